"""The audit log as an operator reads it: lists by whose and when, and the commands."""

import asyncio
import json
from typing import Any

import pytest
from click.testing import CliRunner

from billing.actor import acting
from billing.errors import InputError
from scripts.cli.main import main
from scripts.office import Office, operator_name
from tests.billing.monitoring.audit_log import Log
from tests.support.payers import make_payer


async def test_lists_by_wallet_user_actor_and_time(log: Log, office: Office) -> None:
    first, second = await make_payer(office), await make_payer(office)
    with acting("operator:ann"):
        await office.wallets.credit(first.wallet_id, 5, reason="r")
    rows = await log.audit.list_rows(wallet_id=first.wallet_id)
    assert [row["action"] for row in rows] == ["created", "grant", "created", "grant"]
    assert {row["user_id"] for row in await log.audit.list_rows(user_id=second.user_id)} == {
        str(second.user_id)
    }
    assert [row["id"] for row in await log.audit.list_rows(actor="operator:ann")] == [rows[-1]["id"]]
    assert await log.audit.list_rows(limit=1) == rows[-1:]
    with pytest.raises(InputError):
        await log.audit.list_rows(limit=0)


async def test_the_command(log: Log, office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUMA_POSTGRES__DSN", office.settings.postgres.dsn.get_secret_value())
    monkeypatch.setenv("TUMA_REDIS__URL", office.settings.redis.url.get_secret_value())
    monkeypatch.setenv("TUMA_UPSTREAM__API_KEY", "sk-sim")

    async def run(*words: str) -> tuple[int, Any]:
        done = await asyncio.to_thread(CliRunner().invoke, main, [*words, "--json"])
        return done.exit_code, json.loads(done.stdout)

    assert (await run("users", "create", "--email", "cli@example.com"))[0] == 0
    async with office.database.connection() as connection:
        assert await connection.fetchval("SELECT ids FROM audit_blocks") == [1], "sealed at once"
    code, listed = await run("audit", "list", "--user", "cli@example.com", "--since", "2020-01-01")
    assert code == 0
    assert [row["actor"] for row in listed["rows"]] == [f"operator:{operator_name()}"]
    assert "created users" in listed["report"]
    code, found = await run("audit", "verify")
    assert (code, found["ok"], found["rows"], found["blocks"], found["unsealed"]) == (0, True, 1, 1, 0)
    assert await run("audit", "seal") == (0, {"blocks": 0})
    assert (await run("audit", "verify", "--expect", found["head"]))[0] == 0
    async with log.tampering() as connection:
        await connection.execute("UPDATE audit_log SET actor = 'system'")
    code, found = await run("audit", "verify")
    assert (code, found["ok"]) == (1, False)
    assert found["problems"] == [{"block": 1, "row": 1, "problem": "it differs from its line in actor"}]
