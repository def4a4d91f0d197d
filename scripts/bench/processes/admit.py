"""A process that reserves and releases as fast as it can, as a worker does: what one Redis carries of it.

It prints how many pairs it made. There is no Postgres: a wallet's mirror is filled with a balance that nothing exhausts.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from uuid import UUID

import uvloop

from billing.holds.hold import Hold
from billing.holds.holds import Holds
from billing.ids import new_id
from billing.limits import Limits
from billing.money import NANO
from billing.redis.pipeline import RedisPipe
from config.settings import load_settings

URL_FROM = "BENCH_REDIS_URL"
_USERS = 1_000
_LIMITS = Limits(requests_per_min=1_000_000, tokens_per_min=1_000_000_000)


async def admit(url: str, seconds: float, callers: int) -> dict[str, float]:
    """Reserve and release with so many callers at once; return the pairs and the seconds they took."""
    settings = load_settings(redis={"url": url})
    pipe = RedisPipe(settings.redis)
    people = [(new_id(), new_id(), new_id()) for _ in range(_USERS)]
    wallets = {user: wallet for user, wallet, _ in people}

    async def read_mirror(user_id: UUID, _moment: datetime) -> Mapping[str, str]:
        return {f"available:{wallets[user_id]}": str(1_000_000_000 * NANO)}

    holds = Holds(pipe, settings.holds, read_mirror)
    pairs = 0
    began = time.perf_counter()

    async def call(number: int) -> None:
        nonlocal pairs
        while time.perf_counter() - began < seconds:
            user, wallet, key = people[number % _USERS]
            number += callers
            hold = Hold(new_id(), user, wallet, key, 1_000_000, 100, _LIMITS, 1_000, currency="USD")
            await holds.reserve(hold)
            await holds.release(hold, charge_nano=500_000, tokens_used=50)
            pairs += 1

    try:
        await asyncio.gather(*(call(number) for number in range(callers)))
    finally:
        await pipe.close()
    return {"pairs": pairs, "seconds": time.perf_counter() - began}


def main() -> None:
    """Work for some seconds, then print."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.processes.admit", description=__doc__)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--callers", type=int, required=True, help="Calls at a time.")
    given = parser.parse_args()
    # The URL holds a password, which the list of processes need not show.
    found = uvloop.run(admit(os.environ[URL_FROM], given.seconds, given.callers))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
