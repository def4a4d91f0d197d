"""The bench's provider: canned answers in OpenRouter's shapes, as fast as Python writes them, and what each caller was billed.

It speaks just enough HTTP/1.1 for clients that send a Content-Length. Callers are told apart by their key. What an
answer costs follows from its number, so that nothing is kept per answer and a cost in the wrong place shows in the sums.
"""

import argparse
import asyncio
import json
import re
import signal
import sys
import time
from typing import Any, cast

import uvloop

from scripts.sim.exact_json import dumps, to_bytes, usd

CHUNKS = 64
PACE_S = 0.01  # between two chunks of a paced stream
SLOW_PACE_S = 2.0  # between two chunks of a slow one, until it is released
API = "/api/v1"
MODELS = ("bench/fast", "bench/paced", "bench/slow")
_HEAD_BYTES_MAX = 64 * 1024
_BODY_BYTES_MAX = 16 * 1024 * 1024
_BACKLOG = 4096
_COST_LEAST_NANOUSD = 40_000
_COST_STEPS = 997
_PROMPT_TOKENS = 12
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_KEY = re.compile(rb"\r\nauthorization: *bearer +(\S+)", re.IGNORECASE)
_MODEL = re.compile(rb'"model" *: *"(bench/[a-z]+)"')
_STREAM = re.compile(rb'"stream" *: *true')
_GENERATION = re.compile(r"id=gen-bench-([0-9]+)$")
_WORD = " lorem"
_STAMP = re.compile(rb'"content":"([0-9]{7})"')
_STAMPS_PER_S, _STAMPS = 100_000, 10**7
_SPREAD = 0.618  # of a beat, between two slow streams: evenly, however many there are
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
_STREAM_END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def cost_nanousd(number: int) -> int:
    """Return what the answer of this number costs."""
    return _COST_LEAST_NANOUSD + number % _COST_STEPS


class BilledCalls:
    """Count and sum of what was billed, by the caller's key."""

    def __init__(self) -> None:
        self._last = 0
        self.calls: dict[str, int] = {}
        self.nanousd: dict[str, int] = {}

    def begin(self, key: str) -> int:
        """Bill an answer; return its number."""
        self._last += 1
        self.add(key, 1, cost_nanousd(self._last))
        return self._last

    def add(self, key: str, calls: int, nanousd: int) -> None:
        """Bill so many calls that cost this together."""
        self.calls[key] = self.calls.get(key, 0) + calls
        self.nanousd[key] = self.nanousd.get(key, 0) + nanousd

    def as_json(self, key: str) -> dict[str, int]:
        """Return a key's count and sum."""
        return {"calls": self.calls.get(key, 0), "nanousd": self.nanousd.get(key, 0)}


def _usage(number: int) -> str:
    counts = f'"prompt_tokens":{_PROMPT_TOKENS},"completion_tokens":{CHUNKS},"total_tokens":{_PROMPT_TOKENS + CHUNKS}'
    details = '"prompt_tokens_details":{"cached_tokens":0},"completion_tokens_details":{"reasoning_tokens":0}'
    return f'{{{counts},"cost":{usd(cost_nanousd(number)):f},{details}}}'


def plain_answer(number: int, model: str) -> bytes:
    """Return a whole answer, head and body."""
    body = (
        f'{{"id":"gen-bench-{number}","object":"chat.completion","created":1700000000,"model":"{model}",'
        f'"choices":[{{"index":0,"finish_reason":"stop","message":{{"role":"assistant","content":"{_WORD * CHUNKS}"}}}}],'
        f'"usage":{_usage(number)}}}'
    ).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def text_piece(number: int, model: str, text: str = _WORD) -> bytes:
    """Return a chunk with text."""
    delta = (
        f'"choices":[{{"index":0,"delta":{{"role":"assistant","content":"{text}"}},"finish_reason":null}}]'
    )
    return _framed(f"data: {_start(number, model)}{delta}}}\n\n")


def stamp(now_s: float) -> str:
    """Write a moment of the monotonic clock, which all processes share, as text for a chunk; it begins anew after 100 s."""
    return f"{int(now_s * _STAMPS_PER_S) % _STAMPS:07d}"


def delays_s(data: bytes, now_s: float) -> list[float]:
    """Return how long ago the chunks in ``data`` were written, as their stamps say."""
    return [(now_s * _STAMPS_PER_S - int(found)) % _STAMPS / _STAMPS_PER_S for found in _STAMP.findall(data)]


def stream_pieces(number: int, model: str) -> list[bytes]:
    """Return the pieces of a stream: 64 chunks with text, and the end with usage."""
    last = _framed(
        f'data: {_start(number, model)}"choices":[{{"index":0,"delta":{{"role":"assistant","content":""}},"finish_reason":"stop"}}],'
        f'"usage":{_usage(number)}}}\n\n'
    )
    return [text_piece(number, model)] * CHUNKS + [last + _STREAM_END]


def _start(number: int, model: str) -> str:
    return f'{{"id":"gen-bench-{number}","object":"chat.completion.chunk","created":1700000000,"model":"{model}",'


def _framed(text: str) -> bytes:
    data = text.encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


class _Upstream:
    """What all connections share."""

    def __init__(self) -> None:
        self.books = BilledCalls()
        self.waiting: dict[int, _Connection] = {}

    def get(self, key: str, target: str) -> tuple[int, Any]:
        """Answer a GET."""
        path, _, query = target.partition("?")
        billed = self.books.as_json(key)
        match path.removeprefix(API):
            case "/models":
                return 200, {"data": [_describe(model) for model in MODELS]}
            case "/embeddings/models":
                return 200, {"data": []}
            case "/key":
                return 200, {"data": {"usage": usd(billed["nanousd"]), "limit_remaining": 1_000_000}}
            case "/credits" | "/activity":
                return 403, {"error": {"code": 403, "message": "only for management keys"}}
            case "/generation":
                found = _GENERATION.search(query)
                if found is not None:
                    cost = usd(cost_nanousd(int(found[1])))
                    return 200, {"data": {"id": f"gen-bench-{found[1]}", "total_cost": cost}}
            case "/bench/books":
                return 200, {**billed, "waiting": len(self.waiting)}
        return 404, {"error": {"code": 404, "message": "not found"}}

    def post(self, key: str, path: str, body: bytes) -> tuple[int, Any]:
        """Answer a POST of the bench's own."""
        if path == "/bench/release":
            waiting, self.waiting = self.waiting, {}
            for connection in waiting.values():
                connection.release()
            return 200, {"released": len(waiting)}
        if path == "/bench/bill":
            told = json.loads(body)
            self.books.add(key, told["calls"], told["nanousd"])
            return 200, self.books.as_json(key)
        return 404, {"error": {"code": 404, "message": "not found"}}


def _describe(model: str) -> dict[str, Any]:
    return {
        "id": model,
        "name": model,
        "context_length": 1_000_000,
        "pricing": {"prompt": "0.00000015", "completion": "0.0000006", "request": "0", "image": "0"},
        "top_provider": {"max_completion_tokens": 16_384},
    }


class _Connection(asyncio.Protocol):
    """One caller's connection: a request, its answer, the next request."""

    def __init__(self, upstream: _Upstream) -> None:
        self._upstream = upstream
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None
        self._rest: list[bytes] = []
        self._number, self._model = 0, ""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's inherit from nothing

    def connection_lost(self, _error: Exception | None) -> None:
        """Forget what was still to be said."""
        self._upstream.waiting.pop(id(self), None)
        if self._timer is not None:
            self._timer.cancel()
        self._transport = None

    def data_received(self, data: bytes) -> None:
        """Answer a request when all of it is here."""
        received = self._received
        received += data
        end = received.find(b"\r\n\r\n")
        if end < 0:
            if len(received) > _HEAD_BYTES_MAX:
                self._close()
            return
        head = bytes(received[:end])
        length = _LENGTH.search(head)
        size = int(length[1]) if length else 0
        if size > _BODY_BYTES_MAX:
            self._close()
            return
        start = end + 4
        if len(received) < start + size:
            return
        body = bytes(received[start : start + size])
        del received[: start + size]
        self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
        found = _KEY.search(head)
        key = found[1].decode("latin-1") if found else ""
        if method == "POST" and target == f"{API}/chat/completions":
            self._complete(key, body)
            return
        status, said = (
            self._upstream.get(key, target)
            if method == "GET"
            else self._upstream.post(key, target.removeprefix(API), body)
        )
        data = to_bytes(dumps(said))
        self._write(
            b"HTTP/1.1 %d -\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (status, len(data), data)
        )

    def _complete(self, key: str, body: bytes) -> None:
        named = _MODEL.search(body)
        model = named[1].decode() if named else MODELS[0]
        number = self._upstream.books.begin(key)
        if _STREAM.search(body) is None:
            self._write(plain_answer(number, model))
            return
        pieces = stream_pieces(number, model)
        self._write(_STREAM_HEAD)
        if model == "bench/fast":
            for piece in pieces:
                self._write(piece)
            return
        self._number, self._model, self._rest = number, model, pieces[1:]
        self._write_stamped()
        now_s = asyncio.get_running_loop().time()
        if model == "bench/slow":
            self._upstream.waiting[id(self)] = self
            self._wait(now_s + SLOW_PACE_S * (number * _SPREAD % 1))
        else:
            self._pace(now_s, 1)

    def _pace(self, began_s: float, number: int) -> None:
        """Send the next piece on the beat, however late the one before was."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_at(began_s + number * PACE_S, self._beat, began_s, number)

    def _beat(self, began_s: float, number: int) -> None:
        if number == len(self._rest):
            self._write(self._rest[-1])
        else:
            self._write_stamped()
            self._pace(began_s, number + 1)

    def _wait(self, until_s: float) -> None:
        self._timer = asyncio.get_running_loop().call_at(until_s, self._say_more, until_s)

    def _say_more(self, at_s: float) -> None:
        self._write_stamped()
        self._wait(at_s + SLOW_PACE_S)

    def release(self) -> None:
        """Send the rest of a stream that waits."""
        if self._timer is not None:
            self._timer.cancel()
        for piece in self._rest:
            self._write(piece)

    def _write_stamped(self) -> None:
        self._write(text_piece(self._number, self._model, stamp(time.monotonic())))

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()


async def _serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    upstream = _Upstream()
    server = await loop.create_server(lambda: _Connection(upstream), "127.0.0.1", port, backlog=_BACKLOG)
    sys.stdout.write(f"bench upstream on http://127.0.0.1:{server.sockets[0].getsockname()[1]}{API}\n")
    sys.stdout.flush()
    await stop.wait()
    server.close()


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.processes.upstream", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    uvloop.run(_serve(parser.parse_args().port))


if __name__ == "__main__":
    main()
