"""The provider's own record of an answer, which it writes some time after the answer's end."""

import asyncio
import contextlib
import time

from billing.errors import ProviderUnavailableError
from billing.provider.records import Bill
from proxy.upstream.adapter import Upstream

_PAUSE_FIRST_S = 0.05
_PAUSE_MAX_S = 2.0


async def wait_for_bill(upstream: Upstream, generation_id: str, wait_s: float) -> Bill | None:
    """Ask for the record until it is there; None if it is not, after ``wait_s`` seconds."""
    deadline_s = time.monotonic() + wait_s
    pause_s = _PAUSE_FIRST_S
    while True:
        with contextlib.suppress(ProviderUnavailableError):
            bill = await upstream.find_bill(generation_id)
            if bill is not None:
                return bill
        if time.monotonic() + pause_s > deadline_s:
            return None
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 2, _PAUSE_MAX_S)
