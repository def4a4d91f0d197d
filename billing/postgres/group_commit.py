"""Group commit: many callers, one statement, one commit; nothing queued is ever dropped silently."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import structlog

from billing.errors import BrokenInvariantError, PostgresUnavailableError
from billing.meters import Meters
from billing.postgres.database import AWAY, REPEATABLE
from billing.tasks import TrackedTasks

Item = TypeVar("Item")
Result = TypeVar("Result")

_BACKOFF_FIRST_S = 0.05
_BACKOFF_MAX_S = 2.0
_log = structlog.get_logger("tuma.batcher")


class Batcher(Generic[Item, Result]):
    """Collects items and commits them in batches, one batch at a time, repeating a batch until Postgres answers.

    What a batch costs is much the same for one item and for ten, so a batch waits for company, as long as that harms
    nobody: until it is full, until its first item has waited for as long as it may, or, if somebody is waiting for one of
    its items, until nobody else is on the way here.

    A batch may be repeated because its commit is idempotent. A batch that Postgres refuses for one item's sake is split,
    so that the others are not held up. How long one caller waits is the caller's business; the item stays queued.

    Args:
        commit: commits a batch and returns a result per item, in order.
        name: for logs.
        rows_max: items per batch.
        delay_ms: how long an item waits for company at most, once somebody waits for it.
        queue_max: items waiting; beyond it ``full`` is true.
        meters: where batches are counted.
        coming: how many will submit something very soon; nobody is known to, without it.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[Item]], Awaitable[list[Result]]],
        *,
        name: str,
        rows_max: int,
        delay_ms: float,
        queue_max: int,
        meters: Meters | None = None,
        coming: Callable[[], int] = lambda: 0,
    ) -> None:
        self._commit = commit
        self._name = name
        self._rows_max = rows_max
        self._delay_s = delay_ms / 1000
        self._queue_max = queue_max
        self._meters = meters or Meters()
        self._coming = coming
        self._queue: list[tuple[Item, asyncio.Future[Result]]] = []
        self._tasks = TrackedTasks()
        self._running = False
        self._away = False
        self._hurried = False  # somebody waits for an item of the next batch
        self._leave_at_s = 0.0  # when the next batch leaves at the latest, by the loop's clock
        self._company: asyncio.Future[None] | None = None  # while a batch waits for company
        self._timer: asyncio.TimerHandle | None = None  # the same

    @property
    def away(self) -> bool:
        """Whether Postgres failed to answer the latest attempt."""
        return self._away

    @property
    def full(self) -> bool:
        """Whether more is waiting than the settings allow; new calls are refused then."""
        return len(self._queue) >= self._queue_max

    def __len__(self) -> int:
        return len(self._queue)

    def submit(self, item: Item, *, patience_ms: float | None = None) -> asyncio.Future[Result]:
        """Queue an item; the future holds its result, once committed.

        Args:
            item: what is committed.
            patience_ms: how long it may wait for company as long as nobody waits for it; None if somebody does.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Result] = loop.create_future()
        self._queue.append((item, answer))
        if patience_ms is None:
            self._expect(loop.time() + self._delay_s)
            self._hurried = True
        else:
            self._expect(loop.time() + patience_ms / 1000)
        if not self._running:
            self._running = True
            self._tasks.start(self._drain(), name=f"{self._name} batches")
        else:
            self.reconsider()
        return answer

    def hurry(self, answer: asyncio.Future[Result]) -> None:
        """Somebody waits for this item now."""
        if self._hurried or not any(waiting is answer for _, waiting in self._queue):
            return  # its batch hurries already, or has left
        self._hurried = True
        self._expect(asyncio.get_running_loop().time() + self._delay_s)
        self.reconsider()

    def reconsider(self) -> None:
        """Let the batch that waits leave, if it need not wait any more: somebody who was coming is not, or is here."""
        if self._company is not None and self._is_ready():
            self._leave()

    def _leave(self) -> None:
        if self._company is not None and not self._company.done():
            self._company.set_result(None)

    def _expect(self, leave_at_s: float) -> None:
        """Let the next batch leave then at the latest."""
        if len(self._queue) > 1 and leave_at_s >= self._leave_at_s:
            return
        self._leave_at_s = leave_at_s
        if self._timer is not None:
            self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_at(leave_at_s, self._leave)

    def _is_ready(self) -> bool:
        if len(self._queue) >= self._rows_max or (self._hurried and self._coming() <= 0):
            return True
        return asyncio.get_running_loop().time() >= self._leave_at_s

    async def _drain(self) -> None:
        try:
            while self._queue:
                await self._wait_for_company()
                batch = self._queue[: self._rows_max]
                del self._queue[: len(batch)]
                self._hurried = bool(self._queue)  # who is left behind has waited
                try:
                    await self._commit_all(batch)
                except asyncio.CancelledError:
                    self._queue[:0] = [entry for entry in batch if not entry[1].done()]
                    raise
        finally:
            self._running = False

    async def _wait_for_company(self) -> None:
        if self._is_ready():
            return
        loop = asyncio.get_running_loop()
        self._company = loop.create_future()
        self._timer = loop.call_at(self._leave_at_s, self._leave)
        try:
            await self._company
        finally:
            self._timer.cancel()
            self._company = self._timer = None

    async def _commit_all(self, batch: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        pause_s = _BACKOFF_FIRST_S
        while True:
            try:
                results = await self._commit([item for item, _ in batch])
            except (PostgresUnavailableError, *AWAY, *REPEATABLE) as error:
                if not self._away:
                    _log.warning("batch.delayed", batch=self._name, rows=len(batch), error=str(error))
                self._away = True
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _BACKOFF_MAX_S)
                continue
            except Exception as error:  # noqa: BLE001 - what Postgres refuses for good is handed to the caller it concerns
                self._away = False
                await self._split(batch, error)
                return
            if self._away:
                self._away = False
                _log.warning("batch.resumed", batch=self._name, rows=len(batch), waiting=len(self._queue))
            self._meters.batch_rows.observe(len(batch), self._name)
            for (_, answer), result in zip(batch, results, strict=True):
                if not answer.done():
                    answer.set_result(result)
            return

    async def _split(self, batch: list[tuple[Item, asyncio.Future[Result]]], error: Exception) -> None:
        if len(batch) > 1:
            middle = len(batch) // 2
            await self._commit_all(batch[:middle])
            await self._commit_all(batch[middle:])
            return
        _log.error(
            "batch.refused", batch=self._name, item=repr(batch[0][0]), error=str(error), exc_info=error
        )
        answer = batch[0][1]
        if not answer.done():
            answer.set_exception(BrokenInvariantError(f"{self._name} refused: {error}"))

    async def close(self, timeout_s: float) -> list[Item]:
        """Commit what is queued within ``timeout_s`` seconds; return what could not be."""
        await self._tasks.drain(timeout_s)
        left = [item for item, answer in self._queue if not answer.done()]
        for _, answer in self._queue:
            answer.cancel()
        self._queue.clear()
        return left
