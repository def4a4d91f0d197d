"""A server over real sockets that answers the paid POST as a test says, and the client that asks it."""

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from yarl import URL

from proxy.upstream.client import UpstreamClient, UpstreamResponse

Scenario = Callable[[], Awaitable[None]]
Respond = Callable[[int, asyncio.StreamWriter], Awaitable[None]]
HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class Server:
    """Answers each request with what the test says, and notes what came.

    Args:
        respond: is given the request's number and the connection.
    """

    def __init__(self, respond: Respond) -> None:
        self._respond = respond
        self.requests: list[bytes] = []
        self.writers: list[asyncio.StreamWriter] = []
        self.ended: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.writers.append(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"Content-Length: (\d+)", head)
                assert length is not None
                self.requests.append(head + await reader.readexactly(int(length[1])))
                await self._respond(len(self.requests), writer)
        except (asyncio.IncompleteReadError, OSError, RuntimeError, asyncio.CancelledError):
            self.ended.append(writer)
        finally:
            writer.close()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def served(
    respond: Respond, *, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1", **settings: Any
) -> AsyncIterator[tuple[Server, UpstreamClient]]:
    server = Server(respond)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=tls)
    port = listener.sockets[0].getsockname()[1]
    client = UpstreamClient(
        URL(f"{'https' if tls else 'http'}://{host}:{port}"),
        **{"connections_max": 100, "connect_timeout_s": 10.0, **settings},
    )
    try:
        yield server, client
    finally:
        client.close()
        listener.close()
        await server.stop()


def always(answer: bytes) -> Respond:
    async def respond(_: int, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    return respond


async def post(client: UpstreamClient, body: bytes = b"{}", *, idle_s: float = 30.0) -> UpstreamResponse:
    head = b"POST /v1 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    return await client.post(head, body, first_byte_s=idle_s, idle_s=idle_s)


async def read(response: UpstreamResponse) -> bytes:
    found = b""
    while piece := await response.read_some():
        found += piece
    return found


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)
