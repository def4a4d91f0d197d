"""Group commit: many callers, one statement, one commit; nothing queued is ever dropped silently."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import structlog

from billing.db import AWAY, REPEATABLE
from billing.errors import BrokenInvariantError, PostgresUnavailableError
from billing.meters import Meters
from billing.tasks import TrackedTasks

Item = TypeVar("Item")
Result = TypeVar("Result")

_BACKOFF_FIRST_S = 0.05
_BACKOFF_MAX_S = 2.0
_log = structlog.get_logger("tuma.batcher")


class Batcher(Generic[Item, Result]):
    """Collects items and commits them in batches, one batch at a time, repeating a batch until Postgres answers.

    A batch may be repeated because its commit is idempotent. A batch that Postgres refuses for one item's sake is split,
    so that the others are not held up. How long one caller waits is the caller's business; the item stays queued.

    Args:
        commit: commits a batch and returns a result per item, in order.
        name: for logs.
        rows_max: items per batch.
        delay_ms: how long the first item of a batch waits for company.
        queue_max: items waiting; beyond it ``full`` is true.
        meters: where batches are counted.
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
    ) -> None:
        self._commit = commit
        self._name = name
        self._rows_max = rows_max
        self._delay_s = delay_ms / 1000
        self._queue_max = queue_max
        self._meters = meters or Meters()
        self._queue: list[tuple[Item, asyncio.Future[Result]]] = []
        self._tasks = TrackedTasks()
        self._running = False
        self._away = False

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

    def submit(self, item: Item) -> asyncio.Future[Result]:
        """Queue an item; the future holds its result, once committed."""
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._queue.append((item, answer))
        if not self._running:
            self._running = True
            self._tasks.start(self._drain(), name=f"{self._name} batches")
        return answer

    def withdraw(self, answer: asyncio.Future[Result]) -> bool:
        """Take an item back that has not been sent yet; False when it may have been committed."""
        for index, (_, waiting) in enumerate(self._queue):
            if waiting is answer:
                del self._queue[index]
                answer.cancel()
                return True
        return False

    async def _drain(self) -> None:
        try:
            while self._queue:
                if len(self._queue) < self._rows_max:
                    await asyncio.sleep(self._delay_s)
                batch = self._queue[: self._rows_max]
                del self._queue[: len(batch)]
                try:
                    await self._commit_all(batch)
                except asyncio.CancelledError:
                    self._queue[:0] = [entry for entry in batch if not entry[1].done()]
                    raise
        finally:
            self._running = False

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
