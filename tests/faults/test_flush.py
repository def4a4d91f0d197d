"""Redis loses everything, again and again, under load: nobody is charged wrongly, and admission recovers by itself."""

import asyncio
import random

import aiohttp
from redis.asyncio import Redis

from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.faults.test_kill import one_call
from tests.support.books import check_books
from tests.support.payers import make_payer
from tests.support.running import Running


async def test_flushes_under_load(
    proxy: Running, office: Office, sim: SimulatedProvider, redis_url: str
) -> None:
    dice = random.Random(7)
    payers = [await make_payer(office, amount="50") for _ in range(3)]
    redis = Redis.from_url(redis_url)
    ended = asyncio.Event()

    async def load(session: aiohttp.ClientSession) -> None:
        while not ended.is_set():
            await one_call(session, proxy.base_url, dice.choice(payers), dice)

    async with aiohttp.ClientSession() as session:
        tasks = [asyncio.get_running_loop().create_task(load(session)) for _ in range(20)]
        for _ in range(12):
            await asyncio.sleep(0.25)
            await redis.flushall()
            await redis.script_flush()
        ended.set()
        await asyncio.gather(*tasks)
    await redis.aclose()
    await proxy.quiet()
    await sim.books.wait_quiet()
    by_request = {entry.request_id: entry.cost_nanousd for entry in sim.books.generations.values()}
    async with office.database.connection() as connection:
        rows = await connection.fetch("SELECT id, state, accuracy, charge_nano FROM calls")
    assert len(rows) > 50
    for row in rows:
        assert (row["state"], row["accuracy"]) == ("settled", "exact")
        assert row["charge_nano"] == by_request[str(row["id"])]
    async with asyncio.timeout(15):
        while await office.holds.find_leases(expired=False, limit=10):
            await asyncio.sleep(
                0.1
            )  # what a renewal put back after its call had ended is dropped with its lease
    await check_books(office)
    assert sum(row["charge_nano"] for row in rows) == sim.books.total_nanousd


async def test_a_wallet_never_spends_what_it_lacks_though_redis_forgets(
    proxy: Running, office: Office, sim: SimulatedProvider, redis_url: str
) -> None:
    """I7 under flushes: Postgres admits last."""
    payer = await make_payer(office, amount="0.001")
    redis = Redis.from_url(redis_url)
    body = {
        "model": "openai/gpt-4o-mini",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 200,
        "stream": True,
        "sim": {"chunks": 200, "chunk_delay_ms": 2},
    }

    async def attempt(session: aiohttp.ClientSession) -> int:
        async with session.post(f"{proxy.base_url}/v1/chat/completions", json=body) as response:
            await response.read()
            return response.status

    async def forget() -> None:
        for _ in range(40):
            await asyncio.sleep(0.02)
            await redis.flushall()

    headers = {"Authorization": f"Bearer {payer.secret}"}
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:
        forgetting = asyncio.get_running_loop().create_task(forget())
        statuses = []
        for _ in range(6):
            statuses += await asyncio.gather(*(attempt(session) for _ in range(30)))
        await forgetting
    await redis.aclose()
    await proxy.quiet(30)
    assert set(statuses) <= {200, 402, 503}
    assert statuses.count(200) > 0
    wallet = await office.wallets.get_wallet(payer.wallet_id)
    assert wallet.posted_nano >= 0
    async with asyncio.timeout(15):
        while await office.holds.find_leases(expired=False, limit=10):
            await asyncio.sleep(0.1)
    await check_books(office)
    async with office.database.connection() as connection:
        loss = await connection.fetchval(
            "SELECT coalesce(-sum(amount_nano), 0) FROM journal_entry WHERE account = 'house_loss'"
        )
    assert 1_000_000 - wallet.posted_nano + int(loss) == sim.books.total_nanousd
