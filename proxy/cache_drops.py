"""What Postgres says has changed."""

import asyncio
from uuid import UUID

from billing.errors import RedisUnavailableError
from billing.ids import parse_id
from billing.wallets.wallets import Wallets
from proxy.services import Services

_COOL_AGAIN_S = 1.0


async def cool_wallet(services: Services, wallet_id: str) -> None:
    """Drop the mirror of a wallet that changed otherwise than through a settlement.

    A change that was missed needs nothing: the mirror's own end of life bounds how long it can be stale.
    """
    if wallet_id == "*":
        services.signed_in.callers.drop(None)
    else:
        services.signed_in.callers.drop(lambda caller: str(caller.wallet_id) == wallet_id)
        owner = await Wallets(services.database).find_owner(parse_id(wallet_id, "wallet"))
        if owner is not None:
            cool_user(services, owner)


def cool_user(services: Services, user_id: UUID) -> None:
    """Drop the mirror of a user whose caps or clock changed."""
    services.tasks.start(_cool(services, user_id), name=f"cool {user_id}")


async def changed_key(services: Services, key_id: str) -> None:
    """Drop what is cached of a key, and look whether it may still watch."""
    await services.keys.forget(key_id)
    services.watchers.doubt(None if key_id == "*" else lambda caller: str(caller.key_id) == key_id)


async def changed_user(services: Services, user_id: str) -> None:
    """Drop what is cached of a user, their keys and their mirror, and look whether they may still watch."""
    services.keys.callers.drop_user(user_id)
    services.signed_in.callers.drop_user(user_id)
    services.watchers.doubt(None if user_id == "*" else lambda caller: str(caller.user_id) == user_id)
    if user_id != "*":
        cool_user(services, parse_id(user_id, "user"))


async def _cool(services: Services, user_id: UUID) -> None:
    """Drop a mirror, though Redis be away just now: it may come back with the stale one."""
    while True:
        try:
            await services.holds.cool(user_id)
        except RedisUnavailableError:
            await asyncio.sleep(_COOL_AGAIN_S)
        else:
            return
