"""A connection that one user keeps, so that a statement costs neither a look into the pool nor a return to it."""

import asyncio
from typing import Any, NoReturn, Protocol

import asyncpg

from billing.tasks import TrackedTasks


class Lender(Protocol):
    """Where a held connection comes from, and who is asked while it is in use: a ``Database``."""

    async def connect(self) -> Any:
        """Open a connection as the pool does, outside of it."""

    async def fetch(self, sql: str, *args: object) -> list[Any]:
        """Run one statement on a connection of the pool."""

    def refuse(self, error: BaseException) -> NoReturn:
        """Raise what an error of Postgres means for who asked."""


class HeldConnection:
    """Runs statements, each of which is a transaction of its own, on a connection that it keeps.

    It connects when it is first asked, and anew after a connection broke or ran out of time. Each SQL text stays prepared there,
    and is prepared anew if what it reads was changed under it (asyncpg's cache does both). No two statements are on it at
    once: who finds it in use takes one of the pool.

    Args:
        lender: whose connections these are.
        close_timeout_s: how long a connection may take to end.
        broken: after which errors a connection is not used any more.
    """

    def __init__(
        self, lender: Lender, *, close_timeout_s: float, broken: tuple[type[BaseException], ...]
    ) -> None:
        self._lender = lender
        self._close_timeout_s = close_timeout_s
        self._broken = broken
        self._connection: Any = None
        self._lock = asyncio.Lock()
        self._endings = TrackedTasks()

    async def fetch(self, sql: str, *args: object) -> list[Any]:
        """Run one statement.

        Raises:
            PostgresUnavailableError: it could not connect, or the connection broke, or it took too long.
            InputError: a text has a character that Postgres does not store.
        """
        if self._lock.locked():
            return await self._lender.fetch(sql, *args)
        async with self._lock:
            try:
                connection = self._connection
                if connection is None or connection.is_closed():
                    connection = self._connection = await self._lender.connect()
                rows: list[Any] = await connection.fetch(sql, *args)
            except asyncpg.PostgresError as error:
                if isinstance(error, self._broken):
                    self._drop()
                self._lender.refuse(error)
            except BaseException as error:
                # What was cancelled or took too long may still be running there: the next one does not wait for it.
                self._drop()
                if isinstance(error, Exception):
                    self._lender.refuse(error)
                raise
        return rows

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._endings.start(self._end(connection), name="end of a held connection")

    async def _end(self, connection: Any) -> None:
        try:
            await connection.close(
                timeout=self._close_timeout_s
            )  # cancels what is running, and waits for that
        except self._broken:
            connection.terminate()

    async def close(self) -> None:
        """Close the connection, waiting a bounded time for the statement on it."""
        try:
            await asyncio.wait_for(self._lock.acquire(), self._close_timeout_s)
        except TimeoutError:
            self._drop()
        else:
            self._drop()
            self._lock.release()
        await self._endings.drain(self._close_timeout_s)
