"""Reading a streamed answer to where it ends, which not every provider says."""

import asyncio
import time

import aiohttp

from proxy.protocol.meter import StreamMeter
from proxy.upstream.client import UpstreamResponse


class LastWords:
    """Knows when a provider has said all it will say.

    Most close the body after ``[DONE]``. Some tell usage only after it; some go on with heartbeats, or with silence, once finish
    and usage are told, and never end: for neither is waited longer than ``wait_s``.

    Args:
        wait_s: ``TUMA_UPSTREAM__END_WAIT_S``.
    """

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._news: tuple[object, float] | None = None  # usage as it stood, and until when more may come

    async def read_on(self, response: UpstreamResponse, meter: StreamMeter) -> bytes:
        """Return the next piece; nothing at the end.

        Raises:
            aiohttp.ClientError, TimeoutError: it broke off.
        """
        if meter.usage is None and not meter.done:
            return await response.read_some()
        if meter.done and meter.usage is not None:
            return b""
        return await self._read_last(response, meter)

    async def _read_last(self, response: UpstreamResponse, meter: StreamMeter) -> bytes:
        """Read on for a bounded time from the last news on; all bytes go on to the client, but for those after ``[DONE]``."""
        if self._news is None or self._news[0] != meter.usage:
            self._news = meter.usage, time.monotonic() + self._wait_s
        while True:
            ends_s = self._news[1] - time.monotonic()
            if ends_s <= 0:
                if meter.done or meter.finished:
                    meter.end()
                    return b""
                self._news = meter.usage, time.monotonic() + self._wait_s
                continue
            try:
                async with asyncio.timeout(ends_s) as limit:
                    return await response.read_some()
            except (aiohttp.ClientError, OSError, TimeoutError):
                if meter.done:
                    return b""  # it broke off after its end
                if not limit.expired():
                    raise
