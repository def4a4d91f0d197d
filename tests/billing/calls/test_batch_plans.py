"""What a batch reads of the tables: its own rows by their keys, however large the tables were when its plans were made."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import asyncpg
import pytest

from billing.calls.ledger import Extension, Ledger
from billing.ids import new_id
from billing.postgres.database import Database
from config.settings import Settings
from scripts.office import Office
from tests.billing.calls.test_ledger import books_hold, ending, opening
from tests.support.payers import make_payer

CALLS = 300
_READ = """
SELECT relname, coalesce(seq_scan, 0) AS seq_scan, coalesce(idx_scan, 0) AS idx_scan,
       coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0) AS rows
FROM pg_stat_user_tables WHERE relname ~ '^(calls|usage|journal_tx|journal_entry)_[0-9d]' OR relname IN ('wallets', 'feeds')
"""


@pytest.fixture
async def database(settings: Settings, office: Office) -> AsyncIterator[Database]:
    """One connection: it makes its plans on empty tables, and counts what it reads."""
    database = Database(settings.postgres, connections_max=1)
    yield database
    await database.close()


async def read_so_far(database: Database) -> dict[str, dict[str, int]]:
    async with database.connection() as connection:
        await connection.execute("SELECT pg_stat_force_next_flush()")
        rows: list[Any] = await connection.fetch(_READ)
    return {
        row["relname"]: {"seq": row["seq_scan"], "idx": row["idx_scan"], "rows": row["rows"]} for row in rows
    }


@pytest.mark.calendar
async def test_a_batch_reads_its_own_rows(office: Office, database: Database) -> None:
    payer = await make_payer(office, amount="1000")
    ledger = Ledger(database, worker_id=new_id())
    for _ in range(8):  # so that no plan is made for this time alone any more
        first = opening(payer, 10)
        await ledger.open_calls([first])
        await ledger.extend_calls([Extension(first.call_id, 20, 20)])
        await ledger.settle_calls([ending(first.call_id, 1)])
    calls = [opening(payer, 10) for _ in range(CALLS)]
    await ledger.open_calls(calls)
    await ledger.settle_calls([ending(call.call_id, 1) for call in calls[1:-1]])

    before = await read_so_far(database)
    pair = [calls[0].call_id, calls[-1].call_id]  # all the others lie between them
    await ledger.open_calls([calls[0], calls[-1]])
    await ledger.extend_calls([Extension(call_id, 20, 20) for call_id in pair])
    assert [item.won for item in await ledger.settle_calls([ending(call_id, 1) for call_id in pair])] == [
        True,
        True,
    ]
    after = await read_so_far(database)

    read = {
        name: {key: count - before[name][key] for key, count in now.items()} for name, now in after.items()
    }
    assert {name for name, of in read.items() if of["seq"]} == set(), (
        "nothing is read from one end to the other"
    )
    assert max(of["rows"] for of in read.values()) <= 20
    looked_at = {name for name, of in read.items() if of["idx"]}
    assert len({name for name in looked_at if name.startswith("calls_")}) == 1, "no month but the calls' own"
    assert len({name for name in looked_at if name.startswith("usage_")}) == 1
    await books_hold(office)


@pytest.mark.calendar
async def test_a_batch_of_two_months(office: Office, database: Database) -> None:
    payer = await make_payer(office)
    ledger = Ledger(database, worker_id=new_id())
    old, new = replace(opening(payer, 10), call_id=new_id(at_ms=0)), opening(payer, 10)
    assert await ledger.open_calls([new, old]) == ["opened", "opened"]
    assert await ledger.open_calls([old, new]) == ["opened", "opened"]
    ids = [new.call_id, old.call_id]
    assert await ledger.extend_calls([Extension(call_id, 20, 20) for call_id in ids]) == [
        "extended",
        "extended",
    ]
    settled = await ledger.settle_calls([ending(call_id, 7) for call_id in ids])
    assert [(item.won, item.charge_nano, item.hold_nano) for item in settled] == [(True, 7, 20)] * 2
    assert [item.won for item in await ledger.settle_calls([ending(call_id, 7) for call_id in ids])] == [
        False,
        False,
    ]
    await books_hold(office)


async def test_a_settlement_that_does_not_balance_is_refused(office: Office, database: Database) -> None:
    payer = await make_payer(office)
    ledger = Ledger(database, worker_id=new_id())
    call = opening(payer, 10)
    await ledger.open_calls([call])
    with pytest.raises(asyncpg.IntegrityConstraintViolationError, match="does not balance"):
        await ledger.settle_calls([ending(call.call_id, 7, spread_nano=None)])
    await ledger.settle_calls([ending(call.call_id, 7)])
    await books_hold(office)
