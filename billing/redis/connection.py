"""One connection to Redis: made by redis-py (TLS, login, database, protocol), then written and read in bulk.

redis-py packs each argument and awaits each reply in Python; a pipeline of a few scripts so costs more than all else
that a call asks of Redis. hiredis, which redis-py uses too, packs a command and parses every reply of a read in C. And no
command waits for the replies to those before it: Redis answers in order.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import hiredis
from redis._parsers.base import BaseParser
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse

Argument = bytes | str | int
_NOT_ENOUGH = object()


class Command:
    """One command on its way.

    Args:
        words: its name and arguments.

    Raises:
        ValueError, TypeError: they cannot be written.
    """

    __slots__ = ("answer", "packed", "sent_s", "since_s", "words")

    def __init__(self, words: tuple[Argument, ...]) -> None:
        self.words = words
        self.packed: bytes = hiredis.pack_command(words)  # type: ignore[arg-type]  # it takes any number of words
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.since_s = self.sent_s = time.perf_counter()


class RedisLink(asyncio.Protocol):
    """Writes commands, and hands on the replies as they come.

    Args:
        connection: connected, and with no reply outstanding.
        timeout_s: how long the reply to the oldest command may take; then the connection is given up.
        on_reply: takes a command and its reply; an error is an exception, not raised.
        on_lost: takes the commands whose fate is unknown, and why; called once.
    """

    def __init__(
        self,
        connection: AbstractConnection,
        *,
        timeout_s: float,
        on_reply: Callable[[Command, Any], None],
        on_lost: Callable[["RedisLink", list[Command], BaseException], None],
    ) -> None:
        self.connection = connection
        self._timeout_s = timeout_s
        self._on_reply = on_reply
        self._on_lost = on_lost
        self._waiting: deque[Command] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._lost = self._retired = False
        self._parser = hiredis.Reader(
            protocolError=InvalidResponse, replyError=BaseParser.parse_error, notEnoughData=_NOT_ENOUGH
        )
        # redis-py has no public way to its streams.
        writer: asyncio.StreamWriter | None = getattr(connection, "_writer", None)
        if writer is None:
            raise RedisConnectionError("the connection was closed")
        self._transport: Any = writer.transport
        self._before: Any = self._transport.get_protocol()
        self._transport.set_protocol(self)

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_usable(self) -> bool:
        """Whether commands may be sent."""
        return not self._lost and not self._retired

    def send(self, commands: Iterable[Command]) -> None:
        """Write commands; the replies come in the same order."""
        now_s = time.perf_counter()
        packed = []
        for command in commands:
            command.sent_s = now_s
            packed.append(command.packed)
            self._waiting.append(command)
        try:
            self._transport.write(b"".join(packed))
        except RuntimeError as error:  # uvloop's, for a connection that was reset
            self._lose(error)
        else:
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self._check)

    def data_received(self, data: bytes) -> None:
        """Take in replies, some or parts of them."""
        try:
            self._parser.feed(data)
            while (reply := self._parser.gets()) is not _NOT_ENOUGH:
                if not isinstance(reply, hiredis.PushNotification):
                    self._on_reply(self._waiting.popleft(), reply)
        except (InvalidResponse, IndexError) as error:  # no reply at all, or one to no command
            self._lose(error)
        if self._retired and not self._waiting:
            self._lose(RedisConnectionError("it is no longer the primary"))

    def retire(self) -> None:
        """Take no more commands, and close when the last reply has come."""
        self._retired = True

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that the connection ended."""
        self._before.connection_lost(exc)  # who closes it waits for that
        self._lose(exc or RedisConnectionError("the server closed the connection"))

    def _check(self) -> None:
        self._timer = None
        if not self._waiting:
            return
        # Both loops read before they look at timers: of a process that stood still itself, no reply is taken for late.
        left_s = self._waiting[0].sent_s + self._timeout_s - time.perf_counter()
        if left_s <= 0:
            self._lose(TimeoutError())
        else:
            self._timer = asyncio.get_running_loop().call_later(left_s, self._check)

    def _lose(self, error: BaseException) -> None:
        if self._lost:
            return
        self._lost = True
        if self._timer is not None:
            self._timer.cancel()
        self._transport.abort()
        unknown = list(self._waiting)
        self._waiting.clear()
        self._on_lost(self, unknown, error)

    def close(self) -> None:
        """Give the connection up; what is outstanding fails."""
        self._lose(RedisConnectionError("the connection was closed"))
