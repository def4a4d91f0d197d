"""Caps: windows of the user's clock, kept in Redis and in Postgres, whatever happens to either."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.books.proof import Books
from billing.calls.assessment import Evidence
from billing.calls.corrections import Corrections
from billing.calls.ledger import Extension, Opening
from billing.calls.live_call import LiveCall
from billing.calls.outcome import Ending
from billing.errors import CapExceededError, InputError, InsufficientFundsError, NotFoundError, RateLimitError
from billing.holds.hold import Hold
from billing.identity.caller import Caller
from billing.ids import new_id
from billing.limits import Limits
from billing.money import NANO
from billing.provider.records import Bill
from billing.wallets.caps import Caps, Scope
from tests.stateful.world import (
    MODEL,
    WIDE,
    Connections,
    House,
    LittleProvider,
    Worker,
    check_all,
    ending_of,
    furnish,
    make_caller,
    quote_of,
)
from tests.support.settings import make_settings

NGN_RATE = 1_600
SCOPES: tuple[Scope, ...] = ("wallet", "key", "user")
PERIODS = ("day", "week", "month", "total")


@dataclass
class Shop:
    """A database with a few workers on it."""

    workers: list[Worker]
    provider: LittleProvider
    house: House

    @property
    def caps(self) -> Caps:
        return Caps(self.workers[0].database)

    async def make_caller(self, *, amount: int = 1_000, currency: str = "USD") -> Caller:
        caller = await make_caller(self.workers[0].connections, currency=currency)
        await self.workers[0].wallets.credit(caller.wallet_id, amount * NANO, reason="test")
        return caller

    async def begin(
        self, caller: Caller, nanousd: int, *, worker: int = 0, at: datetime | None = None
    ) -> LiveCall:
        """Reserve, open and confirm a call that arrived at a moment."""
        calls = self.workers[worker].calls
        call_id = new_id() if at is None else new_id(at_ms=int(at.timestamp() * 1000))
        quote = quote_of(self.house, caller, nanousd)
        call = await calls.reserve(caller, quote, call_id=call_id, model=MODEL, stream=False)
        calls.open(call)
        try:
            await calls.confirm_open(call)
        except BaseException:
            await asyncio.wait((calls.end(call, Ending(call.call_id, "void", "test")),))
            raise
        return call

    async def end(self, call: LiveCall, nanousd: int, *, worker: int = 0) -> None:
        """Let the provider bill so much for it."""
        calls = self.workers[worker].calls
        generation_id = self.provider.answer(nanousd)
        bill = self.provider.bills[generation_id]
        ending = ending_of(
            call, Evidence(generation_id=generation_id, billed_usd=bill.cost_usd, usage=bill.usage)
        )
        task = calls.end(call, ending)
        await asyncio.wait((task,))
        task.result()

    async def pay(self, caller: Caller, nanousd: int, **when: Any) -> LiveCall:
        call = await self.begin(caller, nanousd, **when)
        await self.end(call, nanousd)
        return call

    async def refuses(self, caller: Caller, nanousd: int, *, at: datetime | None = None) -> None:
        """Redis refuses, and so would Postgres alone; neither has changed."""
        with pytest.raises(CapExceededError):
            await self.begin(caller, nanousd, at=at)
        before = await self.look(caller)  # the mirror is warm now
        with pytest.raises(CapExceededError):
            await self.begin(caller, nanousd, at=at)
        assert await self.open_unreserved(caller, nanousd, at=at) == "cap_exceeded"
        assert await self.look(caller) == before

    def opening_of(self, caller: Caller, nanousd: int, *, at: datetime | None = None) -> Opening:
        quote = quote_of(self.house, caller, nanousd)
        return Opening(
            new_id() if at is None else new_id(at_ms=int(at.timestamp() * 1000)),
            caller.user_id,
            caller.wallet_id,
            caller.key_id,
            MODEL,
            False,
            quote.price.id,
            quote.fx.id,
            quote.hold_nano,
            quote.hold_nanousd,
        )

    async def open_unreserved(self, caller: Caller, nanousd: int, *, at: datetime | None = None) -> str:
        opening = self.opening_of(caller, nanousd, at=at)
        return (await self.workers[0].ledger.open_calls([opening]))[0]

    async def look(self, caller: Caller) -> tuple[Any, ...]:
        """What Redis and Postgres count of a caller."""
        mirror = await self.workers[0].holds.read_mirror(caller.user_id)
        scopes = (caller.user_id, caller.wallet_id, *([caller.key_id] if caller.key_id else []))
        async with self.workers[0].database.connection() as connection:
            rows = await connection.fetch(
                "SELECT scope_id, period, starts_at, held_nano, spent_nano FROM cap_windows"
                " WHERE scope_id = ANY ($1) ORDER BY 1, 2, 3",
                list(scopes),
            )
        return mirror, [tuple(row) for row in rows]

    async def counts_hold(self, caller: Caller, moment: datetime | None = None) -> None:
        """What is counted as calls come and go is what counting them anew gives, in Postgres and in Redis."""
        checks = await Books(
            self.workers[0].database, self.workers[0].holds, self.provider, sweep_grace_s=60
        ).check(full=True)
        assert checks["I7"].ok, checks["I7"].detail
        assert checks["I6"].ok, checks["I6"].detail
        mirror = await self.workers[0].holds.read_mirror(caller.user_id)
        if mirror:
            assert mirror == await self.workers[0].ledger.read_mirror(
                caller.user_id, moment or datetime.now(UTC)
            )

    async def events(self, caller: Caller) -> list[tuple[str, int]]:
        async with self.workers[0].database.connection() as connection:
            rows = await connection.fetch(
                "SELECT body->>'period' AS period, (body->>'percent')::int AS percent FROM events"
                " WHERE user_id = $1 ORDER BY id",
                caller.user_id,
            )
        return [(row["period"], row["percent"]) for row in rows]


@pytest.fixture
async def shop(dsn: str, redis_url: str) -> AsyncIterator[Shop]:
    settings = make_settings(
        postgres_dsn=dsn,
        redis_url=redis_url,
        holds={"lease_s": 600, "renew_s": 60},
        sweep={"worker_lease_s": 600},
        quota={"slab_usd": 10**5},
        postgres={"pool_max": 4},
    )
    provider = LittleProvider()
    async with AsyncExitStack() as stack:
        workers = []
        for _ in range(3):
            connections = Connections(settings)
            stack.push_async_callback(connections.close)
            workers.append(Worker(connections, provider))
        house = await furnish(workers[0].connections, provider, rates={"NGN": (str(NGN_RATE), 0)})
        for worker in workers:
            await worker.register()
            await worker.quota.load()
        yield Shop(workers, provider, house)


def scope_id(caller: Caller, scope: Scope) -> UUID:
    found = {"wallet": caller.wallet_id, "key": caller.key_id, "user": caller.user_id}[scope]
    assert found is not None
    return found


# -- windows ----------------------------------------------------------------------------------------------------------

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


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("period", PERIODS)
async def test_a_cap_counts_what_is_held_and_spent(shop: Shop, scope: Scope, period: str) -> None:
    caller = await shop.make_caller()
    await shop.caps.set_caps(scope, scope_id(caller, scope), {period: 10 * NANO})
    first = await shop.begin(caller, 6 * NANO)
    await shop.refuses(caller, 4 * NANO + 1)
    second = await shop.begin(caller, 4 * NANO)
    await shop.refuses(caller, 1)
    await shop.end(first, 5 * NANO)
    await shop.refuses(caller, NANO + 1)
    await shop.end(second, 0)
    await shop.pay(caller, 5 * NANO)
    await shop.refuses(caller, 1)
    await shop.counts_hold(caller)
    other = await shop.make_caller()
    await shop.pay(other, 20 * NANO)


@pytest.mark.parametrize("scope", SCOPES)
async def test_a_cap_per_call_bounds_the_hold_with_its_extensions(shop: Shop, scope: Scope) -> None:
    caller = await shop.make_caller()
    await shop.caps.set_caps(scope, scope_id(caller, scope), {"call": 5 * NANO})
    await shop.refuses(caller, 5 * NANO + 1)
    calls = [await shop.begin(caller, 5 * NANO), await shop.begin(caller, 3 * NANO)]
    extend = shop.workers[0].calls.extend
    assert await extend(calls[1], hold_nano=5 * NANO, hold_nanousd=5 * NANO)
    before = await shop.look(caller)
    assert not await extend(calls[1], hold_nano=5 * NANO + 1, hold_nanousd=5 * NANO + 1)
    assert await shop.look(caller) == before
    for call in calls:
        await shop.end(call, NANO)
    await shop.counts_hold(caller)


@pytest.mark.parametrize("scope", SCOPES)
async def test_an_extension_is_refused_by_what_is_left(shop: Shop, scope: Scope) -> None:
    caller = await shop.make_caller()
    await shop.caps.set_caps(scope, scope_id(caller, scope), {"day": 10 * NANO})
    call = await shop.begin(caller, 4 * NANO)
    worker = shop.workers[0]
    assert await worker.calls.extend(call, hold_nano=9 * NANO, hold_nanousd=9 * NANO)
    await shop.refuses(caller, 2 * NANO)
    before = await shop.look(caller)
    assert not await worker.calls.extend(call, hold_nano=11 * NANO, hold_nanousd=11 * NANO)
    assert await shop.look(caller) == before
    # Postgres alone refuses too, and the call stands as before.
    verdicts = await worker.ledger.extend_calls([Extension(call.call_id, 11 * NANO, 11 * NANO)])
    assert verdicts == ["cap_exceeded"]
    await worker.pipe.run("FLUSHALL")
    assert not await worker.calls.extend(call, hold_nano=11 * NANO, hold_nanousd=11 * NANO)
    assert await worker.calls.extend(call, hold_nano=10 * NANO, hold_nanousd=10 * NANO)
    await shop.end(call, 10 * NANO)
    await shop.refuses(caller, 1)
    await shop.counts_hold(caller)


async def test_refusals_say_whose_cap_and_until_when(shop: Shop) -> None:
    caller = await shop.make_caller()
    await shop.caps.set_caps("key", scope_id(caller, "key"), {"day": 10 * NANO})
    await shop.pay(caller, 7 * NANO)
    with pytest.raises(CapExceededError) as caught:
        await shop.begin(caller, 4 * NANO)
    text = str(caught.value)
    assert "the key's cap is 10 USD per day, and 3 of it is left until" in text
    assert f"{datetime.now(UTC) + timedelta(days=1):%Y-%m-%d}T00:00:00Z" in text or "T00:00:00Z" in text


async def test_funds_are_asked_before_caps_and_neither_keeps_anything(shop: Shop) -> None:
    caller = await shop.make_caller(amount=5)
    await shop.caps.set_caps("wallet", caller.wallet_id, {"day": 100 * NANO})
    with pytest.raises(InsufficientFundsError):
        await shop.begin(caller, 6 * NANO)
    assert await shop.open_unreserved(caller, 6 * NANO) == "insufficient_funds"
    await shop.counts_hold(caller)
    await shop.pay(caller, 5 * NANO)
    await shop.counts_hold(caller)


async def test_one_batch_is_judged_call_by_call(shop: Shop) -> None:
    """Ten calls in one commit, of two keys: each cap admits what fits it, in their order."""
    caller = await shop.make_caller()
    await shop.caps.set_caps("wallet", caller.wallet_id, {"day": 10 * NANO})
    batch = [shop.opening_of(caller, 3 * NANO) for _ in range(5)]
    verdicts = await shop.workers[0].ledger.open_calls(batch)
    assert verdicts == ["opened", "opened", "opened", "cap_exceeded", "cap_exceeded"]
    assert await shop.workers[0].ledger.open_calls(batch[:3]) == ["opened"] * 3, "a repeat changes nothing"
    await shop.counts_hold(caller)
    await shop.workers[0].ledger.settle_calls([Ending(item.call_id, "void", "test") for item in batch[:3]])
    await shop.counts_hold(caller)


# -- many at once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
async def test_two_hundred_at_once_never_pass_a_cap_nor_leave_a_holds_worth(shop: Shop, scope: Scope) -> None:
    """On three workers: what is held and spent never exceeds the cap; when all are refused, less than one hold is left."""
    caller = await shop.make_caller()
    limit, hold, cost = 20 * NANO, NANO, 3 * NANO // 10
    await shop.caps.set_caps(scope, scope_id(caller, scope), {"day": limit})
    flushing = asyncio.Event()

    async def spend(number: int) -> int:
        spent = 0
        while True:
            try:
                call = await shop.begin(caller, hold, worker=number % 3)
            except CapExceededError:
                async with shop.workers[0].database.connection() as connection:
                    held = await connection.fetchval(
                        "SELECT coalesce(sum(held_nano), 0) FROM cap_windows WHERE scope_id = $1",
                        scope_id(caller, scope),
                    )
                if not held:
                    return spent
                await asyncio.sleep(0.02)
                continue
            await shop.end(call, cost, worker=number % 3)
            spent += cost
            flushing.set()

    async def watch() -> None:
        await flushing.wait()
        async with shop.workers[0].database.connection() as connection:
            for step in range(1000):
                most = await connection.fetchval("SELECT max(held_nano + spent_nano) FROM cap_windows")
                assert most <= limit
                if step == 20:
                    await shop.workers[0].pipe.run("FLUSHALL")
                await asyncio.sleep(0.005)

    watching = asyncio.create_task(watch())
    spent = sum(await asyncio.gather(*(spend(number) for number in range(200))))
    watching.cancel()
    await asyncio.wait((watching,))
    assert watching.cancelled() or watching.exception() is None
    assert limit - hold < spent <= limit
    await shop.counts_hold(caller)
    await check_all(shop.workers[0], shop.provider)


async def test_a_users_cap_counts_dollars_over_wallets_of_several_currencies(shop: Shop) -> None:
    dollars = await shop.make_caller()
    worker = shop.workers[0]
    wallet_id = await worker.wallets.create_wallet(str(dollars.user_id), currency="NGN")
    await worker.wallets.credit(wallet_id, 10**6 * NANO, reason="test")
    naira = Caller(dollars.user_id, wallet_id, None, "NGN", WIDE)
    await shop.caps.set_caps("user", dollars.user_id, {"month": 10 * NANO})
    third = await worker.wallets.create_wallet(str(dollars.user_id), currency="EUR")
    async with worker.database.connection() as connection:
        assert await connection.fetchval("SELECT capped FROM wallets WHERE id = $1", third), (
            "made after the cap"
        )

    async def spend(caller: Caller, number: int) -> int:
        try:
            call = await shop.begin(caller, NANO, worker=number % 3)
        except CapExceededError:
            return 0
        await asyncio.sleep(0.01)
        await shop.end(call, NANO, worker=number % 3)
        return 1

    paid = await asyncio.gather(*(spend((dollars, naira)[number % 2], number) for number in range(60)))
    assert sum(paid) == 10
    await shop.refuses(naira, 1)
    await shop.refuses(dollars, 1)
    await shop.counts_hold(dollars)


async def test_a_window_that_another_wallet_makes_meanwhile_counts_a_settlement(shop: Shop) -> None:
    """One transaction makes a user's window while a call of another of their wallets, live as it sees it, is settled."""
    dollars = await shop.make_caller()
    worker = shop.workers[0]
    wallet_id = await worker.wallets.create_wallet(str(dollars.user_id), currency="USD")
    await worker.wallets.credit(wallet_id, 100 * NANO, reason="test")
    other = Caller(dollars.user_id, wallet_id, None, "USD", WIDE)
    await shop.caps.set_caps("user", dollars.user_id, {"day": 10 * NANO})
    call = await shop.begin(other, 3 * NANO)
    quote = quote_of(shop.house, dollars, NANO)
    async with worker.database.transaction() as connection:
        await connection.execute("DELETE FROM cap_windows")
    async with worker.database.transaction() as connection:
        verdict = await connection.fetchval(
            "SELECT verdict FROM open_batch($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
            worker.id,
            [new_id()],
            [dollars.user_id],
            [dollars.wallet_id],
            [dollars.key_id],
            [MODEL],
            [False],
            [quote.price.id],
            [quote.fx.id],
            [quote.hold_nano],
            [quote.hold_nanousd],
        )
        assert verdict == "opened"
        settling = asyncio.create_task(shop.end(call, 2 * NANO))
        await asyncio.sleep(0.3)
        assert not settling.done()
    await settling
    (cap,) = await shop.caps.find_caps(dollars.user_id)
    assert (cap.held_nano, cap.spent_nano) == (NANO, 2 * NANO)


# -- changes ----------------------------------------------------------------------------------------------------------


@pytest.mark.calendar
async def test_a_cap_counts_what_was_spent_before_it_was_set(shop: Shop) -> None:
    caller = await shop.make_caller()
    await shop.pay(caller, 3 * NANO)
    void = await shop.begin(caller, NANO)
    await shop.end(void, 0)
    live = await shop.begin(caller, 2 * NANO)
    for scope in SCOPES:
        await shop.caps.set_caps(scope, scope_id(caller, scope), {"day": 6 * NANO, "total": 50 * NANO})
    await shop.workers[0].holds.cool(caller.user_id)
    await shop.refuses(caller, NANO + 1)
    await shop.end(live, 2 * NANO)
    await shop.pay(caller, NANO)
    await shop.refuses(caller, 1)
    await shop.counts_hold(caller)
    for cap in await shop.caps.find_caps(*(scope_id(caller, scope) for scope in SCOPES)):
        assert (cap.held_nano, cap.spent_nano) == (0, 6 * NANO)


async def test_caps_set_while_calls_come_and_go_count_every_one(shop: Shop) -> None:
    caller = await shop.make_caller()
    done = asyncio.Event()

    async def spend(number: int) -> None:
        while not done.is_set():
            try:
                call = await shop.begin(caller, 10**6, worker=number % 3)
            except CapExceededError:
                continue
            await shop.end(call, 10**5, worker=number % 3)

    spending = [asyncio.create_task(spend(number)) for number in range(12)]
    for step in range(30):
        for scope in SCOPES:
            limits = {"day": 10**9 if step % 3 else None, "total": 10**12 if step % 2 else None}
            await shop.caps.set_caps(scope, scope_id(caller, scope), limits)
        if step % 5 == 0:
            zone = ("Asia/Tokyo", "America/Lima")[step % 2]
            await shop.caps.set_clock(caller.user_id, timezone=zone, week_starts=1 + step % 7)
    done.set()
    await asyncio.gather(*spending)
    await shop.workers[0].holds.cool(caller.user_id)
    await shop.counts_hold(caller)
    await check_all(shop.workers[0], shop.provider)


async def test_the_user_sets_limits_below_the_operators_ceiling(shop: Shop) -> None:
    caller = await shop.make_caller()
    room = shop.caps
    await room.set_caps("wallet", caller.wallet_id, {"day": 10 * NANO})
    await room.set_caps("wallet", caller.wallet_id, {"day": 50 * NANO}, owner=caller.user_id)
    (cap,) = await room.find_caps(caller.wallet_id)
    assert (cap.effective_nano, cap.as_json()["limit"]) == (10 * NANO, "10")
    await shop.workers[0].holds.cool(caller.user_id)
    await shop.refuses(caller, 11 * NANO)
    await room.set_caps("wallet", caller.wallet_id, {"day": None}, owner=caller.user_id)
    await shop.workers[0].holds.cool(caller.user_id)
    await shop.refuses(caller, 11 * NANO)
    await room.set_caps("wallet", caller.wallet_id, {"day": 0}, owner=caller.user_id)
    await shop.workers[0].holds.cool(caller.user_id)
    await shop.refuses(caller, 1)
    await room.set_caps("wallet", caller.wallet_id, {"day": None})
    await room.set_caps("wallet", caller.wallet_id, {"day": None}, owner=caller.user_id)
    assert await room.find_caps(caller.wallet_id) == []
    await shop.workers[0].holds.cool(caller.user_id)
    await shop.pay(caller, 11 * NANO)
    async with shop.workers[0].database.connection() as connection:
        assert not await connection.fetchval("SELECT capped FROM wallets WHERE id = $1", caller.wallet_id)
        assert not await connection.fetchval("SELECT count(*) FROM cap_windows")


async def test_bad_input_is_refused(shop: Shop) -> None:
    caller = await shop.make_caller()
    room = shop.caps
    with pytest.raises(InputError, match="fortnight"):
        await room.set_caps("wallet", caller.wallet_id, {"fortnight": 1}, owner=caller.user_id)
    with pytest.raises(InputError):
        await room.set_caps("wallet", caller.wallet_id, {"day": -1}, owner=caller.user_id)
    with pytest.raises(NotFoundError):
        await room.set_caps("key", caller.wallet_id, {"day": 1}, owner=caller.user_id)
    for zone in ("Mars/Olympus", "", "EST5EDT4,M3.2.0,M11.1.0", "'; DROP TABLE users; --"):
        with pytest.raises(InputError, match="time zone"):
            await room.set_clock(caller.user_id, timezone=zone, week_starts=1)
    with pytest.raises(InputError):
        await room.set_clock(caller.user_id, timezone="UTC", week_starts=8)
    with pytest.raises(NotFoundError):
        await room.set_clock(new_id(), timezone="UTC", week_starts=1)
    assert await room.find_caps(caller.wallet_id) == []


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


@pytest.mark.calendar
async def test_a_flush_forgets_no_window(shop: Shop) -> None:
    caller = await shop.make_caller()
    for scope in SCOPES:
        await shop.caps.set_caps(scope, scope_id(caller, scope), {"day": 10 * NANO})
    await shop.pay(caller, 4 * NANO)
    live = await shop.begin(caller, 3 * NANO)
    await shop.workers[0].pipe.run("FLUSHALL")
    await shop.refuses(caller, 3 * NANO + 1)
    await shop.workers[0].pipe.run("FLUSHALL")
    assert await shop.workers[0].holds.renew(live.hold) == "cold"
    other = await shop.begin(caller, 3 * NANO)
    await shop.refuses(caller, 1)
    await shop.end(live, 3 * NANO)
    await shop.end(other, 3 * NANO)
    await shop.counts_hold(caller)


async def test_the_books_find_a_cap_that_counts_otherwise(shop: Shop) -> None:
    caller = await shop.make_caller()
    await shop.caps.set_caps("wallet", caller.wallet_id, {"day": 10 * NANO})
    await shop.pay(caller, 4 * NANO)
    worker = shop.workers[0]
    books = Books(worker.database, worker.holds, shop.provider, sweep_grace_s=60)
    key = f"tuma:{{s{caller.user_id.int % 64:02d}}}:u:{caller.user_id}"
    await worker.pipe.run("HINCRBY", key, f"left:{caller.wallet_id}:day", "1")
    checks = await books.check()
    assert not checks["I6"].ok
    assert f"caps of user {caller.user_id}" in checks["I6"].detail
    await worker.holds.cool(caller.user_id)
    async with worker.database.connection() as connection:
        await connection.execute("UPDATE cap_windows SET spent_nano = spent_nano - 1")
    checks = await books.check()
    assert not checks["I7"].ok
    assert "a cap counts otherwise than its calls" in checks["I7"].detail
    assert checks["I6"].ok


async def test_a_hold_that_a_flush_took_is_put_back_under_its_caps(shop: Shop) -> None:
    """Reserved, not yet open, the mirror lost and filled without it: a sign of life counts it again, in dollars too."""
    caller = await shop.make_caller()
    for scope in SCOPES:
        await shop.caps.set_caps(scope, scope_id(caller, scope), {"day": 10 * NANO})
    worker = shop.workers[0]
    quote = quote_of(shop.house, caller, 6 * NANO)
    call = await worker.calls.reserve(caller, quote, call_id=new_id(), model=MODEL, stream=False)
    await worker.pipe.run("FLUSHALL")
    probe = Hold(new_id(), caller.user_id, caller.wallet_id, caller.key_id, NANO, 1, WIDE, NANO)
    await worker.holds.reserve(probe)
    assert await worker.holds.renew(call.hold) == "restored"
    with pytest.raises(CapExceededError):
        await worker.holds.reserve(
            Hold(new_id(), caller.user_id, caller.wallet_id, caller.key_id, 4 * NANO, 1, WIDE, 4 * NANO)
        )
    assert await worker.holds.release(probe, charge_nano=0) == "released"
    await asyncio.wait((worker.calls.end(call, Ending(call.call_id, "void", "test")),))
    await shop.counts_hold(caller)


async def test_what_the_house_pays_counts_for_no_cap(shop: Shop) -> None:
    """Redis let it through, Postgres refused by a cap that is newer, the provider billed it."""
    caller = await shop.make_caller()
    worker = shop.workers[0]
    quote = quote_of(shop.house, caller, 6 * NANO)
    call = await worker.calls.reserve(caller, quote, call_id=new_id(), model=MODEL, stream=False)
    for scope in SCOPES:
        await shop.caps.set_caps(scope, scope_id(caller, scope), {"day": 5 * NANO})
    worker.calls.open(call)
    with pytest.raises(CapExceededError):
        await worker.calls.confirm_open(call)
    await shop.end(call, 6 * NANO)
    for cap in await shop.caps.find_caps(*(scope_id(caller, scope) for scope in SCOPES)):
        assert (cap.held_nano, cap.spent_nano) == (0, 0)
    await worker.holds.cool(caller.user_id)
    await shop.pay(caller, NANO)
    await shop.counts_hold(caller)
    await check_all(worker, shop.provider)


# -- limits -----------------------------------------------------------------------------------------------------------


async def test_a_user_is_limited_beside_their_keys(shop: Shop) -> None:
    caller = await shop.make_caller()
    holds = shop.workers[0].holds
    user_limits = Limits(3, 10**9, 2)

    def hold(key_id: UUID | None, tokens: int = 1) -> Hold:
        return Hold(
            new_id(), caller.user_id, caller.wallet_id, key_id, 1, tokens, WIDE, 1, user_limits=user_limits
        )

    first = hold(caller.key_id)
    state = await holds.reserve(first)
    assert (state.limits.requests_per_min, state.remaining_requests) == (3, 2), "the tighter one is shown"
    second = hold(new_id())
    await holds.reserve(second)
    with pytest.raises(RateLimitError, match="user is limited to 2 calls at a time"):
        await holds.reserve(hold(caller.key_id))
    await holds.release(first, charge_nano=0)
    await holds.reserve(hold(None))
    await holds.release(second, charge_nano=0)
    with pytest.raises(RateLimitError, match="user is limited to 3 requests per minute") as caught:
        await holds.reserve(hold(new_id()))
    assert 15_000 < caught.value.retry_after_ms <= 20_000
    assert caught.value.state is not None
    assert caught.value.state.remaining_requests == 0


async def test_a_caller_without_a_key_is_limited_by_the_user(shop: Shop) -> None:
    caller = await shop.make_caller()
    holds = shop.workers[0].holds
    narrow = Limits(10**6, 100)
    hold = Hold(new_id(), caller.user_id, caller.wallet_id, None, 1, 60, narrow)
    await holds.reserve(hold)
    with pytest.raises(RateLimitError, match="user is limited to 100 tokens"):
        await holds.reserve(Hold(new_id(), caller.user_id, caller.wallet_id, None, 1, 60, narrow))
    await holds.release(hold, charge_nano=0, tokens_used=10)
    await holds.reserve(Hold(new_id(), caller.user_id, caller.wallet_id, None, 1, 60, narrow))
