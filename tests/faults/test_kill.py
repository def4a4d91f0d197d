"""``kill -9`` of the real ``tuma serve`` under load, then start again: nothing lost, nothing invented."""

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import aiohttp
import pytest

from config.settings import Settings
from scripts.office import Office
from scripts.programs.embedded import EmbeddedPostgres, EmbeddedRedis
from scripts.sim.provider import SimulatedProvider
from tests.support.books import check_books
from tests.support.paths import ROOT
from tests.support.payers import Payer, make_payer, sync_models

MODEL = "openai/gpt-4o-mini"


def environment(
    settings: Settings, *, workers: int = 1, port: int = 0, more: Mapping[str, str] | None = None
) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("TUMA_")},
        "TUMA_PORT": str(port),
        "TUMA_WORKERS": str(workers),
        "TUMA_POSTGRES__DSN": settings.postgres.dsn.get_secret_value(),
        "TUMA_REDIS__URL": settings.redis.url.get_secret_value(),
        "TUMA_UPSTREAM__BASE_URL": settings.upstream.base_url,
        "TUMA_UPSTREAM__API_KEY": "sk-sim",
        "TUMA_UPSTREAM__EXTRA_MEMBERS": '["sim"]',
        "TUMA_AUTH__KEY_PEPPER": settings.auth.key_pepper.get_secret_value(),
        "TUMA_HOLDS__LEASE_S": "2",
        "TUMA_HOLDS__RENEW_S": "0.5",
        "TUMA_SWEEP__PERIOD_S": "0.3",
        "TUMA_SWEEP__WORKER_LEASE_S": "2",
        "TUMA_LOG__LEVEL": "error",
        **(more or {}),
    }


_PATIENCE_S = 100.0  # a deadline that no stop waits for, on however busy a machine


@asynccontextmanager
async def serving(settings: Settings, **options: Any) -> AsyncIterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.cli", "serve"],
        env=environment(settings, **options),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        line = await asyncio.to_thread(process.stdout.readline)
        assert line.startswith("tuma: accepting calls on http://127.0.0.1:"), line
        yield process, line.split()[-1]
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(process.wait, 30)


async def one_call(session: aiohttp.ClientSession, url: str, payer: Payer, dice: random.Random) -> None:
    told = {
        "chunks": dice.randrange(1, 40),
        "chunk_delay_ms": dice.choice((0, 5, 20)),
        "cancellable": dice.random() < 0.5,
    }
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "hi"}],
        "stream": dice.random() < 0.8,
    }
    try:
        async with session.post(
            f"{url}/v1/chat/completions",
            json={**body, "sim": told},
            headers={"Authorization": f"Bearer {payer.secret}"},
        ) as response:
            read = 0
            async for _ in response.content.iter_any():
                read += 1
                if dice.random() < 0.02:
                    return  # hangs up
    except (aiohttp.ClientError, OSError, TimeoutError):
        pass


async def settle_down(office: Office, sim: SimulatedProvider, *, timeout_s: float = 30) -> None:
    """Wait until no call is open, then until Redis has no hold left."""
    await sim.books.wait_quiet()
    async with asyncio.timeout(timeout_s):
        while True:
            async with office.database.connection() as connection:
                live = await connection.fetchval(
                    "SELECT count(*) FROM calls WHERE state IN ('open', 'review')"
                )
            if not live and not await office.holds.find_leases(expired=False, limit=10):
                return
            await asyncio.sleep(0.2)


async def check_exact(office: Office, sim: SimulatedProvider, *, calls: int) -> None:
    """Each call is settled exactly at what the provider's books say, and all books agree."""
    async with office.database.connection() as connection:
        rows = await connection.fetch("SELECT state, accuracy, charge_nano, generation_id FROM calls")
    assert len(rows) == calls
    for row in rows:
        assert (row["state"], row["accuracy"]) == ("settled", "exact")
        assert row["charge_nano"] == sim.books.generations[row["generation_id"]].cost_nanousd > 0
    await check_books(office)


async def house_and_unknown(office: Office, sim: SimulatedProvider) -> int:
    """Return what the provider billed for calls that we know as void: their worker died before any byte came back."""
    async with office.database.connection() as connection:
        rows = await connection.fetch("SELECT id FROM calls WHERE state = 'void'")
    void = {str(row["id"]) for row in rows}
    async with office.database.connection() as connection:
        known = {str(row["id"]) for row in await connection.fetch("SELECT id FROM calls")}
    return sum(
        entry.cost_nanousd
        for entry in sim.books.generations.values()
        if entry.request_id in void or entry.request_id not in known
    )


async def test_kill_mid_stream_then_start_again(
    settings: Settings, office: Office, sim: SimulatedProvider
) -> None:
    await sync_models(office)
    payer = await make_payer(office)
    headers = {"Authorization": f"Bearer {payer.secret}"}
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "sim": {"chunks": 200, "chunk_delay_ms": 20},
    }
    async with serving(settings) as (process, url), aiohttp.ClientSession(headers=headers) as session:
        responses = [await session.post(f"{url}/v1/chat/completions", json=body) for _ in range(5)]
        for response in responses:
            assert (await response.content.readline()).startswith(b"data:")
        process.kill()
        await asyncio.to_thread(process.wait)
        for response in responses:
            response.close()
    async with office.database.connection() as connection:
        assert await connection.fetchval("SELECT count(*) FROM calls WHERE state = 'open'") == 5
    async with serving(settings):
        await settle_down(office, sim)
    await check_exact(office, sim, calls=5)


async def test_redis_and_the_server_are_lost_together(
    settings: Settings, office: Office, sim: SimulatedProvider
) -> None:
    """A double fault: the ids of answers that last are in Postgres, too."""
    await sync_models(office)
    payer = await make_payer(office)
    headers = {"Authorization": f"Bearer {payer.secret}"}
    told = {"chunks": 2000, "chunk_delay_ms": 20}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True, "sim": told}
    async with serving(settings) as (process, url), aiohttp.ClientSession(headers=headers) as session:
        responses = [await session.post(f"{url}/v1/chat/completions", json=body) for _ in range(5)]
        async with office.database.connection() as connection, asyncio.timeout(10):
            while await connection.fetchval("SELECT count(*) FROM calls WHERE generation_id IS NOT NULL") < 5:
                await asyncio.sleep(0.05)
        process.kill()
        await office.pipe.run("FLUSHALL")
        await asyncio.to_thread(process.wait)
        await office.pipe.run("FLUSHALL")
        for response in responses:
            response.close()
    async with serving(settings):
        await settle_down(office, sim)
    await check_exact(office, sim, calls=5)


async def test_kill_while_redis_is_away(
    settings: Settings, office: Office, sim: SimulatedProvider, redis_server: EmbeddedRedis
) -> None:
    """What cannot be noted in Redis is noted in Postgres before a byte goes on."""
    await sync_models(office)
    payer = await make_payer(office)
    headers = {"Authorization": f"Bearer {payer.secret}"}
    told = {"chunks": 200, "chunk_delay_ms": 20, "first_delay_ms": 1000}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True, "sim": told}
    async with serving(settings) as (process, url), aiohttp.ClientSession(headers=headers) as session:
        asked = [
            asyncio.ensure_future(session.post(f"{url}/v1/chat/completions", json=body)) for _ in range(5)
        ]
        async with office.database.connection() as connection, asyncio.timeout(10):
            while await connection.fetchval("SELECT count(*) FROM calls WHERE state = 'open'") < 5:
                await asyncio.sleep(0.02)
        redis_server.kill()
        try:
            for response in await asyncio.gather(*asked):
                assert (await response.content.readline()).startswith(b"data:")
            process.kill()
            await asyncio.to_thread(process.wait)
        finally:
            redis_server.start()
        for task in asked:
            task.result().close()
    await office.pipe.run("FLUSHALL")
    async with serving(settings):
        await settle_down(office, sim)
    await check_exact(office, sim, calls=5)


async def test_kill_while_settlements_wait_for_postgres(
    settings: Settings, office: Office, sim: SimulatedProvider, postgres: EmbeddedPostgres
) -> None:
    """What a settlement says is noted in Redis while it waits: the provider need not even know the answer any more."""
    await sync_models(office)
    payer = await make_payer(office)
    headers = {"Authorization": f"Bearer {payer.secret}"}
    told = {"chunks": 40, "chunk_delay_ms": 20, "generation_missing": True}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True, "sim": told}
    async with serving(settings) as (process, url), aiohttp.ClientSession(headers=headers) as session:
        responses = [await session.post(f"{url}/v1/chat/completions", json=body) for _ in range(5)]
        for response in responses:
            assert (await response.content.readline()).startswith(b"data:")
        postgres.kill()
        try:
            for response in responses:
                assert (await response.read()).endswith(b"data: [DONE]\n\n"), (
                    "answers under way go on to their end"
                )
            refused = await session.post(f"{url}/v1/chat/completions", json=body)
            assert (refused.status, refused.headers["Retry-After"]) == (503, "5")
            async with asyncio.timeout(10):
                for response in responses:
                    call_id = UUID(response.headers["x-request-id"])
                    while "settlement" not in await office.holds.find_notes(payer.user_id, call_id):
                        await asyncio.sleep(0.05)
            process.kill()
            await asyncio.to_thread(process.wait)
        finally:
            postgres.start()
    async with serving(settings):
        await settle_down(office, sim)
    await check_exact(office, sim, calls=5)


@pytest.mark.timeout(120)
async def test_random_kills_under_load(settings: Settings, office: Office, sim: SimulatedProvider) -> None:
    """Workers die at random moments; the books equal the provider's but for answers that nobody ever saw begin."""
    seed = int(os.environ.get("FAULT_SEED", "0")) or random.SystemRandom().randrange(1, 10**9)
    print(f"FAULT_SEED={seed}")
    dice = random.Random(seed)
    await sync_models(office)
    payers = [await make_payer(office, amount="100") for _ in range(3)]
    port = 0
    for _ in range(4):
        async with serving(settings, port=port) as (process, url), aiohttp.ClientSession() as session:
            port = int(url.rpartition(":")[2])

            async def load(url: str = url, session: aiohttp.ClientSession = session) -> None:
                while True:
                    await one_call(session, url, dice.choice(payers), dice)
                    await asyncio.sleep(0.002)

            tasks = [asyncio.get_running_loop().create_task(load()) for _ in range(20)]
            await asyncio.sleep(0.5 + dice.random())
            process.kill()
            await asyncio.to_thread(process.wait)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    async with serving(settings, port=port):
        await settle_down(office, sim)
    async with office.database.connection() as connection:
        ours = int(
            await connection.fetchval(
                "SELECT coalesce(-sum(amount_nano), 0) FROM journal_entry WHERE account = 'provider_cost'"
            )
        )
        count = await connection.fetchval("SELECT count(*) FROM calls WHERE state = 'settled'")
        inexact = await connection.fetchval("SELECT count(*) FROM calls WHERE accuracy = 'estimated'")
    unseen = await house_and_unknown(office, sim)
    assert count > 50
    assert inexact == 0
    assert sim.books.total_nanousd - ours == unseen
    by_id = {entry.id: entry.cost_nanousd for entry in sim.books.generations.values()}
    async with office.database.connection() as connection:
        rows = await connection.fetch("SELECT generation_id, charge_nano FROM calls WHERE state = 'settled'")
    assert all(row["charge_nano"] == by_id[row["generation_id"]] for row in rows), (
        "no wallet pays more than its calls cost"
    )


async def test_workers_share_a_socket_and_are_replaced(
    settings: Settings, office: Office, sim: SimulatedProvider
) -> None:
    import psutil

    await sync_models(office)
    payer = await make_payer(office)
    async with serving(settings, workers=2) as (process, url), aiohttp.ClientSession() as session:
        children = psutil.Process(process.pid).children()
        assert len(children) == 2
        dice = random.Random(1)
        await asyncio.gather(*(one_call(session, url, payer, dice) for _ in range(40)))
        os.kill(children[0].pid, signal.SIGKILL)
        async with asyncio.timeout(15):
            while children[0].is_running() or len(psutil.Process(process.pid).children()) < 2:
                await asyncio.sleep(0.1)
        await asyncio.gather(*(one_call(session, url, payer, dice) for _ in range(40)))
        await settle_down(office, sim)
    await check_books(office)


@pytest.mark.parametrize("pause_s", [0.0, 0.2, 0.45])
async def test_a_stop_is_heard_while_a_worker_is_replaced(
    settings: Settings, office: Office, pause_s: float
) -> None:
    import psutil

    await sync_models(office)
    async with serving(settings, workers=2) as (process, _):
        os.kill(psutil.Process(process.pid).children()[0].pid, signal.SIGKILL)
        await asyncio.sleep(pause_s)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 20) == 0


async def test_a_stop_under_load_ends_soon_and_cuts_nobody_off(
    settings: Settings, office: Office, sim: SimulatedProvider
) -> None:
    """Clients that keep their connections alive are told to close them: the server does not wait for its deadline."""
    await sync_models(office)
    payer = await make_payer(office)
    told = {"chunks": 10, "chunk_delay_ms": 20}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True, "sim": told}
    whole: list[bool] = []
    ended = asyncio.Event()

    async with serving(settings, more={"TUMA_SHUTDOWN_S": str(_PATIENCE_S)}) as (process, url):

        async def load() -> None:
            headers = {"Authorization": f"Bearer {payer.secret}"}
            async with aiohttp.ClientSession(headers=headers) as session:
                while not ended.is_set():
                    try:
                        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
                            answer = await response.read()
                            if response.status == 200:  # a busy machine's Redis may be too late for some
                                whole.append(answer.endswith(b"data: [DONE]\n\n"))
                    except aiohttp.ClientConnectionError:  # an answer that is cut off is a ClientPayloadError
                        await asyncio.sleep(0.05)

        clients = [asyncio.get_running_loop().create_task(load()) for _ in range(10)]
        async with asyncio.timeout(60):
            while len(whole) <= 20:
                await asyncio.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, _PATIENCE_S / 2) == 0
        ended.set()
        await asyncio.gather(*clients)
    assert all(whole)
    await settle_down(office, sim)
    await check_books(office)
