"""Measure the live feed: what it costs settlements, what idle watchers cost, and how late an event is.

``python -m tests.measure.feed settle`` · ``python -m tests.measure.feed idle --watchers 5000`` · ``python -m tests.measure.feed latency``,
from the checkout's environment. Each starts servers of its own in a temporary folder, and stops them.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from pydantic import SecretStr

from billing.calls.ledger import Ledger
from billing.ids import new_id
from billing.postgres.database import Database
from billing.postgres.migrate import migrate
from billing.wallets.feed import Feeds
from config.settings import Settings
from scripts.office import open_office
from scripts.programs.embedded import EmbeddedPostgres, EmbeddedRedis
from scripts.sim.provider import SimulatedProvider
from tests.faults.test_kill import serving
from tests.support.feeds import ending, opening, watching
from tests.support.payers import Payer, make_payer
from tests.support.settings import make_settings

_ROWS = 200
_WALLETS = 200
_WARM = 10


@asynccontextmanager
async def servers() -> AsyncIterator[Settings]:
    """Postgres that does not wait for the disk, Redis and a provider."""
    with tempfile.TemporaryDirectory(prefix="tuma-feed-") as folder:
        with (
            EmbeddedPostgres(Path(folder) / "postgres", fast=True) as postgres,
            EmbeddedRedis(Path(folder) / "redis") as redis,
        ):
            async with SimulatedProvider() as provider:
                settings = make_settings(
                    postgres_dsn=postgres.dsn(), redis_url=redis.url, upstream_url=provider.base_url
                )
                database = Database(settings.postgres)
                await migrate(database)
                await database.close()
                yield settings


async def measure_settle(batches: int) -> None:
    """Open and settle batches of 200 calls of as many wallets: without the feed's triggers, unwatched, and watched."""
    async with servers() as settings, open_office(settings) as office:
        payers = {
            name: [await make_payer(office, amount="1000000") for _ in range(_WALLETS)]
            for name in ("without", "unwatched", "watched")
        }
        strangers = [await make_payer(office) for _ in range(2_000)]
        feeds = Feeds(office.database, settings.feed)
        await feeds.watch([payer.wallet_id for payer in (*payers["watched"], *strangers)])
        # A session that takes itself for a replica fires no triggers. Each way has wallets and a connection of its own.
        dsn = settings.postgres.dsn.get_secret_value()
        silent = f"{dsn}{'&' if '?' in dsn else '?'}session_replication_role=replica"
        ways = {"without": silent, "unwatched": dsn, "watched": dsn}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        pools = {
            name: Database(settings.postgres.model_copy(update={"dsn": SecretStr(where)}), connections_max=1)
            for name, where in ways.items()
        }
        for number in range(batches + _WARM):
            for name in random.sample(list(ways), len(ways)):
                spent = await _batch(Ledger(pools[name], worker_id=new_id()), payers[name])
                if number >= _WARM:
                    found[name].append(spent)
        for pool in pools.values():
            await pool.close()
    base = [statistics.median(column) for column in zip(*found["without"], strict=True)]
    best = [min(column) for column in zip(*found["without"], strict=True)]
    for name, times in found.items():
        columns = list(zip(*times, strict=True))
        opened, settled = (statistics.median(column) for column in columns)
        ratios = [min(column) / least for column, least in zip(columns, best, strict=True)]
        print(
            f"{name:<10} open {opened * 1000:6.1f} ms ({opened / base[0]:.2f}, best {ratios[0]:.2f})"
            f"  settle {settled * 1000:6.1f} ms ({settled / base[1]:.2f}, best {ratios[1]:.2f}),"
            f" {_ROWS / settled:.0f}/s, best {_ROWS / min(columns[1]):.0f}/s"
        )


async def _batch(ledger: Ledger, payers: list[Payer]) -> tuple[float, float]:
    calls = [opening(payers[number % len(payers)], 2_000) for number in range(_ROWS)]
    began = time.perf_counter()
    await ledger.open_calls(calls)
    opened = time.perf_counter()
    await ledger.settle_calls([ending(call.call_id, 1_000) for call in calls])
    return opened - began, time.perf_counter() - opened


async def measure_idle(count: int, seconds: float) -> None:
    """Hang so many watchers of as many wallets on one worker, and look at its memory and its CPU time."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    async with servers() as settings, open_office(settings) as office, AsyncExitStack() as stack:
        payers = [await make_payer(office, amount="0") for _ in range(count)]
        process, url = await stack.enter_async_context(serving(settings))
        worker = psutil.Process(process.pid)
        await (await stack.enter_async_context(watching(url, payers[0].secret))).take(1)
        before = worker.memory_info().rss
        began = time.monotonic()
        host, port = url.removeprefix("http://").split(":")
        gate = asyncio.Semaphore(50)

        async def come(payer: Payer) -> asyncio.StreamWriter:
            async with gate:
                reader, writer = await asyncio.open_connection(host, int(port), limit=4096)
                writer.write(
                    f"GET /v1/wallet/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {payer.secret}\r\n\r\n".encode()
                )
                async with asyncio.timeout(60):
                    await reader.readuntil(b"event: balance")
                drains.append(asyncio.ensure_future(_swallow(reader)))
                return writer

        drains: list[asyncio.Future[None]] = []
        writers = await asyncio.gather(*map(come, payers))
        print(f"{count} came in {time.monotonic() - began:.1f} s")
        await asyncio.sleep(5)
        grown = worker.memory_info().rss - before
        spent = sum(worker.cpu_times()[:2])
        await asyncio.sleep(seconds)
        busy = sum(worker.cpu_times()[:2]) - spent
        print(f"{grown / count / 1024:.1f} KiB per watcher, {busy * 60 / seconds:.2f} s CPU per minute")
        for drain in drains:
            drain.cancel()
        for writer in writers:
            writer.close()


async def _swallow(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError):
        while await reader.read(4096):
            pass


async def measure_latency(rounds: int, watchers: int) -> None:
    """From the write of an event, just before its commit, to the client's end of the socket, over two workers."""
    async with servers() as settings, open_office(settings) as office, AsyncExitStack() as stack:
        payer = await make_payer(office, amount="1000000")
        _, url = await stack.enter_async_context(serving(settings, workers=2))
        streams = [await stack.enter_async_context(watching(url, payer.secret)) for _ in range(watchers)]
        for stream in streams:
            await stream.take(1)
        ledger = Ledger(office.database, worker_id=new_id())
        late: list[float] = []

        async def follow(stream: Any) -> None:
            for _ in range(2 * rounds):
                event = await stream.next()
                now = datetime.now(UTC)
                late.append((now - datetime.fromisoformat(event["created_at"])).total_seconds())

        following = [asyncio.ensure_future(follow(stream)) for stream in streams]
        for _ in range(rounds):
            await _batch_of(ledger, payer)
            await asyncio.sleep(0.02)
        await asyncio.gather(*following)
        late.sort()
        shown = {f"p{part}_ms": round(late[int(len(late) * part / 100)] * 1000, 1) for part in (50, 95, 99)}
        print(json.dumps({"events": len(late), **shown, "max_ms": round(late[-1] * 1000, 1)}))


async def _batch_of(ledger: Ledger, payer: Payer) -> None:
    call = opening(payer, 2_000)
    await ledger.open_calls([call])
    await ledger.settle_calls([ending(call.call_id, 1_000)])


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("settle", "idle", "latency"))
    parser.add_argument("--watchers", type=int, default=5_000)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    given = parser.parse_args()
    for name in [name for name in os.environ if name.startswith("TUMA_")]:
        del os.environ[name]
    match given.what:
        case "settle":
            asyncio.run(measure_settle(given.rounds))
        case "idle":
            asyncio.run(measure_idle(given.watchers, given.seconds))
        case _:
            asyncio.run(measure_latency(given.rounds, min(given.watchers, 20)))


if __name__ == "__main__":
    main()
