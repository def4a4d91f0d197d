"""Hears what operators change in Postgres, so that caches drop it at once (LISTEN/NOTIFY, channel ``tuma``)."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from billing.errors import PostgresUnavailableError
from billing.postgres.database import AWAY, Database

_PROBE_S = 5.0
_BACKOFF_MAX_S = 5.0
_log = structlog.get_logger("tuma.changes")

Listener = Callable[[str], Awaitable[None]]


async def announce(database: Database, kind: str, detail: str) -> None:
    """Tell every process that follows the channel of a change.

    Raises:
        PostgresUnavailableError: nobody was told.
    """
    async with database.connection() as connection:
        await connection.execute("SELECT pg_notify('tuma', $1)", f"{kind}:{detail}")


class ChangeFeed:
    """Follows the channel and calls the listener of each kind of change: ``key``, ``wallet``, ``prices``, ``fx``.

    After a gap (start, a lost connection) every listener is called with ``*``: anything may have changed.

    Args:
        database: where to listen.
        listeners: by kind; each is given the id behind the colon, or ``*``.
    """

    def __init__(self, database: Database, listeners: dict[str, Listener]) -> None:
        self._database = database
        self._listeners = listeners
        self._heard: asyncio.Queue[str] = asyncio.Queue()

    async def run(self) -> None:
        """Follow the channel until cancelled, through restarts of Postgres."""
        pause_s = 0.1
        while True:
            try:
                connection = await self._database.connect_alone()
            except PostgresUnavailableError:
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _BACKOFF_MAX_S)
                continue
            pause_s = 0.1
            try:
                await self._follow(connection)
            except (PostgresUnavailableError, *AWAY) as error:
                _log.warning("changes.lost", error=str(error))
            finally:
                connection.terminate()

    async def _follow(self, connection: Any) -> None:
        await connection.add_listener("tuma", self._hear)
        for listener in self._listeners.values():
            await listener("*")
        while True:
            try:
                async with asyncio.timeout(_PROBE_S):
                    change = await self._heard.get()
            except TimeoutError:
                await connection.execute("SELECT 1")  # a connection that died quietly is found here
                continue
            kind, _, detail = change.partition(":")
            if kind in self._listeners:
                await self._listeners[kind](detail or "*")

    def _hear(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        self._heard.put_nowait(str(payload))
