"""The pools on the way of a call return connections without a round trip: so nothing may be left in their sessions."""

import aiohttp
import asyncpg
import pytest

from billing.calls.ledger import Ledger
from billing.calls.outcome import Ending
from billing.errors import PostgresUnavailableError
from billing.ids import new_id
from billing.postgres.database import _LEAVE_NOTHING, Database
from billing.postgres.pinned_connection import HeldConnection
from billing.postgres.roles import Role
from config.settings import Settings
from scripts.office import Office
from tests.billing.calls.test_ledger import ending, opening
from tests.support.books import check_books
from tests.support.payers import make_payer
from tests.support.running import Running

# What lives longer than a transaction. A lock or a setting that ends with it is `pg_advisory_xact_…`, `set_config(…, true)`.
_LASTS = (
    r"pg_(try_)?advisory_(?!xact|unlock)(un)?lock|set_config\s*\([^;]*,\s*false\s*\)|\m(un)?listen\M|\mset\s+session\M"
    r"|\mtemp(orary)?\s+(table|sequence|view)\M|\mwith\s+hold\M|\mprepare\M"
)
_LEFT = """
SELECT (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()) AS locks,
       (SELECT count(*) FROM pg_cursors WHERE statement NOT LIKE '%pg_cursors%') AS cursors,
       (SELECT count(*) FROM pg_listening_channels()) AS channels,
       (SELECT count(*) FROM pg_class WHERE relpersistence = 't') AS temporary,
       (SELECT count(*) FROM pg_settings WHERE source = 'session' AND setting <> reset_val) AS told,
       coalesce(current_setting('tuma.usage_kept', true), '') AS kept, coalesce(current_setting('tuma.actor', true), '') AS actor,
       coalesce(current_setting('app.user_id', true), '') AS person
"""
_NOTHING = {
    "locks": 0,
    "cursors": 0,
    "channels": 0,
    "temporary": 0,
    "told": 0,
    "kept": "",
    "actor": "",
    "person": "",
}


async def test_no_function_leaves_anything_in_a_session(office: Office) -> None:
    async with office.database.connection() as connection:
        assert await connection.fetchval("SELECT 'pg_advisory_lock(1)' ~* $1", _LASTS)
        assert await connection.fetchval("SELECT 'set_config(''a'', b, false)' ~* $1", _LASTS)
        assert not await connection.fetchval("SELECT 'pg_advisory_xact_lock(1)' ~* $1", _LASTS)
        wrong = await connection.fetch(
            "SELECT oid::regprocedure::text AS name FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
            " AND prosrc ~* $1",
            _LASTS,
        )
    assert [row["name"] for row in wrong] == []


async def test_calls_leave_nothing_in_the_sessions(office: Office, proxy: Running) -> None:
    payer = await make_payer(office, caps={"day": 10**9})
    head = {"Authorization": f"Bearer {payer.secret}"}
    async with aiohttp.ClientSession(headers=head) as session:
        for stream in (False, True):
            body = {
                "model": "openai/gpt-4o-mini",
                "messages": [{"role": "user", "content": "hi"}],
                "stream": stream,
            }
            async with session.post(f"{proxy.base_url}/v1/chat/completions", json=body) as response:
                assert response.status == 200, await response.text()
                await response.read()
    await proxy.quiet()
    ledger = proxy.services.calls._ledger
    for held, role in ((ledger._opener, "proxy"), (ledger._settler, "settler")):
        assert isinstance(held, HeldConnection)
        database = held._lender
        assert isinstance(database, Database)
        assert database.role == role
        assert role in _LEAVE_NOTHING
        async with database.connection() as connection:
            assert dict(await connection.fetchrow(_LEFT)) == _NOTHING
        assert [dict(row) for row in await held.fetch(_LEFT)] == [_NOTHING]
    await check_books(office)


@pytest.mark.parametrize("role", sorted(_LEAVE_NOTHING))
async def test_a_connection_comes_back_without_a_round_trip(
    settings: Settings, office: Office, role: Role
) -> None:
    database = Database(settings.postgres, name="traceless", role=role, connections_max=1)
    try:
        async with database.connection() as connection:
            await connection.fetchval("SELECT 'the last word'")
        async with office.database.connection() as connection:
            said = await connection.fetchval(
                "SELECT query FROM pg_stat_activity WHERE application_name = 'traceless'"
            )
        assert said == "SELECT 'the last word'"
    finally:
        await database.close()


async def test_a_broken_transaction_is_rolled_back_all_the_same(settings: Settings, office: Office) -> None:
    payer = await make_payer(office)
    database = Database(settings.postgres, role="settler", connections_max=1)
    ledger = Ledger(office.database, worker_id=new_id(), settler=database)
    call = opening(payer, 1_000)
    await ledger.open_calls([call])
    try:
        async with database.connection() as connection:
            await connection.execute("BEGIN")
            await connection.execute("SELECT pg_advisory_xact_lock(1)")
        async with database.connection() as connection:
            assert not connection.is_in_transaction()
            assert dict(await connection.fetchrow(_LEFT)) == _NOTHING
        with pytest.raises(asyncpg.CheckViolationError):
            await ledger.settle_calls([ending(call.call_id, -1)])
        with pytest.raises(PostgresUnavailableError):
            async with database.connection() as connection:
                await connection.execute("SELECT pg_sleep(60)", timeout=0.05)
        async with database.connection() as connection:
            assert dict(await connection.fetchrow(_LEFT)) == _NOTHING
        assert [item.won for item in await ledger.settle_calls([Ending(call.call_id, "void", "test")])] == [
            True
        ]
    finally:
        await database.close()
