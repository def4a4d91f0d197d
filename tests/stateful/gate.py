"""A gate before a server: it lets through, swallows answers, or cuts and refuses. How an outage looks to a client."""

import asyncio
import contextlib
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

_CHUNK_BYTES = 65_536


class Gate:
    """Forwards TCP to a server from a port of its own.

    Args:
        url: of the server: a DSN or a Redis URL.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self._target = (parts.hostname, parts.port)
        self._shut = False
        self._mute = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self.shut()
        self._server.close()
        await self._server.wait_closed()

    def through(self, url: str) -> str:
        """Return the same URL, by way of this gate."""
        assert self._server is not None
        parts = urlsplit(url)
        user, at, _ = parts.netloc.rpartition("@")
        port = self._server.sockets[0].getsockname()[1]
        return parts._replace(netloc=f"{user}{at}127.0.0.1:{port}").geturl()

    def shut(self) -> None:
        """Cut every connection, and refuse new ones until ``open``. What was sent through before still arrives."""
        self._shut = True
        for writer in self._writers:
            writer.transport.abort()

    def mute(self) -> None:
        """Let requests through and swallow the answers, until ``open``."""
        self._mute = True

    def open(self) -> None:
        """Let everything through again."""
        self._shut = self._mute = False

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            if not self._shut:
                await self._forward(reader, writer)
        writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection(*self._target)
        both = {writer, to_server}
        self._writers |= both
        try:
            if self._shut:
                return
            await asyncio.gather(
                self._pump(reader, to_server, answers=False), self._pump(from_server, writer, answers=True)
            )
        finally:
            self._writers -= both
            to_server.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool
    ) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            if not (answers and self._mute):
                writer.write(data)
        writer.transport.abort() if answers else writer.close()
