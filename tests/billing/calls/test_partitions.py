"""Partitions by month: made ahead, and what comes before they are made is kept, found and swept all the same."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from billing.calls.ledger import Ledger
from billing.calls.sweeper import Sweeper
from billing.ids import id_floor, minted_at, new_id
from billing.reports.usage import UsageBook, UsageQuery
from scripts.office import Office
from tests.billing.calls.test_ledger import books_hold, ending, opening
from tests.support.clock import drop_partitions
from tests.support.payers import make_payer

pytestmark = pytest.mark.calendar

PARENTS = ("calls", "usage", "usage_rollup", "journal_tx", "journal_entry")


@pytest.fixture
def ledger(office: Office) -> Ledger:
    return Ledger(office.database, worker_id=new_id())


def month_of(moment: datetime, *, later: int = 0) -> str:
    months = moment.year * 12 + moment.month - 1 + later
    return f"{months // 12}_{months % 12 + 1:02}"


async def sweep(office: Office) -> None:
    sweeper = Sweeper(office.database, office.holds, office.upstream, office.settings.sweep)
    assert await sweeper.sweep() is not None


async def find_partitions(office: Office, month: str) -> set[str]:
    async with office.database.connection() as connection:
        rows = await connection.fetch(
            "SELECT relname FROM pg_class WHERE relispartition AND relkind = 'r' AND relname LIKE '%' || $1",
            month,
        )
    return {row["relname"] for row in rows}


async def test_a_call_lies_in_the_partition_of_its_month(office: Office, ledger: Ledger) -> None:
    async with office.database.connection() as connection:
        await connection.execute("SELECT ensure_partitions(3)")
        assert await connection.fetchval("SELECT ensure_partitions(3)") == 0
        call = opening(await make_payer(office), 1)
        await ledger.open_calls([call])
        await ledger.settle_calls([ending(call.call_id, 1)])
        place = "SELECT tableoid::regclass::text FROM calls WHERE id = $1"
        assert await connection.fetchval(place, call.call_id) == f"calls_{minted_at(call.call_id):%Y_%m}"
    await books_hold(office)


async def test_months_are_made_ahead(office: Office) -> None:
    now = datetime.now(UTC)
    await sweep(office)
    for later in (-1, 0, 1, 2, 3):
        month = month_of(now, later=later)
        assert await find_partitions(office, month) == {f"{parent}_{month}" for parent in PARENTS}


async def test_what_came_before_its_months_partition_stays_where_it_is(
    office: Office, ledger: Ledger
) -> None:
    """Nobody swept for months; a payment and calls are there before the first sweep, some of them of next month."""
    async with office.database.connection() as connection:
        await connection.execute("SELECT ensure_partitions(3)")
    await drop_partitions(office.database)
    payer = await make_payer(office)
    now = datetime.now(UTC)
    later = new_id(at_ms=round((now + timedelta(days=31)).timestamp() * 1000))
    calls = [opening(payer, 10), opening(payer, 10), replace(opening(payer, 10), call_id=later)]
    await ledger.open_calls(calls)
    await ledger.settle_calls([ending(call.call_id, 7) for call in calls])
    for _ in range(2):
        await sweep(office)
    call = opening(payer, 10)
    await ledger.open_calls([call])
    await ledger.settle_calls([ending(call.call_id, 5)])
    month = month_of(now, later=3)
    assert await find_partitions(office, month) == {f"{parent}_{month}" for parent in PARENTS}
    since, until = (now - timedelta(days=1)).date(), (now + timedelta(days=33)).date()
    report = await UsageBook(office.database).read_wallet(
        payer.wallet_id, UsageQuery(since=since, until=until, by=())
    )
    assert report.totals["USD"].charge_nano == 3 * 7 + 5
    await books_hold(office)


@pytest.mark.parametrize("zone", ["America/New_York", "Pacific/Kiritimati", "Africa/Cairo"])
async def test_months_are_those_of_utc_whatever_the_servers_zone(office: Office, zone: str) -> None:
    """Each begins where the one before it ends: none is missing, none reaches into another."""
    await drop_partitions(office.database)
    async with office.database.connection() as connection:
        await connection.execute(f"SET TimeZone = '{zone}'")
        await connection.execute("SELECT ensure_partitions(14)")
        await connection.execute("SET TimeZone = 'UTC'")
        rows = await connection.fetch(
            "SELECT relname, pg_get_expr(relpartbound, oid) AS bounds FROM pg_class"
            " WHERE relname ~ '^usage_rollup_[0-9]{4}_[0-9]{2}$' ORDER BY 1"
        )
        ids = await connection.fetch(
            "SELECT relname, pg_get_expr(relpartbound, oid) AS bounds FROM pg_class"
            " WHERE relname ~ '^journal_tx_[0-9]{4}_[0-9]{2}$' ORDER BY 1"
        )
    now = datetime.now(UTC)
    for later in range(15):
        begins, ends = (
            f"{month_of(now, later=step).replace('_', '-')}-01 00:00:00+00" for step in (later, later + 1)
        )
        found = {row["relname"]: row["bounds"] for row in (*rows, *ids)}
        month = month_of(now, later=later)
        assert found[f"usage_rollup_{month}"] == f"FOR VALUES FROM ('{begins}') TO ('{ends}')"
        low, high = (id_floor(datetime.fromisoformat(bound)) for bound in (begins, ends))
        assert found[f"journal_tx_{month}"] == f"FOR VALUES FROM ('{low}') TO ('{high}')"
