"""A cap's window is one of the user's clock; what is counted in it belongs to it, however late it comes."""

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.calls.corrections import Corrections
from billing.errors import CapExceededError
from billing.money import NANO
from billing.provider.records import Bill
from tests.billing.wallets.caps_shop import SCOPES, Shop, scope_id

ZONES = (
    "UTC",
    "Africa/Lagos",
    "Africa/Cairo",  # its clocks change at midnight: the first hour of a day is skipped, or shown twice
    "America/Havana",
    "America/Santiago",
    "Asia/Beirut",
    "Asia/Kathmandu",
    "Australia/Lord_Howe",  # half an hour
    "Europe/Berlin",
    "Pacific/Apia",  # skipped 30 December 2011
)


def start_by_hand(period: str, moment: datetime, zone: str, week_starts: int) -> tuple[datetime, datetime]:
    """The window's ends by Python's own time zones: fold 0 is the first of two equal times, and the end of a gap."""
    day = moment.astimezone(ZoneInfo(zone)).date()
    if period == "day":
        first, after = day, day + timedelta(1)
    elif period == "week":
        first = day - timedelta((day.isoweekday() - week_starts) % 7)
        after = first + timedelta(7)
    else:
        first = day.replace(day=1)
        after = (first + timedelta(32)).replace(day=1)

    def midnight(day: date) -> datetime:
        return datetime(day.year, day.month, day.day, tzinfo=ZoneInfo(zone)).astimezone(UTC)

    return midnight(first), midnight(after)


@pytest.mark.calendar
async def test_windows_follow_the_users_clock(shop: Shop) -> None:
    """Over daylight saving, month ends and weeks: equal to Python's reckoning, without gaps, and around the moment."""
    moments: list[tuple[str, str, datetime, int]] = []

    @given(
        zone=st.sampled_from(ZONES),
        period=st.sampled_from(["day", "week", "month"]),
        moment=st.datetimes(datetime(2010, 1, 1), datetime(2040, 1, 1)),  # noqa: DTZ001 - UTC is added below
        week_starts=st.integers(1, 7),
    )
    def collect(zone: str, period: str, moment: datetime, week_starts: int) -> None:
        moments.append((period, zone, moment.replace(tzinfo=UTC), week_starts))

    collect()
    for zone in ZONES:  # every hour of the days on which clocks change in 2025
        hours = [datetime(2025, 1, 1, tzinfo=UTC) + timedelta(hours=hour) for hour in range(24 * 365)]
        for before, after in pairwise(hours):
            if before.astimezone(ZoneInfo(zone)).utcoffset() != after.astimezone(ZoneInfo(zone)).utcoffset():
                moments += [
                    ("day", zone, before + timedelta(minutes=20 * step), 1) for step in range(-75, 75)
                ]
    async with shop.workers[0].database.connection() as connection:
        rows = await connection.fetch(
            "SELECT w.*, (cap_window(a.period, w.ends_at, a.zone, a.week)).starts_at AS next_starts"
            " FROM unnest($1::text[], $2::timestamptz[], $3::text[], $4::int[]) WITH ORDINALITY AS a (period, moment, zone, week, ord)"
            " CROSS JOIN LATERAL cap_window(a.period, a.moment, a.zone, a.week) w ORDER BY a.ord",
            [item[0] for item in moments],
            [item[2] for item in moments],
            [item[1] for item in moments],
            [item[3] for item in moments],
        )
    assert len(rows) == len(moments) > 1000
    for (period, zone, moment, week_starts), row in zip(moments, rows, strict=True):
        told = (period, zone, moment, week_starts)
        assert row["starts_at"] <= moment < row["ends_at"], told
        assert row["next_starts"] == row["ends_at"], told
        assert (row["starts_at"], row["ends_at"]) == start_by_hand(period, moment, zone, week_starts), told


@pytest.mark.calendar
async def test_a_cap_is_whole_again_in_the_next_window(shop: Shop) -> None:
    """The end of a day on the user's clock; what arrived before it counts where it belongs, however late it ends."""
    caller = await shop.make_caller()
    await shop.caps.set_clock(caller.user_id, timezone="America/New_York", week_starts=7)
    for period in ("day", "month"):
        await shop.caps.set_caps("wallet", caller.wallet_id, {period: 10 * NANO})
    # On 1 November 2037 clocks go back in New York: a day of 25 hours, from 04:00 to 05:00 UTC, and a new month.
    before = datetime(2037, 11, 1, 3, 59, 59, 999000, tzinfo=UTC)
    after = datetime(2037, 11, 1, 4, 0, tzinfo=UTC)
    late = datetime(2037, 11, 2, 4, 59, 59, 999000, tzinfo=UTC)
    monday = datetime(2037, 11, 2, 5, 0, tzinfo=UTC)
    first = await shop.begin(caller, 9 * NANO, at=before)
    await shop.refuses(caller, 2 * NANO, at=before)
    second = await shop.begin(caller, 6 * NANO, at=after)
    await shop.end(first, 8 * NANO)
    await shop.counts_hold(caller, after)
    await shop.refuses(caller, 5 * NANO, at=late)
    # Of the day before it: Redis has moved on to a new window, Postgres still knows.
    assert await shop.open_unreserved(caller, 3 * NANO, at=before) == "cap_exceeded"
    with pytest.raises(CapExceededError):
        await shop.begin(caller, 3 * NANO, at=before)
    await shop.end(second, 6 * NANO)
    with pytest.raises(CapExceededError, match="month"):  # the day is new, the month is not
        await shop.begin(caller, 5 * NANO, at=monday)
    third = await shop.pay(caller, 4 * NANO, at=monday)
    await shop.counts_hold(caller, monday)
    windows = (await shop.look(caller))[1]
    spent = {(period, starts): amount for _, period, starts, _, amount in windows}
    new_york = ZoneInfo("America/New_York")
    assert spent["day", datetime(2037, 10, 31, tzinfo=new_york)] == 8 * NANO
    assert spent["day", datetime(2037, 11, 1, tzinfo=new_york)] == 6 * NANO
    assert spent["day", datetime(2037, 11, 2, tzinfo=new_york)] == 4 * NANO
    assert spent["month", datetime(2037, 10, 1, tzinfo=new_york)] == 8 * NANO
    assert spent["month", datetime(2037, 11, 1, tzinfo=new_york)] == 10 * NANO
    assert third.hold.amount_nano == 4 * NANO


@pytest.mark.calendar
async def test_thresholds_are_told_once_per_window(shop: Shop) -> None:
    caller = await shop.make_caller()
    await shop.caps.set_caps("wallet", caller.wallet_id, {"day": 10 * NANO})
    steps: list[Callable[[], Any]] = [lambda: shop.pay(caller, 4 * NANO), lambda: shop.pay(caller, NANO)]
    await steps[0]()
    assert await shop.events(caller) == []
    await steps[1]()
    assert await shop.events(caller) == [("day", 50)]
    await shop.pay(caller, NANO)
    assert await shop.events(caller) == [("day", 50)]
    await shop.pay(caller, 4 * NANO)
    assert await shop.events(caller) == [("day", 50), ("day", 100)]
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    await shop.pay(caller, 8 * NANO, at=tomorrow)
    assert await shop.events(caller) == [("day", 50), ("day", 100), ("day", 80)]


@pytest.mark.calendar
async def test_corrections_and_refunds_move_the_window_of_their_call(shop: Shop) -> None:
    caller = await shop.make_caller()
    yesterday = datetime.now(UTC) - timedelta(days=1)
    for scope in SCOPES:
        await shop.caps.set_caps(scope, scope_id(caller, scope), {"day": 10 * NANO})
    old = await shop.pay(caller, 6 * NANO, at=yesterday)
    new = await shop.pay(caller, 5 * NANO)
    corrections = Corrections(shop.workers[0].database, charge_estimates_upward=True)
    await corrections.correct(old.call_id, Bill("gen", Decimal(4), shop.provider.bills.popitem()[1].usage))
    await corrections.refund(new.call_id, amount_nano=2 * NANO, reason="test")
    spent = {}
    for at in (yesterday, datetime.now(UTC)):
        for cap in await shop.caps.find_caps(*(scope_id(caller, scope) for scope in SCOPES), moment=at):
            spent[cap.scope, at.date()] = cap.spent_nano
    today, before = datetime.now(UTC).date(), yesterday.date()
    assert {spent[scope, before] for scope in SCOPES} == {4 * NANO}
    assert {spent[scope, today] for scope in SCOPES} == {3 * NANO}
    await shop.workers[0].holds.cool(caller.user_id)
    await shop.refuses(caller, 7 * NANO + 1)
    await shop.pay(caller, 7 * NANO)


@pytest.mark.calendar
async def test_old_windows_are_forgotten_and_counted_anew(shop: Shop) -> None:
    caller = await shop.make_caller()
    old = datetime.now(UTC) - timedelta(days=60)
    await shop.caps.set_caps("wallet", caller.wallet_id, {"day": 10 * NANO})
    await shop.pay(caller, 4 * NANO, at=old)
    live = await shop.begin(caller, 3 * NANO, at=old)
    assert await shop.caps.forget_windows() == 1
    await shop.end(live, 2 * NANO)
    (cap,) = await shop.caps.find_caps(caller.wallet_id, moment=old)
    assert (cap.held_nano, cap.spent_nano) == (0, 6 * NANO)
    await shop.counts_hold(caller, old)
