"""Connections of the client for the paid POST: what is kept, used again, waited for, verified and given up."""

import asyncio
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
from yarl import URL

from proxy.upstream import client as client_module
from proxy.upstream.client import UpstreamClient
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
from tests.support.tls_proxy import Authority


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
