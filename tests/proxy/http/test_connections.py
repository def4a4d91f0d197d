"""Bounds on connections: how many, how slow, and how large a head; and that what keeps to them is served."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from config.settings import Settings
from scripts.office import Office
from tests.support.running import Running, run_proxy

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def limited(settings: Settings, **limits: float) -> AsyncIterator[Running]:
    changed = settings.limits.model_copy(update=limits)
    async with run_proxy(settings.model_copy(update={"limits": changed})) as proxy:
        yield proxy


async def connect(proxy: Running) -> Connection:
    return await asyncio.open_connection("127.0.0.1", int(proxy.base_url.rpartition(":")[2]))


async def answer_to(connection: Connection, data: bytes) -> bytes:
    """Send, and read one whole answer, or until the connection is closed."""
    reader, writer = connection
    try:
        writer.write(data)
        await writer.drain()
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        return head + await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionResetError, BrokenPipeError):
        return b""


async def until_closed(reader: asyncio.StreamReader) -> tuple[bytes, float]:
    began = time.monotonic()
    async with asyncio.timeout(10):
        try:
            data = await reader.read()
        except ConnectionResetError:
            data = b""
    return data, time.monotonic() - began


@pytest.mark.usefixtures("office")
async def test_slow_heads(settings: Settings) -> None:
    async with limited(settings, head_timeout_s=0.5, silent_timeout_s=0.8, keepalive_timeout_s=2) as proxy:
        # A byte now and then, for ever: slow-loris.
        slow = await connect(proxy)
        silent = await connect(proxy)
        second_is_slow = await connect(proxy)
        idle = await connect(proxy)
        assert b" 200 " in await answer_to(second_is_slow, HEALTH)
        assert b" 200 " in await answer_to(idle, HEALTH)

        async def trickle(writer: asyncio.StreamWriter) -> None:
            for byte in b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 1000:
                writer.write(bytes((byte,)))
                await asyncio.sleep(0.05)

        tricklers = [asyncio.create_task(trickle(writer)) for writer in (slow[1], second_is_slow[1])]
        for (data, seconds), name in zip(
            await asyncio.gather(*(until_closed(one[0]) for one in (slow, second_is_slow, silent, idle))),
            ("slow", "second is slow", "silent", "idle"),
            strict=True,
        ):
            if "slow" in name:
                assert 0.4 < seconds < 1.9, (name, seconds)
                if data:  # bytes under way may reset the connection before the answer is read
                    assert data.startswith(b"HTTP/1.0 408"), (name, data)
                    assert json.loads(data.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
            else:
                assert data == b""
                # One that has been of use may be idle for longer.
                assert (0.7 < seconds < 1.9) if name == "silent" else (1.9 < seconds < 4), (name, seconds)
        for task in tricklers:
            task.cancel()
        # Slow, but not too slow.
        reader, writer = await connect(proxy)
        for piece in (HEALTH[:5], HEALTH[5:20], HEALTH[20:]):
            await asyncio.sleep(0.1)
            writer.write(piece)
        assert b" 200 OK" in await reader.readuntil(b"\r\n\r\n")
        writer.close()


@pytest.mark.usefixtures("office")
@pytest.mark.parametrize("limit", ["connections", "connections_per_address"])
async def test_connections_at_once(settings: Settings, limit: str) -> None:
    async with limited(settings, **{limit: 3}) as proxy:
        there = [await connect(proxy) for _ in range(3)]
        assert all([b" 200 " in await answer_to(one, HEALTH) for one in there])
        for _ in range(5):
            refused = await connect(proxy)
            assert await answer_to(refused, HEALTH) == b""
            refused[1].close()
        assert all([b" 200 " in await answer_to(one, HEALTH) for one in there])
        there[0][1].close()
        async with asyncio.timeout(2):
            while b" 200 " not in await answer_to(again := await connect(proxy), HEALTH):
                again[1].close()
        for _, writer in (*there, again):
            writer.transport.abort()
        await asyncio.sleep(0.05)
        assert (proxy.server._count, proxy.server._per_address) == (0, {})


@pytest.mark.usefixtures("office")
async def test_heads_that_are_too_large(settings: Settings) -> None:
    async with limited(
        settings, line_bytes=1000, field_bytes=2000, fields=20, head_bytes=6000, head_timeout_s=5
    ) as proxy:
        start = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"

        async def status(data: bytes) -> int:
            connection = await connect(proxy)
            answer = await answer_to(connection, data)
            if b"error" in answer:
                assert await connection[0].read() == b""
                assert (
                    json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
                )
            connection[1].close()
            return int(answer.split(b" ")[1])

        assert await status(b"GET /healthz?" + b"a" * 900 + b" HTTP/1.1\r\nHost: x\r\n\r\n") == 200
        assert await status(b"GET /healthz?" + b"a" * 1100 + b" HTTP/1.1\r\nHost: x\r\n\r\n") == 400
        assert await status(start + b"X-A: " + b"a" * 1900 + b"\r\n\r\n") == 200
        assert await status(start + b"X-A: " + b"a" * 2100 + b"\r\n\r\n") == 400
        assert await status(start + b"".join(b"X-%d: y\r\n" % i for i in range(19)) + b"\r\n") == 200
        assert await status(start + b"".join(b"X-%d: y\r\n" % i for i in range(20)) + b"\r\n") == 400
        assert (
            await status(start + b"".join(b"X-%d: %s\r\n" % (i, b"a" * 1500) for i in range(5)) + b"\r\n")
            == 431
        )
        # One that has no end is not waited for.
        connection = await connect(proxy)
        for i in range(4):
            connection[1].write((start if i == 0 else b"") + b"X-%d: %s\r\n" % (i, b"a" * 1500))
            await asyncio.sleep(0.02)
        data, seconds = await until_closed(connection[0])
        assert data.startswith(b"HTTP/1.0 431")
        assert seconds < 1


async def test_a_flood_of_connections_leaves_nothing_behind(settings: Settings, office: Office) -> None:
    async with limited(settings, connections=50) as proxy:

        async def one(index: int) -> None:
            connection = await connect(proxy)
            if index % 3:
                await answer_to(
                    connection, HEALTH[: index % len(HEALTH)] if index % 2 else HEALTH
                ) if not index % 2 else None
            connection[1].transport.abort()

        await asyncio.gather(*(one(index) for index in range(300)))
        await asyncio.sleep(0.1)
        assert (proxy.server._count, proxy.server._per_address, proxy.server.connections) == (0, {}, [])
        assert b" 200 " in await answer_to(await connect(proxy), HEALTH)
