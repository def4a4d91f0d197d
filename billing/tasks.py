"""Background tasks that are known by name, drained at shutdown, and whose failure is heard."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from billing.actor import copy_context_of_house

_log = structlog.get_logger("tuma.tasks")
_AGAIN_S = 0.5


class TrackedTasks:
    """Owns tasks: asyncio keeps only weak references, and an unobserved failure is a silent loss."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, Any], *, name: str) -> asyncio.Task[Any]:
        """Run ``work`` until it ends; an exception is logged as an error, whoever else looks at the task.

        It is the house's: not audited as the doing of whoever was acting when it was started.
        """
        task = asyncio.get_running_loop().create_task(work, name=name, context=copy_context_of_house())
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def keep(self, work: Callable[[], Coroutine[Any, Any, None]], *, name: str) -> asyncio.Task[Any]:
        """Run ``work`` for as long as the process lives: one that fails is logged and begun anew."""
        return self.start(self._again(work, name), name=name)

    async def _again(self, work: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        while True:
            try:
                await work()
            except Exception as error:  # noqa: BLE001 - a loop that leases or sweeps must not end while calls run
                _log.error("loop.failed", loop=name, error=repr(error), exc_info=error)
            await asyncio.sleep(_AGAIN_S)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("task.failed", task=task.get_name(), error=repr(error), exc_info=error)

    async def drain(self, timeout_s: float) -> int:
        """Wait for the tasks to end; cancel what is left after ``timeout_s`` seconds and return how many that were."""
        if not self._tasks:
            return 0
        _, left = await asyncio.wait(set(self._tasks), timeout=timeout_s)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=timeout_s)
        return len(left)

    def cancel(self) -> None:
        """Cancel every task without waiting."""
        for task in self._tasks:
            task.cancel()


async def wait_until_done(future: asyncio.Future[Any], timeout_s: float | None = None) -> bool:
    """Wait until a future is done; tell whether it is. It is never cancelled, and what it raises is not raised here.

    Args:
        future: what is waited for.
        timeout_s: for how many seconds at most; None for as long as it takes.
    """
    if future.done():
        return True
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] = loop.create_future()

    def wake(_: object = None) -> None:
        if not waiter.done():
            waiter.set_result(None)

    timer = None if timeout_s is None else loop.call_later(timeout_s, wake)
    future.add_done_callback(wake)
    try:
        await waiter
    finally:
        if timer is not None:
            timer.cancel()
        future.remove_done_callback(wake)
    return future.done()
