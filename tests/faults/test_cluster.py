"""Redis Cluster under load: calls, a slot that moves, a primary that dies, one that forgets; then the books are read."""

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from billing.errors import BrokenInvariantError, RedisUnavailableError
from billing.holds.hold import shard_of
from billing.redis.cluster import RedisCluster
from scripts.cli.doctor import _ask_redis
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.faults.test_kill import MODEL, settle_down
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer
from tests.support.redis_cluster import ClusterNode, LocalCluster
from tests.support.running import Running
from tests.support.servers import DEBIAN_REDIS

NANO = 10**9
CLIENTS = 24
LONG_ROUNDS = 6


@pytest.fixture(scope="module")
def cluster(folder: Path, request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    program = DEBIAN_REDIS if request.config.getoption("--servers") == "debian" else None
    with LocalCluster(folder / "cluster", program=program) as made:
        yield made


@pytest.fixture
async def redis_url(cluster: LocalCluster) -> str:
    cluster.flush()
    return cluster.url


@pytest.fixture
def link(office: Office) -> RedisCluster:
    assert isinstance(office.pipe, RedisCluster)
    return office.pipe


def tag_of(payer: Payer) -> str:
    return f"{{s{shard_of(payer.user_id):02d}}}"


async def call(
    session: aiohttp.ClientSession, url: str, payer: Payer, *, stream: bool, chunks: int = 8
) -> int:
    """Make one call to its end and return its status."""
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 100,
        "stream": stream,
        "sim": {"chunks": chunks, "chunk_delay_ms": 3},
    }
    headers = {"Authorization": f"Bearer {payer.secret}"}
    async with session.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
        await response.read()
        return response.status


class Load:
    """Clients that call without a pause; ``statuses`` by payer."""

    def __init__(self, url: str, payers: list[Payer]) -> None:
        self._url = url
        self._payers = payers
        self.ended = asyncio.Event()
        self.statuses: dict[Payer, Counter[int]] = {payer: Counter() for payer in payers}

    async def run(self, session: aiohttp.ClientSession, dice: random.Random) -> None:
        while not self.ended.is_set():
            payer = dice.choice(self._payers)
            status = await call(
                session, self._url, payer, stream=dice.random() < 0.7, chunks=dice.randrange(1, 30)
            )
            self.statuses[payer][status] += 1
            if status != 200:
                await asyncio.sleep(0.02)

    async def see(self, payer: Payer, status: int = 200) -> None:
        """Wait for one more answer of a status."""
        seen = self.statuses[payer][status]
        async with asyncio.timeout(30):
            while self.statuses[payer][status] == seen:
                await asyncio.sleep(0.02)


@asynccontextmanager
async def loaded(proxy: Running, office: Office, payers: list[Payer]) -> AsyncIterator[Load]:
    """Load while the block lasts; at every moment Postgres has admitted no more than the wallets have (I7)."""
    load = Load(proxy.base_url, payers)
    lowest: list[int] = []

    async def watch() -> None:
        while not load.ended.is_set():
            async with office.database.connection() as connection:
                lowest.append(
                    await connection.fetchval(
                        "SELECT min(posted_nano + overdraft_nano - held_nano) FROM wallets"
                    )
                )
            await asyncio.sleep(0.02)

    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
        asyncio.TaskGroup() as group,
    ):
        group.create_task(watch())
        for number in range(CLIENTS):
            group.create_task(load.run(session, random.Random(number)))
        try:
            for payer in payers:
                await load.see(payer)
            yield load
        finally:
            load.ended.set()
    assert lowest
    assert min(lowest) >= 0
    assert {status for counts in load.statuses.values() for status in counts} <= {200, 402, 503}


async def read_the_books(proxy: Running, office: Office, sim: SimulatedProvider, payers: list[Payer]) -> None:
    """When quiet, I1 to I8 hold, and wallets and house together paid what the provider billed, nano for nano."""
    await proxy.quiet(30)
    await settle_down(office, sim)
    await check_books(office)
    billed = {entry.request_id: entry.cost_nanousd for entry in sim.books.generations.values()}
    async with office.database.connection() as connection:
        rows = await connection.fetch("SELECT id, state, charge_nano FROM calls")
        spent = await connection.fetchval("SELECT sum(charge_nano) FROM calls")
        loss = await connection.fetchval(
            "SELECT coalesce(-sum(amount_nano), 0) FROM journal_entry WHERE account = 'house_loss'"
        )
    assert len(rows) > CLIENTS
    for row in rows:
        assert row["state"] in ("settled", "void")
        assert row["charge_nano"] in (0, billed[str(row["id"])])
    assert int(spent) + int(loss) == sim.books.total_nanousd
    for payer in payers:
        assert (await office.wallets.get_wallet(payer.wallet_id)).posted_nano >= 0


async def test_calls_and_what_doctor_says(
    proxy: Running, office: Office, sim: SimulatedProvider, cluster: LocalCluster
) -> None:
    payers = [await make_payer(office, requests_per_min=100, calls_in_flight=10) for _ in range(12)]
    assert len({cluster.owner_of(tag_of(payer)).port for payer in payers}) > 1
    async with aiohttp.ClientSession() as session:
        for stream in (False, True):
            answers = await asyncio.gather(
                *(call(session, proxy.base_url, payer, stream=stream) for payer in payers)
            )
            assert answers == [200] * len(payers)
        async with session.get(f"{proxy.base_url}/readyz") as response:
            assert (response.status, (await response.json())["checks"]["redis"]) == (200, "ok")
    await settle_down(office, sim)
    await check_books(office)
    for payer in payers:
        wallet = await office.wallets.get_wallet(payer.wallet_id)
        assert (
            await office.holds.find_available(payer.user_id, payer.wallet_id)
            == wallet.posted_nano
            < 10 * NANO
        )
    await asyncio.to_thread(cluster.wait_whole)
    ok, said = await _ask_redis(office)
    assert ok, said
    assert "a cluster of 3 primaries, 3 of them with a replica" in said


async def test_a_script_has_one_slot(link: RedisCluster, office: Office) -> None:
    with pytest.raises(BrokenInvariantError, match="look has keys of several slots"):
        await link.call(office.holds._look, ["tuma:{s01}:u:x", "tuma:{s02}:k:x", "tuma:{s02}:p:x"], ())


async def test_a_slot_moves_under_load(
    proxy: Running, office: Office, sim: SimulatedProvider, cluster: LocalCluster, link: RedisCluster
) -> None:
    payers = [await make_payer(office) for _ in range(4)]
    moving, key = payers[0], tag_of(payers[0])
    async with loaded(proxy, office, payers) as load:
        source = cluster.owner_of(key)
        target = next(node for node in cluster.primaries() if node is not source)
        await asyncio.to_thread(cluster.begin_move, key, target)
        # A key that is not at its old place is asked for at the new one, where alone it then is.
        assert await link.run("SET", f"tuma:look:{key}", "1", "NX", "PX", 60_000)
        assert await link.run("GET", f"tuma:look:{key}") == b"1"
        assert not await link.run("SET", f"tuma:look:{key}", "1", "NX", "PX", 60_000)
        fail = proxy.services.failures._script
        assert await link.call(fail, [f"tuma:{key}:a:somebody"], (1,)) == 0
        assert await link.call(fail, [f"tuma:{key}:a:somebody"], (1,)) > 0
        # Keys of which some are here and some there: nobody runs a script on them, and it is refused within the bound.
        async with asyncio.timeout(10):
            with pytest.raises(RedisUnavailableError, match="TryAgain"):
                await link.call(
                    office.holds._look, [f"tuma:{key}:u:x", f"tuma:{key}:a:somebody", f"tuma:{key}:p:x"], ()
                )
        await load.see(moving, 503)
        await asyncio.to_thread(cluster.finish_move, key, source, target)
        assert cluster.owner_of(key) is target
        for payer in payers:
            await load.see(payer)
    await read_the_books(proxy, office, sim, payers)


async def test_a_primary_forgets_under_load(
    proxy: Running, office: Office, sim: SimulatedProvider, cluster: LocalCluster
) -> None:
    payers = [await make_payer(office) for _ in range(4)] + [await make_payer(office, amount="0.004")]
    forgetful: ClusterNode = cluster.owner_of(tag_of(payers[0]))
    async with loaded(proxy, office, payers) as load:
        for _ in range(8):
            await asyncio.sleep(0.1)
            await asyncio.to_thread(forgetful.ask, "FLUSHALL")
            await asyncio.to_thread(forgetful.ask, "SCRIPT", "FLUSH")
        for payer in payers[:4]:
            await load.see(payer)
    await read_the_books(proxy, office, sim, payers)


async def hears_of_it(office: Office) -> None:
    """The office asks seldom: that a primary was lost it learns from a question that fails."""
    async with asyncio.timeout(30):
        while True:
            try:
                await office.holds.find_leases(expired=False, limit=1)
            except RedisUnavailableError:
                await asyncio.sleep(0.1)
            else:
                return


async def calls_whose_writes_are_lost(
    proxy: Running, office: Office, lost: ClusterNode, heir: ClusterNode, payers: list[Payer]
) -> None:
    """Let each make a call that the replica hears of, and one, to its end, that it does not: nobody will mend that mirror."""
    async with aiohttp.ClientSession() as session:
        for payer in payers:
            assert await call(session, proxy.base_url, payer, stream=False) == 200
        await asyncio.to_thread(lost.ask, "WAIT", 1, 5000)
        os.kill(heir.pid, signal.SIGSTOP)
        await asyncio.to_thread(lost.ask, "CLIENT", "KILL", "TYPE", "replica")
        before = [await office.holds.find_available(payer.user_id, payer.wallet_id) for payer in payers]
        answers = await asyncio.gather(
            *(call(session, proxy.base_url, payer, stream=False) for payer in payers)
        )
        assert answers == [200] * len(payers)
    async with asyncio.timeout(10):
        for payer, amount in zip(payers, before, strict=True):
            while amount == await office.holds.find_available(payer.user_id, payer.wallet_id):
                await asyncio.sleep(0.005)


async def test_a_primary_dies_under_load(
    proxy: Running,
    office: Office,
    sim: SimulatedProvider,
    cluster: LocalCluster,
    request: pytest.FixtureRequest,
) -> None:
    rounds = LONG_ROUNDS if request.config.getoption("--long") else 1
    rich = [await make_payer(office, amount="50") for _ in range(6)]
    poor = [await make_payer(office, amount="0.004") for _ in range(4)]
    seldom = [await make_payer(office) for _ in range(9)]
    dice = random.Random(3)
    async with loaded(proxy, office, [*rich, *poor]) as load:
        for left in reversed(range(rounds)):
            lost = cluster.owner_of(tag_of(dice.choice(rich)))
            hurt = [payer for payer in rich if cluster.owner_of(tag_of(payer)) is lost]
            heir = cluster.replica_of(lost)
            await hears_of_it(office)
            await calls_whose_writes_are_lost(proxy, office, lost, heir, seldom)
            lost.kill()
            os.kill(heir.pid, signal.SIGCONT)
            await load.see(hurt[0], 503)
            await asyncio.to_thread(cluster.wait_promoted, lost)
            for payer in rich:
                await load.see(payer)
            if left:
                lost.start()
                await asyncio.to_thread(cluster.wait_whole)
    await hears_of_it(office)
    await read_the_books(proxy, office, sim, [*rich, *poor, *seldom])
