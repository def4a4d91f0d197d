"""Work off the event loop, fairly between those for whom it is done.

A thread takes a bounded slice of one owner's work, then of the next one's: somebody with much work makes another wait for a
slice, not for all of it. Work that nobody waits for any more is dropped, also in its middle.
"""

import asyncio
import functools
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
Work = Generator[None, None, T]  # it yields wherever it may be put aside


@dataclass(slots=True, eq=False)
class _Job:
    owner: Hashable
    work: Work[Any]
    result: asyncio.Future[Any]
    wanted: Callable[[], bool] | None


class FairThreads:
    """Threads that take turns between the owners of what waits for them.

    Args:
        threads: how many slices are done at once.
        name: of the threads.
        slice_s: how long one owner's work goes on while another's waits.
    """

    def __init__(self, *, threads: int = 1, name: str, slice_s: float = 0.02) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._free = threads
        self._slice_s = slice_s
        self._waiting: OrderedDict[Hashable, deque[_Job]] = OrderedDict()  # whose turn is next comes first

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    async def run(self, owner: Hashable, work: Work[T], *, wanted: Callable[[], bool] | None = None) -> T:
        """Do work in a thread, in turn; whoever is cancelled while waiting takes their work back.

        Args:
            owner: whose turn it takes.
            work: returns what this returns; what it raises is raised.
            wanted: asked before each slice; once it says no, the work is dropped, and the waiting cancelled.
        """
        job = _Job(owner, work, asyncio.get_running_loop().create_future(), wanted)
        self._waiting.setdefault(owner, deque()).append(job)
        self._take_turns()
        try:
            return await job.result  # type: ignore[no-any-return]
        finally:
            self._forget(job)

    def close(self) -> None:
        """Stop the threads; what waits for them is cancelled."""
        for jobs in self._waiting.values():
            for job in jobs:
                job.result.cancel()
        self._waiting.clear()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _take_turns(self) -> None:
        while self._free and self._waiting:
            owner, jobs = self._waiting.popitem(last=False)
            job = jobs.popleft()
            if jobs:
                self._waiting[owner] = jobs  # at the end of the round
            if job.wanted is not None and not job.wanted():
                job.result.cancel()
            if job.result.done():
                continue
            self._free -= 1
            loop = asyncio.get_running_loop()
            turn = loop.run_in_executor(self._executor, _go_on, job.work, self._slice_s)
            turn.add_done_callback(functools.partial(self._end_turn, job))

    def _end_turn(self, job: _Job, turn: "asyncio.Future[tuple[bool, Any]]") -> None:
        self._free += 1
        if turn.cancelled():
            job.result.cancel()
        elif (error := turn.exception()) is not None:
            if not job.result.done():
                job.result.set_exception(error)
        elif not job.result.done():
            ended, value = turn.result()
            if ended:
                job.result.set_result(value)
            else:
                self._waiting.setdefault(job.owner, deque()).appendleft(job)
        if not turn.cancelled():
            self._take_turns()

    def _forget(self, job: _Job) -> None:
        jobs = self._waiting.get(job.owner)
        if jobs is not None and job in jobs:
            jobs.remove(job)
            if not jobs:
                del self._waiting[job.owner]


def finish(work: Work[T]) -> T:
    """Do work at once, here."""
    try:
        while True:
            next(work)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def _go_on(work: Work[Any], slice_s: float) -> tuple[bool, Any]:
    """Do a slice of work; tell whether it ended, and with what."""
    until = time.perf_counter() + slice_s
    try:
        while True:
            next(work)
            if time.perf_counter() >= until:
                return False, None
    except StopIteration as end:
        return True, end.value
