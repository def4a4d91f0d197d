"""How often a client's address may fail to prove who it is, over all workers."""

import asyncio
import time
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from billing.errors import RateLimitError, RedisUnavailableError
from billing.holds.hold import SHARDS
from billing.redis.client import RedisWay
from billing.redis.pipeline import load_script

_REMEMBERED_MAX = 10_000
_WAITING_MAX = 64


class AuthFailures:
    """Counts failed authentications per address, by GCRA in Redis, and keeps those who fail too often from the rest.

    A valid key is served, however many others from its address are not: addresses are shared. What is limited is what a
    guesser can cost: beyond the limit the answer is 429, and keys from that address are looked up one at a time.

    Args:
        pipe: Redis.
        per_min: failures that are answered as such; 0 for no limit.
    """

    def __init__(self, pipe: RedisWay, *, per_min: int) -> None:
        self._pipe = pipe
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
            raise _refusal(1_000)
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
        shard = zlib.crc32(address.encode()) % SHARDS
        try:
            wait_ms = await self._pipe.call(
                self._script, [f"tuma:{{s{shard:02d}}}:a:{address}"], [self._per_min]
            )
        except RedisUnavailableError:
            return  # nothing is admitted without Redis anyway
        if wait_ms:
            self._limited[address] = time.monotonic() + wait_ms / 1000
            self._limited.move_to_end(address)
            if len(self._limited) > _REMEMBERED_MAX:
                self._limited.popitem(last=False)
            raise _refusal(int(wait_ms))


def _refusal(wait_ms: int) -> RateLimitError:
    return RateLimitError(
        "Too many requests with keys that are not valid came from your address.", retry_after_ms=wait_ms
    )
