"""A worker that stands still until it is taken for dead (SIGSTOP), and goes on (SIGCONT): nothing more is passed on of calls that
were ended without it, and what it learns of their cost is a correction, whether the provider tells a cost or only tokens."""

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
import pytest

from config.settings import Settings
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.faults.test_kill import MODEL, serving, settle_down
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, sync_models

PATIENCE_S = 60


@contextmanager
def standing_still(process: subprocess.Popen[str]) -> Iterator[None]:
    os.killpg(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGCONT)


def body(*, stream: bool, **told: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": stream, "sim": told}


async def count(office: Office, condition: str) -> int:
    async with office.database.connection() as connection:
        return int(await connection.fetchval(f"SELECT count(*) FROM calls WHERE {condition}"))


async def until_ended(office: Office) -> None:
    """Wait until the sweeper of another process has ended all calls."""
    async with asyncio.timeout(PATIENCE_S):
        while await count(office, "state IN ('open', 'review')"):
            await asyncio.sleep(0.1)


async def stands(office: Office, payer: Payer) -> tuple[int, int, int]:
    """What the wallet paid, our cost and the house's part of it, in nano units."""
    wallet = await office.wallets.get_wallet(payer.wallet_id)
    async with office.database.connection() as connection:
        cost, house = await connection.fetchrow(
            "SELECT sum(cost_nanousd)::bigint, sum(house_nanousd)::bigint FROM calls"
        )
    return 10**10 - wallet.posted_nano, cost, house


async def until_costs(office: Office, sim: SimulatedProvider) -> None:
    """Wait until our cost is the provider's bill: what it was still answering is read to its end first."""
    await sim.books.wait_quiet()
    deadline = time.monotonic() + PATIENCE_S
    async with office.database.connection() as connection:
        while True:
            rows = await connection.fetch(
                "SELECT state, outcome, accuracy, generation_id, cost_nanousd, house_nanousd FROM calls"
            )
            if sum(row["cost_nanousd"] for row in rows) == sim.books.total_nanousd:
                return
            assert time.monotonic() < deadline, (sim.books.total_nanousd, rows)
            await asyncio.sleep(0.1)


def of_kind(kind: str) -> dict[str, str]:
    return {"TUMA_UPSTREAM__KIND": kind, "TUMA_UPSTREAM__ON_CLIENT_GONE": "drain"}


@pytest.mark.parametrize("kind", ["openai", "openrouter"])
async def test_a_stream_ends_with_an_error_and_is_charged_what_it_cost(
    settings: Settings, office: Office, sim: SimulatedProvider, kind: str
) -> None:
    await sync_models(office)
    payer = await make_payer(office)
    if kind == "openai":
        sim.set_behaviour(omit_cost=True)
    async with (
        serving(settings, more=of_kind(kind)) as (process, url),
        serving(settings, more=of_kind(kind)),
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {payer.secret}"}) as session,
    ):
        response = await session.post(
            f"{url}/v1/chat/completions", json=body(stream=True, chunks=400, chunk_delay_ms=20)
        )
        assert (await response.content.readline()).startswith(b"data:")
        await asyncio.sleep(1)  # its id and progress are noted
        with standing_still(process):
            await until_ended(office)
            read = len(await _read_what_is_there(response))
        rest = await response.read()
        events = [json.loads(line[6:]) for line in rest.split(b"\n") if line.startswith(b"data: {")]
        assert read
        assert [event["error"]["code"] for event in events if "error" in event] == ["server_stalled"]
        assert not any(event.get("choices") for event in events), "nothing of the answer after it stood still"
        await until_costs(office, sim)
        await settle_down(office, sim)
    paid, cost, house = await stands(office, payer)
    assert (paid, house) == (cost, 0), "nothing of it is free"
    assert await count(office, "accuracy = 'exact'") == 1
    if kind == "openrouter":
        await check_books(office)


async def _read_what_is_there(response: aiohttp.ClientResponse) -> bytes:
    read = b""
    try:
        async with asyncio.timeout(1):
            while True:
                read += await response.content.readany()
    except TimeoutError:
        return read


@pytest.mark.parametrize("kind", ["openai", "openrouter"])
@pytest.mark.parametrize("stream", [False, True])
async def test_calls_that_were_void_by_then_are_no_free_answers(
    settings: Settings, office: Office, sim: SimulatedProvider, kind: str, stream: bool
) -> None:
    """Nothing had come of them when their worker stood still: they are refused, and the house pays what they cost."""
    await sync_models(office)
    payer = await make_payer(office)
    if kind == "openai":
        sim.set_behaviour(omit_cost=True)
    async with (
        serving(settings, more=of_kind(kind)) as (process, url),
        serving(settings, more=of_kind(kind)),
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {payer.secret}"}) as session,
    ):
        told = body(stream=stream, chunks=20, first_delay_ms=6000, chunk_delay_ms=0)
        calls = [asyncio.get_running_loop().create_task(_status(session, url, told)) for _ in range(5)]
        async with asyncio.timeout(PATIENCE_S):
            while await count(office, "state = 'open'") < 5:
                await asyncio.sleep(0.05)
        with standing_still(process):
            await until_ended(office)
            assert await count(office, "state = 'void'") == 5
            await sim.books.wait_quiet()
        answers = await asyncio.gather(*calls)
        assert set(answers) == {(503, "server_stalled")}
        await until_costs(office, sim)
        await settle_down(office, sim)
    paid, cost, house = await stands(office, payer)
    assert paid == 0, "who was told that nothing is answered pays nothing"
    assert cost == house > 0
    if kind == "openrouter":
        await check_books(office)


async def _status(session: aiohttp.ClientSession, url: str, told: dict[str, Any]) -> tuple[int, str | None]:
    async with session.post(f"{url}/v1/chat/completions", json=told) as response:
        answer = await response.json() if response.content_type == "application/json" else {}
        return response.status, answer.get("error", {}).get("code")


async def test_a_worker_that_stood_still_and_lost_nothing_goes_on(
    settings: Settings, office: Office, sim: SimulatedProvider
) -> None:
    """Nobody swept meanwhile: one question, and the stream goes on to its end."""
    await sync_models(office)
    payer = await make_payer(office)
    more = {"TUMA_SWEEP__PERIOD_S": "600"}
    async with (
        serving(settings, more=more) as (process, url),
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {payer.secret}"}) as session,
    ):
        response = await session.post(
            f"{url}/v1/chat/completions", json=body(stream=True, chunks=300, chunk_delay_ms=20)
        )
        assert (await response.content.readline()).startswith(b"data:")
        with standing_still(process):
            await asyncio.sleep(3)
        rest = await response.read()
        assert rest.rstrip().endswith(b"data: [DONE]")
        assert b'"error"' not in rest
        await settle_down(office, sim)
    paid, cost, house = await stands(office, payer)
    assert (paid, cost, house) == (sim.books.total_nanousd, sim.books.total_nanousd, 0)
