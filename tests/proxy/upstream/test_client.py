"""The client for the paid POST over real sockets, on both event loops: what is sent once, kept, given up, waited for."""

import asyncio
import gzip
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvloop
from yarl import URL

from proxy.upstream import client as client_module
from proxy.upstream.client import UpstreamClient, UpstreamResponse
from proxy.upstream.wire import BrokenAnswerError, MalformedAnswerError
from tests.support.tls_proxy import Authority

Scenario = Callable[[], Awaitable[None]]
Respond = Callable[[int, asyncio.StreamWriter], Awaitable[None]]
HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Scenario], None]:
    """Runs a scenario on an event loop of its own, in a thread of its own; exceptions that nobody saw are failures."""

    def run_on(scenario: Scenario) -> None:
        found: list[BaseException | dict[str, Any]] = []

        async def watched() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: found.append(context))
            await scenario()

        def main() -> None:
            try:
                with asyncio.Runner(loop_factory=request.param) as runner:
                    runner.run(watched())
            except BaseException as error:  # noqa: BLE001 - raised again below
                found.append(error)

        thread = threading.Thread(target=main)
        thread.start()
        thread.join()
        for error in found:
            raise error if isinstance(error, BaseException) else AssertionError(error)

    return run_on


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


def test_one_connection_serves_call_after_call(run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        async with served(always(HELLO)) as (server, client):
            for number in range(20):
                response = await post(client, b"x" * number * 10_000)
                assert (response.status, await read(response)) == (200, b"hello")
                assert await response.read_some() == b""
                response.close()  # its connection is another's by now
            assert len(server.writers) == 1
            assert [len(request.partition(b"\r\n\r\n")[2]) for request in server.requests] == [
                number * 10_000 for number in range(20)
            ]
            await asyncio.gather(*(post(client) for _ in range(10)))
            assert len(server.writers) == 10
            await asyncio.gather(*(post(client) for _ in range(10)))
            assert len(server.writers) == 10

    run(scenario)


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello", b"hello"),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nhello", b"hello"),
        (HELLO + HELLO, b"hello"),
        (HELLO + b"\n", b"hello"),
        (CHUNKED + b"5\r\nhello\r\n0\r\n\r\n0\r\n\r\n", b"hello"),
        (b"HTTP/1.1 204 No Content\r\n\r\nhello", b""),
    ],
)
def test_a_connection_that_may_hold_more_is_not_used_again(
    run: Callable[[Scenario], None], answer: bytes, body: bytes
) -> None:
    async def scenario() -> None:
        async with served(always(answer)) as (server, client):
            for number in range(3):
                response = await post(client)
                assert await read(response) == body
                await until(lambda ended=number + 1: len(server.ended) == ended)  # type: ignore[misc]
            assert len(server.writers) == 3

    run(scenario)


def test_what_comes_unasked_ends_the_connection(run: Callable[[Scenario], None]) -> None:
    """Else it would pass for the next call's answer: another caller's, or one that nobody wrote."""

    async def scenario() -> None:
        async with served(always(HELLO)) as (server, client):
            assert await read(await post(client)) == b"hello"
            server.writers[0].write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
            await until(lambda: server.ended)
            assert await read(await post(client)) == b"hello"
            assert len(server.writers) == 2

    run(scenario)


def test_a_connection_that_its_server_closed_is_not_used(run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        async with served(always(HELLO)) as (server, client):
            await read(await post(client))
            server.writers[0].close()
            await until(lambda: not client._idle)
            assert await read(await post(client)) == b"hello"
            assert len(server.requests) == len(server.writers) == 2

    run(scenario)


def test_an_end_that_the_loop_has_not_seen_yet_is_seen(
    run: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_TRUSTED_S", 0.0)

    async def scenario() -> None:
        async with served(always(HELLO)) as (server, client):
            await read(await post(client))
            number = server.writers[0].get_extra_info("socket").fileno()
            (connection,) = client._idle
            assert connection.is_usable
            # From here on the loop does not run until the request is written.
            with socket.socket(fileno=os.dup(number)) as theirs:
                theirs.shutdown(socket.SHUT_RDWR)
            deadline = time.monotonic() + 10
            while connection.is_usable and time.monotonic() < deadline:
                time.sleep(0.001)  # noqa: ASYNC251 - on purpose
            assert await read(await post(client)) == b"hello"
            assert len(server.writers) == 2

    run(scenario)


def test_a_request_is_never_sent_twice(run: Callable[[Scenario], None]) -> None:
    async def hang_up(number: int, writer: asyncio.StreamWriter) -> None:
        if number == 1:
            writer.write(HELLO)
        else:
            writer.transport.abort()

    async def scenario() -> None:
        async with served(hang_up) as (server, client):
            await read(await post(client))
            with pytest.raises((aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)):
                await post(client)
            assert len(server.requests) == 2
            assert client._free == 100

    run(scenario)


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


def test_calls_wait_for_a_connection_in_turn(run: Callable[[Scenario], None]) -> None:
    gate = asyncio.Event()

    async def respond(_: int, writer: asyncio.StreamWriter) -> None:
        await gate.wait()
        writer.write(HELLO)

    async def scenario() -> None:
        async with served(respond, connections_max=2) as (server, client):
            ended: list[int] = []

            async def call(number: int) -> None:
                assert await read(await post(client)) == b"hello"
                ended.append(number)

            tasks = [asyncio.ensure_future(call(number)) for number in range(9)]
            await until(lambda: len(server.requests) == 2)
            with pytest.raises(TimeoutError):
                await post(client, idle_s=0.05)
            tasks[5].cancel()
            gate.set()
            await asyncio.wait(tasks)
            assert sorted(ended) == [0, 1, 2, 3, 4, 6, 7, 8]
            assert len(server.writers) == 2
            assert client._free == 2
            assert not client._waiting

    run(scenario)


def test_a_connection_for_one_who_has_left_goes_to_the_next(run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        async with served(always(CHUNKED), connections_max=1) as (_, client):
            response = await post(client)
            leaving, staying = (asyncio.ensure_future(post(client)) for _ in range(2))
            await until(lambda: len(client._waiting) == 2)
            response.close()
            leaving.cancel()
            await asyncio.wait((leaving,))
            (await asyncio.wait_for(staying, 20)).close()
            assert leaving.cancelled()
            assert client._free == 1

    run(scenario)


def test_idle_connections_are_closed(
    run: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_KEEPALIVE_S", 0.2)

    async def scenario() -> None:
        async with served(always(HELLO)) as (server, client):
            await asyncio.gather(*(post(client) for _ in range(3)))
            await until(lambda: len(server.ended) == 3)
            assert not client._open

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


def test_who_does_not_listen(run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        client = UpstreamClient(URL("http://127.0.0.1:9"), connections_max=1, connect_timeout_s=10.0)
        for _ in range(3):
            with pytest.raises(aiohttp.ClientConnectorError):
                await post(client)
        client = UpstreamClient(
            URL("http://no-such-name.invalid:9"), connections_max=1, connect_timeout_s=10.0
        )
        with pytest.raises((aiohttp.ClientConnectorDNSError, TimeoutError)):
            await post(client)
        assert client._free == 1

    run(scenario)


def test_a_server_that_does_not_speak_tls_is_a_timeout(run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        listener = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        client = UpstreamClient(URL(f"https://127.0.0.1:{port}"), connections_max=1, connect_timeout_s=0.3)
        with pytest.raises(TimeoutError):
            await post(client)
        assert client._free == 1
        assert not client._open
        listener.close()

    run(scenario)


def test_tls_is_verified(
    run: Callable[[Scenario], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, stranger = Authority(tmp_path, "authority"), Authority(tmp_path, "stranger")
    monkeypatch.setenv("SSL_CERT_FILE", authority.file)

    async def scenario() -> None:
        async with served(always(HELLO), tls=authority.context_for("localhost"), host="localhost") as (
            server,
            client,
        ):
            for _ in range(3):
                assert await read(await post(client, b"x" * 200_000)) == b"hello"
            assert len(server.writers) == 1
        async with served(always(CHUNKED), tls=authority.context_for("localhost"), host="localhost") as (
            server,
            client,
        ):
            (await post(client)).close()
            await until(lambda: server.ended)
        for context in (authority.context_for("other.example"), stranger.context_for("localhost")):
            async with served(always(HELLO), tls=context, host="localhost") as (server, client):
                with pytest.raises(aiohttp.ClientConnectorCertificateError):
                    await post(client)
                assert not server.requests
                assert client._free == 100

    run(scenario)


def test_closing_the_client_ends_all(run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        async with served(always(CHUNKED)) as (server, client):
            response = await post(client)
            client.close()
            with pytest.raises(aiohttp.ClientConnectionError):
                await response.read_some()
            await until(lambda: server.ended)
            with pytest.raises(aiohttp.ClientConnectionError):
                await post(client)

    run(scenario)
