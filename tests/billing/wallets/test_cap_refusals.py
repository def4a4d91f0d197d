"""What passes a cap is refused, by Redis and by Postgres alone, one by one and two hundred at once."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from billing.calls.ledger import Extension
from billing.calls.outcome import Ending
from billing.errors import CapExceededError, InsufficientFundsError
from billing.identity.caller import Caller
from billing.ids import new_id
from billing.money import NANO
from billing.wallets.caps import Scope
from tests.billing.wallets.caps_shop import PERIODS, SCOPES, Shop, scope_id
from tests.stateful.world import (
    MODEL,
    WIDE,
    check_all,
    quote_of,
)


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
