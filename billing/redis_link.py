"""One connection to Redis: made by redis-py (TLS, login, database, protocol), then written and read in bulk.

redis-py packs each argument and awaits each reply in Python; a pipeline of a few scripts so costs more than all else
that a call asks of Redis. hiredis, which redis-py uses too, packs a command and parses every reply of a read in C.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import hiredis
from redis._parsers.base import BaseParser
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse

Argument = bytes | str | int
_READ_BYTES = 64 * 1024
_NOT_ENOUGH = object()


class RedisLink:
    """A connection that takes many commands at once.

    Args:
        connection: connected, and with no reply outstanding.
    """

    __slots__ = ("_connection", "_parser", "_reader", "_writer")

    def __init__(self, connection: AbstractConnection) -> None:
        self._connection = connection
        # redis-py has no public way to its streams.
        reader: asyncio.StreamReader | None = getattr(connection, "_reader", None)
        writer: asyncio.StreamWriter | None = getattr(connection, "_writer", None)
        if reader is None or writer is None:
            raise RedisConnectionError("the connection was closed")
        self._reader, self._writer = reader, writer
        self._parser = hiredis.Reader(
            protocolError=InvalidResponse, replyError=BaseParser.parse_error, notEnoughData=_NOT_ENOUGH
        )

    async def exchange(self, commands: Sequence[tuple[Argument, ...]]) -> list[Any]:
        """Send commands, and return their replies in order; those that are errors as exceptions, not raised.

        Raises:
            RedisError, OSError, RuntimeError: the connection broke; what became of the commands is unknown.
        """
        self._writer.write(b"".join([hiredis.pack_command(command) for command in commands]))
        await self._writer.drain()
        replies: list[Any] = []
        take = self._parser.gets
        while len(replies) < len(commands):
            data = await self._reader.read(_READ_BYTES)
            if not data:
                raise RedisConnectionError("the server closed the connection")
            self._parser.feed(data)
            while (reply := take()) is not _NOT_ENOUGH:
                if isinstance(reply, RedisConnectionError):
                    raise reply
                if not isinstance(reply, hiredis.PushNotification):
                    replies.append(reply)
        return replies

    @property
    def is_alive(self) -> bool:
        """Whether the server has not closed it while it lay idle."""
        return not self._reader.at_eof() and self._reader.exception() is None

    async def close(self, *, now: bool = False) -> None:
        """Close it; ``now``: without a farewell."""
        await self._connection.disconnect(nowait=now)
