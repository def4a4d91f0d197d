"""Calls that wait until others of the same wallet end, as those hold what they would need."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar
from uuid import UUID

from billing.errors import CapExceededError, InsufficientFundsError, ProviderQuotaError
from billing.holds.admission import Room
from billing.pricing.quote import Quote
from config.settings import HoldSettings

_LESS = 4  # by how much less is asked of the provider's quota at a time
_TRIES_MAX = 200  # of a call whose wallet others use meanwhile
_Admitted = TypeVar("_Admitted")


class Turns:
    """Who may wait for whom, in this worker; what other workers' calls hold is found out by asking again.

    Args:
        settings: how long a call waits, and how many of a wallet do.
    """

    _ASK_AGAIN_S = 0.5

    def __init__(self, settings: HoldSettings) -> None:
        self._wait_s = settings.turn_wait_s
        self._waiters_max = settings.turn_waiters
        self._sensible_tokens = settings.sensible_tokens
        self._least_tokens = settings.least_tokens
        self._live: Counter[UUID] = Counter()
        self._waiting: Counter[UUID] = Counter()
        self._freed: dict[UUID, asyncio.Event] = {}

    async def admit(
        self,
        quote: Quote,
        wallet_id: UUID,
        *,
        attempt: Callable[[Quote], Awaitable[_Admitted]],
        find_room: Callable[[], Awaitable[Room]],
    ) -> _Admitted:
        """Admit a call, at a smaller bound on its output or a little later if it must be.

        Args:
            quote: of the call; only one that named no bound itself is quoted anew.
            wallet_id: that pays.
            attempt: admits a quote, or raises.
            find_room: returns what wallet and caps have left.

        Raises:
            InsufficientFundsError, CapExceededError, ProviderQuotaError: as ``attempt``, once there is nothing more to try.
        """
        wanted, deadline_s = quote, time.monotonic() + self._wait_s
        for _ in range(_TRIES_MAX):
            try:
                return await attempt(wanted)
            except ProviderQuotaError:
                # What the provider has left for us is no reason to wait, but a smaller bound may fit into it.
                if not quote.open_ended or wanted.told_tokens // _LESS < self._least_tokens:
                    raise
                wanted = quote.told(wanted.told_tokens // _LESS)
            except (InsufficientFundsError, CapExceededError):
                if not quote.open_ended:
                    raise
                smaller = self.fit(quote, await find_room())
                if smaller is not None and smaller.told_tokens >= self._sensible_tokens:
                    wanted = smaller
                elif await self.wait(wallet_id, deadline_s):
                    wanted = quote
                elif smaller is not None:
                    wanted = smaller
                else:
                    raise
        raise InsufficientFundsError("Other calls of the wallet hold what this one needs: try again.")

    def fit(self, quote: Quote, room: Room) -> Quote | None:
        """Quote a call at the largest bound that there is room for; None if that would be no answer."""
        return quote.within(room.nano, room.nanousd, least_tokens=self._least_tokens)

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
