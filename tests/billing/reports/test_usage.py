"""What was used, as it is asked for: a day is a day on anybody's clock, and nobody sees another's."""

from collections import defaultdict
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

import asyncpg
import pytest

from billing.errors import InputError, NotFoundError
from billing.identity.key import Owner
from billing.identity.keys import Keys
from billing.ids import minted_at, new_id
from billing.reports.usage import Latency, Sums, UsageBook, UsageQuery, parse_bound
from billing.wallets.caps import Caps
from scripts.cli.usage import draw_bars, show_usage
from scripts.office import Office
from tests.billing.reports.spender import Spender, read, reading_as_person
from tests.support.payers import Payer, make_payer

ZONES = (
    *("Asia/Kathmandu", "Asia/Kolkata", "Australia/Adelaide", "Australia/Lord_Howe", "Pacific/Chatham"),
    *("America/New_York", "America/St_Johns", "Africa/Cairo", "Atlantic/Azores", "Pacific/Kiritimati", "UTC"),
)
# Their clocks change in these days: in March and April, and in October and November.
SEASONS = (datetime(2026, 3, 28, tzinfo=UTC), datetime(2026, 10, 24, tzinfo=UTC))


async def test_a_day_is_a_day_on_its_owners_clock(office: Office, payer: Payer, spender: Spender) -> None:
    moments = []
    for season in SEASONS:
        for zone in ZONES:
            for days in (0, 1, 8, 15):
                day = (season + timedelta(days=days)).date()
                midnight = datetime(day.year, day.month, day.day, tzinfo=ZoneInfo(zone)).astimezone(UTC)
                moments += [midnight - timedelta(milliseconds=1), midnight, midnight + timedelta(minutes=45)]
        moments += [season + timedelta(hours=hours / 4) for hours in range(150)]
    calls = await spender.open_all(moments, model="m", key_id=None)
    await spender.settle(calls, accuracy="exact", cost_nanousd=7, charge_nano=7, spread_nano=0)
    for zone in ZONES:
        for starts in (1, 7) if zone == "Asia/Kathmandu" else (1,):
            await Caps(office.database).set_clock(payer.user_id, timezone=zone, week_starts=starts)
            bounds = {"since": date(2026, 3, 1), "until": date(2026, 11, 30)}
            expected: dict[str, dict[Any, int]] = {
                name: defaultdict(int) for name in ("hour", "day", "week", "month")
            }
            for call in calls:
                local = minted_at(call).astimezone(ZoneInfo(zone))
                day = local.date()
                expected["day"][day] += 1
                expected["week"][day - timedelta(days=(day.isoweekday() - starts) % 7)] += 1
                expected["month"][day.replace(day=1)] += 1
            for period in ("day", "week", "month"):
                rows = await read(office, payer, period, **bounds)
                assert {row.period: row.sums.calls for row in rows} == expected[period], (zone, period)
        rows = await read(office, payer, "day", since=date(2026, 4, 5), until=date(2026, 4, 6))
        on_that_day = [
            call for call in calls if minted_at(call).astimezone(ZoneInfo(zone)).date() == date(2026, 4, 5)
        ]
        assert sum(row.sums.calls for row in rows) == len(on_that_day), zone


@pytest.mark.calendar
async def test_an_hour_that_comes_twice_is_two(office: Office, payer: Payer, spender: Spender) -> None:
    """On 1 November 2026 the hour from one to two comes twice in New York."""
    await Caps(office.database).set_clock(payer.user_id, timezone="America/New_York", week_starts=1)
    for hour in (4, 5, 6, 7):
        await spender.spend(datetime(2026, 11, 1, hour, 30, tzinfo=UTC))
    rows = await read(office, payer, "hour", since=date(2026, 11, 1), until=date(2026, 11, 2))
    assert [row.as_json()["period"] for row in rows] == [
        "2026-11-01T00:00:00-04:00",
        "2026-11-01T01:00:00-04:00",
        "2026-11-01T01:00:00-05:00",
        "2026-11-01T02:00:00-05:00",
    ]


def test_every_zone_differs_by_quarters() -> None:
    """What the sums rely on. Of dates that usage is shown for, as far as zones are known."""
    for name in available_timezones():
        zone = ZoneInfo(name)
        for month in range(0, 18 * 12, 3):
            moment = datetime(2020 + month // 12, month % 12 + 1, 1, tzinfo=UTC).astimezone(zone)
            offset = moment.utcoffset()
            assert offset is not None
            assert offset.total_seconds() % 900 == 0, (name, moment)


async def test_keys_keep_their_names(office: Office, payer: Payer, spender: Spender) -> None:
    keys = Keys(office.database, office.settings.auth, office.settings.limits)
    with_key = await spender.open(model="m", key_id=payer.key_id)
    without = await spender.open(model="m", key_id=None)
    await spender.settle([with_key, without], accuracy="exact")
    async with office.database.connection() as connection:
        await connection.execute("UPDATE api_keys SET name = 'laptop' WHERE id = $1", payer.key_id)
    await keys.rotate(payer.key_id, owner=Owner(payer.user_id, payer.wallet_id), overlap_s=0)
    await keys.revoke(payer.key_id, owner=Owner(payer.user_id, payer.wallet_id))
    rows = await read(office, payer, "key")
    assert [(row.key_id, row.key_name, row.sums.calls) for row in rows] == [
        (payer.key_id, "laptop", 1),
        (None, None, 1),
    ]


async def test_nobody_sees_anothers(office: Office, payer: Payer, spender: Spender) -> None:
    await spender.spend(accuracy="exact")
    other = await make_payer(office)
    async with reading_as_person(office) as book:
        with pytest.raises(NotFoundError):
            await book.read_own(other.user_id, payer.wallet_id, UsageQuery())
        assert (await book.read_own(other.user_id, other.wallet_id, UsageQuery())).totals == {"USD": Sums()}
        async with book._late._primary.as_person(other.user_id) as connection:
            assert await connection.fetchval("SELECT count(*) FROM usage_rollup") == 0
        async with book._late._primary.as_person(payer.user_id) as connection:
            assert await connection.fetchval("SELECT count(*) FROM usage_rollup") == 1
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.fetchval("SELECT house_nanousd FROM usage_rollup")


async def test_everybodys_sums_may_be_more_than_a_wallet_can_hold(office: Office, spender: Spender) -> None:
    now = datetime.now(UTC)
    for hours in (0, 1, 2):
        await spender.spend(now - timedelta(hours=hours), accuracy="exact")
    async with office.database.connection() as connection:
        await connection.execute("UPDATE usage_rollup SET charge_nano = 9000000000000000000")
    report = await UsageBook(office.database).read_all(UsageQuery(by=()))
    assert report.rows[0].as_json()["charge"] == "27000000000"


@pytest.mark.calendar
def test_bounds_are_read_strictly() -> None:
    assert parse_bound("2026-11-01") == date(2026, 11, 1)
    assert parse_bound("2026-11-01T12:15:00+05:45") == datetime(2026, 11, 1, 6, 30, tzinfo=UTC)
    for wrong in (
        "",
        "yesterday",
        "2026-11",
        "20261101x",
        "2026-13-01",
        "2026-02-30",
        "0001-01-01T00:00+23:00",
    ):
        with pytest.raises(InputError):
            parse_bound(wrong)
    now = datetime(2026, 11, 25, 23, 50, tzinfo=UTC)
    assert UsageQuery().resolve("Asia/Kathmandu", now) == (
        datetime(2026, 10, 27, 18, 15, tzinfo=UTC),
        datetime(2026, 11, 26, 18, 15, tzinfo=UTC),
    )
    for wrong_query in (
        UsageQuery(since=date(2026, 11, 2), until=date(2026, 11, 1)),
        UsageQuery(since=date(2026, 11, 2), until=date(2026, 11, 2)),
        UsageQuery(since=date(2024, 11, 2), until=date(2026, 11, 1)),
        UsageQuery(since=date(1, 1, 1)),
        UsageQuery(until=date(9999, 12, 31)),
        UsageQuery(since=datetime(2026, 11, 2, 0, 7, tzinfo=UTC)),
    ):
        with pytest.raises(InputError):
            wrong_query.resolve("Africa/Lagos", now)
    for by in (("year",), ("day", "hour"), ("model", "model")):
        with pytest.raises(InputError):
            UsageQuery(by=by)


def test_latencies_say_no_more_than_the_bins_know() -> None:
    bins = [0] * 12
    assert Latency(0, 0, tuple(bins)).average_ms is None
    assert Latency(0, 0, tuple(bins)).below_ms(50) is None
    bins[1] = 10  # 100 to 200 ms
    bins[4] = 9
    bins[11] = 1  # beyond the last bound
    found = Latency(20, 12_345, tuple(bins))
    assert found.average_ms == 617
    assert (found.below_ms(50), found.below_ms(51), found.below_ms(95), found.below_ms(96)) == (
        200,
        1_600,
        1_600,
        None,
    )


@pytest.mark.calendar
async def test_the_command_shows_a_table(office: Office, payer: Payer, spender: Spender) -> None:
    now = datetime.now(UTC)
    for days in (0, 0, 1, 2, 9):
        await spender.spend(now - timedelta(days=days), accuracy="exact")
    await spender.spend(now, accuracy="estimated")
    options: dict[str, Any] = {"wallet": None, "user": None, "since": None, "until": None}
    for whose in ({"wallet": str(payer.wallet_id)}, {"user": str(payer.user_id)}, {}):
        for by in ("day", "week", "month", "hour", "model", "key,model", "day,model", ""):
            shown = await show_usage(office, **{**options, **whose}, by=by)
            assert sum(row["calls"] for row in shown["rows"]) == 6, (whose, by)
            assert [total["calls"] for total in shown["totals"]] == [6]
            assert any(bar in shown["report"] for bar in "▁▂▃▄▅▆▇█") == (by != "hour"), by
            if by:
                assert "total" in shown["report"]
    with pytest.raises(InputError):
        await show_usage(office, **{**options, "wallet": str(payer.wallet_id), "user": "x"}, by="day")
    with pytest.raises(NotFoundError):
        await show_usage(office, **{**options, "wallet": str(new_id())}, by="day")


def test_bars() -> None:
    assert draw_bars([0, 1, 50, 100]) == " ▁▄█"
    assert draw_bars([]) == draw_bars([0])[:0] == ""
