"""The client's connection: how many there may be and how slow, whether its client is gone, and what is no HTTP."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import structlog
from aiohttp import HttpVersion10, HttpVersion11, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from billing.ids import new_id
from config.settings import HttpSettings, LimitSettings
from proxy.http.errors import http_error_response
from proxy.http.headers import UsualHeaders

_log = structlog.get_logger("tuma.connections")
_CHECK_S = 1.0
_USUAL = UsualHeaders(HttpSettings())
_VERSIONS = (HttpVersion11, HttpVersion10)
_TEXTS = {
    408: "The request's head did not arrive in time.",
    431: "The request's head is too large.",
}


class ClientWatch:
    """Follows one client through one streamed answer.

    Args:
        on_gone: called once, when the client's connection is lost.
    """

    def __init__(self, on_gone: Callable[[], None]) -> None:
        self.gone = False
        self.writing_since: float | None = None
        self._on_gone = on_gone

    def lost(self) -> None:
        """Tell the relay that the client is gone."""
        if not self.gone:
            self.gone = True
            self._on_gone()

    async def write(self, response: web.StreamResponse, data: bytes) -> None:
        """Send bytes, as fast as the client takes them; to a client that is gone, nothing."""
        await self._watched(response.write, data)

    async def finish(self, response: web.StreamResponse, last: bytes) -> None:
        """Send the last bytes and the end, in one write."""
        await self._watched(response.write_eof, last)

    async def _watched(self, write: Callable[[bytes], Awaitable[None]], data: bytes) -> None:
        if self.gone:
            return
        self.writing_since = time.monotonic()
        try:
            await write(data)
        except ConnectionResetError:
            self.lost()
        finally:
            self.writing_since = None


class ClientProtocol(RequestHandler):
    """aiohttp's server protocol, with bounds on a head's size and pace, a watch on the connection's end, and shaped errors.

    Args:
        server: counts the connections.
        head_bytes: how large a head may become before it is whole.
    """

    def __init__(self, server: "ClientServer", *, head_bytes: int, **kwargs: Any) -> None:
        super().__init__(server, **kwargs)
        self.watch: ClientWatch | None = None
        self.connected_since = time.monotonic()
        self.head_since: float | None = None  # when the first byte of a head came that is not whole yet
        self.address: str | None = None  # as counted; None: not counted
        self._server = server
        self._head_bytes_max = head_bytes
        self._head_bytes = 0
        self._broken = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection, or close it at once when there are too many: nothing of it was read."""
        if not self._server.admit(self, transport):
            assert isinstance(transport, asyncio.Transport)
            transport.abort()
            return
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Tell the watch, if an answer is under way."""
        self._server.dismiss(self)
        super().connection_lost(exc)
        if self.watch is not None:
            self.watch.lost()

    @property
    def is_silent(self) -> bool:
        """Whether nothing has been sent since the connection was made."""
        return self._request_count == 0 and self.head_since is None

    def data_received(self, data: bytes) -> None:
        """Parse what came; note since when a head is on its way."""
        if self._broken:
            return
        super().data_received(data)
        if self._messages:
            self.head_since = None
            self._head_bytes = 0
            self._refuse_other_versions()
            if isinstance(self._messages[-1][0], _ErrInfo):
                self._broken = True
                self._fail_body()
        elif self._waiter is not None and data:  # no request is under way, and this ended no head
            if self.head_since is None:
                self.head_since = time.monotonic()
            self._head_bytes += len(data)
            if self._head_bytes > self._head_bytes_max:
                self.refuse_head(431)

    def resume_reading(self, resume_parser: bool = True) -> None:  # noqa: FBT001, FBT002 - aiohttp's signature
        """Read on after a pause; aiohttp asks for it with each body, and then parses nothing once more."""
        if self._reading_paused or self._buffer_paused:
            super().resume_reading(resume_parser)

    def _refuse_other_versions(self) -> None:
        """Let nothing wait that says it is HTTP/0.9 or HTTP/2; aiohttp would answer in the same version."""
        for index, (message, _) in enumerate(self._messages):
            if not isinstance(message, _ErrInfo) and message.version not in _VERSIONS:
                error = HttpProcessingError(code=400, message="version")
                while len(self._messages) > index:
                    self._messages.pop()
                self._messages.append((_ErrInfo(status=400, exc=error, message="version"), EMPTY_PAYLOAD))
                return

    def _fail_body(self) -> None:
        """Wake whoever reads a body whose chunks cannot be read; aiohttp lets them wait."""
        if len(self._messages) > 1:
            body = self._messages[-2][1]
        elif self._current_request is not None:
            body = self._current_request.content
        else:
            return
        if not body.is_eof() and body.exception() is None:
            body.set_exception(web.RequestPayloadError("its chunks are not valid"))

    def refuse_head(self, status: int) -> None:
        """Answer a head that is too slow or too large, then close."""
        if self._broken or self._waiter is None or self._waiter.done():
            return
        self._broken = True
        self.head_since = None
        error = HttpProcessingError(code=status, message=_TEXTS[status])
        self._messages.append((_ErrInfo(status=status, exc=error, message=_TEXTS[status]), EMPTY_PAYLOAD))
        self._waiter.set_result(None)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - aiohttp's signature
    ) -> web.StreamResponse:
        """Answer what aiohttp could not read or handle; the connection is closed afterwards."""
        if status >= 500:  # noqa: PLR2004 - HTTP
            _log.error("request.failed", error=repr(exc), exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("the response has begun; an error cannot be sent")
        usual = "The request is not valid HTTP." if status < 500 else "Something went wrong on our side."  # noqa: PLR2004 - HTTP
        text = _TEXTS.get(status, usual)
        response = http_error_response(status, text, headers={"x-request-id": str(new_id())})
        _USUAL.add_to(response.headers)
        response.force_close()
        return response


class ClientServer(web.Server):
    """Makes a ``ClientProtocol`` per connection, up to a bound, and lets go of clients that are too slow.

    Args:
        limits: the bounds.
    """

    def __init__(self, handler: Any, *, limits: LimitSettings, **kwargs: Any) -> None:
        super().__init__(handler, **kwargs)
        self._limits = limits
        self._count = 0
        self._per_address: dict[str, int] = {}
        self._refused = 0

    def __call__(self) -> RequestHandler:
        """Make the protocol of a new connection."""
        return ClientProtocol(self, head_bytes=self._limits.head_bytes, loop=self._loop, **self._kwargs)

    def admit(self, protocol: ClientProtocol, transport: asyncio.BaseTransport) -> bool:
        """Count a new connection; False when it is one too many."""
        limits = self._limits
        peer = transport.get_extra_info("peername") if limits.connections_per_address else None
        address = peer[0] if isinstance(peer, tuple) else ""
        there = self._per_address.get(address, 0)
        if self._count >= limits.connections or 0 < limits.connections_per_address <= there:
            self._refused += 1
            return False
        protocol.address = address
        self._count += 1
        self._per_address[address] = there + 1
        return True

    def dismiss(self, protocol: ClientProtocol) -> None:
        """Count a connection no longer."""
        address, protocol.address = protocol.address, None
        if address is None:
            return
        self._count -= 1
        self._per_address[address] -= 1
        if not self._per_address[address]:
            del self._per_address[address]

    async def drop_slow_clients(self) -> None:
        """Close connections whose client stopped reading or does not get on with its request, until cancelled."""
        limits = self._limits
        pause_s = min(_CHECK_S, limits.write_timeout_s, limits.head_timeout_s, limits.silent_timeout_s)
        while True:
            await asyncio.sleep(pause_s)
            now = time.monotonic()
            for protocol in self.connections:
                if isinstance(protocol, ClientProtocol):
                    self._drop_if_slow(protocol, now)
            if self._refused:
                _log.warning("connections.refused", count=self._refused, open=self._count)
                self._refused = 0

    def _drop_if_slow(self, protocol: ClientProtocol, now: float) -> None:
        limits = self._limits
        watch = protocol.watch
        if watch is not None:
            if watch.writing_since is not None and watch.writing_since < now - limits.write_timeout_s:
                transport = protocol.transport
                if transport is not None:
                    transport.abort()
        elif protocol.head_since is not None:
            if protocol.head_since < now - limits.head_timeout_s:
                protocol.refuse_head(408)
        elif protocol.is_silent and protocol.connected_since < now - limits.silent_timeout_s:
            protocol.force_close()


class ClientRunner(web.AppRunner):
    """Runs an application on ``ClientServer``.

    Args:
        app: the application.
        limits: what a client may send, how slowly, and over how many connections.
    """

    def __init__(self, app: web.Application, *, limits: LimitSettings, **kwargs: Any) -> None:
        super().__init__(
            app,
            access_log=None,
            handler_cancellation=False,
            keepalive_timeout=limits.keepalive_timeout_s,
            lingering_time=limits.lingering_s,
            max_line_size=limits.line_bytes,
            max_field_size=limits.field_bytes,
            max_headers=limits.fields,
            **kwargs,
        )
        self._limits = limits

    async def _make_server(self) -> web.Server:
        loop = asyncio.get_running_loop()
        self._app._set_loop(loop)  # noqa: SLF001 - as AppRunner does, which offers no way to name the protocol
        self._app.on_startup.freeze()
        await self._app.startup()
        self._app.freeze()
        return ClientServer(
            self._handle,
            request_factory=self._app._make_request,  # noqa: SLF001 - the same
            loop=loop,
            limits=self._limits,
            **self._kwargs,
        )

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        try:
            return await self._app._handle(request)  # noqa: SLF001 - as AppRunner's server does
        except web.HTTPException as error:
            # Raised before any middleware: an expectation other than 100-continue.
            response = http_error_response(
                error.status, f"{error.reason}.", headers={"x-request-id": str(new_id())}
            )
            response.force_close()
            return response


@contextmanager
def watch_client(request: web.Request, *, on_gone: Callable[[], None]) -> Iterator[ClientWatch]:
    """Watch the client of ``request`` while its answer is under way."""
    watch = ClientWatch(on_gone)
    protocol = request.protocol
    assert isinstance(protocol, ClientProtocol)
    protocol.watch = watch
    if request.transport is None or request.transport.is_closing():
        watch.lost()
    try:
        yield watch
    finally:
        protocol.watch = None
