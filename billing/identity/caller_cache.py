"""Who calls, and the cache that remembers for less than a second what Postgres said of them."""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from billing.errors import PostgresUnavailableError
from billing.identity.caller import Caller, FoundCaller
from billing.tasks import wait_until_done

Name = TypeVar("Name", bound=Hashable)
_AGAIN_S = 0.1
_RETRY_AFTER_S = 5
_REFRESH_TOGETHER = 500


@dataclass(slots=True)
class _Known:
    """What the cache knows of a name, by the monotonic clock. ``caller`` None: there is no such.

    Args:
        until: when Postgres is asked again.
        ends: when the key expires, or the secret before a rotation stops.
        used: somebody came with it since Postgres was asked.
    """

    caller: Caller | None
    until: float
    ends: float
    used: bool = False


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
        # What a refresh under way must not bring back; None while there is none.
        self._dropped: list[Callable[[Caller], bool] | None] | None = None

    def __len__(self) -> int:
        return len(self._known)

    async def find(self, name: Name, look_up: Callable[[], Awaitable[FoundCaller | None]]) -> Caller | None:
        """Return the caller of a name, who may be known; what ``look_up`` raises is raised to all who wait."""
        known = self._known.get(name)
        if known is None or known.until <= time.monotonic():
            known = await self._look_up(name, look_up)
        known.used = True
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

    async def refresh(
        self, look_up: Callable[[Sequence[Name]], Awaitable[Mapping[Name, FoundCaller]]]
    ) -> int:
        """Ask about all at once who came since the last time, so that few calls wait for a look-up; tell how many.

        Args:
            look_up: returns the callers of names, as far as Postgres knows them by these.
        """
        names = [name for name, known in self._known.items() if known.used and known.caller is not None]
        for start in range(0, len(names), _REFRESH_TOGETHER):
            some = names[start : start + _REFRESH_TOGETHER]
            dropped: list[Callable[[Caller], bool] | None] = []
            self._dropped = dropped
            asked = time.monotonic()
            try:
                found = await look_up(some)
            finally:
                self._dropped = None
            for name in some:
                if name in self._known:
                    self._replace(name, found.get(name), asked, dropped)
        return len(names)

    def _replace(
        self,
        name: Name,
        found: FoundCaller | None,
        asked: float,
        dropped: Sequence[Callable[[Caller], bool] | None],
    ) -> None:
        if found is None:
            del self._known[name]  # it is looked up by itself when it comes again
        elif not any(meant is None or meant(found.caller) for meant in dropped):
            ends = math.inf if found.valid_s is None else asked + found.valid_s
            self._known[name] = _Known(found.caller, asked + self._ttl_s, ends)

    def _keep(self, name: Name, known: _Known) -> None:
        self._known[name] = known
        self._known.move_to_end(name)
        if len(self._known) > self._entries_max:
            self._known.popitem(last=False)

    def drop(self, meant: Callable[[Caller], bool] | None) -> None:
        """Forget the callers that are meant, or all with None; what is being looked up just now is not kept, either."""
        self._changes += 1
        if self._dropped is not None:
            self._dropped.append(meant)
        if meant is None:
            self._known.clear()
            return
        for name, known in list(self._known.items()):
            if known.caller is not None and meant(known.caller):
                del self._known[name]

    def drop_user(self, user_id: str) -> None:
        """Forget a user, or all with ``*``."""
        self.drop(None if user_id == "*" else lambda caller: str(caller.user_id) == user_id)
