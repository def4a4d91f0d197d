"""Before a body is read: whether its sender could pay for anything at all, so that one who cannot costs next to nothing."""

from collections import OrderedDict
from uuid import UUID

from aiohttp import web

from billing.errors import RateLimitError
from billing.holds.admission import Room
from billing.identity.caller import Caller
from config.settings import LimitSettings
from proxy.http.request_facts import RATES, facts_of
from proxy.services.call import CallServices


class Door:
    """Looks at a wallet before a body is read: before a large one, and before any of somebody who was just refused.

    Anybody else's body is smaller than what a look costs, and ``reserve`` looks all the same.

    Args:
        limits: from which size on.
        remembered: refused callers.
    """

    def __init__(self, limits: LimitSettings, *, remembered: int = 10_000) -> None:
        self._look_bytes = limits.look_bytes
        self._remembered = remembered
        self._refused: OrderedDict[UUID, None] = OrderedDict()

    async def look(self, request: web.Request, services: CallServices, caller: Caller) -> Room | None:
        """Return what a call of this caller could take; None where it was not looked.

        Raises:
            InsufficientFundsError, CapExceededError, WalletFrozenError, RateLimitError: nothing was read.
            RedisUnavailableError, PostgresUnavailableError: nobody can tell.
        """
        length = request.content_length
        if length is not None and length < self._look_bytes and _name(caller) not in self._refused:
            return None
        facts = facts_of(request)
        try:
            return await services.calls.find_room(caller, call_id=facts.call_id)
        except RateLimitError as refusal:
            if refusal.state is not None:
                facts.app[RATES].remember(caller, refusal.state)
            raise

    def refused(self, caller: Caller) -> None:
        """Remember that a call of theirs was refused."""
        self._refused[_name(caller)] = None
        if len(self._refused) > self._remembered:
            self._refused.popitem(last=False)

    def admitted(self, caller: Caller) -> None:
        """Remember that it was not."""
        self._refused.pop(_name(caller), None)


def _name(caller: Caller) -> UUID:
    return caller.key_id or caller.wallet_id


DOOR = web.AppKey("door", Door)
