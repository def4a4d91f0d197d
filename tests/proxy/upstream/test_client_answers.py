"""Answers that the client for the paid POST reads: whole, broken off, silent, slow, more than anybody reads."""

import asyncio
import gzip
import time
from collections.abc import Callable

import aiohttp
import pytest
from yarl import URL

from proxy.upstream import client as client_module
from proxy.upstream.client import UpstreamClient
from proxy.upstream.wire import BrokenAnswerError, MalformedAnswerError
from tests.proxy.upstream.client_server import (
    CHUNKED,
    HELLO,
    Scenario,
    always,
    post,
    read,
    served,
    until,
)


@pytest.mark.parametrize(
    "part",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello",
        CHUNKED + b"5\r\nhello\r\n",
        CHUNKED + b"6\r\nhello",
        CHUNKED + b"5\r\nhello\r\n0\r\n",
    ],
)
def test_an_answer_that_breaks_off_is_an_error_after_what_came(
    run: Callable[[Scenario], None], part: bytes
) -> None:
    async def cut(_: int, writer: asyncio.StreamWriter) -> None:
        writer.write(part)
        await writer.drain()
        writer.close()

    async def scenario() -> None:
        async with served(cut) as (_, client):
            response = await post(client)
            found = b""
            with pytest.raises(BrokenAnswerError):
                while True:
                    piece = await response.read_some()
                    assert piece, "an answer that broke off passed for a whole one"
                    found += piece
            assert found == b"hello"
            assert client._free == 100

    run(scenario)


def test_a_body_without_a_length_ends_with_its_connection(run: Callable[[Scenario], None]) -> None:
    async def close(_: int, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: Text/Plain; charset=x\r\n\r\nhel")
        await writer.drain()
        writer.write(b"lo")
        writer.close()

    async def scenario() -> None:
        async with served(close) as (_, client):
            response = await post(client)
            assert response.content_type == "text/plain"
            assert await read(response) == b"hello"

    run(scenario)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 5\r\n\r\nhello",
        b"SSH-2.0-OpenSSH\r\n\r\n",
    ],
)
def test_what_is_no_answer_is_an_error_at_once(run: Callable[[Scenario], None], answer: bytes) -> None:
    async def scenario() -> None:
        async with served(always(answer)) as (server, client):
            with pytest.raises(MalformedAnswerError):
                await post(client)
            await until(lambda: server.ended)
            assert client._free == 100

    run(scenario)


def test_interim_answers_are_passed_over_and_gzip_is_taken_off(run: Callable[[Scenario], None]) -> None:
    text = b"lorem " * 100_000
    packed = gzip.compress(text)

    async def respond(_: int, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n")
        await writer.drain()
        writer.write(
            b"HTTP/1.1 201 Created\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed)
        )
        for at in range(0, len(packed), 100):
            writer.write(packed[at : at + 100])
            await writer.drain()

    async def scenario() -> None:
        async with served(respond) as (server, client):
            for _ in range(2):
                response = await post(client)
                assert (response.status, await read(response)) == (201, text)
            assert len(server.writers) == 1
            assert await (await post(client)).read_up_to(1000) == text[:1000]

    run(scenario)


def test_a_provider_that_nobody_reads_is_made_to_wait(run: Callable[[Scenario], None]) -> None:
    """And is not taken for a silent one meanwhile; afterwards its connection serves again."""
    size = 32 * 1024 * 1024
    sent: list[int] = []

    async def respond(_: int, writer: asyncio.StreamWriter) -> None:
        sent.clear()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size // 65_536):
            writer.write(b"x" * 65_536)
            await writer.drain()
            sent.append(65_536)

    async def scenario() -> None:
        async with served(respond) as (server, client):
            for _ in range(2):
                response = await post(client, idle_s=0.2)
                await asyncio.sleep(0.7)
                assert sum(sent) < size
                assert response._size < 1024 * 1024
                found = 0
                while piece := await response.read_some():
                    found += len(piece)
                assert found == size
            assert len(server.writers) == 1

    run(scenario)


def test_a_burst_is_read_in_few_pieces_and_the_first_at_once(
    run: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def respond(_: int, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + b"5\r\nfirst\r\n")
        for _ in range(3000):
            writer.write(b"5\r\nhello\r\n")
            await asyncio.sleep(0)
        writer.write(b"0\r\n\r\n")

    async def scenario() -> None:
        async with served(respond) as (_, client):
            monkeypatch.setattr(client_module, "_BURST_S", 60.0)
            response = await post(client)
            assert (await response.read_some()).startswith(b"first")  # though a burst lasts a minute
            await until(lambda: response._burst is not None)
            response.close()
            assert response._burst is None
            monkeypatch.setattr(client_module, "_BURST_S", 0.002)
            began = time.monotonic()
            response = await post(client)
            pieces = []
            while piece := await response.read_some():
                pieces.append(piece)
            assert b"".join(pieces) == b"first" + b"hello" * 3000
            assert len(pieces) < 10 + 2 * (time.monotonic() - began) / 0.002
            assert response._burst is None

    run(scenario)


def test_silence_is_an_error(run: Callable[[Scenario], None]) -> None:
    """Before the head, and between two reads; a stream that goes on slowly is none."""

    async def respond(number: int, writer: asyncio.StreamWriter) -> None:
        if number == 1:
            return
        writer.write(CHUNKED)
        for _ in range(15 if number == 2 else 3):
            writer.write(b"5\r\nhello\r\n")
            await asyncio.sleep(0.1)
        if number == 2:
            writer.write(b"0\r\n\r\n")

    async def scenario() -> None:
        async with served(respond) as (server, client):
            with pytest.raises(TimeoutError) as caught:
                await post(client, idle_s=0.3)
            assert isinstance(caught.value, aiohttp.ServerTimeoutError)
            assert await read(await post(client, idle_s=1.0)) == b"hello" * 15
            response = await post(client, idle_s=0.7)
            with pytest.raises(TimeoutError):
                await read(response)
            await until(lambda: len(server.ended) == 2)
            assert client._free == 100

    run(scenario)


def test_closing_wakes_the_read_and_hangs_up(run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        async with served(always(CHUNKED + b"5\r\nhello\r\n")) as (server, client):
            response = await post(client)
            assert await response.read_some() == b"hello"
            loop = asyncio.get_running_loop()
            loop.call_later(0.05, response.close)
            with pytest.raises(aiohttp.ClientConnectionError):
                await response.read_some()
            with pytest.raises(aiohttp.ClientConnectionError):
                await response.read_some()
            response.close()
            await until(lambda: server.ended)
            assert client._free == 100

    run(scenario)


def test_who_stops_waiting_for_the_head_hangs_up(run: Callable[[Scenario], None]) -> None:
    async def respond(number: int, writer: asyncio.StreamWriter) -> None:
        if number > 1:
            writer.write(HELLO)

    async def scenario() -> None:
        async with served(respond) as (server, client):
            asked = asyncio.ensure_future(post(client))
            await until(lambda: server.requests)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            await until(lambda: server.ended)
            assert await read(await post(client)) == b"hello"
            assert len(server.writers) == 2
            # One who leaves when the answer is there leaves alone whoever has the connection next.
            late = asyncio.ensure_future(post(client))
            await until(lambda: late.done() or (len(server.requests) == 3 and client._idle))
            late.cancel()
            response = await post(client)
            assert await read(response) == b"hello"

    run(scenario)


def test_a_read_that_is_cancelled_loses_nothing(run: Callable[[Scenario], None]) -> None:
    async def respond(_: int, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED)
        for _ in range(200):
            writer.write(b"5\r\nhello\r\n")
            await asyncio.sleep(0.001)
        writer.write(b"0\r\n\r\n")

    async def scenario() -> None:
        async with served(respond) as (server, client):
            response = await post(client)
            found = b""
            while True:
                task = asyncio.ensure_future(response.read_some())
                await asyncio.wait((task,), timeout=0.0015)
                task.cancel()
                await asyncio.wait((task,))
                if not task.cancelled():
                    found += task.result()
                    if not task.result():
                        break
            assert found == b"hello" * 200
            assert len(server.writers) == 1

    run(scenario)


def test_an_answer_before_the_whole_request_ends_the_connection(run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        ended = asyncio.Event()

        async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
            await writer.drain()
            try:
                await asyncio.wait_for(ended.wait(), 20)
            finally:
                writer.close()

        listener = await asyncio.start_server(refuse, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        client = UpstreamClient(URL(f"http://127.0.0.1:{port}"), connections_max=9, connect_timeout_s=10.0)
        response = await post(client, b"x" * 64 * 1024 * 1024)
        assert (response.status, await read(response)) == (413, b"no")
        assert not client._idle
        assert not client._open
        ended.set()
        client.close()
        listener.close()

    run(scenario)
