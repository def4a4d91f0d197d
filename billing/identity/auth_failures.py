"""How often a client's address may fail to prove who it is, and a user change what is theirs, over all workers."""

import asyncio
import time
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

from billing.errors import RateLimitError, RedisUnavailableError
from billing.holds.hold import SHARDS
from billing.redis.client import RedisWay
from billing.redis.pipeline import Script, load_script

_REMEMBERED_MAX = 10_000
_WAITING_MAX = 64


class AuthFailures:
    """Counts failed authentications per address, by GCRA in Redis, and keeps those who fail too often from the rest.

    A valid key is served, however many others from its address are not: addresses are shared. What is limited is what a
    guesser can cost: beyond the limit the answer is 429, and keys from that address are looked up one at a time.

    Args:
        pipe: Redis.
        per_min: failures that are answered as such; 0 for no limit.
        kind: one letter, by which these are told from others in Redis.
        what: is not valid.
    """

    def __init__(
        self, pipe: RedisWay, *, per_min: int, kind: str = "a", what: str = "requests with keys"
    ) -> None:
        self._pipe = pipe
        self._kind = kind
        self._what = what
        self._per_min = per_min
        self._script = load_script("billing.identity", "fail")
        self._limited: OrderedDict[str, float] = OrderedDict()  # until when, by the monotonic clock
        self._lane = asyncio.Lock()
        self._waiting = 0

    @property
    def any_limited(self) -> bool:
        """Whether any address fails too often: only then has an address to be looked at beforehand."""
        return bool(self._limited)

    @asynccontextmanager
    async def lane(self, address: str) -> AsyncIterator[None]:
        """Stay in the slow lane for as long as the block lasts, if the address fails too often.

        Raises:
            RateLimitError: too many wait there.
        """
        until = self._limited.get(address)
        if until is None or until <= time.monotonic():
            self._limited.pop(address, None)
            yield
            return
        if self._waiting >= _WAITING_MAX:
            raise self._refusal(1_000)
        self._waiting += 1
        try:
            async with self._lane:
                yield
        finally:
            self._waiting -= 1

    async def count(self, address: str) -> None:
        """Count one failure.

        Raises:
            RateLimitError: there were too many from this address.
        """
        if not self._per_min:
            return
        wait_ms = await _count(self._pipe, self._script, f"{self._kind}:{address}", self._per_min)
        if wait_ms:
            self._limited[address] = time.monotonic() + wait_ms / 1000
            self._limited.move_to_end(address)
            if len(self._limited) > _REMEMBERED_MAX:
                self._limited.popitem(last=False)
            raise self._refusal(wait_ms)

    def _refusal(self, wait_ms: int) -> RateLimitError:
        return RateLimitError(
            f"Too many {self._what} that are not valid came from your address.", retry_after_ms=wait_ms
        )


class UserWrites:
    """Counts how often a user changes their keys, caps and top-ups: each is several transactions, and rows that stay.

    Args:
        pipe: Redis.
        per_min: of a user; 0 for no limit.
    """

    def __init__(self, pipe: RedisWay, *, per_min: int) -> None:
        self._pipe = pipe
        self._per_min = per_min
        self._script = load_script("billing.identity", "fail")

    async def count(self, user_id: UUID) -> None:
        """Count one change.

        Raises:
            RateLimitError: there were too many.
        """
        if not self._per_min:
            return
        wait_ms = await _count(self._pipe, self._script, f"w:{user_id}", self._per_min)
        if wait_ms:
            raise RateLimitError(
                f"You may change keys, caps and top-ups {self._per_min} times per minute.",
                retry_after_ms=wait_ms,
            )


async def _count(pipe: RedisWay, script: Script, name: str, per_min: int) -> int:
    """Count by GCRA; return for how many milliseconds no more is to come, 0 if it was within the limit."""
    shard = zlib.crc32(name.encode()) % SHARDS
    try:
        return int(await pipe.call(script, [f"tuma:{{s{shard:02d}}}:{name}"], [per_min]))
    except RedisUnavailableError:
        return 0  # nothing is admitted without Redis anyway
