"""Schemathesis reads the document that Tuma serves, and tries what people may do with it on the real server."""

import asyncio
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest

from billing.money import NANO
from config.settings import Settings
from proxy.endpoints import ENDPOINTS
from proxy.http.errors import ErrorJson
from proxy.openapi.answer_schemas import write_answers
from proxy.operator import endpoints as operator
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.faults.test_kill import serving, settle_down
from tests.faults.test_limits import SECRET
from tests.support.books import check_books
from tests.support.payers import sync_models

ADMIN = "the operator's token, long enough"
_EXAMPLES = 12
_EXCLUDED = (
    # What is well-formed may still be refused: a moment in the past, a key of somebody else, an empty wallet.
    "positive_data_acceptance",
)


def forbid_what_is_not_documented(document: dict[str, Any]) -> None:
    """Clients shall bear with members that come later; here one that is not documented is a leak."""
    open_ended = {
        "ChatCompletion",
        "ChatCompletionWithCost",
        "Completion",
        "Embeddings",
        "Response",
        "WalletAnswer",  # one of others
        "ErrorObject",  # the provider's own pass through
        "Document",
    }
    shapes = {item.answer for item in (*ENDPOINTS, *operator.ADMIN) if item.answer is not None}
    _, answers = write_answers((ErrorJson, *shapes))
    for name in answers.keys() - open_ended:
        document["components"]["schemas"][name]["additionalProperties"] = False


def command_of(
    document: Path, url: str, paths: str, bearer: str, seed: int, minutes: float | None
) -> list[str]:
    """What runs Schemathesis over the document, on what is under these paths."""
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        str(document),
        f"--url={url}",
        f"--include-path-regex=^/{'(v1|api)' if paths == 'v1' else paths}/",
        "--exclude-path-regex=/(events|ws)$",  # they have no end: tests/proxy/live/test_feed.py
        "--checks=all",
        f"--exclude-checks={','.join(_EXCLUDED)}",
        f"--header=Authorization: Bearer {bearer}",
        f"--max-examples={_EXAMPLES if minutes is None else 1000}",
        "--request-timeout=20",
        "--continue-on-failure",
        "--generation-database=none",
        f"--seed={seed}",
        "--no-color",
    ]
    if minutes is not None:
        command.append(f"--max-time={int(minutes * 60)}")
    return command


@pytest.mark.parametrize("paths", ["v1", "admin"])
async def test_schemathesis(
    settings: Settings,
    office: Office,
    sim: SimulatedProvider,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    paths: str,
) -> None:
    minutes = request.config.getoption("--minutes")
    await sync_models(office)
    token = jwt.encode({"sub": "ada", "exp": time.time() + 7200}, SECRET, algorithm="HS256")
    more = {
        "TUMA_AUTH__JWT_SECRET": SECRET,
        "TUMA_AUTH__DEFAULT_CURRENCY": "USD",
        "TUMA_ADMIN__TOKEN": ADMIN,
        "TUMA_AUTH__KEYS_MAX": "100000",
        "TUMA_LIMITS__AUTH_FAILURES_PER_MIN": "0",
        "TUMA_LIMITS__BODY_TIMEOUT_S": "2",
    }
    async with serving(settings, more=more) as (_, url):
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session:
            async with session.get(f"{url}/v1/wallet") as response:
                assert response.status == 200
            async with session.get(f"{url}/openapi.json") as response:
                assert response.headers["x-request-id"]
                document = await response.json()
        assert document["openapi"] == "3.1.0"
        forbid_what_is_not_documented(document)
        path = tmp_path / "openapi.json"
        path.write_text(json.dumps(document))
        (wallet,) = await office.wallets.find_wallets()
        await office.wallets.credit(wallet.id, 1_000 * NANO, reason="test")
        await office.cool(wallet.id)
        seed = random.randrange(2**32)
        bearer = token if paths == "v1" else ADMIN
        command = command_of(path, url, paths, bearer, seed, minutes)
        done = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert done.returncode == 0, f"seed {seed}\n{done.stdout[-20_000:]}\n{done.stderr[-2_000:]}"
        print(done.stdout[-1_500:])
        await settle_down(office, sim)
    async with office.database.connection() as connection:
        made = await connection.fetchrow(
            "SELECT (SELECT count(*) FROM api_keys) AS keys, (SELECT count(*) FROM users) AS users,"
            " (SELECT count(*) FROM calls WHERE state = 'settled') AS calls"
        )
    if paths == "v1":
        assert made["keys"] > 3
        assert made["calls"] >= 2
    else:
        assert made["users"] > 1
    await check_books(office)
