"""A worker that dies at its n-th step, as by ``kill -9``.

A step is what a task runs from one resume to its next wait, so the moments between steps are all the moments at which
an asyncio program can be seen to stop. Every task that is started within a life belongs to it: a batcher's, a
pipeline's, a driver's own. When the fuse has burnt down none of them is ever resumed again, no ``finally`` of theirs
runs, and the sockets are closed as the kernel would: what was written before still arrives.
"""

import asyncio
import contextlib
import contextvars
from collections.abc import Coroutine
from typing import Any

_life: contextvars.ContextVar["Life | None"] = contextvars.ContextVar("life", default=None)
_CLOSES_MAX = 100  # a coroutine whose ``finally`` waits has to be closed again


class Life:
    """One worker's life, on a ``MortalLoop``; ``steps`` counts those since it was armed."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, MortalLoop), "nothing is counted on another loop"
        self._loop = loop
        self._fuse: int | None = None
        self._buried = False
        self._tasks: list[asyncio.Task[Any]] = []
        self._works: list[Coroutine[Any, Any, Any]] = []
        self._sockets: list[asyncio.Transport] = []
        self.dead = False
        self.died: asyncio.Future[None] = loop.create_future()
        self.steps = 0

    def begin(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a task of this life."""
        context = contextvars.copy_context()
        context.run(_life.set, self)
        return self._loop.create_task(work, context=context)

    def arm(self, fuse: int | None) -> None:
        """Count from now on, and die in place of the step with number ``fuse``; None: never."""
        self.steps = 0
        self._fuse = fuse

    def may_step(self) -> bool:
        """Count a step; False when there is none any more."""
        if not self.dead:
            self.steps += 1
            if self.steps == self._fuse:
                self._die()
        return not self.dead

    def _die(self) -> None:
        self.dead = True
        for transport in self._sockets:
            transport.abort()
        self.died.set_result(None)

    def limbo(self) -> asyncio.Future[Any]:
        """Return what a dead task waits for, in vain."""
        future = self._loop.create_future()
        future._asyncio_future_blocking = True  # as ``await`` would say to the task
        return future

    def task_of(self, work: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:
        """Make a task of this life; it is kept, so that nobody collects it before the burial."""
        task = asyncio.Task(_Steps(self, work), loop=self._loop, **options)
        self._works.append(work)
        self._tasks.append(task)
        return task

    def own(self, transport: asyncio.Transport) -> None:
        """Close this socket at the end."""
        self._sockets.append(transport)
        if self.dead:
            transport.abort()

    @property
    def buried(self) -> bool:
        """Whether dead tasks may end."""
        return self._buried

    async def bury(self) -> None:
        """Forget the dead, when all has been checked: now their ``finally`` blocks run, as far as they do not wait.

        They run within this life, so what they start is dead as well, and their sockets are closed: nothing comes of it.
        """
        self._buried = True
        context = contextvars.copy_context()
        context.run(_life.set, self)
        buried = 0
        while buried < len(self._tasks):
            fresh = self._tasks[buried:]
            buried = len(self._tasks)
            for task in fresh:
                task.cancel()
            await asyncio.wait(fresh)
            for work in self._works[-len(fresh) :]:
                context.run(_close, work)


class _Steps(Coroutine[Any, Any, Any]):
    """A coroutine of a life: it takes no step after the end."""

    def __init__(self, life: Life, work: Coroutine[Any, Any, Any]) -> None:
        self._owner = life
        self._work = work

    def send(self, value: Any) -> Any:
        return self._work.send(value) if self._owner.may_step() else self._owner.limbo()

    def throw(self, *error: Any) -> Any:
        if self._owner.buried and self._owner.dead:
            raise error[0]
        return self._work.throw(*error) if self._owner.may_step() else self._owner.limbo()

    def close(self) -> None:
        if not self._owner.dead:
            self._work.close()

    def __await__(self) -> Any:
        return self._work.__await__()


def _close(work: Coroutine[Any, Any, Any]) -> None:
    for _ in range(_CLOSES_MAX):
        with contextlib.suppress(Exception):  # a ``finally`` that waits, or fails on a closed socket
            work.close()
            return


class MortalLoop(asyncio.SelectorEventLoop):
    """An event loop that knows which life each task and each socket belongs to."""

    def __init__(self) -> None:
        super().__init__()
        self.set_task_factory(self._make_task)  # type: ignore[arg-type]

    def _make_task(
        self, _loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any], **options: Any
    ) -> asyncio.Task[Any]:
        context: contextvars.Context | None = options.get("context")
        life = _life.get() if context is None else context.get(_life)
        if life is None:
            return asyncio.Task(work, loop=self, **options)
        return life.task_of(work, **options)

    def _make_socket_transport(self, *args: Any, **options: Any) -> asyncio.Transport:
        transport: asyncio.Transport = super()._make_socket_transport(*args, **options)  # type: ignore[misc]
        life = _life.get()
        if life is not None:
            life.own(transport)
        return transport
