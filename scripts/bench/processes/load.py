"""The load generator: a process that makes calls as it is told, one JSON line after the other, and tells what they took.

A raw client over ``asyncio.Protocol``: it takes less of the machine than what it measures. Answers are counted as good
only if they are whole.
"""

import asyncio
import contextlib
import itertools
import json
import ssl
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import uvloop

from scripts.bench.processes.upstream import CHUNKS, PACE_S, delays_s
from scripts.bench.scenarios import NUMBER
from scripts.bench.stats import percentile

_OPEN_AT_ONCE = 50
_TAIL = b"\r\n0\r\n\r\n"
_ERROR_CHARS = 300


@dataclass
class _Tally:
    """What the calls of one job took, in seconds."""

    latency: list[float] = field(default_factory=list)
    first_byte: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def as_json(self, seconds: float) -> dict[str, Any]:
        figures: dict[str, float] = {"calls_per_s": len(self.latency) / seconds}
        for name, values in (
            ("latency", self.latency),
            ("first_byte", self.first_byte),
            ("gap", self.gaps),
            ("chunk_delay", self.delays),
        ):
            if values:
                figures[f"{name}_p50_ms"] = percentile(values, 50) * 1000
                figures[f"{name}_p99_ms"] = percentile(values, 99) * 1000
        return {
            "calls": len(self.latency),
            "errors": len(self.errors),
            "error": self.errors[0] if self.errors else None,
            "figures": figures,
        }


class _Caller(asyncio.Protocol):
    """One connection, which makes calls one after the other until there are no more to make.

    Args:
        next_request: the bytes of the next call; None when there are no more, nothing when there is none yet.
        tally: where what it took is noted.
        stream: whether answers are streams of 64 chunks.
        paced: whether the chunks tell when they were sent, so that their way and the pauses between them are measured.
        on_first_byte: called at each answer's first byte.
        on_idle: called when there is no next call yet; ``call`` asks again.
        after_s: when the first call is made.
        every_s: from the beginning of a call to that of the next, if the answer is there by then; 0 for as fast as it goes.
    """

    def __init__(
        self,
        next_request: Callable[[], bytes | None],
        tally: _Tally,
        *,
        stream: bool,
        paced: bool = False,
        on_first_byte: Callable[[], None] | None = None,
        on_idle: "Callable[[_Caller], None] | None" = None,
        after_s: float = 0.0,
        every_s: float = 0.0,
    ) -> None:
        self._every_s = every_s
        self._next_request = next_request
        self._tally = tally
        self._stream = stream
        self._paced = paced
        self._on_first_byte = on_first_byte
        self._on_idle = on_idle
        self._after_s = after_s
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._body_at = 0
        self._length: int | None = None
        self._sent_s = self._last_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Make the first call, now or when it is due."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's inherit from nothing
        asyncio.get_running_loop().call_later(self._after_s, self.call)

    def connection_lost(self, error: Exception | None) -> None:
        """Note a connection that ended in the middle of a call."""
        if not self.ended.done():
            self._tally.errors.append(f"the connection was lost: {error}")
            self.ended.set_result(None)

    def close(self) -> None:
        """Close the connection."""
        if not self.ended.done():
            self.ended.set_result(None)
        if self._transport is not None:
            self._transport.close()

    def call(self) -> None:
        """Make the next call, if there is one."""
        request = self._next_request()
        if request is None:
            self.close()
            return
        if not request:
            assert self._on_idle is not None
            self._on_idle(self)
            return
        assert self._transport is not None
        self._received.clear()
        self._body_at, self._length = 0, None
        self._sent_s = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Take in a part of an answer."""
        now = time.perf_counter()
        self._received += data
        if self._paced:
            self._tally.delays += delays_s(data, time.monotonic())
        if not self._body_at and not self._read_head():
            return
        if len(self._received) == self._body_at:
            return
        if not self._last_s:
            self._tally.first_byte.append(now - self._sent_s)
            if self._on_first_byte is not None:
                self._on_first_byte()
        elif self._paced:
            self._tally.gaps.append(now - self._last_s)
        self._last_s = now
        if self._is_whole():
            self._take(now)

    def _read_head(self) -> bool:
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = bytes(self._received[:end]).lower()
        at = head.find(b"\r\ncontent-length:")
        self._length = int(head[at + 17 :].split(b"\r\n", 1)[0]) if at >= 0 else None
        self._body_at, self._last_s = end + 4, 0.0
        return True

    def _is_whole(self) -> bool:
        if self._length is not None:
            return len(self._received) >= self._body_at + self._length
        return self._received.endswith(_TAIL)

    def _take(self, now: float) -> None:
        body = self._received[self._body_at :]
        good = body.count(b'"delta"') >= CHUNKS and b"[DONE]" in body if self._stream else b'"usage"' in body
        if self._received[9:12] == b"200" and good:
            self._tally.latency.append(now - self._sent_s)
        else:
            self._tally.errors.append(bytes(self._received[:_ERROR_CHARS]).decode(errors="replace"))
        self._last_s = 0.0
        wait_s = self._sent_s + self._every_s - now
        if wait_s > 0:
            asyncio.get_running_loop().call_later(wait_s, self.call)
        else:
            self.call()


class _Companion:
    """Makes as many calls somewhere else, each when one of those that are measured is made.

    Both proxies then work at one pace, in the same moments, with the same neighbours.
    """

    def __init__(self, request: bytes, count: int) -> None:
        self.tally = _Tally()
        self._request = request
        self._count = count
        self._due = self._made = 0
        self._idle: list[_Caller] = []

    def caller(self, *, stream: bool, paced: bool) -> _Caller:
        """Return one more connection to make calls over."""
        return _Caller(self._next, self.tally, stream=stream, paced=paced, on_idle=self._idle.append)

    def follow(self) -> None:
        """Make one more call, over a connection that is free, or when one is."""
        self._due += 1
        if self._idle:
            self._idle.pop().call()

    def _next(self) -> bytes | None:
        if self._made == self._count:
            return None
        if self._made == self._due:
            return b""
        self._made += 1
        if self._made == self._count:
            for caller in self._idle:
                caller.close()
        return self._request


class Load:
    """Does the jobs; each returns what it took, in milliseconds, and how many calls failed."""

    def __init__(self) -> None:
        self._waiting: list[_Caller] = []
        self._tally = _Tally()
        self._numbers = itertools.count()

    async def calls(self, job: dict[str, Any]) -> dict[str, Any]:
        """Make so many calls over so many connections."""
        requests: list[bytes] = [text.encode() for text in job["requests"]]
        mark, numbers = NUMBER.encode(), self._numbers
        left: int = job["calls"]
        beside: dict[str, Any] | None = job.get("beside")
        companion = _Companion(beside["requests"][0].encode(), left) if beside else None

        def next_request() -> bytes | None:
            nonlocal left
            if not left:
                return None
            left -= 1
            if companion is not None:
                companion.follow()
            return requests[left % len(requests)].replace(mark, b"%08d" % next(numbers))

        tally = _Tally()
        # Paced streams last equally long: begun at once, they would all begin again at once.
        every_s = job["connections"] / job["rate"] if job.get("rate") else 0.0
        lasts_s = CHUNKS * PACE_S if job["paced"] else every_s
        due = itertools.count(0, lasts_s / job["connections"])

        def make() -> _Caller:
            return _Caller(
                next_request,
                tally,
                stream=job["stream"],
                paced=job["paced"],
                after_s=next(due),
                every_s=every_s,
            )

        began = time.perf_counter()
        callers: list[_Caller] = []
        if beside is not None and companion is not None:
            callers += await self._connect(
                beside,
                job["connections"],
                lambda: companion.caller(stream=job["stream"], paced=job["paced"]),
            )
        callers += await self._connect(job, job["connections"], make)
        await self._await_ends(callers, tally, job["timeout_s"])
        said = tally.as_json(time.perf_counter() - began)
        if companion is not None:
            said["beside"] = companion.tally.as_json(time.perf_counter() - began)
        return said

    async def open(self, job: dict[str, Any]) -> dict[str, Any]:
        """Open so many streams that wait; return when each has had its first byte."""
        requests: list[bytes] = [text.encode() for text in job["requests"]]
        self._tally = _Tally()
        for first in range(0, job["calls"], _OPEN_AT_ONCE):
            count = min(_OPEN_AT_ONCE, job["calls"] - first)
            came: list[asyncio.Future[None]] = []

            def make(came: list[asyncio.Future[None]] = came) -> _Caller:
                first_byte = asyncio.get_running_loop().create_future()
                came.append(first_byte)
                one = iter((requests[len(came) % len(requests)],))
                return _Caller(
                    lambda: next(one, None),
                    self._tally,
                    stream=True,
                    paced=True,
                    on_first_byte=lambda: first_byte.set_result(None),
                )

            callers = await self._connect(job, count, make)
            self._waiting += callers
            await asyncio.wait([*came], timeout=job["timeout_s"])
            if self._tally.errors:
                break
        return {"waiting": len(self._tally.first_byte), "error": next(iter(self._tally.errors), None)}

    async def rest(self, job: dict[str, Any]) -> dict[str, Any]:
        """Wait, while the streams that were opened go on; return what their chunks took on the way meanwhile."""
        self._tally.gaps.clear()
        self._tally.delays.clear()
        await asyncio.sleep(job["seconds"])
        return {**self._tally.as_json(job["seconds"]), "chunks": len(self._tally.delays)}

    async def finish(self, job: dict[str, Any]) -> dict[str, Any]:
        """Wait until the streams that waited have ended."""
        callers, self._waiting = self._waiting, []
        began = time.perf_counter()
        await self._await_ends(callers, self._tally, job["timeout_s"])
        return self._tally.as_json(time.perf_counter() - began)

    async def _connect(self, job: dict[str, Any], count: int, make: Callable[[], _Caller]) -> list[_Caller]:
        secure = ssl.create_default_context() if job["secure"] else None
        loop = asyncio.get_running_loop()
        made = await asyncio.gather(
            *(loop.create_connection(make, job["host"], job["port"], ssl=secure) for _ in range(count))
        )
        return [caller for _, caller in made]

    async def _await_ends(self, callers: Sequence[_Caller], tally: _Tally, timeout_s: float) -> None:
        _, late = await asyncio.wait([caller.ended for caller in callers], timeout=timeout_s)
        if late:
            tally.errors.append(f"{len(late)} calls had not ended after {timeout_s:.0f} s")
            for caller in callers:
                caller.close()


async def _work() -> None:
    load = Load()
    ways = {"calls": load.calls, "open": load.open, "rest": load.rest, "finish": load.finish}
    sys.stdout.write("bench load is ready\n")
    sys.stdout.flush()
    while line := await asyncio.to_thread(sys.stdin.readline):
        job = json.loads(line)
        try:
            said = await ways[job["do"]](job)
        except OSError as error:
            said = {"calls": 0, "errors": 1, "error": str(error), "figures": {}, "waiting": 0}
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()


def main() -> None:
    """Work until stdin ends."""
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(_work())


if __name__ == "__main__":
    main()
