"""The faults of a campaign: which come when, and what each does."""

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Iterable

from redis.asyncio import Redis

from tests.faults.campaign.result import Result
from tests.faults.campaign.servers import Servers

# How often each fault comes in one round; rounds are shuffled, and follow each other until the time is over.
ROUND = {
    "kill_worker": 5,
    "kill_master": 1,
    "stop_master": 1,
    "flush": 2,
    "kill_redis": 1,
    "restart_redis": 1,
    "fail_over_redis": 1,
    "kill_postgres": 1,
    "cut_postgres": 1,
    "cut_redis": 1,
    "cut_provider": 1,
    "stall_postgres": 1,
    "stall_redis": 1,
}


class Faults:
    """Injects faults, one after the other, and remembers when it was that something was lost.

    Args:
        dice: draw the schedule.
        outage_s: how long Postgres is away at most.
        result: counts them.
        verbose: whether each is printed as it happens.
    """

    def __init__(
        self, servers: Servers, dice: random.Random, result: Result, *, outage_s: float, verbose: bool
    ) -> None:
        self._servers = servers
        self._dice = dice
        self._outage_s = outage_s
        self._verbose = verbose
        self._result = result
        self._began_s = time.monotonic()
        self.lost_s: list[float] = []  # Unix seconds at which Redis had lost what it knew
        self.killed_s: list[float] = []  # and at which a worker was killed
        self.back_s: list[float] = []  # and at which Postgres was back

    async def inject(self, seconds: float) -> None:
        """Inject a round of faults, then others for as long as that."""
        deadline = time.monotonic() + seconds
        for name in self._draw_faults(deadline):
            await self._do(name)
            await asyncio.sleep(0.2 + self._dice.random() * 1.5)

    def _draw_faults(self, deadline: float) -> Iterable[str]:
        """Yield a round of faults, then others while there is time."""
        first = True
        while first or time.monotonic() < deadline:
            deck = [name for name, count in ROUND.items() for _ in range(count)]
            self._dice.shuffle(deck)
            for name in deck:
                if not first and time.monotonic() > deadline:
                    return
                yield name
            first = False

    async def _do(self, name: str) -> None:
        began_s = time.monotonic()
        fault: Callable[[], Awaitable[object]] = getattr(self, f"_{name}")
        await fault()
        self._result.faults[name] += 1
        line = f"{began_s - self._began_s:8.2f} s  {name} ({time.monotonic() - began_s:.2f} s)"
        self._result.log.append(line)
        if self._verbose:
            print(line, flush=True)

    async def _kill_worker(self) -> None:
        pids = self._servers.worker_pids()
        if pids:
            os.kill(self._dice.choice(pids), signal.SIGKILL)
            self.killed_s.append(time.time())

    async def _kill_master(self) -> None:
        await self._servers.kill_master()

    async def _stop_master(self) -> None:
        await self._servers.stop_master()

    async def _flush(self) -> None:
        client = Redis.from_url(self._servers.redis.url)
        await client.flushall()
        self.lost_s.append(time.time())
        if self._dice.random() < 0.5:
            await client.script_flush()
        await client.aclose()

    async def _kill_redis(self) -> None:
        """A crash, and a restart from its append-only file, or from nothing."""
        server = self._servers.redis
        await self._servers.in_thread(server.kill)
        if self._dice.random() < 0.5:
            for path in server.data_dir.rglob("*.aof*"):
                if path.is_file():
                    path.unlink()
        await asyncio.sleep(self._dice.random() * 2)
        await self._servers.in_thread(server.start)
        self.lost_s.append(time.time())

    async def _restart_redis(self) -> None:
        server = self._servers.redis
        await self._servers.in_thread(server.stop)
        await asyncio.sleep(self._dice.random())
        await self._servers.in_thread(server.start)

    async def _fail_over_redis(self) -> None:
        await self._servers.fail_over_redis()
        self.lost_s.append(time.time())

    async def _kill_postgres(self) -> None:
        await self._servers.in_thread(self._servers.postgres.kill)
        await asyncio.sleep(1 + self._dice.random() * (self._outage_s - 1))
        await self._servers.in_thread(self._servers.postgres.start)
        self.back_s.append(time.time())

    async def _cut_postgres(self) -> None:
        self._servers.to_postgres.cut()

    async def _cut_redis(self) -> None:
        self._servers.to_redis.cut()

    async def _cut_provider(self) -> None:
        self._servers.to_provider.cut()

    async def _stall_postgres(self) -> None:
        await self._servers.to_postgres.stall(0.5 + self._dice.random() * 2)
        self.back_s.append(time.time())

    async def _stall_redis(self) -> None:
        await self._servers.to_redis.stall(0.5 + self._dice.random() * 2)
