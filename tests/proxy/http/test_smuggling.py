"""Request smuggling: a shape that two servers could read differently is refused and its connection closed, or it has one meaning.

Behind every shape comes a second, whole call with a valid key: where the shape is refused, that call must never be made.
"""

import asyncio
import json
import random
from collections.abc import Iterator

import pytest

from config.settings import Settings
from proxy.endpoints import ENDPOINTS
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, sync_models
from tests.support.running import Running, run_proxy

BODY = json.dumps({"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "hi"}]}).encode()
SMUGGLED = BODY.replace(b'"hi"', b'"smuggled"')
LINE = b"POST /v1/chat/completions HTTP/1.1"
HOST = b"Host: x\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
NO_CHUNKS = b"0\r\n\r\n"
UPGRADE = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)


class Shapes:
    """The requests, with a payer's key in them."""

    def __init__(self, payer: Payer) -> None:
        self.key = b"Authorization: Bearer " + payer.secret.encode() + b"\r\n"
        # It ends its connection, so that a test need not wait to see that nothing more comes.
        self.second = (
            LINE
            + b"\r\nHost: second\r\nConnection: close\r\n"
            + self.key
            + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED)
            + SMUGGLED
        )

    def head(self, headers: bytes, *, line: bytes = LINE, host: bytes = HOST) -> bytes:
        return line + b"\r\n" + host + self.key + headers + b"\r\n"

    def refused(self) -> Iterator[tuple[str, bytes]]:
        """Shapes of which nothing is done; the second call stands behind each."""
        for name, data in (
            *self._lengths(),
            *self._codings(),
            *self._lines(),
            *self._fields(),
            *self._chunks(),
            *self._protocols(),
        ):
            yield name, data + self.second

    def _lengths(self) -> Iterator[tuple[str, bytes]]:
        yield "CL.TE", self.head(LENGTH + CHUNKED) + NO_CHUNKS
        yield "TE.CL", self.head(CHUNKED + b"Content-Length: 4\r\n") + NO_CHUNKS
        yield "two lengths that differ", self.head(b"Content-Length: 0\r\n" + LENGTH) + BODY
        yield "two lengths alike", self.head(LENGTH + LENGTH) + BODY
        values = (
            b"-5",
            b"+5",
            b"0x10",
            b"5 5",
            b"5, 5",
            b"5,6",
            b"",
            b"1_0",
            b"5.0",
            b"5;",
            b"\xd9\xa1",
            b"5\x0b",
        )
        for value in (*values, b"9" * 30, b"%d" % 2**64, b"%d" % (2**64 - 1), b"%d" % 2**63):
            yield f"length {value!r}", self.head(b"Content-Length: " + value + b"\r\n") + BODY
        yield "length behind a space", self.head(b" Content-Length: 5\r\n") + BODY
        yield "length before a space", self.head(b"Content-Length : 5\r\n") + BODY
        yield "folded length", self.head(b"Content-Length: 1\r\n 0\r\n") + BODY

    def _codings(self) -> Iterator[tuple[str, bytes]]:
        for value in (
            *(b"xchunked", b"\x0bchunked", b"chunked\x0b", b"\x00chunked", b"chunked, identity", b"identity"),
            *(
                b"identity, chunked",
                b"gzip, chunked",
                b"chunked, chunked",
                b"chunked;q=1",
                b"'chunked'",
                b"chunk",
            ),
            *(
                b'"chunked"',
                b"",
                b"chunked,",
                b",chunked",
                b"x, chunked",
                b"chunked chunked",
                b"\xe3\x83\x81hunked",
            ),
        ):
            yield f"coding {value!r}", self.head(b"Transfer-Encoding:" + value + b"\r\n") + NO_CHUNKS
            yield (
                f"length and {value!r}",
                self.head(LENGTH + b"Transfer-Encoding:" + value + b"\r\n") + NO_CHUNKS,
            )
        for value in (b" chunked", b"\tchunked", b"chunked ", b"CHUNKED"):
            yield (
                f"length and {value!r}",
                self.head(LENGTH + b"Transfer-Encoding:" + value + b"\r\n") + NO_CHUNKS,
            )
        for value in (b"identity, chunked", b"gzip, chunked", b",chunked"):  # a whole call, if it were chunks
            yield f"a call in {value!r}", self.head(b"Transfer-Encoding:" + value + b"\r\n") + CHUNKS
        for first, second in ((b"chunked", b"chunked"), (b"chunked", b"identity"), (b"identity", b"chunked")):
            both = b"Transfer-Encoding: " + first + b"\r\nTransfer-Encoding: " + second + b"\r\n"
            yield f"codings {first!r} and {second!r}", self.head(both) + NO_CHUNKS
        yield "underscore", self.head(LENGTH + b"Transfer_Encoding: chunked\r\n") + NO_CHUNKS
        yield "coding before a space", self.head(LENGTH + b"Transfer-Encoding : chunked\r\n") + NO_CHUNKS
        yield "folded coding", self.head(b"Transfer-Encoding:\r\n chunked\r\n") + NO_CHUNKS

    def _lines(self) -> Iterator[tuple[str, bytes]]:
        yield "bare LF everywhere", self.head(LENGTH).replace(b"\r\n", b"\n") + BODY
        yield "bare LF between fields", self.head(LENGTH + b"X-A: b\n" + CHUNKED) + NO_CHUNKS
        yield "bare LF at the end", self.head(LENGTH)[:-4] + b"\n\n" + BODY
        yield "bare CR in a value", self.head(LENGTH + b"X-A: b\r" + CHUNKED) + NO_CHUNKS
        yield "folded field", self.head(LENGTH + b"X-A: a\r\n b\r\n") + BODY
        yield "garbage line", self.head(LENGTH + b"no colon\r\n") + BODY

    def _fields(self) -> Iterator[tuple[str, bytes]]:
        for byte in (b"\x00", b"\x01", b"\x0b", b"\x0c", b"\x7f", b"\x1b"):
            yield f"{byte!r} in a value", self.head(LENGTH + b"X-A: a" + byte + b"b\r\n") + BODY
            yield f"{byte!r} in a name", self.head(LENGTH + b"X-" + byte + b"A: b\r\n") + BODY
        yield "a name beyond ASCII", self.head(LENGTH + b"X-\xe4: b\r\n") + BODY
        yield "no name", self.head(LENGTH + b": b\r\n") + BODY
        yield "two keys", self.head(LENGTH + b"Authorization: Bearer sk-tuma-other\r\n") + BODY
        yield "two hosts", self.head(LENGTH, host=HOST + b"Host: y\r\n") + BODY
        yield "no host", self.head(LENGTH, host=b"") + BODY
        for host in (b"a b", b"a/b", b"user@x", b"x:port", b"x#y", b"x?y", b"[::1", b"x\\y", b"x, y"):
            yield f"host {host!r}", self.head(LENGTH, host=b"Host: " + host + b"\r\n") + BODY

    def _chunks(self) -> Iterator[tuple[str, bytes]]:
        for chunks in (
            *(
                b"f" * 17 + b"\r\n",
                b"1" + b"0" * 16 + b"\r\n",
                b"-1\r\n",
                b"+1\r\nx\r\n0\r\n\r\n",
                b"\r\n\r\n",
            ),
            *(
                b"0x1\r\nx\r\n0\r\n\r\n",
                b"0_0\r\n\r\n",
                b"0 \r\n\r\n",
                b" 0\r\n\r\n",
                b"0\t\r\n\r\n",
                b"0\n\n",
            ),
            *(b"0;a=b\n\r\n\r\n", b'0;a="b\n"\r\n\r\n', b"2\nab\r\n0\r\n\r\n", b"2\r\nab\n0\r\n\r\n"),
            *(b"2\r\nab0\r\n\r\n", b"2\r\nabXX0\r\n\r\n", b"0\r\r", b"0\r\nContent-Length: 5\r\n\r\n"),
            *(
                b"0\r\nTransfer-Encoding: chunked\r\n\r\n",
                b"0\r\nX: y\r\n z\r\n\r\n",
                b"0\r\nX\x00: y\r\n\r\n",
            ),
        ):
            yield f"chunks {chunks!r}", self.head(CHUNKED) + chunks

    def _protocols(self) -> Iterator[tuple[str, bytes]]:
        yield "HTTP/0.9", b"GET /healthz\r\n\r\n"
        # The parser knows these two, and asks no Host of them.
        for version in (b"HTTP/2.0", b"HTTP/0.9"):
            line = b"GET /healthz " + version
            yield f"{version!r} without a body", self.head(b"", line=line)
            yield f"{version!r} without host", self.head(LENGTH, line=line, host=b"") + BODY
        yield "HTTP/1.0 and chunks", self.head(CHUNKED, line=LINE[:-1] + b"0") + NO_CHUNKS
        yield "HTTP/1.0 without length", self.head(b"", line=LINE[:-1] + b"0")
        for version in (
            b"HTTP/1.2",
            b"HTTP/2.0",
            b"http/1.1",
            b"HTTP/1.10",
            b"HTTP/1,1",
            b"HTTP/1.1 ",
            b"HTTP/+1.1",
        ):
            yield f"version {version!r}", self.head(LENGTH, line=LINE[:-8] + version) + BODY
        yield "HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00" * 9
        yield "TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 100 + b"\r\n\r\n"
        for target in (b"x:80", b"/a b", b"/\xff", b"", b"http://", b"*", b"/v1/chat/completions#/healthz"):
            yield f"target {target!r}", self.head(LENGTH, line=b"POST " + target + b" HTTP/1.1") + BODY
        for target in (b"evil.example:443", b"/v1/chat/completions", b"x"):
            yield f"CONNECT {target!r}", self.head(b"", line=b"CONNECT " + target + b" HTTP/1.1")
        for method in (b"FOO", b"post", b"POST\x00", b"PO ST", b"POST\t"):
            yield f"method {method!r}", self.head(LENGTH, line=LINE.replace(b"POST", method)) + BODY
        yield "another expectation", self.head(LENGTH + b"Expect: 200-maybe\r\n") + BODY
        yield "old websockets", self.head(LENGTH + b"Sec-WebSocket-Key1: a\r\n") + BODY

    def understood(self) -> Iterator[tuple[str, bytes, list[str]]]:
        """Shapes that have one meaning, and what the provider is to be asked because of them."""
        yield from self._with_a_second_call()
        yield from self._with_a_call_in_the_body()
        yield from self._with_nothing_read_after()

    def _with_a_second_call(self) -> Iterator[tuple[str, bytes, list[str]]]:
        """Both are calls."""
        call = self.head(LENGTH) + BODY
        second = self.second
        yield "two calls", call + second, ["hi", "smuggled"]
        yield "empty lines first", b"\r\n\r\n" + call + second, ["hi", "smuggled"]
        yield (
            "HTTP/1.0 that stays",
            (self.head(LENGTH + b"Connection: keep-alive\r\n", line=LINE[:-1] + b"0") + BODY + second),
            ["hi", "smuggled"],
        )
        yield (
            "length hidden by Connection",
            (self.head(LENGTH + b"Connection: content-length\r\n") + BODY + second),
            ["hi", "smuggled"],
        )
        yield (
            "expectation",
            self.head(LENGTH + b"Expect: 100-continue\r\n") + BODY + second,
            ["hi", "smuggled"],
        )
        yield (
            "method override",
            self.head(LENGTH + b"X-HTTP-Method-Override: GET\r\n") + BODY + second,
            ["hi", "smuggled"],
        )

    def _with_a_call_in_the_body(self) -> Iterator[tuple[str, bytes, list[str]]]:
        """The second call is the first one's body."""
        second = self.second
        hidden = b"Connection: close\r\nContent-Length: %d\r\n" % len(second)
        for method in (b"GET", b"HEAD", b"OPTIONS", b"DELETE"):
            yield (
                f"{method!r} with a body",
                (self.head(hidden, line=method + b" /healthz HTTP/1.1") + second),
                [],
            )

    def _with_nothing_read_after(self) -> Iterator[tuple[str, bytes, list[str]]]:
        second = self.second
        # An absolute target names only a path here.
        absolute = LINE.replace(b" /", b" http://evil.example:1/")
        yield "absolute target", self.head(LENGTH + b"Connection: close\r\n", line=absolute) + BODY, ["hi"]
        # Nothing is read after chunks, as aiohttp makes a header of the next request of a trailer's last field.
        for trailer in (
            b"",
            b"X-T: y\r\n",
            b"Authorization: Bearer sk-tuma-other\r\n",
            b"X-Tuma-Wallet: w\r\n",
        ):
            yield (
                f"chunks and trailer {trailer!r}",
                (self.head(CHUNKED) + CHUNKS[:-2] + trailer + b"\r\n" + second),
                ["hi"],
            )
        yield (
            "chunk extension",
            (self.head(CHUNKED) + CHUNKS.replace(b"\r\n", b";a=b\r\n", 1) + second),
            ["hi"],
        )
        for value in (b" chunked", b"\tchunked", b"chunked ", b"CHUNKED"):
            yield (
                f"coding {value!r}",
                (self.head(b"Transfer-Encoding:" + value + b"\r\n") + CHUNKS + second),
                ["hi"],
            )
        # Nor after the offer of another protocol.
        h2c = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
        yield "h2c", self.head(LENGTH + h2c) + BODY + second, ["hi"]
        yield "websocket", self.head(LENGTH + UPGRADE) + BODY + second, ["hi"]
        yield "websocket without body", self.head(UPGRADE, line=b"GET /healthz HTTP/1.1") + second, []


async def send(proxy: Running, data: bytes, *, split: int | None = None) -> tuple[bytes, bool]:
    """Send in one piece, or in two; return the answer and whether the server closed the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.base_url.rpartition(":")[2]))
    answer = b""
    closed = True
    try:
        for piece in (data,) if split is None else (data[:split], data[split:]):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)
        async with asyncio.timeout(5):
            while piece := await reader.read(65_536):
                answer += piece
    except (ConnectionResetError, BrokenPipeError):
        pass
    except TimeoutError:
        closed = False
    finally:
        writer.close()
    return answer, closed


def asked(sim: SimulatedProvider) -> list[str]:
    return [request.body["messages"][0]["content"] for request in sim.requests]


@pytest.fixture
async def payer(office: Office) -> Payer:
    return await make_payer(office)


async def test_dangerous_shapes_are_refused(
    proxy: Running, payer: Payer, office: Office, sim: SimulatedProvider
) -> None:
    dice = random.Random(7)
    turn = asyncio.Semaphore(16)

    async def check(name: str, data: bytes, split: int | None) -> None:
        async with turn:
            answer, closed = await send(proxy, data, split=split)
        assert closed, (name, split, answer)
        # A connection that is closed upon bytes that were not read may be reset before the answer was.
        if answer or split is None:
            assert answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), (name, split, answer)
            head, _, body = answer.partition(b"\r\n\r\n")
            assert b"x-request-id:" in head.lower(), (name, head)
            assert b"connection: close" in head.lower() or head.startswith(b"HTTP/1.0"), (name, head)
            assert json.loads(body)["error"]["type"] == "invalid_request_error", (
                name,
                body,
            )  # one answer, no more

    shapes = list(Shapes(payer).refused())
    await asyncio.gather(*(check(name, data, None) for name, data in shapes))
    await asyncio.gather(*(check(name, data, dice.randrange(1, len(data))) for name, data in shapes))
    await proxy.quiet()
    assert asked(sim) == []
    assert (await office.wallets.get_wallet(payer.wallet_id)).posted_nano == 10 * 10**9
    await check_books(office)


async def test_the_rest_has_one_meaning(
    proxy: Running, payer: Payer, office: Office, sim: SimulatedProvider
) -> None:
    dice = random.Random(11)
    for name, data, wanted in Shapes(payer).understood():
        for split in (None, dice.randrange(1, len(data)), dice.randrange(1, len(data))):
            sim.requests.clear()
            answer, closed = await send(proxy, data, split=split)
            assert closed, (name, split, answer)
            # As above: where the second request is not read, the reset may be quicker than the first one's answer.
            if answer or len(wanted) > 1:
                assert answer.startswith(
                    (b"HTTP/1.1 200", b"HTTP/1.0 200", b"HTTP/1.1 100", b"HTTP/1.1 405")
                ), (name, answer)
            await proxy.quiet()
            assert asked(sim) == wanted, (name, split)
    wallet = await office.wallets.get_wallet(payer.wallet_id)
    assert 10 * 10**9 - wallet.posted_nano == sim.books.total_nanousd > 0
    await check_books(office)


async def test_chunks_that_break_in_a_later_packet_end_the_call_at_once(
    proxy: Running, payer: Payer, sim: SimulatedProvider
) -> None:
    shapes = Shapes(payer)
    started = shapes.head(CHUNKED) + b"2\r\n{}\r\n"
    for broken in (b"zz\r\n", b"-1\r\n", b"5\n", b"0\r\nContent-Length: 5\r\n\r\n"):
        async with asyncio.timeout(2):
            answer, closed = await send(proxy, started + broken + shapes.second, split=len(started))
        assert closed
        assert answer == b"" or answer.startswith(b"HTTP/1.1 400"), answer
        assert answer.count(b"HTTP/1.1 ") <= 1
    assert asked(sim) == []


async def test_pipelined_requests_wait_in_the_socket(
    settings: Settings, office: Office, sim: SimulatedProvider
) -> None:
    """A client that sends request upon request without reading is not read any further."""
    await sync_models(office)
    payer = await make_payer(office)
    sim.set_behaviour(first_delay_ms=2_000)
    async with run_proxy(settings) as proxy:
        call = Shapes(payer).head(LENGTH) + BODY
        _, writer = await asyncio.open_connection("127.0.0.1", int(proxy.base_url.rpartition(":")[2]))
        writer.write(call * 200)
        async with asyncio.timeout(20):
            while not sim.requests:
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.2)
        (protocol,) = proxy.server.connections
        assert 0 < len(protocol._messages) <= 32
        assert len(sim.requests) == 1
        writer.transport.abort()
        await asyncio.sleep(0.05)
        await proxy.quiet()
        assert len(sim.requests) < 40


async def test_a_head_has_no_body_behind_it(settings: Settings, office: Office) -> None:
    """What came behind the answer to a HEAD would be read as the answer to the next request on that connection."""
    payer = await make_payer(office)
    key = b"Authorization: Bearer " + payer.secret.encode() + b"\r\n"
    paths = [item.path for item in ENDPOINTS if item.method == "GET"]
    assert "/v1/wallet/events" in paths
    async with run_proxy(settings) as proxy:
        for path in paths:
            for query in ("", "?format=csv"):
                shown = path.replace("{month}", "2026-11") + query
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", int(proxy.base_url.rpartition(":")[2])
                )
                writer.write(b"HEAD " + shown.encode() + b" HTTP/1.1\r\n" + HOST + key + b"\r\n")
                writer.write(b"GET /healthz HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n")
                async with asyncio.timeout(20):
                    head = await reader.readuntil(b"\r\n\r\n")
                    rest = await reader.read()
                assert head.startswith(b"HTTP/1.1 "), shown
                if b"connection: close" in head.lower():
                    assert rest == b"", shown
                else:
                    assert rest.startswith(b"HTTP/1.1 200 OK\r\n"), shown
                writer.close()
