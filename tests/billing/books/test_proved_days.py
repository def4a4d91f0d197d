"""Days that were proved once: counted without being read again, whatever is posted into them later."""

import asyncio
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from uuid import UUID

import pytest

from billing.books.proof import _CAPS_OFF, Books
from billing.books.proved_days import DayBook
from billing.calls.corrections import Corrections
from billing.calls.ledger import Ledger
from billing.calls.outcome import Ending
from billing.errors import BrokenInvariantError
from billing.ids import new_id
from billing.pricing.cost import Usage
from billing.provider.records import Bill
from billing.reports.usage import UsageBook, UsageQuery
from billing.wallets.caps import Caps
from scripts.office import Office
from tests.billing.calls.test_ledger import opening
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer

DAY_MS = 24 * 3600 * 1000


def id_of(days_ago: float) -> UUID:
    """Mint an id as it would have been some days ago."""
    return new_id(at_ms=int(time.time() * 1000 - days_ago * DAY_MS))


class Past:
    """Calls of earlier days."""

    def __init__(self, office: Office, payer: Payer) -> None:
        self.office = office
        self.payer = payer
        self.ledger = Ledger(office.database, worker_id=new_id())

    async def open(self, days_ago: float) -> UUID:
        call = replace(opening(self.payer, 10_000), call_id=id_of(days_ago))
        assert await self.ledger.open_calls([call]) == ["opened"]
        return call.call_id

    async def settle(self, call_id: UUID, cost: int) -> None:
        ending = Ending(
            call_id,
            "settled",
            "completed",
            generation_id="g",
            accuracy="estimated",
            cost_nanousd=cost,
            charge_nano=cost,
            usage=Usage(1, 1),
        )
        assert (await self.ledger.settle_calls([ending]))[0].won

    async def proved(self) -> tuple[int, int, int]:
        """Return days, calls and settled nano-dollars of the verified days."""
        async with self.office.database.connection() as connection:
            row = await connection.fetchrow(
                "SELECT count(*), sum(calls), sum(settled_nanousd) FROM verified_days"
            )
        return int(row[0]), int(row[1] or 0), int(row[2] or 0)

    async def check(self) -> None:
        """Both ways of reading the books hold, and say the same of the sums."""
        quick = await Books(
            self.office.database, self.office.holds, self.office.upstream, sweep_grace_s=3600
        ).check()
        full = await Books(
            self.office.database, self.office.holds, self.office.upstream, sweep_grace_s=3600
        ).check(full=True)
        for name in ("I1", "I2", "I3", "I4", "I5", "I6", "I7", "usage"):
            assert quick[name].ok, quick[name].detail
            assert full[name].ok, full[name].detail
        assert quick["I4"].detail == full["I4"].detail


@pytest.fixture
async def past(office: Office) -> Past:
    return Past(office, await make_payer(office))


@pytest.mark.calendar
async def test_days_that_are_over_are_proved_and_counted_once(past: Past) -> None:
    for days_ago in (5, 5, 3, 2, 0):
        await past.settle(await past.open(days_ago), 1000)
    book = DayBook(past.office.database)
    assert await book.verify_all() == 3
    assert await past.proved() == (3, 4, 4000)
    assert await book.verify_all() == 0
    await past.settle(await past.open(0), 500)
    await past.check()
    assert await past.proved() == (3, 4, 4000)


@pytest.mark.calendar
async def test_today_is_not_over(past: Past) -> None:
    await past.settle(await past.open(0), 1000)
    assert await DayBook(past.office.database).verify_all() == 0


@pytest.mark.calendar
async def test_what_is_posted_into_a_proved_day_is_counted(past: Past) -> None:
    slow = await past.open(3)
    await past.settle(await past.open(3), 1000)
    assert await DayBook(past.office.database).verify_all() == 1
    await past.check()
    await past.settle(slow, 700)
    await past.check()
    corrections = Corrections(past.office.database, charge_estimates_upward=True)
    await corrections.correct(slow, Bill("g", Decimal("0.0000009"), Usage()))
    await past.check()
    await corrections.refund(slow, amount_nano=100, reason="sorry")
    await past.check()
    void = await past.open(3)
    assert (await past.ledger.settle_calls([Ending(void, "void", "lost")]))[0].won
    await past.check()


async def test_any_transaction_that_lies_in_a_proved_day_is_counted(past: Past) -> None:
    """Settlements alone take an old id today; the function that posts everything else asks of its ids, too."""
    await past.settle(await past.open(3), 1000)
    assert await DayBook(past.office.database).verify_all() == 1
    late = id_of(3)
    async with past.office.database.transaction() as connection:
        await connection.execute(
            "INSERT INTO journal_tx (id, kind, wallet_id) VALUES ($1, 'grant', $2)",
            late,
            past.payer.wallet_id,
        )
        await connection.execute(
            "SELECT post_entries(ARRAY[$1, $1]::uuid[], '{1,2}', '{wallet,grant}', ARRAY[$2::uuid, NULL], '{USD,USD}', '{5,-5}')",
            late,
            past.payer.wallet_id,
        )
    await past.check()


async def test_a_posting_under_way_and_a_proof_wait_for_each_other(past: Past) -> None:
    """Whichever comes first, what is posted into the day is counted once."""
    calls = [await past.open(2) for _ in range(30)]

    async def post() -> None:
        for call in calls:
            await past.settle(call, 100)

    async def prove() -> None:
        for _ in range(10):
            await DayBook(past.office.database).verify_all()

    await asyncio.gather(post(), prove())
    await past.check()
    assert (await past.proved())[0] == 1


async def test_two_proofs_at_once_count_once(past: Past) -> None:
    for days_ago in (4, 3, 2):
        await past.settle(await past.open(days_ago), 1000)
    await asyncio.gather(*(DayBook(past.office.database).verify_all() for _ in range(4)))
    assert await past.proved() == (3, 3, 3000)
    await past.check()


async def test_a_day_that_does_not_balance_is_not_proved(past: Past) -> None:
    await past.settle(await past.open(4), 1000)
    bad = await past.open(3)
    await past.settle(bad, 1000)
    await past.settle(await past.open(2), 1000)
    async with past.office.database.connection() as connection:
        await connection.execute(
            "INSERT INTO journal_entry (tx_id, seq, account, currency, amount_nano) VALUES ($1, 99, 'suspense', 'USD', 1)",
            bad,
        )
    with pytest.raises(BrokenInvariantError, match=str(bad)):
        await DayBook(past.office.database).verify_all()
    assert await past.proved() == (1, 1, 1000)
    books = Books(past.office.database, past.office.holds, past.office.upstream, sweep_grace_s=3600)
    checks = await books.check()
    assert not checks["I1"].ok
    assert str(bad) in checks["I1"].detail


async def test_an_entry_smuggled_into_a_proved_day_shows_in_full(past: Past) -> None:
    """The quick check trusts a proved day and the append-only trigger; --full trusts nothing."""
    call = await past.open(3)
    await past.settle(call, 1000)
    await DayBook(past.office.database).verify_all()
    async with past.office.database.connection() as connection:
        await connection.execute(
            "INSERT INTO journal_entry (tx_id, seq, account, currency, amount_nano) VALUES ($1, 99, 'suspense', 'USD', 1)",
            call,
        )
    books = Books(past.office.database, past.office.holds, past.office.upstream, sweep_grace_s=3600)
    assert not (await books.check(full=True))["I1"].ok


@pytest.mark.calendar
async def test_a_month_whose_days_are_proved_can_be_detached(past: Past) -> None:
    """As docs/archiving.md says; the quick check goes on without it, and caps in total count what was in it."""
    caps = Caps(past.office.database)
    wallet_id = past.payer.wallet_id
    await caps.set_caps("wallet", wallet_id, {"day": 10**9, "total": 10**9})
    old = await past.open(40)
    await past.settle(old, 1000)
    await past.settle(await past.open(1), 500)
    await past.settle(await past.open(0), 250)
    await DayBook(past.office.database).verify_all()
    month = time.strftime("%Y_%m", time.gmtime((old.int >> 80) / 1000))
    async with past.office.database.connection() as connection:
        for table in ("calls", "usage", "journal_tx", "journal_entry"):
            name = f"{table}_{month}"
            if await connection.fetchval("SELECT to_regclass($1)", name) is None:
                name = f"{table}_default"
            await connection.execute(f"ALTER TABLE {table} DETACH PARTITION {name}")
        assert await connection.fetchval("SELECT count(*) FROM calls WHERE id = $1", old) == 0
    checks = await Books(
        past.office.database, past.office.holds, past.office.upstream, sweep_grace_s=3600
    ).check()
    for name in ("I1", "I2", "I4", "I7", "usage"):
        assert checks[name].ok, checks[name].detail
    assert {cap.period: cap.spent_nano for cap in await caps.find_caps(wallet_id)} == {
        "day": 250,
        "total": 1750,
    }

    # What was used in that month is still known.
    whole = UsageQuery(since=datetime.now(UTC).date() - timedelta(days=60), by=())
    report = await UsageBook(past.office.database).read_wallet(wallet_id, whole)
    assert (report.totals["USD"].calls, report.totals["USD"].charge_nano) == (3, 1750)

    # What is left is still compared: a cap that counts less than its calls, or a window after that month more.
    async with past.office.database.connection() as connection:
        for change in ("spent_nano - 1001 WHERE period = 'total'", "spent_nano + 1 WHERE period = 'day'"):
            tampering = connection.transaction()
            await tampering.start()
            await connection.execute(f"UPDATE cap_windows SET spent_nano = {change} AND ends_at > now()")
            off = await connection.fetch(_CAPS_OFF, False, 10)
            await tampering.rollback()
            assert len(off) == 1, change


async def test_books_of_today_need_no_proof(past: Past, office: Office) -> None:
    async with office.database.connection() as connection:
        await connection.execute("INSERT INTO provider_openings VALUES ('key', -1000)")
    await past.settle(await past.open(0), 1000)
    await check_books(office)
