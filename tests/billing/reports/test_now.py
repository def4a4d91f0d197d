"""What is spent now, on many clocks: the caps' windows, the usage and the statement that it falls into, whatever the day.

Most of the year each of these zones agrees with UTC on something. ``python -m tests.calendar`` asks when they do not.
"""

import time
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import asyncpg
import pytest
from redis.asyncio import Redis

from billing.ids import minted_at
from billing.reports.statement import Statements
from billing.reports.usage import UsageBook, UsageQuery
from billing.wallets.caps import Caps, Period
from scripts.office import Office
from tests.billing.calls.test_ledger import books_hold
from tests.billing.reports.spender import Spender
from tests.support.payers import Payer, make_payer

pytestmark = pytest.mark.calendar

ZONES = (
    *("UTC", "Africa/Lagos", "Africa/Cairo", "Africa/Casablanca", "Europe/Berlin", "America/New_York"),
    *("America/Santiago", "Asia/Kathmandu", "Australia/Lord_Howe", "Pacific/Kiritimati", "Pacific/Midway"),
)
CHARGE_NANO = 7_000


@pytest.fixture
async def payer(office: Office) -> Payer:
    return await make_payer(office)


async def test_all_have_the_same_clock(dsn: str, redis_url: str) -> None:
    """Python, Postgres and Redis; seconds are counted as ever."""
    connection = await asyncpg.connect(dsn)
    redis = Redis.from_url(redis_url)
    before = datetime.now(UTC)
    seconds, micros = await redis.time()
    shown = [
        await connection.fetchval("SELECT clock_timestamp()"),
        datetime.fromtimestamp(seconds + micros / 1e6, UTC),
    ]
    after = datetime.now(UTC)
    assert all(
        before - timedelta(milliseconds=5) <= moment <= after + timedelta(milliseconds=5) for moment in shown
    )
    began = time.monotonic()
    time.sleep(0.05)  # noqa: ASYNC251 - it is what is tried
    assert 0.05 <= time.monotonic() - began < 1
    await connection.close()
    await redis.aclose()


async def test_what_is_spent_now_is_of_today_on_every_clock(office: Office, payer: Payer) -> None:
    caps, spender = Caps(office.database), Spender(office, payer)
    await caps.set_caps("wallet", payer.wallet_id, dict.fromkeys(("day", "week", "month"), 10**9))
    call = await spender.open(model="m")
    await spender.settle(
        [call], accuracy="exact", charge_nano=CHARGE_NANO, cost_nanousd=CHARGE_NANO, spread_nano=0
    )
    moment = minted_at(call)
    for zone in ZONES:
        local = moment.astimezone(ZoneInfo(zone))
        today, first = local.date(), local.date().replace(day=1)
        monday = today - timedelta(days=today.weekday())
        await caps.set_clock(payer.user_id, timezone=zone, week_starts=1)
        windows = {cap.period: cap for cap in await caps.find_caps(payer.wallet_id, moment=moment)}
        begun: dict[Period, date] = {"day": today, "week": monday, "month": first}
        for period, begins in begun.items():
            midnight = datetime(begins.year, begins.month, begins.day, tzinfo=ZoneInfo(zone)).astimezone(UTC)
            assert windows[period].starts_at == midnight, (zone, period)
            assert windows[period].spent_nano == CHARGE_NANO, (zone, period)
            report = await UsageBook(office.database).read_wallet(
                payer.wallet_id, UsageQuery(since=today, until=today + timedelta(days=1), by=(period,))
            )
            assert [(row.period, row.sums.charge_nano) for row in report.rows] == [(begins, CHARGE_NANO)], (
                zone
            )
        month = await Statements(office.database).read_month(payer.user_id, payer.wallet_id, f"{first:%Y-%m}")
        charges = [(line.day, line.amount_nano) for line in month.lines if line.kind == "settlement"]
        assert charges == [(str(today), -CHARGE_NANO)], zone
        assert month.opening_nano + sum(line.amount_nano for line in month.lines) == month.closing_nano
    await books_hold(office)


async def test_an_hour_ago_is_in_the_window_that_it_was_in(office: Office, payer: Payer) -> None:
    """Every quarter of the last 26 hours, over a change of the clocks, of the month and of the year."""
    caps, spender = Caps(office.database), Spender(office, payer)
    now = datetime.now(UTC)
    calls = await spender.open_all([now - timedelta(minutes=15 * step) for step in range(104)], model="m")
    await spender.settle(calls, accuracy="exact", charge_nano=10, cost_nanousd=10, spread_nano=0)
    await caps.set_caps("wallet", payer.wallet_id, {"day": 10**9, "month": 10**9})
    for zone in ZONES:
        await caps.set_clock(payer.user_id, timezone=zone, week_starts=1)
        since = (now - timedelta(days=2)).astimezone(ZoneInfo(zone)).date()
        query = UsageQuery(since=since, until=since + timedelta(days=4), by=("day",))
        report = await UsageBook(office.database).read_wallet(payer.wallet_id, query)
        days = [minted_at(call).astimezone(ZoneInfo(zone)).date() for call in calls]
        assert {row.period: row.sums.calls for row in report.rows} == {
            day: days.count(day) for day in set(days)
        }, zone
        windows = {cap.period: cap for cap in await caps.find_caps(payer.wallet_id, moment=now)}
        today = now.astimezone(ZoneInfo(zone)).date()
        assert windows["day"].spent_nano == 10 * days.count(today), zone
        assert windows["month"].spent_nano == 10 * sum(
            day.replace(day=1) == today.replace(day=1) for day in days
        ), zone
    await books_hold(office)
