"""A TCP proxy before a server: it cuts, refuses, stalls, swallows answers or redirects. How outages look to a client."""

import asyncio
import contextlib
import socket
import struct
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

_CHUNK_BYTES = 64 * 1024
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER with zero seconds: RST instead of FIN


class TcpProxy:
    """Forwards TCP from a port of its own on loopback, as an asynchronous context.

    Args:
        url: of the server: a DSN, a Redis URL, a base URL.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self._target = (parts.hostname, parts.port)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._links: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._shut = False
        self._mute = False

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1024)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.shut()
        for link in list(self._links):
            link.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    def through(self, url: str) -> str:
        """Return the same URL, by way of this proxy."""
        assert self._server is not None
        parts = urlsplit(url)
        user, at, _ = parts.netloc.rpartition("@")
        port = self._server.sockets[0].getsockname()[1]
        return parts._replace(netloc=f"{user}{at}127.0.0.1:{port}").geturl()

    def point_at(self, url: str) -> None:
        """Send new connections to another server, and cut the present ones."""
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self._target = (parts.hostname, parts.port)
        self.cut()

    def cut(self) -> None:
        """Reset every connection, as a failing network would. What was sent through before still arrives."""
        for writer in list(self._writers):
            sock = writer.get_extra_info("socket")
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            writer.transport.abort()

    def shut(self) -> None:
        """Cut every connection, and refuse new ones until ``open``."""
        self._shut = True
        self.cut()

    def mute(self) -> None:
        """Let requests through and swallow the answers, until ``open``."""
        self._mute = True

    def open(self) -> None:
        """Let everything through again."""
        self._shut = self._mute = False

    async def stall(self, seconds: float) -> None:
        """Let nothing pass for a while; connections stay, and new ones are accepted."""
        self._flowing.clear()
        try:
            await asyncio.sleep(seconds)
        finally:
            self._flowing.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._links.add(task)
        self._writers.add(writer)
        try:
            if not self._shut:
                await self._forward(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()
            self._writers.discard(writer)
            self._links.discard(task)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection(*self._target)
        self._writers.add(to_server)
        try:
            if not self._shut:
                await asyncio.gather(
                    self._pump(reader, to_server, answers=False),
                    self._pump(from_server, writer, answers=True),
                )
        finally:
            to_server.transport.abort()
            self._writers.discard(to_server)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool
    ) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            await self._flowing.wait()
            if not (answers and self._mute):
                writer.write(data)
                await writer.drain()
        writer.transport.abort() if answers else writer.close()
