"""Connections that batches keep: what breaks one, or changes what its statements read, loses nothing and posts nothing twice."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from pydantic import SecretStr

from billing.calls.ledger import Ledger
from billing.calls.outcome import Ending, Settlement
from billing.errors import InputError, PostgresUnavailableError
from billing.ids import new_id
from billing.postgres.database import Database
from billing.postgres.group_commit import Batcher
from billing.postgres.pinned_connection import HeldConnection
from config.settings import Settings
from scripts.office import Office
from tests.billing.calls.test_ledger import books_hold, ending, opening, posted
from tests.support.payers import Payer, make_payer
from tests.support.tcp_proxy import TcpProxy

PID = "SELECT pg_backend_pid()"
GRANTED = 10 * 10**9


def postgres_of(settings: Settings, **changed: object) -> Database:
    return Database(settings.postgres.model_copy(update=changed), name="held")


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    database = postgres_of(settings)
    yield database
    await database.close()


def hold(database: Database) -> HeldConnection:
    held = database.hold()
    assert isinstance(held, HeldConnection)
    return held


async def pid_of(held: HeldConnection) -> int:
    return int((await held.fetch(PID))[0][0])


async def pid_once_served(held: HeldConnection) -> int:
    """Ask again, as a batch does, if the end of the connection was not read yet when a statement came."""
    with suppress(PostgresUnavailableError):
        return await pid_of(held)
    return await pid_of(held)


async def opened(office: Office, payer: Payer) -> UUID:
    call = opening(payer, 1_000)
    assert await Ledger(office.database, worker_id=new_id()).open_calls([call]) == ["opened"]
    return call.call_id


@asynccontextmanager
async def locked(office: Office, payer: Payer) -> AsyncIterator[None]:
    """Let whoever posts to the payer's wallet wait."""
    async with office.database.transaction() as connection:
        await connection.execute("SELECT FROM wallets WHERE id = $1 FOR UPDATE", payer.wallet_id)
        yield


async def waiting(office: Office, count: int = 1) -> list[int]:
    """Return the backends that wait for a lock, as soon as there are so many."""
    async with asyncio.timeout(60):
        while True:
            async with office.database.connection() as connection:
                rows = await connection.fetch(
                    "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
                )
            if len(rows) == count:
                return [row["pid"] for row in rows]
            await asyncio.sleep(0.02)


async def backends(office: Office, count: int) -> None:
    """Wait until there are so many of the databases under test."""
    async with asyncio.timeout(60):
        while True:
            async with office.database.connection() as connection:
                found = await connection.fetchval(
                    "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'held' AND datname = current_database()"
                )
            if found == count:
                return
            await asyncio.sleep(0.02)


def settler(ledger: Ledger) -> Batcher[Ending, Settlement]:
    return Batcher(ledger.settle_calls, name="settle", rows_max=8, delay_ms=0, queue_max=100)


async def delayed(settles: Batcher[Ending, Settlement]) -> None:
    async with asyncio.timeout(60):
        while not settles.away:
            await asyncio.sleep(0.02)


async def test_it_keeps_one_connection_and_its_statements(office: Office, database: Database) -> None:
    held = hold(database)
    prepared = "SELECT count(*) FROM pg_prepared_statements WHERE statement = $1"
    assert [await pid_of(held) for _ in range(3)] == [await pid_of(held)] * 3
    assert (await held.fetch(prepared, PID))[0][0] == 1
    await backends(office, 1)
    await database.close()
    await backends(office, 0)


async def test_a_batch_whose_connection_is_ended_is_settled_once(office: Office, database: Database) -> None:
    payer = await make_payer(office)
    call_id = await opened(office, payer)
    settles = settler(Ledger(database, worker_id=new_id(), hold=True))
    async with locked(office, payer):
        answer = settles.submit(ending(call_id, 100))
        [pid] = await waiting(office)
        async with office.database.connection() as connection:
            await connection.execute("SELECT pg_terminate_backend($1)", pid)
        async with asyncio.timeout(60):
            while await waiting(office) == [pid]:  # until it is repeated on another connection
                await asyncio.sleep(0.02)
    assert (await answer).won
    assert await posted(office, payer) == (GRANTED - 100, 0)
    await settles.close(5)
    await books_hold(office)


async def test_a_lost_answer_and_an_outage_lose_nothing(office: Office, settings: Settings) -> None:
    payer = await make_payer(office)
    first, second, third = [await opened(office, payer) for _ in range(3)]
    dsn = settings.postgres.dsn.get_secret_value()
    async with TcpProxy(dsn) as between:
        database = postgres_of(settings, dsn=SecretStr(between.through(dsn)), command_timeout_s=0.5)
        settles = settler(Ledger(database, worker_id=new_id(), hold=True))
        assert (await settles.submit(ending(first, 100))).won
        between.mute()
        answer = settles.submit(ending(second, 100))
        await delayed(settles)  # the statement's time is over
        between.open()
        assert (await answer).state == "settled"
        between.shut()
        answer = settles.submit(ending(third, 100))
        await delayed(settles)
        between.open()
        assert (await answer).won
        await settles.close(5)
        await database.close()
    assert await posted(office, payer) == (GRANTED - 300, 0)
    await books_hold(office)


async def test_what_takes_too_long_is_cancelled_and_the_next_does_not_wait_for_it(
    office: Office, settings: Settings
) -> None:
    payer = await make_payer(office)
    call_id = await opened(office, payer)
    database = postgres_of(settings, command_timeout_s=1.0)
    ledger, held = Ledger(database, worker_id=new_id(), hold=True), hold(database)
    before = await pid_of(held)
    async with locked(office, payer):
        with pytest.raises(PostgresUnavailableError, match="TimeoutError"):
            await ledger.settle_calls([ending(call_id, 100)])
        with pytest.raises(PostgresUnavailableError, match="TimeoutError"):
            await held.fetch("SELECT FROM wallets WHERE id = $1 FOR UPDATE", payer.wallet_id)
        assert await pid_of(held) != before
        await waiting(office, 0)
    assert (await ledger.settle_calls([ending(call_id, 100)]))[0].won
    await database.close()
    await backends(office, 0)


async def test_what_is_given_up_is_cancelled(office: Office, database: Database) -> None:
    payer = await make_payer(office)
    held = hold(database)
    before = await pid_of(held)
    async with locked(office, payer):
        task = asyncio.create_task(
            held.fetch("SELECT FROM wallets WHERE id = $1 FOR UPDATE", payer.wallet_id)
        )
        assert await waiting(office) == [before]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await pid_of(held) != before
        await waiting(office, 0)


async def test_who_finds_it_in_use_takes_one_of_the_pool(office: Office, database: Database) -> None:
    payer = await make_payer(office)
    held = hold(database)
    before = await pid_of(held)
    async with locked(office, payer):
        slow = asyncio.create_task(
            held.fetch("SELECT 1 FROM wallets WHERE id = $1 FOR UPDATE", payer.wallet_id)
        )
        assert await waiting(office) == [before]
        others = await asyncio.gather(pid_of(held), pid_of(held))
        assert before not in others
    assert len(await slow) == 1
    assert await pid_of(held) == before


async def test_a_refusal_is_as_from_the_pool_and_leaves_the_connection(
    office: Office, database: Database
) -> None:
    held = hold(database)
    before = await pid_of(held)
    for way in (held, database):
        with pytest.raises(InputError, match="cannot be stored"):
            await way.fetch("SELECT $1::text", "a\0b")
        with pytest.raises(InputError, match="cannot be stored"):
            await way.fetch("SELECT $1::text", "\ud800")
    assert await pid_of(held) == before
    async with office.database.connection() as connection:
        await connection.execute("SELECT pg_terminate_backend($1)", before)
    await backends(office, 1)  # the pool's: the connection's end reached nobody who waited for it
    assert await pid_once_served(held) != before


async def test_where_nobody_is_let_in_it_says_so_as_the_pool_does(settings: Settings) -> None:
    dsn = settings.postgres.dsn.get_secret_value()
    for wrong, error in (
        (dsn.rpartition("/")[0] + "/no_such", InputError),
        ("postgresql://u:p@127.0.0.1:1/x", PostgresUnavailableError),
    ):
        database = postgres_of(settings, dsn=SecretStr(wrong))
        said = []
        for way in (database, database.hold()):
            with pytest.raises(error) as raised:
                await way.fetch(PID)
            said.append(str(raised.value))
        assert said[0] == said[1]
        await database.close()


@pytest.mark.parametrize(
    "change",
    [
        "CREATE OR REPLACE",
        "DROP",
        "ALTER TABLE calls ADD COLUMN later bigint",
    ],
)
async def test_a_migration_under_it_is_noticed(office: Office, database: Database, change: str) -> None:
    payer = await make_payer(office)
    ledger = Ledger(database, worker_id=new_id(), hold=True)
    for number in range(2):
        call = opening(payer, 1_000)
        assert await ledger.open_calls([call]) == ["opened"]
        assert (await ledger.settle_calls([ending(call.call_id, 100)]))[0].won
        if number == 0:
            await migrate_under(office, change)
    assert await posted(office, payer) == (GRANTED - 200, 0)
    await books_hold(office)


async def migrate_under(office: Office, change: str) -> None:
    async with office.database.transaction() as connection:
        if change.startswith("ALTER"):
            await connection.execute(change)
            return
        functions = await connection.fetch(
            "SELECT oid::regprocedure::text AS name, pg_get_functiondef(oid) AS text FROM pg_proc"
            " WHERE proname IN ('open_batch', 'settle_batch')"
        )
        assert functions
        for function in functions:
            if change == "DROP":
                await connection.execute(f"DROP FUNCTION {function['name']}")
            await connection.execute(function["text"])


async def test_a_statement_whose_columns_change_is_prepared_anew(office: Office, database: Database) -> None:
    held = hold(database)
    shown: list[Any] = []
    for columns in ("a integer", "a integer, b text"):
        async with office.database.transaction() as connection:
            await connection.execute("DROP FUNCTION IF EXISTS changing")
            await connection.execute(
                f"CREATE FUNCTION changing() RETURNS TABLE ({columns}) LANGUAGE plpgsql AS 'BEGIN RETURN NEXT; END'"
            )
        shown.append((await pid_of(held), tuple((await held.fetch("SELECT * FROM changing()"))[0].keys())))
    assert shown == [(shown[0][0], ("a",)), (shown[0][0], ("a", "b"))]


async def test_closing_waits_for_what_runs_but_not_for_ever(office: Office, settings: Settings) -> None:
    payer = await make_payer(office)
    select = "SELECT 1 FROM wallets WHERE id = $1 FOR UPDATE"
    database = postgres_of(settings)
    async with locked(office, payer):
        slow = asyncio.create_task(hold(database).fetch(select, payer.wallet_id))
        await waiting(office)
        closing = asyncio.create_task(database.close())
        await asyncio.sleep(0)
    assert len(await slow) == 1
    await closing

    database = postgres_of(settings, connect_timeout_s=1.0)
    async with locked(office, payer):
        slow = asyncio.create_task(hold(database).fetch(select, payer.wallet_id))
        await waiting(office)
        await database.close()
        with pytest.raises(asyncpg.QueryCanceledError):
            await slow
        await waiting(office, 0)
    await backends(office, 0)


async def test_behind_a_pooler_nothing_is_held(settings: Settings) -> None:
    database = postgres_of(settings, pooler="transaction")
    assert database.hold() is database
    await database.close()
