"""Calls that wait until others of the same wallet end, as those hold what they would need."""

import asyncio
import time
from collections import Counter
from uuid import UUID

from config.settings import HoldSettings


class Turns:
    """Who may wait for whom, in this worker; what other workers' calls hold is found out by asking again.

    Args:
        settings: how long a call waits, and how many of a wallet do.
    """

    _ASK_AGAIN_S = 0.5

    def __init__(self, settings: HoldSettings) -> None:
        self._wait_s = settings.turn_wait_s
        self._waiters_max = settings.turn_waiters
        self._live: Counter[UUID] = Counter()
        self._waiting: Counter[UUID] = Counter()
        self._freed: dict[UUID, asyncio.Event] = {}

    def began(self, wallet_id: UUID) -> None:
        """Note that a call holds money of a wallet."""
        self._live[wallet_id] += 1

    def ended(self, wallet_id: UUID) -> None:
        """Note that one has ended, and let those who wait look again."""
        self._live[wallet_id] -= 1
        if self._live[wallet_id] <= 0:
            del self._live[wallet_id]
        freed = self._freed.pop(wallet_id, None)
        if freed is not None:
            freed.set()

    def deadline_s(self) -> float:
        """Return until when a call that comes now waits, by the monotonic clock."""
        return time.monotonic() + self._wait_s

    async def wait(self, wallet_id: UUID, deadline_s: float) -> bool:
        """Wait until a call of the wallet has ended, or half a second; False if there is nothing to wait for any more."""
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not self._live[wallet_id] or self._waiting[wallet_id] >= self._waiters_max:
            return False
        freed = self._freed.setdefault(wallet_id, asyncio.Event())
        self._waiting[wallet_id] += 1
        try:
            async with asyncio.timeout(min(left_s, self._ASK_AGAIN_S)):
                await freed.wait()
        except TimeoutError:
            pass
        finally:
            self._waiting[wallet_id] -= 1
            if not self._waiting[wallet_id]:
                del self._waiting[wallet_id]
        return True
