"""A client of one provider for the paid POST: HTTP/1.1 over warm connections, with as little per call and chunk as it takes.

A request's bytes are written once; nothing here sends them again. An answer belongs to the connection that it comes on until its end:
then the connection may serve another call, if nothing came after that end and both sides are willing; else it is closed.

``aiohttp``'s own errors are raised, so that callers need not know which client they have.
"""

import asyncio
import contextlib
import select
import socket
import ssl
from collections import deque
from collections.abc import Mapping
from typing import Any, cast

import aiohappyeyeballs
import aiohttp
from aiohttp.client_reqrep import ConnectionKey
from yarl import URL

from proxy.upstream.wire import Inflater, MalformedAnswerError, ResponseParser, inflater_for

_BUFFERED_BYTES_MAX = 64 * 1024  # of an answer that nobody reads, before its provider is made to wait
_KEEPALIVE_S = 60.0  # that a connection may be idle
_TRUSTED_S = 1.0  # a connection that was idle for longer is looked at before it is used
_ADDRESSES_TTL_S = 60.0
_NEXT_ADDRESS_S = 0.25  # after which the next address is tried beside the one before: RFC 8305, section 5
_BURST_S = 0.002  # a reader is woken once in that time at most, so that a burst of small chunks is not work for each of them
_COPIED_BYTES_MAX = 64 * 1024  # a body up to this goes out in one piece with its head


class UpstreamResponse:
    """One response, head read, body as it comes. ``headers`` are by lower-case name."""

    __slots__ = (
        "_burst",
        "_connection",
        "_error",
        "_inflater",
        "_is_ended",
        "_pieces",
        "_size",
        "_unread",
        "_waiter",
        "_woken_s",
        "headers",
        "status",
    )

    def __init__(self, connection: "_Connection") -> None:
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self._connection: _Connection | None = connection  # until the answer's end
        self._pieces: list[bytes] = []
        self._size = 0
        self._unread = b""
        self._is_ended = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._inflater: Inflater | None = None
        self._woken_s = 0.0
        self._burst: asyncio.Handle | None = None

    @property
    def content_type(self) -> str:
        """The media type without its parameters, in lower case; empty if there is none."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def read_some(self) -> bytes:
        """Return what of the body has come since the last time, once there is something; nothing at its end.

        A read that is cancelled loses nothing: the next one goes on.

        Raises:
            aiohttp.ClientError, TimeoutError: the answer broke off, or was closed.
        """
        if self._unread:
            data, self._unread = self._unread, b""
            return data
        while True:
            if self._size:
                data = self._take()
                if self._inflater is None:
                    return data
                self._inflater.feed(data)
            if self._inflater is not None:
                inflated = self._inflater.take()
                if inflated:
                    return inflated
            if self._error is not None:
                raise self._error
            if self._is_ended:
                if self._inflater is not None:
                    self._inflater.end()
                return b""
            await self._wait()

    async def peek(self, most: int) -> bytes:
        """Return how the body begins, white space left out, and leave it to be read; empty if there is no more of it.

        Args:
            most: bytes of white space that are waited through.

        Raises:
            aiohttp.ClientError, TimeoutError: the answer broke off, or was closed.
        """
        data = b""
        while not data.strip() and len(data) < most and (piece := await self.read_some()):
            data += piece
        self._unread = data
        return data.lstrip()

    async def read_up_to(self, most: int) -> bytes:
        """Return the body, or its beginning: ``most`` bytes.

        Raises:
            aiohttp.ClientError, TimeoutError: the answer broke off, or was closed.
        """
        body = b""
        while len(body) < most and (data := await self.read_some()):
            body += data
        return body[:most]

    def close(self) -> None:
        """Hang up, unless the answer has ended: wakes the read under way with an error."""
        connection = self._connection
        if connection is not None:
            connection.fail(aiohttp.ClientConnectionError("Connection closed"))

    async def wait_for_head(self) -> None:
        """Return when ``status`` and ``headers`` are there.

        Raises:
            aiohttp.ClientError, TimeoutError: no answer came.
        """
        while not self.status:
            if self._error is not None:
                raise self._error
            await self._wait()

    async def _wait(self) -> None:
        assert self._waiter is None, "two read one answer"
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._burst is not None:
            self._burst.cancel()
            self._burst = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _take(self) -> bytes:
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._size = 0
        if self._connection is not None:
            self._connection.resume()
        return data

    def begin(self, parser: ResponseParser) -> None:
        """The head has come.

        Raises:
            MalformedAnswerError: its body cannot be read.
        """
        self._inflater = inflater_for(parser.headers)
        self.headers = parser.headers
        self.status = parser.status
        self._wake()

    def feed(self, data: bytes, now_s: float, loop: asyncio.AbstractEventLoop) -> bool:
        """More of the body has come; whether to read no more for now.

        After a pause, as between the tokens of a model, the reader is woken at once. In a burst it is woken once in ``_BURST_S``, and what
        comes meanwhile is left where it is, as each read, with all that follows from it, costs more than the bytes.
        """
        self._pieces.append(data)
        self._size += len(data)
        if now_s - self._woken_s >= _BURST_S:
            self._woken_s = now_s
            self._wake()
            return self._size > _BUFFERED_BYTES_MAX
        if self._burst is None:
            self._burst = loop.call_at(self._woken_s + _BURST_S, self._end_burst, loop)
        return True

    def _end_burst(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read on; what that brings wakes the reader, else what is here already does: one turn of the loop later."""
        self._woken_s = 0.0
        if self._connection is not None:
            self._connection.resume()
        self._burst = loop.call_soon(self._after_burst, loop)

    def _after_burst(self, loop: asyncio.AbstractEventLoop) -> None:
        self._burst = loop.call_soon(self._wake)

    def end(self, error: Exception | None = None) -> None:
        """The body has ended; with an error: it broke off, or was given up."""
        self._connection = None
        self._error = error
        self._is_ended = True
        self._wake()


class _Connection(asyncio.Protocol):
    """One connection: idle, or with one call's response on it.

    Args:
        client: whose it is.
        loop: it runs on.
    """

    __slots__ = (
        "_active_s",
        "_client",
        "_idle_s",
        "_is_paused",
        "_limit_s",
        "_loop",
        "_parser",
        "_response",
        "_timer",
        "_timer_at_s",
        "_transport",
    )

    def __init__(self, client: "UpstreamClient", loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._response: UpstreamResponse | None = None
        self._parser: ResponseParser | None = None
        self._is_paused = False
        # One timer for all the connection's life, pushed on when it fires: nothing is set or cancelled per read.
        self._active_s = loop.time()
        self._limit_s = _KEEPALIVE_S
        self._idle_s = 0.0  # the limit that begins with the first byte of the answer's body
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_s = 0.0

    @property
    def is_usable(self) -> bool:
        """Whether another request may be written on it."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return False
        return self._loop.time() - self._active_s < _TRUSTED_S or not _has_news(transport)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's inherit from nothing

    def ask(self, head: bytes, body: bytes, *, first_byte_s: float, idle_s: float) -> UpstreamResponse:
        """Write a request; return the response that is to come.

        Args:
            head: whole, with the empty line.
            body: as its length in the head says.
            first_byte_s: for how long nothing may come before the first byte of the answer's body.
            idle_s: the same after it.
        """
        assert self._transport is not None
        response = self._response = UpstreamResponse(self)
        self._parser = ResponseParser()
        self._limit(first_byte_s)
        self._idle_s = idle_s
        if len(body) <= _COPIED_BYTES_MAX:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))
        return response

    def data_received(self, data: bytes) -> None:
        """Hand on what came of the answer."""
        response, parser = self._response, self._parser
        if response is None or parser is None:
            self.drop()  # nothing was asked: what comes now must not pass for the next call's answer
            return
        self._active_s = now_s = self._loop.time()
        try:
            body = parser.feed(data)
            if not response.status and parser.status:
                response.begin(parser)
        except MalformedAnswerError as error:
            self.fail(error)
            return
        if body:
            if self._limit_s != self._idle_s:
                self._limit(self._idle_s)
            if response.feed(body, now_s, self._loop) and not parser.ended:
                self._pause()
        if parser.ended:
            self._finish(response, keep=parser.is_reusable)

    def eof_received(self) -> None:
        """Never use it again; the transport closes itself, and ``connection_lost`` says what that means."""
        if self._response is None:
            self.drop()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the answer, where its end is the connection's; else it broke off."""
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        response, parser = self._response, self._parser
        if response is None or parser is None:
            self._client.forget(self)
            return
        try:
            if exc is None:
                parser.end()
                self._finish(response, keep=False)
                return
            error = aiohttp.ClientPayloadError(f"the answer broke off: {exc!r}")
        except aiohttp.ClientPayloadError as broken:
            error = broken
        self.fail(error if parser.status else _lost_error(exc))

    def fail(self, error: Exception) -> None:
        """Give up the answer under way, and the connection with it: its rest would be read as another's."""
        response = self._response
        if response is not None:
            self._response = self._parser = None
            self._client.free_slot()
            response.end(error)
        self.drop()

    def drop(self) -> None:
        """Close at once; nothing is under way."""
        assert self._response is None
        self._client.forget(self)
        if self._transport is not None:
            self._transport.abort()  # a provider may bill until it notices

    def resume(self) -> None:
        """Let the provider send on, if it was made to wait."""
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._active_s = self._loop.time()
            if not self._transport.is_closing():
                self._transport.resume_reading()

    def _pause(self) -> None:
        if not self._is_paused and self._transport is not None and not self._transport.is_closing():
            self._is_paused = True
            self._transport.pause_reading()

    def _finish(self, response: UpstreamResponse, *, keep: bool) -> None:
        """End the answer; keep the connection for another call, if that is safe."""
        self._response = self._parser = None
        self.resume()
        response.end()
        # A provider that answered before it had all of the request may stop reading it.
        if keep and self._transport is not None and not self._transport.get_write_buffer_size():
            self._limit(_KEEPALIVE_S)
            self._client.keep(self)
        else:
            self.drop()
        self._client.free_slot()

    def _limit(self, limit_s: float) -> None:
        """From now on this is how long nothing may come."""
        self._limit_s = limit_s
        self._active_s = now_s = self._loop.time()
        if self._timer is None or self._timer_at_s > now_s + limit_s:
            self._set_timer(now_s + limit_s)

    def _set_timer(self, at_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at_s = at_s
        self._timer = self._loop.call_at(at_s, self._check_activity)

    def _check_activity(self) -> None:
        self._timer = None
        due_s = self._active_s + self._limit_s
        now_s = self._loop.time()
        if self._is_paused:  # it is we who do not read
            self._set_timer(now_s + self._limit_s)
        elif now_s < due_s:
            self._set_timer(due_s)
        else:
            self.fail(aiohttp.SocketTimeoutError("Timeout on reading data from socket"))


def _has_news(transport: asyncio.Transport) -> bool:
    """Whether something came that the loop has not come to yet: on an idle connection, most likely its end."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
    return bool(poll.poll(0))


def _lost_error(exc: Exception | None) -> aiohttp.ClientError:
    """Return the error for a connection that ended before the answer's head."""
    if isinstance(exc, OSError):
        return aiohttp.ClientOSError(*exc.args)
    return aiohttp.ServerDisconnectedError()


class UpstreamClient:
    """Posts to one origin over a pool of connections that are kept alive.

    Args:
        url: of the origin; its path is not used.
        connections_max: with a call on them at once; further calls wait for one.
        connect_timeout_s: for the name's look-up, TCP and TLS together.
    """

    def __init__(self, url: URL, *, connections_max: int, connect_timeout_s: float) -> None:
        assert url.raw_host is not None
        assert url.port is not None
        self._host = url.raw_host
        self._port = url.port
        self._tls = _make_tls() if url.scheme == "https" else None
        self._connect_timeout_s = connect_timeout_s
        self._free = connections_max
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._open: set[_Connection] = set()
        self._idle: dict[_Connection, None] = {}  # the last used is taken first
        self._addresses: list[Any] = []
        self._addresses_until_s = 0.0
        self._looking_up = asyncio.Lock()
        self._is_closed = False

    async def post(self, head: bytes, body: bytes, *, first_byte_s: float, idle_s: float) -> UpstreamResponse:
        """Send a request once; return the response when its head is there.

        Args:
            head: whole, with the empty line.
            body: as its length in the head says.
            first_byte_s: how long to wait for a free connection, and then for the first byte of the answer's body.
            idle_s: how long to wait between two reads of it.

        Raises:
            aiohttp.ClientError, TimeoutError: no answer came.
        """
        if self._free:
            self._free -= 1
        else:
            await self._wait_for_slot(first_byte_s)
        try:
            connection = self._take_idle() or await self._connect()
        except BaseException:
            self.free_slot()
            raise
        response = connection.ask(head, body, first_byte_s=first_byte_s, idle_s=idle_s)
        try:
            await response.wait_for_head()
        except BaseException:
            response.close()
            raise
        return response

    def close(self) -> None:
        """Close all connections; answers under way break off."""
        self._is_closed = True
        for connection in list(self._open):
            connection.fail(aiohttp.ClientConnectionError("Connector is closed."))

    def keep(self, connection: _Connection) -> None:
        """Take a connection back whose answer has ended."""
        if self._is_closed:
            connection.drop()
        else:
            self._idle[connection] = None

    def forget(self, connection: _Connection) -> None:
        """A connection is no more."""
        self._open.discard(connection)
        self._idle.pop(connection, None)

    def free_slot(self) -> None:
        """Let another call have a connection: the one that waits longest."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._free += 1

    async def _wait_for_slot(self, wait_s: float) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            async with asyncio.timeout(wait_s):
                await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled():
                self.free_slot()  # it was given one, too late
            else:
                with contextlib.suppress(ValueError):
                    self._waiting.remove(waiter)
            if isinstance(error, TimeoutError):
                raise aiohttp.ConnectionTimeoutError("no connection to the provider is free") from None
            raise

    def _take_idle(self) -> _Connection | None:
        while self._idle:
            connection, _ = self._idle.popitem()
            if connection.is_usable:
                return connection
            connection.drop()
        return None

    async def _connect(self) -> _Connection:
        if self._is_closed:
            raise aiohttp.ClientConnectionError("Connector is closed.")
        key = ConnectionKey(
            self._host, self._port, self._tls is not None, self._tls or True, None, None, None
        )
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                connection = await self._open_connection()
        except TimeoutError as error:
            self._addresses_until_s = 0.0  # they may have changed
            raise aiohttp.ConnectionTimeoutError(f"Connection timeout to {self._host}") from error
        except ssl.CertificateError as error:
            raise aiohttp.ClientConnectorCertificateError(key, error) from error
        except ssl.SSLError as error:
            raise aiohttp.ClientConnectorSSLError(key, error) from error
        except socket.gaierror as error:
            raise aiohttp.ClientConnectorDNSError(key, error) from error
        except OSError as error:
            self._addresses_until_s = 0.0
            raise aiohttp.ClientConnectorError(key, error) from error
        if not connection.is_usable:
            connection.drop()
            raise aiohttp.ServerDisconnectedError
        return connection

    async def _open_connection(self) -> _Connection:
        loop = asyncio.get_running_loop()
        link = await aiohappyeyeballs.start_connection(
            await self._look_up(loop), happy_eyeballs_delay=_NEXT_ADDRESS_S, interleave=1, loop=loop
        )
        _, connection = await loop.create_connection(
            lambda: _Connection(self, loop),
            sock=link,  # closed by the loop, should this fail
            ssl=self._tls,
            server_hostname=self._host.rstrip(".") if self._tls is not None else None,
        )
        self._open.add(connection)
        return connection

    async def _look_up(self, loop: asyncio.AbstractEventLoop) -> list[Any]:
        """Return the host's addresses, looked up once a minute for all connections."""
        async with self._looking_up:
            if loop.time() >= self._addresses_until_s:
                self._addresses = await loop.getaddrinfo(
                    self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
                )
                self._addresses_until_s = loop.time() + _ADDRESSES_TTL_S
            return self._addresses


def _make_tls() -> ssl.SSLContext:
    """Return a context that verifies the server by the system's authorities, or those of ``SSL_CERT_FILE``."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(("http/1.1",))
    return context
