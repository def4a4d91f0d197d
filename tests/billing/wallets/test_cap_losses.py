"""What a cap counts when Redis has lost it, when the house pays, and when somebody has falsified it."""

import asyncio

import pytest

from billing.books.proof import Books
from billing.calls.outcome import Ending
from billing.errors import CapExceededError
from billing.holds.hold import Hold
from billing.ids import new_id
from billing.money import NANO
from tests.billing.wallets.caps_shop import SCOPES, Shop, scope_id
from tests.stateful.world import (
    MODEL,
    WIDE,
    check_all,
    quote_of,
)


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
