"""Fuzzing the request's head and body over real sockets: no 500, nothing that hangs, every error in shape, and the books are right.

``--minutes 5`` runs it for so long; otherwise some seconds.
"""

import asyncio
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any
from uuid import UUID

import hypothesis
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from pydantic import SecretStr

from config.settings import Settings
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, sync_models
from tests.support.running import Running, run_proxy

_ANSWER_S = 8.0
_SHORT_EXAMPLES = 40
_QUICK = {
    "head_timeout_s": 0.2,
    "silent_timeout_s": 0.2,
    "keepalive_timeout_s": 0.2,
    "body_timeout_s": 0.2,
    "lingering_s": 0.1,
    "body_bytes": 300_000,
}
_ADMIN = "an operator's token"
_KEY = b"@key@"  # in the place of the payer's key, so that an example that failed can be kept

# Heads

_METHODS = st.sampled_from(
    [
        b"GET",
        b"POST",
        b"PUT",
        b"DELETE",
        b"OPTIONS",
        b"HEAD",
        b"PATCH",
        b"TRACE",
        b"CONNECT",
        b"PRI",
        b"get",
        b"",
    ]
) | st.binary(max_size=8)
_PIECES = st.sampled_from(
    [
        b"..",
        b"//",
        b"%2e%2e",
        b"%2f",
        b"%00",
        b"%zz",
        b"%",
        b"?",
        b"#",
        b";",
        b"\\",
        b"*",
        b"@",
        b":",
        b"\xff",
        b" ",
        b"a" * 9000,
    ]
) | st.binary(max_size=12)
_VERSIONS = st.sampled_from(
    [b"HTTP/1.1"] * 8 + [b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"HTTP/1.1 ", b"http/1.1", b""]
)
_NAMES = st.sampled_from(
    [
        *(b"Host", b"Authorization", b"Content-Length", b"Transfer-Encoding", b"Content-Type", b"Connection"),
        *(
            b"Expect",
            b"Upgrade",
            b"Content-Encoding",
            b"Accept-Encoding",
            b"Origin",
            b"Cookie",
            b"Range",
            b"TE",
        ),
        *(b"Access-Control-Request-Method", b"Access-Control-Request-Headers", b"X-Request-Id", b"Trailer"),
        *(b"X-Forwarded-For", b"Forwarded", b"Sec-WebSocket-Key", b"Sec-WebSocket-Version", b"Last-Event-ID"),
        *(
            b"If-Modified-Since",
            b"If-None-Match",
            b"HTTP2-Settings",
            b"X-Tuma-Wallet",
            b"Idempotency-Key",
            b"",
        ),
    ]
) | st.binary(max_size=20)
_VALUES = st.sampled_from(
    [
        *(b"chunked", b"identity", b"gzip", b"deflate", b"br", b"zstd", b"close", b"keep-alive", b"upgrade"),
        *(
            b"websocket",
            b"h2c",
            b"100-continue",
            b"0",
            b"1",
            b"-1",
            b"5",
            b"1000",
            b"99999999999",
            b"x",
            b"*",
        ),
        *(
            b"application/json",
            b"multipart/form-data; boundary=x",
            b"text/plain; charset=nope",
            b"http://x",
            b"null",
        ),
        *(
            b"Bearer " + _KEY,
            b"bearer",
            b"Bearer \xff",
            b"Bearer sk-tuma-\xc3\xa4",
            b"Basic Og==",
            b"a" * 20_000,
        ),
    ]
) | st.binary(max_size=30)
_ENDS = st.sampled_from([b"\r\n"] * 60 + [b"\n", b"\r", b"\r\n ", b"\x00\r\n", b""])


@st.composite
def _chunks(draw: st.DrawFn, body: bytes) -> bytes:
    """A body in chunks, perhaps broken ones."""
    out = b""
    while body:
        size = draw(st.integers(1, max(len(body), 1)))
        out += b"%x" % size + draw(st.sampled_from([b""] * 6 + [b";a=b", b" ", b"\n", b"g"])) + b"\r\n"
        out += body[:size] + draw(st.sampled_from([b"\r\n"] * 9 + [b"", b"\n"]))
        body = body[size:]
    trailer = draw(st.sampled_from([b""] * 6 + [b"X: y\r\n", b"Authorization: Bearer x\r\n", b"\x00"]))
    return out + draw(st.sampled_from([b"0\r\n"] * 9 + [b"00\r\n", b"-0\r\n", b""])) + trailer + b"\r\n"


@st.composite
def _messages(draw: st.DrawFn, paths: list[bytes], bodies: st.SearchStrategy[bytes]) -> bytes:
    """A request that is more or less one."""
    target = draw(st.sampled_from(paths))
    for piece in draw(st.lists(_PIECES, max_size=2)) if draw(st.integers(0, 2)) == 0 else ():
        at = draw(st.integers(0, len(target)))
        target = target[:at] + piece + target[at:]
    body = draw(bodies)
    fields = [(b"Host", b"x"), (b"Authorization", b"Bearer " + _KEY)]
    framing = draw(st.sampled_from(["length"] * 6 + ["chunked", "wrong", "none", "both"]))
    if framing in {"chunked", "both"}:
        fields.append((b"Transfer-Encoding", b"chunked"))
    if framing in {"length", "both"}:
        fields.append((b"Content-Length", b"%d" % len(body)))
    if framing == "wrong":
        fields.append((b"Content-Length", b"%d" % draw(st.integers(0, 2 * len(body) + 2))))
    if framing == "chunked":
        body = draw(_chunks(body))
    if draw(st.booleans()):
        fields += draw(st.lists(st.tuples(_NAMES, _VALUES), min_size=1, max_size=4))
    fields = draw(st.permutations(fields))
    if draw(st.integers(0, 9)) == 0:
        fields = fields[1:]
    head = draw(_METHODS if draw(st.integers(0, 4)) == 0 else st.sampled_from([b"GET", b"POST"]))
    head += (
        b" " + target + b" " + (draw(_VERSIONS) if draw(st.integers(0, 5)) == 0 else b"HTTP/1.1") + b"\r\n"
    )
    for name, value in fields:
        head += name + draw(st.sampled_from([b": "] * 60 + [b":", b" : ", b"", b":\t"])) + value + draw(_ENDS)
    return head + b"\r\n" + body


def heads(paths: list[bytes]) -> st.SearchStrategy[list[bytes]]:
    small = st.binary(max_size=40) | st.just(
        b'{"model":"openai/gpt-4o-mini","messages":[{"role":"user","content":"hi"}]}'
    )
    broken = st.binary(max_size=200) | st.binary(max_size=60).map(lambda data: b"GET / HTTP/1.1\r\n" + data)
    pairs = st.tuples(_messages(paths, small), _messages(paths, small)).map(b"".join)
    return st.lists(_messages(paths, small) | broken | pairs, min_size=6, max_size=16)


# Bodies

_TEXTS = st.text(max_size=20) | st.sampled_from(
    [
        "\ud800",
        "\udfff\ud800",
        "\x00",
        "\u2028",
        "a" * 5000,
        "user",
        "system",
        "tool",
        "text",
        "image_url",
        "<|endoftext|>",
    ]
)
_RAW = st.sampled_from(
    [
        *(
            "1e999",
            "-1e999",
            "NaN",
            "Infinity",
            "-0",
            "0.1e-400",
            "1" * 5000,
            "-" + "9" * 30,
            "1E400",
            "00",
            "+1",
            ".5",
        ),
        *(
            "[" * 3000 + "]" * 3000,
            '{"a":' * 2000 + "1" + "}" * 2000,
            "[" * 50_000,
            '"\\ud800"',
            '"\\u0000"',
            '"\\x"',
            '"',
        ),
        *(
            "tru",
            "undefined",
            "//",
            "1_0",
            "9223372036854775808",
            "18446744073709551616",
            "3.0",
            "1e2",
            "'a'",
            "\ufeff1",
        ),
    ]
)


def _written(value: object) -> str:
    return json.dumps(value)


_VALUE = (
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.integers(-(2**70), 2**70) | st.floats() | _TEXTS,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXTS, inner, max_size=4),
        max_leaves=8,
    ).map(_written)
    | _RAW
)


@st.composite
def _object(draw: st.DrawFn, known: dict[str, st.SearchStrategy[str]]) -> str:
    """A JSON object with some of the members that are known, right or wrong, some twice, and others."""
    pairs = []
    for name, right in known.items():
        how = draw(st.integers(0, 39))
        if how < 30:
            pairs.append((name, draw(right)))
        if how == 39:
            pairs.append((name, draw(_VALUE)))
    if draw(st.integers(0, 19)) == 0:
        pairs.append((draw(st.sampled_from([*known, "x"])), draw(_VALUE)))
    if draw(st.integers(0, 3)) == 0:
        pairs.append((draw(_TEXTS.filter(lambda text: text != "sim")), draw(_VALUE)))
    return "{" + ",".join(f"{json.dumps(name)}:{value}" for name, value in pairs) + "}"


def _array(items: st.SearchStrategy[str], most: int = 3) -> st.SearchStrategy[str]:
    return st.lists(items, min_size=1, max_size=most).map(lambda texts: "[" + ",".join(texts) + "]")


def _just(*values: object) -> st.SearchStrategy[str]:
    return st.sampled_from([json.dumps(value) for value in values])


_PART = _object(
    {
        "type": _just("text", "image_url", "input_audio", "file", "refusal"),
        "text": _just("hi", ""),
        "image_url": _just({"url": "data:image/png;base64,AA=="}, {"url": "http://x", "detail": "high"}, "x"),
        "input_audio": _just({"data": "AAAA", "format": "wav"}),
        "file": _just({"file_data": "data:application/pdf;base64,AA==", "filename": "x"}),
    }
)
_MESSAGE = _object(
    {
        "role": _just("user", "system", "assistant", "tool"),
        "content": _just("hi", None, "x" * 3000) | _array(_PART),
        "name": _just("n"),
        "tool_calls": _just([{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]),
    }
)
_CHAT = _object(
    {
        "model": _just("openai/gpt-4o-mini", "openai/gpt-4o-mini", "openai/gpt-4o", "no/such"),
        "messages": _array(_MESSAGE),
        "stream": _just(True, False),
        "stream_options": _just({"include_usage": True}, {}, None),
        "max_tokens": _just(1, 5, 100),
        "max_completion_tokens": _just(1, 16, None),
        "n": _just(1, 2),
        "models": _just(["openai/gpt-4o-mini"], []),
        "temperature": _just(0, 1.5),
        "tools": _just([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]),
        "response_format": _just({"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}),
        "stop": _just("a", ["b"]),
        "usage": _just({"include": False}),
        "user": _just("u"),
        "modalities": _just(["text", "audio"]),
        "prediction": _just({"type": "content", "content": "x"}),
        "reasoning": _just({"effort": "high", "max_tokens": 10}),
        "plugins": _just([{"id": "web"}]),
    }
)


@st.composite
def _bodies(draw: st.DrawFn) -> bytes:
    text = draw(_CHAT).encode("utf-8", "surrogatepass")
    how = draw(st.integers(0, 14))
    if how == 0 and text:
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.binary(max_size=4)) + text[at + draw(st.integers(0, 3)) :]
    elif how == 1:
        text = draw(st.binary(max_size=100))
    elif how == 2:
        text = draw(st.sampled_from([b"\xef\xbb\xbf", b" " * 5000, b"[", b"\x1f\x8b"])) + text
    return text


def bodies(paths: list[bytes]) -> st.SearchStrategy[list[bytes]]:
    def message(method: bytes, path: bytes, body: bytes, extra: bytes) -> bytes:
        return (
            method
            + b" "
            + path
            + b" HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
            + _KEY
            + b"\r\n"
            + extra
            + b"Content-Length: %d\r\n\r\n" % len(body)
            + body
        )

    chats = st.sampled_from([b"/v1/chat/completions"] * 3 + [b"/api/chat", b"/v1/estimate"])
    methods = st.sampled_from([b"POST", b"PUT", b"PATCH", b"DELETE"])
    extras = st.sampled_from([b""] * 12 + [b"Content-Encoding: gzip\r\n", b"Content-Type: text/plain\r\n"])
    return st.lists(
        st.builds(message, st.just(b"POST"), chats, _bodies(), extras)
        | st.builds(message, methods, st.sampled_from(paths), _bodies(), extras),
        min_size=6,
        max_size=16,
    )


# What must hold


class Fuzz:
    """Sends batches of requests and looks at every answer."""

    def __init__(self, proxy: Running, payer: Payer) -> None:
        self._port = int(proxy.base_url.rpartition(":")[2])
        self._key = payer.secret.encode()
        self.statuses: Counter[str] = Counter()

    async def check(self, batch: list[bytes]) -> None:
        problems = await asyncio.gather(*(self._check(data) for data in batch))
        assert [problem for problem in problems if problem is not None] == []

    async def _check(self, data: bytes) -> str | None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=2**26)
        try:
            operator = b"/admin" in data.partition(b"\r\n")[0]
            writer.write(data.replace(_KEY, _ADMIN.encode() if operator else self._key))
            async with asyncio.timeout(_ANSWER_S):
                return await self._read(reader, data)
        except (TimeoutError, ValueError) as error:
            return f"{error!r}: {data!r}"
        except (ConnectionResetError, BrokenPipeError):
            self.statuses["reset"] += 1
            return None
        finally:
            writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader, data: bytes) -> str | None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            while head.startswith(b"HTTP/1.1 100"):
                head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            self.statuses["closed"] += 1
            return None if error.partial == b"" else f"half a head {error.partial!r} for {data!r}"
        lines = head.decode("latin-1").split("\r\n")
        status = lines[0].split(" ")[1]
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        self.statuses[status] += 1
        if status in {"500", "503", "504"} or not lines[0].startswith("HTTP/1."):
            return f"{head!r} for {data!r}"
        if "x-request-id" not in headers or headers.get("x-content-type-options") != "nosniff":
            return f"headers missing in {head!r} for {data!r}"
        if status[0] in "45" and "content-length" in headers and not data.startswith(b"HEAD"):
            shown = json.loads(await reader.readexactly(int(headers["content-length"])))["error"]
            if not (isinstance(shown["message"], str) and isinstance(shown["type"], str)):
                return f"{shown!r} for {data!r}"
        elif headers.get("content-type", "").startswith("text/event-stream"):
            await self._read_stream(reader)
        return None

    async def _read_stream(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            if line == b"0\r\n":
                return


@pytest.fixture
async def proxy(settings: Settings, office: Office) -> Any:
    await sync_models(office)
    limits = settings.limits.model_copy(update=_QUICK)
    admin = settings.admin.model_copy(update={"token": SecretStr(_ADMIN)})
    async with run_proxy(settings.model_copy(update={"limits": limits, "admin": admin})) as running:
        yield running


@pytest.mark.parametrize("strategy", [heads, bodies])
async def test_nothing_is_a_500_and_nothing_hangs(
    proxy: Running,
    office: Office,
    sim: SimulatedProvider,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    strategy: Callable[[list[bytes]], st.SearchStrategy[list[bytes]]],
) -> None:
    payer = await make_payer(office, amount="1000000")
    minutes = request.config.getoption("--minutes")
    victim = await make_payer(office)  # whom the operator freezes, caps, credits and revokes at random
    named = {
        "model": "openai/gpt-4o-mini",
        "user": victim.user_id,
        "wallet": victim.wallet_id,
        "key": victim.key_id,
        "month": "2026-11",
        "provider": "stripe",
    }
    paths = sorted(
        {
            route.resource.canonical.format_map(defaultdict(lambda: UUID(int=1), named)).encode()
            for route in proxy.app.router.routes()
            if route.resource is not None
        }
    )
    assert b"/v1/chat/completions" in paths
    assert any(path.startswith(b"/admin/wallets/") for path in paths)
    fuzz = Fuzz(proxy, payer)
    loop = asyncio.get_running_loop()

    @hypothesis.settings(
        max_examples=_SHORT_EXAMPLES if minutes is None else 500,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy(paths))
    def one_round(batch: list[bytes]) -> None:
        asyncio.run_coroutine_threadsafe(fuzz.check(batch), loop).result()

    until = time.monotonic() + (minutes or 0) * 60 / 2  # half of it for the heads, half for the bodies
    await asyncio.to_thread(one_round)
    while time.monotonic() < until:
        await asyncio.to_thread(one_round)
    with capsys.disabled():
        print(f"\n{strategy.__name__}: {fuzz.statuses.total()} requests: {dict(fuzz.statuses.most_common())}")
    await proxy.quiet()
    wallet = await office.wallets.get_wallet(payer.wallet_id)
    assert 10**6 * 10**9 - wallet.posted_nano == sim.books.total_nanousd
    assert fuzz.statuses["200"] > 0
    await check_books(office)
