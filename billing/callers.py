"""Who calls, and the cache that remembers for less than a second what Postgres said of them."""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, Generic, TypeVar
from uuid import UUID

from billing.errors import AddressNotAllowedError, ModelNotAllowedError, PostgresUnavailableError
from billing.holds import Limits, Place, limiters_of
from billing.waiting import wait_until_done
from config.settings import LimitSettings

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Name = TypeVar("Name", bound=Hashable)
_NAME_LENGTH_MAX = 200
_AGAIN_S = 0.1
_RETRY_AFTER_S = 5


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and which wallet pays; what bounds them, where anything does.

    Args:
        good_until_s: when what they came with ends, by the monotonic clock.
    """

    user_id: UUID
    wallet_id: UUID
    key_id: UUID | None
    currency: str
    limits: Limits
    user_limits: Limits | None = None
    models: tuple[str, ...] | None = None
    networks: tuple[Network, ...] | None = None
    manages: bool = False
    good_until_s: float = math.inf
    place: Place = field(init=False, repr=False, compare=False)  # of its holds

    def __post_init__(self) -> None:
        limiters = limiters_of(self.user_id, self.key_id, self.limits, self.user_limits)
        place = Place(self.user_id, self.wallet_id, self.key_id, limiters)
        object.__setattr__(self, "place", place)  # it is frozen

    def allows_model(self, model: str) -> bool:
        """Tell whether this caller may call a model."""
        return self.models is None or any(
            model.startswith(rule[:-1]) if rule.endswith("*") else model == rule for rule in self.models
        )

    def require_models(self, models: Sequence[str]) -> None:
        """Refuse models that the key does not allow.

        Raises:
            ModelNotAllowedError: one of them is not among the key's.
        """
        for model in models:
            if not self.allows_model(model):
                raise ModelNotAllowedError(f"This key may not call {model[:_NAME_LENGTH_MAX]!r}.")

    def require_address(self, address: Address | None) -> None:
        """Refuse a client that calls from elsewhere than the key allows.

        Raises:
            AddressNotAllowedError: it does, or where from is unknown.
        """
        if self.networks is not None and (
            address is None or not any(address in network for network in self.networks)
        ):
            raise AddressNotAllowedError(f"This key may not be used from {address or 'an unknown address'}.")


@dataclass(frozen=True, slots=True)
class FoundCaller:
    """A caller as Postgres knows them now, and for how many seconds what they came with is good; None: no end is known."""

    caller: Caller
    valid_s: float | None = None


@dataclass(frozen=True, slots=True)
class _Known:
    """What the cache knows of a name, by the monotonic clock. ``caller`` None: there is no such.

    Args:
        until: when Postgres is asked again.
        ends: when the key expires, or the secret before a rotation stops.
    """

    caller: Caller | None
    until: float
    ends: float


class CallerCache(Generic[Name]):
    """Remembers callers by what they came with. Many who ask at once wait for one answer.

    Args:
        ttl_s: how long an answer is believed, should nobody tell of a change.
        entries_max: callers remembered.
        wait_s: how long a lookup waits for a Postgres that is away.
    """

    def __init__(self, *, ttl_s: float, entries_max: int, wait_s: float) -> None:
        self._ttl_s = ttl_s
        self._wait_s = wait_s
        self._entries_max = entries_max
        self._known: OrderedDict[Name, _Known] = OrderedDict()
        self._lookups: dict[Name, asyncio.Future[_Known]] = {}
        self._changes = 0  # counted, so that a lookup that a change overtook is not kept

    def __len__(self) -> int:
        return len(self._known)

    async def find(self, name: Name, look_up: Callable[[], Awaitable[FoundCaller | None]]) -> Caller | None:
        """Return the caller of a name, who may be known; what ``look_up`` raises is raised to all who wait."""
        known = self._known.get(name)
        if known is None or known.until <= time.monotonic():
            known = await self._look_up(name, look_up)
        return None if known.ends <= time.monotonic() else known.caller

    async def _look_up(self, name: Name, look_up: Callable[[], Awaitable[FoundCaller | None]]) -> _Known:
        while (running := self._lookups.get(name)) is not None:
            await wait_until_done(running)
            if not running.cancelled():
                return running.result()
        running = self._lookups[name] = asyncio.get_running_loop().create_future()
        try:
            deadline = time.monotonic() + self._wait_s
            while True:
                changes = self._changes
                asked = time.monotonic()  # what is read is at least as new as this
                try:
                    found = await look_up()
                    break
                except PostgresUnavailableError as error:
                    if time.monotonic() >= deadline:
                        raise PostgresUnavailableError(str(error), retry_after_s=_RETRY_AFTER_S) from error
                    await asyncio.sleep(_AGAIN_S)
            ends = math.inf if found is None or found.valid_s is None else asked + found.valid_s
            known = _Known(None if found is None else found.caller, asked + self._ttl_s, ends)
            if changes == self._changes:
                self._keep(name, known)
        except BaseException as error:
            if isinstance(error, Exception):
                running.set_exception(error)
                running.exception()  # looked at, should nobody wait for it
            else:
                running.cancel()
            raise
        else:
            running.set_result(known)
            return known
        finally:
            del self._lookups[name]

    def _keep(self, name: Name, known: _Known) -> None:
        self._known[name] = known
        self._known.move_to_end(name)
        if len(self._known) > self._entries_max:
            self._known.popitem(last=False)

    def drop(self, meant: Callable[[Caller], bool] | None) -> None:
        """Forget the callers that are meant, or all with None; what is being looked up just now is not kept, either."""
        self._changes += 1
        if meant is None:
            self._known.clear()
            return
        for name, known in list(self._known.items()):
            if known.caller is not None and meant(known.caller):
                del self._known[name]

    def drop_user(self, user_id: str) -> None:
        """Forget a user, or all with ``*``."""
        self.drop(None if user_id == "*" else lambda caller: str(caller.user_id) == user_id)


def limits_of_user(row: Mapping[str, Any], usual: LimitSettings) -> Limits | None:
    """Return a user's own limits, else the settings'; None when neither says anything.

    Args:
        row: with ``user_requests_per_min``, ``user_tokens_per_min`` and ``user_calls_in_flight``.
        usual: for users without limits of their own.
    """
    found = (
        row["user_requests_per_min"] or usual.user_requests_per_min,
        row["user_tokens_per_min"] or usual.user_tokens_per_min,
        row["user_calls_in_flight"] or usual.user_calls_in_flight,
    )
    if not any(found):
        return None
    return Limits(found[0] or usual.requests_per_min, found[1] or usual.tokens_per_min, found[2])
