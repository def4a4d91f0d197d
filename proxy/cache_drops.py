"""What Postgres says has changed is dropped from what this worker, and Redis, remember of it."""

import asyncio
from uuid import UUID

from billing.errors import RedisUnavailableError
from billing.holds.holds import Holds
from billing.identity.keys import Keys
from billing.identity.sign_ins import People
from billing.ids import parse_id
from billing.tasks import TrackedTasks
from billing.wallets.wallets import Wallets
from proxy.live.watchers import Watchers

_COOL_AGAIN_S = 1.0


class CacheDrops:
    """Drops mirrors, keys and sign-ins that changed, and lets watchers be looked at again.

    Args:
        wallets: to find a wallet's owner.
        holds: mirrors of users in Redis.
        keys: cached ones.
        signed_in: cached sign-ins.
        watchers: of feeds.
        tasks: in which mirrors are dropped.
    """

    def __init__(
        self,
        wallets: Wallets,
        *,
        holds: Holds,
        keys: Keys,
        signed_in: People,
        watchers: Watchers,
        tasks: TrackedTasks,
    ) -> None:
        self._wallets = wallets
        self._holds = holds
        self._keys = keys
        self._signed_in = signed_in
        self._watchers = watchers
        self._tasks = tasks

    async def wallet_changed(self, wallet_id: str) -> None:
        """Drop the mirror of a wallet that changed otherwise than through a settlement.

        A change that was missed needs nothing: the mirror's own end of life bounds how long it can be stale.
        """
        if wallet_id == "*":
            self._signed_in.callers.drop(None)
        else:
            self._signed_in.callers.drop(lambda caller: str(caller.wallet_id) == wallet_id)
            owner = await self._wallets.find_owner(parse_id(wallet_id, "wallet"))
            if owner is not None:
                self.cool_user(owner)

    async def key_changed(self, key_id: str) -> None:
        """Drop what is cached of a key, and look whether it may still watch."""
        await self._keys.forget(key_id)
        self._watchers.doubt(None if key_id == "*" else lambda caller: str(caller.key_id) == key_id)

    async def user_changed(self, user_id: str) -> None:
        """Drop what is cached of a user, their keys and their mirror, and look whether they may still watch."""
        self._keys.callers.drop_user(user_id)
        self._signed_in.callers.drop_user(user_id)
        self._watchers.doubt(None if user_id == "*" else lambda caller: str(caller.user_id) == user_id)
        if user_id != "*":
            self.cool_user(parse_id(user_id, "user"))

    def cool_user(self, user_id: UUID) -> None:
        """Drop the mirror of a user whose caps or clock changed."""
        self._tasks.start(self._cool(user_id), name=f"cool {user_id}")

    async def _cool(self, user_id: UUID) -> None:
        """Drop a mirror, though Redis be away just now: it may come back with the stale one."""
        while True:
            try:
                await self._holds.cool(user_id)
            except RedisUnavailableError:
                await asyncio.sleep(_COOL_AGAIN_S)
            else:
                return
