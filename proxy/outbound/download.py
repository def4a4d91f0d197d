"""A document from a server that we ask: bounded in time and size, from nowhere but there."""

from http import HTTPStatus

import aiohttp
from yarl import URL


async def download(url: URL | str, *, timeout_s: float, bytes_max: int) -> bytes:
    """GET a JSON document, following nothing.

    Args:
        url: where it is; in no message, as it may have a key in it.
        timeout_s: for the whole of it.
        bytes_max: a larger one is refused.

    Raises:
        aiohttp.ClientError, TimeoutError, OSError: no answer came.
        ValueError: another status than 200, or too large.
    """
    async with (
        aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept": "application/json", "Accept-Encoding": "identity"},
            auto_decompress=False,  # the bound is on what is parsed
            trust_env=False,  # no proxy of the environment sees a key
        ) as session,
        session.get(url, allow_redirects=False) as response,
    ):
        if response.status != HTTPStatus.OK:
            raise ValueError(f"status {response.status}")
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > bytes_max:
                raise ValueError(f"more than {bytes_max} bytes")
        return bytes(body)
