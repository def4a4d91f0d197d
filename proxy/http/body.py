"""Reading what the caller asks: a bounded body, parsed once, checked where money depends on it."""

import asyncio

from aiohttp import web

from config.settings import LimitSettings
from proxy.http.errors import BadRequestError, BodyTimeoutError, BodyTooLargeError


async def read_body(request: web.Request, limits: LimitSettings) -> bytes:
    """Read a body whole, within the settings' bounds of size and time.

    Raises:
        BodyTooLargeError, BodyTimeoutError, BadRequestError: it could not be read.
    """
    length = request.content_length
    if length is not None and length > limits.body_bytes:
        raise BodyTooLargeError(f"The body is larger than {limits.body_bytes} bytes.")
    try:
        content = request.content
        if content.is_eof() and content.exception() is None:  # it came with its head
            body: bytes = content.read_nowait(-1)
            if len(body) > limits.body_bytes:
                raise BodyTooLargeError(f"The body is larger than {limits.body_bytes} bytes.")
            return body
        async with asyncio.timeout(limits.body_timeout_s):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise BodyTooLargeError(f"The body is larger than {limits.body_bytes} bytes.") from None
    except TimeoutError:
        raise BodyTimeoutError(f"The body did not arrive within {limits.body_timeout_s:g} seconds.") from None
    except (web.RequestPayloadError, ConnectionResetError, ValueError) as error:
        raise BadRequestError(f"The body could not be read: {error}") from None
