"""Who may set a cap, to what, and that one set while calls come and go counts every call."""

import asyncio

import pytest

from billing.errors import CapExceededError, InputError, NotFoundError
from billing.ids import new_id
from billing.money import NANO
from tests.billing.wallets.caps_shop import SCOPES, Shop, scope_id
from tests.stateful.world import (
    check_all,
)


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
    try:
        for step in range(30):
            for scope in SCOPES:
                limits = {"day": 10**9 if step % 3 else None, "total": 10**12 if step % 2 else None}
                await shop.caps.set_caps(scope, scope_id(caller, scope), limits)
            if step % 5 == 0:
                zone = ("Asia/Tokyo", "America/Lima")[step % 2]
                await shop.caps.set_clock(caller.user_id, timezone=zone, week_starts=1 + step % 7)
    finally:
        done.set()  # else they spend for ever, and a failure looks like a hang
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
