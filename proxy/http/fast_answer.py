"""The answers of calls, made without aiohttp's writer: head and first bytes are one piece, and one write.

aiohttp makes a response's head from a mapping that it builds, completes and reads in a dozen steps, and writes a stream's
head by itself. A call's answer has always the same few fields. This way is for what is usual: HTTP/1.1, a connection
that stays; every other answer goes aiohttp's way (``Heads._is_usual`` says which). On the wire both are the same
(``tests/proxy/test_lean.py``).
"""

import asyncio
import re
from collections.abc import Mapping

from aiohttp import ClientConnectionResetError, HttpVersion11, hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.base_protocol import BaseProtocol
from aiohttp.helpers import rfc822_formatted_time
from multidict import CIMultiDict, CIMultiDictProxy

from proxy.http.cors import Cors
from proxy.http.headers import UsualHeaders
from proxy.http.request_facts import facts_of
from proxy.http.request_head import ends_connection

_FORBIDDEN = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")  # as aiohttp has it: with these lines could be made up
_END = b"0\r\n\r\n"
_JSON = {"Content-Type": "application/json"}
_EVENTS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "X-Accel-Buffering": "no",
}
_NONE: CIMultiDictProxy[str] = CIMultiDictProxy(CIMultiDict())
_STATUS_LINE = "HTTP/1.1 200 OK\r\n"


class _Lean(web.StreamResponse):
    """What is common to both: it knows its whole head, and takes no more fields."""

    _status = 200
    _reason = "OK"
    _keep_alive = True
    _headers = _NONE  # type: ignore[assignment]  # nothing can be put into it
    _protocol: BaseProtocol

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Take the connection; nothing is written yet."""
        if self._eof_sent:
            return None
        self._protocol = request.protocol
        self._payload_writer = writer = request.writer
        return writer

    def _send(self, data: bytes) -> AbstractStreamWriter:
        writer, transport = self._payload_writer, self._protocol.transport
        assert writer is not None, "it is prepared, and has not ended"
        if transport is None or transport.is_closing():
            raise ClientConnectionResetError("Cannot write to closing transport")
        writer.output_size += len(data)  # by it aiohttp knows whether an answer has begun
        transport.write(data)
        return writer

    async def _send_last(self, data: bytes) -> None:
        writer = self._send(data)
        self._eof_sent = True
        self._body_length = writer.output_size
        self._payload_writer = None
        if self._protocol.writing_paused:
            await writer.drain()


class _LeanAnswer(_Lean, web.Response):
    """A whole answer. aiohttp's own beginning is left out: it makes fields, of which there are none."""

    def __init__(self, head: str, body: bytes) -> None:
        self._whole = head.encode() + body
        self._body = body

    async def write_eof(self, data: bytes = b"") -> None:
        """Write all of it."""
        assert not data
        if not self._eof_sent:
            await self._send_last(self._whole)


class _LeanStream(_Lean):
    """An answer in chunks; its head goes out with the first of them."""

    def __init__(self, head: str) -> None:
        self._head = head.encode()

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write a chunk, and wait while the client has much to read."""
        if not data:
            return  # it would be the end
        writer = self._send(b"%b%x\r\n%b\r\n" % (self._head, len(data), bytes(data)))
        self._head = b""
        if self._protocol.writing_paused:
            await writer.drain()

    async def write_eof(self, data: bytes = b"") -> None:
        """Write the last chunk and the end."""
        if self._eof_sent:
            return
        chunk = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
        await self._send_last(self._head + chunk + _END)


class Heads:
    """Makes the answers of calls.

    Args:
        usual: the fields that every answer has.
        cors: for pages.
        draining: set while the process stops.
    """

    def __init__(self, usual: UsualHeaders, cors: Cors, draining: asyncio.Event) -> None:
        self._cors = cors
        self._draining = draining
        self._json = _STATUS_LINE + _lines({**_JSON, **usual.fields})
        self._events = _STATUS_LINE + _lines({**_EVENTS, hdrs.TRANSFER_ENCODING: "chunked", **usual.fields})

    def answer(self, request: web.Request, body: bytes, headers: Mapping[str, str]) -> web.Response:
        """Return a whole answer, JSON, with these headers beside the usual."""
        if not self._is_usual(request):
            return web.Response(body=body, headers={**headers, **_JSON})
        return _LeanAnswer(
            self._head(request, self._json, headers) + f"Content-Length: {len(body)}\r\n\r\n", body
        )

    def stream(self, request: web.Request, headers: Mapping[str, str]) -> web.StreamResponse:
        """Return a stream of events, not yet prepared, with these headers beside the usual."""
        if not self._is_usual(request):
            return web.StreamResponse(headers={**headers, **_EVENTS})
        return _LeanStream(self._head(request, self._events, headers) + "\r\n")

    def _head(self, request: web.Request, same: str, headers: Mapping[str, str]) -> str:
        page = self._cors.fields(request)
        own = _lines({**headers, **page} if page else headers)
        return f"{same}Date: {rfc822_formatted_time()}\r\n{own}"

    def _is_usual(self, request: web.Request) -> bool:
        message = request._message  # noqa: SLF001 - one look in place of three
        return (
            message.version == HttpVersion11
            and not message.should_close
            and message.method == hdrs.METH_POST
            and facts_of(request).head_checked
            and not self._draining.is_set()
            and not ends_connection(request)
        )


HEADS = web.AppKey("heads", Heads)


def _lines(fields: Mapping[str, str]) -> str:
    """Write fields of a head.

    Raises:
        ValueError: a value would not stay in its line.
    """
    lines = "".join([f"{name}: {value}\r\n" for name, value in fields.items()])
    if _FORBIDDEN.search(lines.replace("\r\n", "", len(fields))) is not None:
        raise ValueError("a header has a control character")
    return lines
