"""Answers that are too large to be read: the caller is told, and the call ends all the same."""

from typing import Any

import aiohttp
import pytest

from config.settings import Settings
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.support.payers import make_payer, sync_models
from tests.support.running import run_proxy

MODEL = "openai/gpt-4o"


@pytest.mark.parametrize("kind", ["openrouter", "openai"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_ends_whose_answer_is_too_large(
    settings: Settings, office: Office, sim: SimulatedProvider, kind: str, stream: bool
) -> None:
    await sync_models(office)
    payer = await make_payer(office)
    upstream = settings.upstream.model_copy(
        update={"kind": kind, "answer_bytes": 10_000, "event_bytes": 10_000}
    )
    told: dict[str, Any] = {"text": "much " * 200_000}
    if stream:
        told = {"text": f"small {'large' * 4_000} and more after it", "chunk_delay_ms": 50}
    ask = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "x"}],
        "stream": stream,
        "sim": told,
    }
    async with (
        run_proxy(settings.model_copy(update={"upstream": upstream})) as proxy,
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {payer.secret}"}) as session,
    ):
        async with session.post(f"{proxy.base_url}/v1/chat/completions", json=ask) as response:
            body = await response.text()
            assert '"upstream_error"' in body
        await proxy.quiet()
        wallet = await office.wallets.get_wallet(payer.wallet_id)
    assert wallet.held_nano == 0
    assert (wallet.posted_nano < 10**10) == stream, "what the caller was given is paid, and nothing else"
    async with office.database.connection() as connection:
        state = await connection.fetchval("SELECT state FROM calls")
    assert state == ("settled" if stream else "void")
