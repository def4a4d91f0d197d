"""Fill a Postgres of its own with millions of settled calls, and time what must stay fast: `tuma books check`, a wallet's page.

Run it with ``python -m tests.measure.books --calls 10000000 --folder FOLDER`` from the checkout's environment. It needs about 1.6 kB
of disk per call and stops its servers at the end; the data stay in the folder, and are used again if they are there.
"""

import argparse
import asyncio
import time
from pathlib import Path

import asyncpg

from billing.books.proof import Books
from billing.postgres.database import Database
from billing.postgres.migrate import migrate
from config.settings import load_settings
from scripts.bench.measures.fill import History, fill
from scripts.office import open_office
from scripts.programs.embedded import EmbeddedPostgres, EmbeddedRedis
from scripts.sim.provider import SimulatedProvider

_WALLETS = 100_000


async def measure(dsn: str, redis_url: str, provider: SimulatedProvider) -> None:
    """Time the checks, first with nothing proved, then with every day proved, and read everything once more."""
    settings = load_settings(
        postgres={"dsn": dsn},
        redis={"url": redis_url},
        upstream={"base_url": provider.base_url, "api_key": "sk-sim"},
        auth={"key_pepper": "a pepper for the measurement"},
    )
    async with open_office(settings) as office:
        async with office.database.connection() as connection:
            await connection.execute(
                "INSERT INTO provider_openings SELECT 'key', -sum(spent_nanousd) FROM quota_slabs ON CONFLICT DO NOTHING"
            )
            rows = await connection.fetchval("SELECT count(*) FROM usage", timeout=3600)
            entries = await connection.fetchval("SELECT sum(entries) FROM verified_days")
        print(f"{rows} usage rows")
        books = Books(office.database, office.holds, office.upstream, sweep_grace_s=60)
        for name, full in (("first", False), ("again", False), ("once more", False), ("full", True)):
            began = time.monotonic()
            checks = await books.check(full=full)
            took_s = time.monotonic() - began
            off = {key: check.detail for key, check in checks.items() if not check.ok}
            print(f"books check, {name}: {took_s:.1f} s, {off or 'ok'}", flush=True)
        print(f"{entries} entries proved before the first")


async def run(arguments: argparse.Namespace) -> None:
    folder: Path = arguments.folder
    with (
        EmbeddedPostgres(folder / "postgres", fast=True) as postgres,
        EmbeddedRedis(folder / "redis") as redis,
    ):
        dsn = postgres.dsn()
        database = Database(load_settings(postgres={"dsn": dsn}).postgres)
        await migrate(database)
        await database.close()
        connection = await asyncpg.connect(dsn)
        is_empty = not await connection.fetchval("SELECT 1 FROM users LIMIT 1")
        await connection.close()
        if is_empty:
            await fill(dsn, History(_WALLETS, arguments.calls), print)
        async with SimulatedProvider() as provider:
            await measure(dsn, redis.url, provider)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, required=True)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
