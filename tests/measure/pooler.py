"""What a pooler costs: calls opened and settled, one batch after the other, straight to Postgres and through PgBouncer.

Run it with ``python -m tests.measure.pooler`` from the checkout's environment, where Debian's package ``pgbouncer`` is installed.
Four ways are taken in turn, and medians shown: CPU of this process, of Postgres and of PgBouncer, and the time of a batch.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import asyncpg
import psutil
from pydantic import SecretStr

from billing.calls.ledger import Ledger
from billing.ids import new_id
from billing.postgres.database import Database
from billing.postgres.migrate import migrate
from config.settings import PostgresSettings
from scripts.office import open_office
from scripts.programs.embedded import EmbeddedPostgres
from tests.support.feeds import ending, opening
from tests.support.payers import Payer, make_payer
from tests.support.pgbouncer import pooling
from tests.support.settings import make_settings

BATCHES = 60  # of each kind and round
ROUNDS = 9
SIZES = (1, 10, 100)
STRAIGHT = "straight"
WAYS = (STRAIGHT, "straight, nothing prepared", "PgBouncer")
_HEAD = ("way", "calls a batch", "batch ms", "Tuma CPU ms", "Postgres CPU ms", "PgBouncer CPU ms")


def cpu_s(pid: int) -> float:
    """CPU of a process and its children, which live as long as it."""
    tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in tree)


@asynccontextmanager
async def ledger_by(settings: PostgresSettings) -> AsyncIterator[Ledger]:
    """A ledger as a worker has it: opened by the proxy's role, settled by the settler's."""
    proxy = Database(settings, role="proxy", connections_max=1)
    settler = Database(settings, role="settler", connections_max=1)
    try:
        yield Ledger(proxy, worker_id=new_id(), settler=settler)
    finally:
        await proxy.close()
        await settler.close()


async def run_batches(ledger: Ledger, payer: Payer, size: int) -> list[float]:
    took = []
    for _ in range(BATCHES):
        calls = [opening(payer, 2) for _ in range(size)]
        began = time.perf_counter()
        await ledger.open_calls(calls)
        await ledger.settle_calls([ending(call.call_id, 1) for call in calls])
        took.append(time.perf_counter() - began)
    return took


async def main() -> None:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tuma-bench-")))
        postgres = stack.enter_context(EmbeddedPostgres(folder / "postgres", fast=True))
        dsn = postgres.dsn("tuma")
        database = Database(PostgresSettings(dsn=SecretStr(dsn)))
        await migrate(database)
        await database.close()
        server = await stack.enter_async_context(pooling(postgres, dsn, folder))
        direct = PostgresSettings(dsn=SecretStr(server.direct_dsn))
        through = {"direct_dsn": SecretStr(server.direct_dsn), "pooler": "transaction"}
        ways = dict(
            zip(
                WAYS,
                (
                    direct,
                    direct.model_copy(update=through),
                    direct.model_copy(update={**through, "dsn": SecretStr(server.dsn)}),
                ),
                strict=True,
            )
        )
        office = await stack.enter_async_context(open_office(make_settings(postgres_dsn=dsn, redis_url="")))
        payer = await make_payer(office, amount="1000")
        ledgers = {
            name: await stack.enter_async_context(ledger_by(settings)) for name, settings in ways.items()
        }
        print(
            f"PostgreSQL {await version(dsn)}; {ROUNDS} rounds of {BATCHES} batches, in turn; without fsync"
        )
        print(" | ".join(_HEAD))
        for size in SIZES:
            figures: dict[str, list[tuple[float, ...]]] = {name: [] for name in WAYS}
            for _ in range(ROUNDS + 1):
                for name, ledger in ledgers.items():
                    before = (time.process_time(), cpu_s(postgres.pid), cpu_s(server.pid))
                    took = await run_batches(ledger, payer, size)
                    after = (time.process_time(), cpu_s(postgres.pid), cpu_s(server.pid))
                    spent = [(b - a) / BATCHES * 1000 for a, b in zip(before, after, strict=True)]
                    figures[name].append((statistics.median(took) * 1000, *spent))
            for name, rows in figures.items():
                middle = [
                    statistics.median(column) for column in zip(*rows[1:], strict=True)
                ]  # the first warms up
                print(" | ".join((name, str(size), *(f"{value:.3f}" for value in middle))))


async def version(dsn: str) -> str:
    connection = await asyncpg.connect(dsn)
    try:
        return str(await connection.fetchval("SHOW server_version"))
    finally:
        await connection.close()


if __name__ == "__main__":
    asyncio.run(main())
