"""The client's connection: knowing at once that it is gone, and answering what is no HTTP in OpenAI's shape."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import structlog
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from billing.ids import new_id
from proxy.errors import http_error_response

_log = structlog.get_logger("tuma.connections")
_CHECK_S = 1.0


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
        if self.gone:
            return
        self.writing_since = time.monotonic()
        try:
            await response.write(data)
        except ConnectionResetError:
            self.lost()
        finally:
            self.writing_since = None


class ClientProtocol(RequestHandler):
    """aiohttp's server protocol, with a watch on the connection's end and errors in OpenAI's shape."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.watch: ClientWatch | None = None

    def connection_lost(self, exc: BaseException | None) -> None:
        """Tell the watch, if an answer is under way."""
        super().connection_lost(exc)
        if self.watch is not None:
            self.watch.lost()

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
        text = "The request is not valid HTTP." if status < 500 else "Something went wrong on our side."  # noqa: PLR2004 - HTTP
        response = http_error_response(status, text, headers={"x-request-id": str(new_id())})
        response.force_close()
        return response


class ClientServer(web.Server):
    """Makes a ``ClientProtocol`` per connection, and lets go of clients that take no byte for too long.

    Args:
        write_timeout_s: how long one write may wait for the client.
    """

    def __init__(self, handler: Any, *, write_timeout_s: float, **kwargs: Any) -> None:
        super().__init__(handler, **kwargs)
        self._write_timeout_s = write_timeout_s

    def __call__(self) -> RequestHandler:
        """Make the protocol of a new connection."""
        return ClientProtocol(self, loop=self._loop, **self._kwargs)

    async def drop_stuck_clients(self) -> None:
        """Close connections whose client stopped reading, until cancelled."""
        while True:
            await asyncio.sleep(min(_CHECK_S, self._write_timeout_s))
            oldest = time.monotonic() - self._write_timeout_s
            for protocol in self.connections:
                watch = protocol.watch if isinstance(protocol, ClientProtocol) else None
                if watch is not None and watch.writing_since is not None and watch.writing_since < oldest:
                    transport = protocol.transport
                    if transport is not None:
                        transport.abort()


class ClientRunner(web.AppRunner):
    """Runs an application on ``ClientServer``.

    Args:
        app: the application.
        write_timeout_s: see ``ClientServer``.
    """

    def __init__(self, app: web.Application, *, write_timeout_s: float, **kwargs: Any) -> None:
        super().__init__(app, **kwargs)
        self._write_timeout_s = write_timeout_s

    async def _make_server(self) -> web.Server:
        loop = asyncio.get_running_loop()
        self._app._set_loop(loop)  # noqa: SLF001 - as AppRunner does, which offers no way to name the protocol
        self._app.on_startup.freeze()
        await self._app.startup()
        self._app.freeze()
        return ClientServer(
            self._app._handle,  # noqa: SLF001 - the same
            request_factory=self._app._make_request,  # noqa: SLF001 - the same
            loop=loop,
            write_timeout_s=self._write_timeout_s,
            **self._kwargs,
        )


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
