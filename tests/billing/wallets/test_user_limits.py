"""Limits of a user, beside those of their keys."""

from uuid import UUID

import pytest

from billing.errors import RateLimitError
from billing.holds.hold import Hold
from billing.ids import new_id
from billing.limits import Limits
from tests.billing.wallets.caps_shop import Shop
from tests.stateful.world import (
    WIDE,
)


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
