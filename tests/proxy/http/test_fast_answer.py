"""The answers of calls, written without aiohttp's writer: on the wire they are what aiohttp would have written."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web

from config.settings import Settings
from proxy.http import fast_answer as lean
from proxy.public.health import DRAINING
from scripts.office import Office
from tests.support.payers import Payer, make_payer, sync_models
from tests.support.running import Running, run_proxy

PAGE = "https://app.example.com"
HELLO: dict[str, Any] = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "hi"}]}
STREAM = {**HELLO, "stream": True}
CHAT = "/v1/chat/completions"
# Of these the value is another one for each call.
OWN = {
    "date",
    "x-request-id",
    "x-tuma-balance",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
}
OWN |= {"x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens", "content-length"}
Head = list[tuple[str, str]]


@pytest.fixture
async def payer(office: Office) -> Payer:
    await sync_models(office)
    return await make_payer(office)


class Ways:
    """Sees which answers went the lean way, and can close it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: list[bool] = []
        self.closed = False
        self.pieces: list[bytes] = []
        usual, send = lean.Heads._is_usual, lean._Lean._send

        def look(heads: lean.Heads, request: web.Request) -> bool:
            self.taken.append(usual(heads, request) and not self.closed)
            return self.taken[-1]

        def note(answer: lean._Lean, data: bytes) -> Any:
            self.pieces.append(data)
            return send(answer, data)

        monkeypatch.setattr(lean.Heads, "_is_usual", look)
        monkeypatch.setattr(lean._Lean, "_send", note)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ways]:
    yield Ways(monkeypatch)


def request(
    payer: Payer, body: dict[str, Any], *, path: str = CHAT, version: str = "1.1", **headers: str
) -> bytes:
    text = json.dumps(body).encode()
    fields = {
        "Host": "tuma",
        "Authorization": f"Bearer {payer.secret}",
        "Content-Length": str(len(text)),
        **headers,
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST {path} HTTP/{version}\r\n{lines}\r\n".encode() + text


class Client:
    """A connection that reads answers to the byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(cls, proxy: Running) -> "Client":
        return cls(*await asyncio.open_connection("127.0.0.1", int(proxy.base_url.rpartition(":")[2])))

    async def ask(self, data: bytes) -> tuple[str, Head, bytes]:
        self.writer.write(data)
        return await self.read()

    async def read(self) -> tuple[str, Head, bytes]:
        async with asyncio.timeout(20):
            text = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            status, *lines = text.removesuffix("\r\n\r\n").split("\r\n")
            fields = [(line.partition(": ")[0].lower(), line.partition(": ")[2]) for line in lines]
            named = dict(fields)
            if "content-length" in named:
                return status, fields, await self.reader.readexactly(int(named["content-length"]))
            if "transfer-encoding" not in named:
                return status, fields, await self.reader.read()
            body = b""
            while size := int((await self.reader.readuntil(b"\r\n")).strip(), 16):
                body += await self.reader.readexactly(size)
                assert await self.reader.readexactly(2) == b"\r\n"
            assert await self.reader.readexactly(2) == b"\r\n"
            return status, fields, body

    async def is_closed(self) -> bool:
        async with asyncio.timeout(5):
            return not await self.reader.read(1)


def compared(fields: Head) -> Head:
    return sorted((name, "" if name in OWN else value) for name, value in fields)


@pytest.mark.parametrize("origins", [(), (PAGE,), ("*",)])
async def test_heads_are_those_that_aiohttp_writes(
    settings: Settings, payer: Payer, ways: Ways, origins: tuple[str, ...]
) -> None:
    changed = settings.model_copy(
        update={
            "cors": settings.cors.model_copy(update={"origins": origins}),
            "http": settings.http.model_copy(update={"hsts_s": 77}),
        }
    )
    async with run_proxy(changed) as proxy:
        client = await Client.to(proxy)
        for body, path, headers in (
            (HELLO, CHAT, {}),
            (STREAM, CHAT, {}),
            (HELLO, "/api/chat", {"Origin": PAGE}),
            (STREAM, "/api/chat", {"Origin": PAGE}),
            (STREAM, CHAT, {"Origin": "https://evil.example"}),
        ):
            said = request(payer, body, path=path, **headers)
            ways.closed = False
            status, fields, content = await client.ask(said)
            ways.closed = True
            status_then, fields_then, content_then = await client.ask(said)
            assert ways.taken[-2:] == [True, False]
            assert status == status_then == "HTTP/1.1 200 OK"
            assert compared(fields) == compared(fields_then)
            names = [name for name, _ in fields]
            assert len(set(names)) == len(names)
            assert {"date", "server", "x-request-id", "strict-transport-security"} <= set(names)
            assert len(content) > 100
            assert len(content_then) > 100
        client.writer.close()


async def test_head_and_first_bytes_are_one_piece(proxy: Running, payer: Payer, ways: Ways) -> None:
    client = await Client.to(proxy)
    _, _, body = await client.ask(request(payer, HELLO))
    (whole,) = ways.pieces
    assert whole.startswith(b"HTTP/1.1 200 OK\r\n")
    assert whole.endswith(b"\r\n\r\n" + body)
    ways.pieces.clear()
    _, _, body = await client.ask(request(payer, STREAM))
    assert ways.pieces[0].startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\n\r\n" in ways.pieces[0]
    assert b"data: " in ways.pieces[0]
    assert ways.pieces[-1].endswith(b"\r\n0\r\n\r\n")
    assert not any(piece.startswith(b"HTTP") for piece in ways.pieces[1:])
    assert body.endswith(b"data: [DONE]\n\n")
    client.writer.close()


async def test_one_after_the_other_on_one_connection(proxy: Running, payer: Payer, ways: Ways) -> None:
    client = await Client.to(proxy)
    client.writer.write(request(payer, HELLO) + request(payer, STREAM) + request(payer, HELLO))
    answers = [await client.read() for _ in range(3)]
    assert [answer[0] for answer in answers] == ["HTTP/1.1 200 OK"] * 3
    assert len({dict(answer[1])["x-request-id"] for answer in answers}) == 3
    assert ways.taken == [True] * 3
    client.writer.close()


@pytest.mark.parametrize("body", [HELLO, STREAM])
async def test_connections_that_end_go_the_other_way(
    proxy: Running, payer: Payer, ways: Ways, body: dict[str, Any]
) -> None:
    for said in (
        request(payer, body, Connection="close"),
        request(payer, body, Upgrade="h2c", Connection="Upgrade"),
        request(payer, body, version="1.0"),
    ):
        client = await Client.to(proxy)
        status, fields, _ = await client.ask(said)
        assert status.endswith(" 200 OK")
        assert dict(fields).get("connection", "close") == "close"
        assert await client.is_closed()
        client.writer.close()
    client = await Client.to(proxy)
    proxy.app[DRAINING].set()
    _, fields, _ = await client.ask(request(payer, body))
    assert dict(fields)["connection"] == "close"
    assert await client.is_closed()
    client.writer.close()
    assert ways.taken == [False] * 4


@pytest.mark.parametrize("value", ["a\r\nSet-Cookie: b", "a\r\n", "a\nb", "a\rb", "a\0b", "\x7f"])
def test_no_value_makes_lines_of_its_own(value: str) -> None:
    with pytest.raises(ValueError, match="control character"):
        lean._lines({"x-a": "b", "x-tuma-charge": value, "x-c": "d"})
    with pytest.raises(ValueError, match="control character"):
        lean._lines({value: "a"})


def test_nothing_is_put_into_a_head_that_is_made() -> None:
    answer = lean._LeanAnswer("HTTP/1.1 200 OK\r\n", b"{}")
    with pytest.raises(TypeError):
        answer.headers["X-Late"] = "1"
    assert answer.content_length == 2
    assert answer.status == 200
