"""Reading what the caller asks: a bounded body, parsed once, checked where money depends on it."""

import asyncio

from aiohttp import HttpVersion11, StreamReader, hdrs, web

from config.settings import LimitSettings
from proxy.http.body_budget import BodyShare
from proxy.http.errors import BadRequestError, BodyTimeoutError, BodyTooLargeError

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_LINGERS_BYTES = 64 * 1024  # a larger rest of a refused body is not worth its connection


async def read_body(request: web.Request, limits: LimitSettings, share: BodyShare | None = None) -> bytes:
    """Read a body whole, within the settings' bounds of size and time.

    Args:
        request: whose body it is.
        limits: the bounds.
        share: where its bytes are counted while they are held.

    Raises:
        BodyTooLargeError, BodyTimeoutError, BadRequestError: it could not be read.
        RateLimitError, OverloadedError: too much is being read just now.
    """
    length = request.content_length
    if length is not None:
        _require_size(length, limits)
        if share is not None:
            share.expect(length)
    try:
        content = request.content
        if content.is_eof() and content.exception() is None:  # it came with its head
            body: bytes = content.read_nowait(-1)
            _require_size(len(body), limits)
            if share is not None:
                share.grow(len(body))
            return body
        async with asyncio.timeout(limits.body_timeout_s):
            await _ask_for(request)
            return await _read_pieces(content, limits, share)
    except TimeoutError:
        raise BodyTimeoutError(f"The body did not arrive within {limits.body_timeout_s:g} seconds.") from None
    except (web.RequestPayloadError, ConnectionResetError, ValueError) as error:
        raise BadRequestError(f"The body could not be read: {error}") from None


def _require_size(size: int, limits: LimitSettings) -> None:
    if size > limits.body_bytes:
        raise BodyTooLargeError(f"The body is larger than {limits.body_bytes} bytes.")


async def _read_pieces(content: StreamReader, limits: LimitSettings, share: BodyShare | None) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while piece := await content.readany():
        pieces.append(piece)
        size += len(piece)
        _require_size(size, limits)
        if share is not None:
            share.grow(len(piece))
    return b"".join(pieces)


async def expect_later(request: web.Request) -> None:
    """Take an ``Expect: 100-continue``, which aiohttp would answer at once: ``read_body`` does, if it comes to that.

    Raises:
        web.HTTPExpectationFailed: something else is expected.
    """
    expected = request.headers.get(hdrs.EXPECT, "")
    if request.version == HttpVersion11 and expected.lower() != "100-continue":
        raise web.HTTPExpectationFailed(text=f"Unknown Expect: {expected}")


async def _ask_for(request: web.Request) -> None:
    """Tell a client that waits for it that its body is wanted (RFC 9110, section 10.1.1)."""
    if hdrs.EXPECT in request.headers and request.version == HttpVersion11:
        await request.writer.write(_CONTINUE)
        request.writer.output_size = 0  # the answer itself has not begun


def leaves_much_unread(request: web.Request) -> bool:
    """Tell whether so much of a body was not read that nothing more is to be read on its connection."""
    if not request.body_exists or request.content.is_eof():
        return False
    length = request.content_length
    return length is None or length > _LINGERS_BYTES or hdrs.EXPECT in request.headers
