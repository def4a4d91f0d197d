"""Behind PgBouncer in transaction mode, as docs/ops/pgbouncer.ini has it: everything works that leans on a session."""

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from pydantic import SecretStr

from billing.books.reconcile import Reconciler
from billing.calls.sweeper import Sweeper
from billing.errors import InputError
from billing.identity.key import KeyRules
from billing.identity.keys import Keys
from billing.monitoring.audit import Audit
from billing.postgres.database import Database
from billing.postgres.notifications import ChangeFeed
from billing.postgres.pooler import require_sessions
from billing.postgres.roles import LOGINS, Role
from config.settings import Settings, SettingsError
from scripts.cli.doctor import _ask_sessions
from scripts.office import Office, open_office
from scripts.programs.embedded import EmbeddedPostgres
from scripts.sim.provider import SimulatedProvider
from tests.faults.test_kill import MODEL, one_call, serving, settle_down
from tests.support.books import check_books
from tests.support.feeds import watching
from tests.support.payers import make_payer, sync_models
from tests.support.pgbouncer import PROGRAM, PgBouncer, pooled, pooling
from tests.support.running import run_proxy
from tests.support.servers import OwnPostgres
from tests.support.settings import make_settings
from tests.support.shop import open_shop

POOL = 3  # connections to Postgres per role: fewer than two workers would take
CLIENTS = 24


@pytest.fixture
async def pooler(
    dsn: str, postgres: EmbeddedPostgres | OwnPostgres, tmp_path: Path
) -> AsyncIterator[PgBouncer]:
    demand_pooler(postgres)
    async with pooling(postgres, dsn, tmp_path, pool_size=POOL) as server:
        yield server


def demand_pooler(postgres: EmbeddedPostgres | OwnPostgres) -> None:
    if not PROGRAM.exists():
        pytest.skip(f"{PROGRAM} is not there: Debian's package pgbouncer has it, which CI installs")
    if not isinstance(postgres, EmbeddedPostgres):
        pytest.skip("needs the server's own superuser")


@pytest.fixture
def behind(settings: Settings, pooler: PgBouncer) -> Settings:
    return pooled(settings, pooler)


@pytest.fixture
async def inside(behind: Settings) -> AsyncIterator[Office]:
    """Commands go through the pooler, too."""
    async with open_office(behind) as opened:
        yield opened


def told(settings: Settings) -> dict[str, str]:
    return {
        "TUMA_POSTGRES__POOLER": "transaction",
        "TUMA_POSTGRES__DIRECT_DSN": settings.postgres.direct_dsn.get_secret_value(),
    }


async def test_calls_kills_and_a_restart_of_the_pooler(
    behind: Settings, inside: Office, sim: SimulatedProvider, pooler: PgBouncer
) -> None:
    dice = random.Random(18)
    await sync_models(inside)
    payers = [await make_payer(inside, amount="100") for _ in range(3)]
    payer = payers[0]
    keys = Keys(inside.database, inside.settings.auth, inside.settings.limits)
    made = await keys.create(payer.wallet_id, KeyRules(name="to be revoked"))
    async with AsyncExitStack() as stack:
        master, url = await stack.enter_async_context(serving(behind, workers=2, more=told(behind)))
        session = await stack.enter_async_context(aiohttp.ClientSession())

        async def ask(secret: str, path: str = "/v1/wallet") -> tuple[int, Any]:
            async with session.get(url + path, headers={"Authorization": f"Bearer {secret}"}) as response:
                return response.status, await response.json()

        feed = await stack.enter_async_context(watching(url, payer.secret))
        first = await feed.next()
        assert first is not None
        await one_call(session, url, payer, dice)
        event = await feed.next()
        assert event is not None, "the feed follows through LISTEN"

        assert (await ask(made.secret))[0] == 200
        await keys.revoke(made.id)
        async with asyncio.timeout(10):
            while (await ask(made.secret))[0] == 200:
                await asyncio.sleep(0.02)

        ended = asyncio.Event()

        async def load() -> None:
            while not ended.is_set():
                await one_call(session, url, dice.choice(payers), dice)

        clients = [asyncio.get_running_loop().create_task(load()) for _ in range(CLIENTS)]
        await wait_for_calls(inside, 60)
        streams = await asyncio.gather(*(begin_stream(session, url, payer.secret) for _ in range(4)))
        pooler.kill()
        await asyncio.sleep(0.5)
        pooler.restart()
        for stream in streams:
            assert (await stream.read()).endswith(b"data: [DONE]\n\n"), "answers under way go on to their end"
        more = await wait_for_calls(inside, 0)
        await wait_for_calls(inside, more + 60)
        worker = dice.choice(psutil.Process(master.pid).children())
        os.kill(worker.pid, signal.SIGKILL)
        await wait_for_calls(inside, more + 120)
        ended.set()
        await asyncio.gather(*clients)
        await settle_down(inside, sim)
        # What the provider billed for calls whose worker died before a byte came back is the house's loss.
        await Reconciler(inside.database, inside.upstream, inside.settings.reconcile).run()
        status, usage = await ask(payer.secret, "/v1/usage?group_by=model")
        assert status == 200
        assert usage["totals"]["calls"] > 20
        assert await connections(inside) <= POOL * (len(LOGINS) + 1), "the pooler holds them, not the workers"
    await check_books(inside)


async def wait_for_calls(office: Office, count: int) -> int:
    """Wait until so many calls are settled; return how many are."""
    async with asyncio.timeout(60):
        while True:
            async with office.database.connection() as connection:
                found = int(await connection.fetchval("SELECT count(*) FROM calls WHERE state = 'settled'"))
            if found >= count:
                return found
            await asyncio.sleep(0.1)


async def begin_stream(session: aiohttp.ClientSession, url: str, secret: str) -> aiohttp.ClientResponse:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    response = await session.post(
        f"{url}/v1/chat/completions",
        json={**body, "sim": {"chunks": 60, "chunk_delay_ms": 20}},
        headers={"Authorization": f"Bearer {secret}"},
    )
    assert (await response.content.readline()).startswith(b"data:")
    return response


async def connections(office: Office) -> int:
    """Connections to the database that are not sessions of their own, which are few and named so."""
    async with office.database.session() as connection:
        return int(
            await connection.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                " AND application_name NOT LIKE '%alone' AND usename <> 'postgres'"
            )
        )


async def test_a_topup(behind: Settings, inside: Office) -> None:
    async with open_shop(behind, inside) as shop:
        topup = await shop.begin("paystack")
        shop.psp.till.pay(shop.checkout(topup))
        await shop.quiet()
        assert (await shop.see(topup))["state"] == "paid"
        assert await shop.balance() == "5000"
        await shop.agree()


async def test_notices_are_heard(behind: Settings, inside: Office) -> None:
    """Nothing but the notice tells this listener."""
    payer = await make_payer(inside)
    heard: asyncio.Queue[str] = asyncio.Queue()
    database = Database(behind.postgres, role="proxy")
    follower = asyncio.get_running_loop().create_task(ChangeFeed(database, {"key": heard.put}).run())
    try:
        async with asyncio.timeout(10):
            assert await heard.get() == "*"
            await Keys(inside.database, behind.auth, behind.limits).revoke(payer.key_id)
            assert await heard.get() == str(payer.key_id)
    finally:
        follower.cancel()
        await asyncio.gather(follower, return_exceptions=True)
        await database.close()


async def test_locks_are_kept_and_nothing_is_left_behind(behind: Settings, inside: Office) -> None:
    """Sessions' locks lie past the pooler; no statement stays prepared on a connection that is another's next."""
    keeper = Database(behind.postgres, role="keeper")
    operator = Database(behind.postgres, role="operator")
    try:
        sweepers = [Sweeper(keeper, inside.holds, inside.upstream, behind.sweep) for _ in range(2)]
        async with keeper.session() as other:
            assert await other.fetchval("SELECT pg_try_advisory_lock($1)", 0x73776565)
            assert await sweepers[0].sweep() is None, "another process is sweeping"
        assert await sweepers[1].sweep() is not None
        await make_payer(inside)
        assert (await Audit(operator).verify()).ok
        roles: tuple[Role | None, ...] = ("keeper", "operator", None)
        for role in roles:
            async with AsyncExitStack() as stack:
                another = Database(behind.postgres, role=role)
                stack.push_async_callback(another.close)
                held = [await stack.enter_async_context(another.transaction()) for _ in range(POOL)]
                pids = {await connection.fetchval("SELECT pg_backend_pid()") for connection in held}
                assert len(pids) == POOL
                for connection in held:
                    assert await connection.fetchval("SELECT count(*) FROM pg_prepared_statements") == 0
                    assert not await connection.fetchval(
                        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
                    )
    finally:
        await keeper.close()
        await operator.close()


async def test_waiting_for_a_lock_is_bounded(behind: Settings, inside: Office, settings: Settings) -> None:
    """No session can say so for itself: `tuma migrate` has said it of the roles."""
    for role in LOGINS:
        database = Database(behind.postgres, role=role, connections_max=1)
        async with database.connection() as connection:
            assert (role, await connection.fetchval("SHOW lock_timeout")) == (role, "5s")
        await database.close()
    name = behind.postgres.dsn.get_secret_value().rpartition("/")[2]
    ok, said = await _ask_sessions(inside)
    assert (ok, said) == (True, "connections for one transaction, and sessions past the pooler")
    async with open_office(settings) as mighty, mighty.database.connection() as connection:
        await connection.execute(f"ALTER ROLE tuma_settler IN DATABASE {name} RESET lock_timeout")
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'tuma_settler'"
        )
    ok, said = await _ask_sessions(inside)
    assert not ok
    assert "`tuma migrate`" in said


async def test_postgres_is_away_behind_the_pooler(
    behind: Settings, inside: Office, sim: SimulatedProvider, postgres: EmbeddedPostgres
) -> None:
    """What the pooler says of it is an outage, not an answer: what waited is posted when Postgres is back."""
    await sync_models(inside)
    payer = await make_payer(inside)
    told_to_hurry = behind.model_copy(update={"auth": behind.auth.model_copy(update={"wait_s": 0.5})})
    async with run_proxy(told_to_hurry) as running, aiohttp.ClientSession() as session:
        streams = await asyncio.gather(
            *(begin_stream(session, running.base_url, payer.secret) for _ in range(3))
        )
        postgres.kill()
        try:
            for stream in streams:
                assert (await stream.read()).endswith(b"data: [DONE]\n\n")
            head = {"Authorization": f"Bearer {payer.secret}"}
            body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
            async with session.post(
                f"{running.base_url}/v1/chat/completions", json=body, headers=head
            ) as refused:
                assert (refused.status, refused.headers["Retry-After"]) == (503, "5")
        finally:
            postgres.start()
        await running.quiet(30)
        await settle_down(inside, sim)
        async with inside.database.connection() as connection:
            states = await connection.fetch("SELECT state, count(*) FROM calls GROUP BY state")
        assert dict(states)["settled"] == 3
    await check_books(inside)


@pytest.mark.parametrize("mode", ["transaction", "session"])
async def test_a_pooler_that_nobody_told_of(
    settings: Settings, postgres: EmbeddedPostgres | OwnPostgres, dsn: str, tmp_path: Path, mode: str
) -> None:
    """Taught to ignore what it does not know, it is found out by a notice that is lost; one that keeps sessions is good."""
    demand_pooler(postgres)
    more = {"ignore_startup_parameters": "lock_timeout", "pool_mode": mode}
    async with pooling(postgres, dsn, tmp_path, more=more) as server:
        untold = pooled(settings, server, pooler="none", direct_dsn=SecretStr(""))
        in_a_circle = pooled(settings, server, direct_dsn=SecretStr(server.dsn))
        for way, remedy in ((untold, "set TUMA_POSTGRES__POOLER"), (in_a_circle, "does not lead past")):
            if mode == "session":
                assert await find_sessions(way, wait_s=30) != "no pooler"
            else:
                with pytest.raises(InputError, match=remedy):
                    await find_sessions(way, wait_s=0.3)
        if mode == "transaction":
            hasty = pooled(settings, server, direct_dsn=SecretStr(server.dsn), connect_timeout_s=1.0)
            with pytest.raises(InputError, match="does not lead past"):
                async with run_proxy(hasty):
                    pass


async def test_other_ways_past_the_pooler_are_refused(
    settings: Settings, behind: Settings, pooler: PgBouncer, postgres: EmbeddedPostgres
) -> None:
    with pytest.raises(InputError, match=r"TUMA_POSTGRES__DSN leads to a pooler .*lock_timeout.*POOLER"):
        await find_sessions(pooled(settings, pooler, pooler="none", direct_dsn=SecretStr("")), wait_s=30)
    elsewhere = SecretStr(postgres.dsn("tuma"))
    with pytest.raises(InputError, match="DIRECT_DSN does not lead past the pooler to the database of"):
        await find_sessions(pooled(settings, pooler, direct_dsn=elsewhere), wait_s=0.3)
    assert (
        await find_sessions(behind, wait_s=30)
        == "connections for one transaction, and sessions past the pooler"
    )
    assert await find_sessions(settings, wait_s=30) == "no pooler"


async def find_sessions(settings: Settings, *, wait_s: float) -> str:
    database = Database(settings.postgres, role="proxy", connections_max=1)
    try:
        return await require_sessions(database, wait_s=wait_s)
    finally:
        await database.close()


def test_a_pooler_needs_a_way_past_it() -> None:
    with pytest.raises(SettingsError, match=r"TUMA_POSTGRES: .*DIRECT_DSN must be"):
        make_settings(
            postgres_dsn="postgresql://u@h/d", redis_url="redis://h", postgres={"pooler": "transaction"}
        )
