"""What was used: the sums are what the calls say at every moment, and a day is a day on anybody's clock."""

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo, available_timezones

import asyncpg
import pytest

from billing.books.proof import Books
from billing.books.proved_days import DayBook
from billing.books.usage_proof import _NAMES, FIRST_ID, LAST_ID, compare_usage
from billing.calls.corrections import Corrections
from billing.calls.ledger import Ledger
from billing.calls.outcome import Ending
from billing.errors import BrokenInvariantError, InputError, NotFoundError
from billing.identity.key import Owner
from billing.identity.keys import Keys
from billing.ids import id_floor, minted_at, new_id
from billing.postgres.database import Database
from billing.pricing.cost import Usage
from billing.provider.records import Bill
from billing.reports.usage import BIN_BOUNDS_MS, Latency, Sums, UsageBook, UsageQuery, UsageRow, parse_bound
from billing.wallets.caps import Caps
from scripts.cli.usage import draw_bars, show_usage
from scripts.office import Office
from tests.billing.calls.test_ledger import opening
from tests.support.payers import Payer, make_payer

MODELS = ("maker/plain", "maker/modèle:free", "=cmd('x')|1", "a,b\"c'd")


class Spender:
    """Opens and ends calls of a payer, and remembers what it did of each."""

    def __init__(self, office: Office, payer: Payer, dice: random.Random | None = None) -> None:
        self.office = office
        self.payer = payer
        self.dice = dice or random.Random(1)
        self.ledger = Ledger(office.database, worker_id=new_id())
        self.endings: dict[UUID, Ending] = {}

    async def open(self, at: datetime | None = None, **more: Any) -> UUID:
        return (await self.open_all([at or datetime.now(UTC)], **more))[0]

    async def open_all(self, moments: Iterable[datetime], **more: Any) -> list[UUID]:
        calls = []
        for at in moments:
            fields = {
                "model": self.dice.choice(MODELS),
                "key_id": self.dice.choice((self.payer.key_id, None)),
                **more,
            }
            call_id = new_id(at_ms=round(at.timestamp() * 1000))
            calls.append(replace(opening(self.payer, 10_000), call_id=call_id, **fields))
        assert set(await self.ledger.open_calls(calls)) == {"opened"}
        return [call.call_id for call in calls]

    def ending(self, call_id: UUID, **more: Any) -> Ending:
        dice = self.dice
        if dice.random() < 0.2 and not more:
            return Ending(call_id, "void", "upstream_error")
        cost = dice.randrange(1, 9_000)
        fields: dict[str, Any] = {
            "accuracy": dice.choice(("exact", "estimated")),
            "cost_nanousd": cost,
            "charge_nano": cost,
            "spread_nano": cost // 40,
            "first_byte_ms": dice.choice((None, 0, 99, 100, dice.randrange(200_000))),
            "duration_ms": dice.choice((None, 102_399, 102_400, dice.randrange(200_000))),
            **more,
        }
        tokens = Usage(*(dice.randrange(5_000) for _ in range(5)))
        return Ending(call_id, "settled", "completed", generation_id="g", usage=tokens, **fields)

    async def settle(self, call_ids: Iterable[UUID], **more: Any) -> None:
        endings = [self.ending(call_id, **more) for call_id in call_ids]
        await self.ledger.settle_calls(endings)
        self.endings.update({item.call_id: item for item in endings})

    async def spend(self, at: datetime | None = None, **more: Any) -> UUID:
        call_id = await self.open(at)
        await self.settle([call_id], **more)
        return call_id


@pytest.fixture
async def payer(office: Office) -> Payer:
    return await make_payer(office)


@pytest.fixture
def spender(office: Office, payer: Payer) -> Spender:
    return Spender(office, payer)


@asynccontextmanager
async def reading_as_person(office: Office) -> AsyncIterator[UsageBook]:
    """A book by the role that people read by."""
    database = Database(office.settings.postgres, role="api")
    try:
        yield UsageBook(database)
    finally:
        await database.close()


async def differences(office: Office, first: UUID = FIRST_ID, end: UUID = LAST_ID) -> list[str]:
    async with office.database.connection() as connection:
        return await compare_usage(connection, first, end)


async def check(office: Office, *, full: bool = False) -> tuple[bool, str]:
    books = Books(office.database, office.holds, office.upstream, sweep_grace_s=3600)
    found = (await books.check(full=full))["usage"]
    return found.ok, found.detail


async def read(office: Office, payer: Payer, *by: str, **more: Any) -> list[UsageRow]:
    async with reading_as_person(office) as book:
        report = await book.read_own(payer.user_id, payer.wallet_id, UsageQuery(by=by, **more))
    assert sum(report.totals.values(), Sums()) == sum((row.sums for row in report.rows), Sums())
    return list(report.rows)


async def totals(office: Office, payer: Payer) -> Sums:
    return sum((row.sums for row in await read(office, payer)), Sums())


@pytest.mark.calendar
async def test_the_sums_are_those_of_the_calls(office: Office, payer: Payer, spender: Spender) -> None:
    calls = [await spender.open() for _ in range(40)]
    for start in range(0, 40, 7):
        await spender.settle(calls[start : start + 7])
    ended = spender.endings.values()
    settled = [item for item in ended if item.state == "settled"]
    found = await totals(office, payer)
    assert found.calls == len(settled) > 20
    assert found.voids == len(ended) - len(settled) > 0
    assert found.exact == sum(item.accuracy == "exact" for item in settled)
    assert found.cost_nanousd == sum(item.cost_nanousd for item in settled)
    assert found.charge_nano == sum(item.charge_nano for item in settled)
    assert found.spread_nano == sum(item.spread_nano for item in settled)
    for name in (
        "prompt_tokens",
        "completion_tokens",
        "cached_read_tokens",
        "cached_write_tokens",
        "reasoning_tokens",
    ):
        assert getattr(found, name) == sum(getattr(item.usage, name) for item in settled), name
    for name, bins in (("first_byte_ms", found.first_byte_bins), ("duration_ms", found.duration_bins)):
        known = [getattr(item, name) for item in settled if getattr(item, name) is not None]
        assert getattr(found, name) == sum(known)
        ceilings = (*BIN_BOUNDS_MS, 10**9)
        assert bins == tuple(
            sum(low <= value < high for value in known)
            for low, high in zip((0, *BIN_BOUNDS_MS), ceilings, strict=True)
        )
    assert await differences(office) == []


async def test_repairs_are_in_the_sums(office: Office, payer: Payer, spender: Spender) -> None:
    """Corrections both ways, refunds, what the house bears, a void call that cost something after all."""
    corrections = Corrections(office.database, charge_estimates_upward=True)
    first = await spender.spend(accuracy="estimated", charge_nano=5_000, cost_nanousd=5_000, spread_nano=0)
    await corrections.correct(first, Bill("g", Decimal("0.000007"), Usage()))
    assert (await totals(office, payer)).charge_nano == 7_000
    assert (await totals(office, payer)).exact == 1
    await corrections.refund(first, amount_nano=3_000, reason="sorry")
    found = await totals(office, payer)
    assert (found.charge_nano, found.cost_nanousd, found.calls) == (4_000, 7_000, 1)
    lost = await spender.open()
    await spender.ledger.settle_calls([Ending(lost, "void", "worker_lost")])
    assert ((await totals(office, payer)).calls, (await totals(office, payer)).voids) == (1, 1)
    await corrections.correct_late(
        Ending(lost, "settled", "completed", cost_nanousd=1000, provider_cost_nanousd=1000, charge_nano=1000)
    )
    found = await totals(office, payer)
    assert (found.calls, found.voids, found.charge_nano, found.cost_nanousd) == (2, 0, 5_000, 8_000)
    await spender.spend(cost_nanousd=900, charge_nano=0, spread_nano=0, house_nanousd=900)
    report = await UsageBook(office.database).read_wallet(payer.wallet_id, UsageQuery())
    assert report.totals["USD"].house_nanousd == 900 + 3_000
    assert await differences(office) == []


async def test_a_call_in_review_counts_when_it_ends(office: Office, payer: Payer, spender: Spender) -> None:
    call = await spender.open()
    await spender.ledger.settle_calls([Ending(call, "review", "worker_lost", generation_id="g")])
    assert (await totals(office, payer)) == Sums()
    assert await differences(office) == []
    await spender.settle([call], accuracy="exact")
    assert (await totals(office, payer)).calls == 1
    assert await differences(office) == []


async def test_many_settle_at_once(office: Office, spender: Spender, payer: Payer) -> None:
    """Several workers and the sweeper, the same calls twice, corrections in between: nothing is counted twice or left out."""
    others = [await make_payer(office) for _ in range(3)]
    spenders = [spender, *(Spender(office, other, random.Random(7)) for other in others)]
    calls = [(who, await who.open()) for who in spenders for _ in range(40)]
    corrections = Corrections(office.database, charge_estimates_upward=True)
    seen: list[list[str]] = []

    async def settle(part: list[tuple[Spender, UUID]]) -> None:
        endings = [who.ending(call) for who, call in part]
        await Ledger(office.database, worker_id=new_id()).settle_calls(endings)

    async def correct(call: UUID) -> None:
        while True:
            try:
                await corrections.correct(call, Bill("g", Decimal("0.0000005"), Usage()))
            except BrokenInvariantError:  # still live
                await asyncio.sleep(0.01)
            else:
                return

    async def watch() -> None:
        for _ in range(10):
            seen.append(await differences(office))

    dice = random.Random(3)
    parts = [dice.sample(calls, 30) for _ in range(12)]
    rest = [calls[start : start + 40] for start in range(0, len(calls), 40)]
    await asyncio.gather(
        *(settle(part) for part in [*parts, *rest]), *(correct(call) for _, call in calls[::16]), watch()
    )
    assert seen == [[]] * 10
    assert await differences(office) == []
    report = await UsageBook(office.database).read_all(UsageQuery(by=()))
    assert report.totals["USD"].calls + report.totals["USD"].voids == len(calls)


async def test_no_cost_changes_without_the_sums(office: Office, spender: Spender) -> None:
    """What settled before there were sums, in a transaction that ends after, is made to settle again."""
    await spender.spend()
    for change in ("cost_nanousd = 1", "state = 'void'", "charge_nano = charge_nano", "accuracy = 'exact'"):
        async with office.database.connection() as connection:
            with pytest.raises(asyncpg.SerializationError):
                await connection.execute(f"UPDATE calls SET {change}")
    async with office.database.connection() as connection:
        await connection.execute("UPDATE calls SET generation_id = 'other'")


async def test_a_batch_begun_before_the_migration_is_sent_again(
    office: Office, payer: Payer, spender: Spender
) -> None:
    """An older version's function waits for the migration's lock, goes on with its old text, and must not pass the sums by."""
    calls = [await spender.open() for _ in range(2)]
    async with office.database.connection() as connection:
        text = await connection.fetchval(
            "SELECT pg_get_functiondef(oid) FROM pg_proc WHERE proname = 'settle_batch' ORDER BY pronargs DESC LIMIT 1"
        )
        trigger = await connection.fetchval(
            "SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgname = 'calls_usage_kept' AND tgparentid = 0"
        )
        for line in ("PERFORM set_config('tuma.usage_kept', 'yes', true);", "PERFORM add_usage(winners, 1);"):
            assert text.count(line) == 1
            text = text.replace(line, "")
        await connection.execute(text.replace("FUNCTION public.settle_batch(", "FUNCTION public.settle_old("))
        await connection.execute("DROP TRIGGER calls_usage_kept ON calls")

    async with office.database.connection() as old, office.database.connection() as migration:

        async def settle(call: UUID) -> None:
            columns = [
                [call],
                ["settled"],
                ["completed"],
                ["exact"],
                ["provider_cost"],
                ["g"],
                *([[1]] * 5),
                *([[0]] * 7),
                *([[]] * 4),
            ]
            marks = ", ".join(f"${place}" for place in range(1, 24))
            await old.fetch(f"SELECT * FROM settle_old({marks})", new_id(), *columns)

        await settle(calls[0])
        running = migration.transaction()
        await running.start()
        await migration.execute("LOCK TABLE calls IN SHARE ROW EXCLUSIVE MODE")
        waiting = asyncio.create_task(settle(calls[1]))
        blocked = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'calls'::regclass"
        async with asyncio.timeout(30):
            while not await migration.fetchval(blocked):
                await asyncio.sleep(0.01)
        await migration.execute(trigger)
        await migration.execute("SELECT rebuild_usage($1, $2)", FIRST_ID, LAST_ID)
        await running.commit()
        with pytest.raises(asyncpg.SerializationError):
            await waiting
    await spender.settle([calls[1]], accuracy="exact")
    assert (await totals(office, payer)).calls == 2
    assert await differences(office) == []


@pytest.mark.calendar
async def test_summing_anew_changes_nothing(office: Office, spender: Spender) -> None:
    """As an operator may ask for it."""
    now = datetime.now(UTC)
    for hours in (0, 0.1, 0.2, 1, 5, 30, 800):
        await spender.spend(now - timedelta(hours=hours))
    await spender.open()
    query = "SELECT to_jsonb(r)::text AS row FROM usage_rollup r ORDER BY 1"
    async with office.database.connection() as connection:
        before = [row["row"] for row in await connection.fetch(query)]
        await connection.execute("UPDATE usage_rollup SET calls = calls + 1")
        await connection.execute("SELECT rebuild_usage($1, $2)", FIRST_ID, LAST_ID)
        assert [row["row"] for row in await connection.fetch(query)] == before
        hour = now.replace(minute=0, second=0, microsecond=0)
        await connection.execute(
            "SELECT rebuild_usage($1, $2)", id_floor(hour), id_floor(hour + timedelta(hours=1))
        )
        assert [row["row"] for row in await connection.fetch(query)] == before
    assert len(before) >= 5


@pytest.mark.parametrize("name", _NAMES)
async def test_every_difference_is_found(office: Office, spender: Spender, name: str) -> None:
    await spender.spend(accuracy="exact")
    assert await check(office) == (True, "the sums of usage are what the calls say")
    changed = f"{name}[3] = {name}[3] + 1" if name.endswith("bins") else f"{name} = {name} + 1"
    async with office.database.connection() as connection:
        await connection.execute(f"UPDATE usage_rollup SET {changed}")
    ok, detail = await check(office)
    assert not ok
    assert f"{name} " in detail
    assert str(spender.payer.wallet_id) in detail


async def test_a_missing_and_an_invented_sum_are_found(office: Office, spender: Spender) -> None:
    await spender.spend()
    async with office.database.connection() as connection:
        await connection.execute("UPDATE usage_rollup SET model = 'another'")
    found = await differences(office)
    assert len(found) == 2
    assert any("(calls say None)" in text for text in found)
    assert any(" None (calls say" in text for text in found)


@pytest.mark.calendar
async def test_a_day_is_not_proved_while_its_usage_is_wrong(office: Office, spender: Spender) -> None:
    await spender.spend(datetime.now(UTC) - timedelta(days=4))
    await spender.spend(datetime.now(UTC) - timedelta(days=3))
    async with office.database.connection() as connection:
        await connection.execute(
            "UPDATE usage_rollup SET voids = voids + 1 WHERE quarter < now() - interval '3.5 days'"
        )
    with pytest.raises(BrokenInvariantError, match="is not what its calls say"):
        await DayBook(office.database).verify_all()
    assert not (await check(office))[0]
    async with office.database.connection() as connection:
        assert await connection.fetchval("SELECT count(*) FROM verified_days") == 0
        await connection.execute("SELECT rebuild_usage($1, $2)", FIRST_ID, LAST_ID)
    assert await DayBook(office.database).verify_all() == 2
    assert (await check(office))[0]


@pytest.mark.calendar
async def test_proved_days_are_read_again_where_they_changed(office: Office, spender: Spender) -> None:
    """A refund or a late settlement changes an old sum: that wallet's quarter is compared, the rest of the day is not."""
    old = datetime.now(UTC) - timedelta(days=4)
    refunded, untouched = (
        await spender.spend(old, accuracy="exact"),
        await spender.spend(old - timedelta(hours=2)),
    )
    late = await spender.open(old + timedelta(hours=1))
    assert await DayBook(office.database).verify_all() >= 1
    await Corrections(office.database, charge_estimates_upward=True).refund(
        refunded, amount_nano=None, reason="sorry"
    )
    await spender.settle([late], accuracy="exact")
    assert (
        await check(office)
        == await check(office, full=True)
        == (True, "the sums of usage are what the calls say")
    )

    async def is_found(call: UUID) -> bool:
        async with office.database.connection() as connection:
            tampering = connection.transaction()
            await tampering.start()
            await connection.execute(
                "UPDATE usage_rollup SET charge_nano = charge_nano + 1 WHERE quarter = usage_quarter($1)",
                call,
            )
            cut = await connection.fetchval("SELECT end_id FROM verified_days ORDER BY day DESC LIMIT 1")
            quick = await compare_usage(connection, cut, LAST_ID)
            assert await compare_usage(connection, FIRST_ID, LAST_ID)
            await tampering.rollback()
        return bool(quick)

    assert await is_found(refunded)
    assert await is_found(late)
    assert not await is_found(untouched)


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
