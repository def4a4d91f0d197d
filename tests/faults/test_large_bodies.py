"""Eight bodies of 16 MiB from a key without money, at two workers before a provider without records: they cost nobody else anything."""

import asyncio
import json
from typing import Any

import aiohttp

from config.settings import Settings
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.faults.test_kill import MODEL, serving, settle_down
from tests.faults.test_standstill import of_kind, stands
from tests.support.payers import Payer, make_payer, sync_models

LARGE = 16 * 1024 * 1024
ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


def auth(payer: Payer) -> dict[str, str]:
    return {"Authorization": f"Bearer {payer.secret}", "Content-Type": "application/json"}


def large_body() -> bytes:
    """What cost most to read: small things in great number, that all are to be parsed and counted."""
    start, end = json.dumps(ASK)[:-1].encode() + b',"tools":[{}', b"]}"
    return start + b",[]" * ((LARGE - len(start) - len(end)) // 3) + end


async def attack(url: str, payer: Payer, body: bytes) -> int | None:
    """Return the refusal's status; None where the connection was closed while the body was still sent."""
    try:
        async with (
            aiohttp.ClientSession(headers=auth(payer)) as session,
            session.post(f"{url}/v1/chat/completions", data=body) as response,
        ):
            return response.status
    except (aiohttp.ClientError, OSError):
        return None


async def ask(url: str, payer: Payer, *, stream: bool) -> tuple[int, bool]:
    told = {**ASK, "stream": stream, "sim": {"chunks": 20, "chunk_delay_ms": 20}}
    async with (
        aiohttp.ClientSession(headers=auth(payer)) as session,
        session.post(f"{url}/v1/chat/completions", json=told) as response,
    ):
        answer = await response.read()
        return response.status, b'"error"' not in answer


async def test_large_bodies_without_money_make_no_call_free(
    settings: Settings, office: Office, sim: SimulatedProvider
) -> None:
    await sync_models(office)
    sim.set_behaviour(omit_cost=True)
    other, poor = await make_payer(office), await make_payer(office, amount="0")
    body = large_body()
    async with serving(settings, workers=2, more=of_kind("openai")) as (_, url):
        attacks = [asyncio.create_task(attack(url, poor, body)) for _ in range(8)]
        answers = await asyncio.gather(*(ask(url, other, stream=bool(number % 2)) for number in range(5)))
        refused = await asyncio.gather(*attacks)
        await settle_down(office, sim)
    assert answers == [(200, True)] * 5
    assert set(refused) <= {402, 429, None}, refused
    assert 402 in refused
    paid, cost, house = await stands(office, other)
    assert (paid, cost, house) == (sim.books.total_nanousd, sim.books.total_nanousd, 0)
    assert (await office.wallets.get_wallet(poor.wallet_id)).posted_nano == 0
