"""Fill a Postgres of its own with millions of settled calls, and time what must stay fast: `tuma books check`, a wallet's page.

Run it with ``python -m tests.scale --calls 10000000 --folder FOLDER`` from the checkout's environment. It needs about 1.6 kB
of disk per call and stops its servers at the end; the data stay in the folder, and are used again if they are there.
"""

import argparse
import asyncio
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg

from billing.books import Books
from billing.db import Database
from billing.ids import id_floor
from billing.migrate import migrate
from billing.money import NANO
from billing.rollup import FIRST_ID, LAST_ID
from config.settings import load_settings
from scripts.embedded import EmbeddedPostgres, EmbeddedRedis
from scripts.office import open_office
from scripts.sim.provider import SimulatedProvider

_WALLETS = 100_000
DAYS = 40
_PER_STEP = 250_000
_BATCH = 100  # calls of one row of the shadow ledger
_ID = """(lpad(to_hex(({first} + (i * {step})::bigint)), 12, '0') || '7' || substr(md5({salt} || i), 1, 3)
          || '8' || substr(md5({salt} || i), 4, 15))::uuid"""


async def fill(connection: Any, calls: int) -> None:
    """Write ``calls`` settled calls over the last days, evenly, to 100,000 wallets, with all that the books keep of them."""
    await connection.execute(
        """
        INSERT INTO users (id, email)
        SELECT ('00000000-0000-7000-8000-' || lpad(to_hex(i), 12, '0'))::uuid, 'user' || i || '@example.com'
        FROM generate_series(1, $1) i
        """,
        _WALLETS,
    )
    await connection.execute(
        """
        INSERT INTO wallets (id, user_id, currency)
        SELECT ('00000000-0000-7000-9000-' || lpad(to_hex(i), 12, '0'))::uuid,
               ('00000000-0000-7000-8000-' || lpad(to_hex(i), 12, '0'))::uuid, 'USD' FROM generate_series(1, $1) i
        """,
        _WALLETS,
    )
    now = datetime.now(UTC)
    first_ms = int((now - timedelta(days=DAYS)).timestamp() * 1000)
    step_ms = (DAYS * 24 * 3600 * 1000 - 3_600_000) / calls
    await add_partitions(connection, now)
    await _grant(connection, first_ms)
    for done in range(0, calls, _PER_STEP):
        began = time.monotonic()
        await _add_calls(connection, done, min(done + _PER_STEP, calls), first_ms, step_ms)
        rate = _PER_STEP / (time.monotonic() - began)
        print(f"{min(done + _PER_STEP, calls):>12} calls, {rate:.0f}/s", flush=True)
    await connection.execute(
        "UPDATE wallets w SET posted_nano = e.total FROM (SELECT wallet_id, sum(amount_nano) AS total FROM journal_entry"
        " WHERE wallet_id IS NOT NULL GROUP BY wallet_id) e WHERE e.wallet_id = w.id",
        timeout=3600,
    )
    await connection.execute(
        "UPDATE quota_slabs SET spent_nanousd = t.total, leased_nanousd = t.total"
        " FROM (SELECT sum(amount_nanousd) AS total FROM shadow_usd_ledger) t"
    )
    await sum_up(connection)
    await connection.execute("VACUUM (ANALYZE)", timeout=3600)


async def add_partitions(connection: Any, now: datetime) -> None:
    """Make the months of the last days."""
    month = (now - timedelta(days=DAYS)).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    while month < now:
        following = (month + timedelta(days=32)).replace(day=1)
        for table in ("calls", "usage", "journal_tx", "journal_entry", "usage_rollup"):
            bounds = [month.isoformat(), following.isoformat()]
            if table != "usage_rollup":
                bounds = [str(id_floor(month)), str(id_floor(following))]
            await connection.execute(
                f"CREATE TABLE IF NOT EXISTS {table}_{month:%Y_%m} PARTITION OF {table} FOR VALUES FROM"
                f" ('{bounds[0]}') TO ('{bounds[1]}')"
            )
        month = following


async def sum_up(connection: Any) -> None:
    """Make the sums of usage, as the migration does of what is there before it."""
    began = time.monotonic()
    await connection.execute("SELECT rebuild_usage($1, $2)", FIRST_ID, LAST_ID, timeout=3600)
    print(f"all sums made anew: {time.monotonic() - began:.0f} s", flush=True)


async def _grant(connection: Any, first_ms: int) -> None:
    identity = _ID.format(first=first_ms - 1000, step=0, salt="'grant'")
    wallet = "('00000000-0000-7000-9000-' || lpad(to_hex(i), 12, '0'))::uuid"
    await connection.execute(
        f"INSERT INTO journal_tx (id, kind, wallet_id) SELECT {identity}, 'grant', {wallet}"
        f" FROM generate_series(1, {_WALLETS}) i",
        timeout=3600,
    )
    await connection.execute(
        f"""
        INSERT INTO journal_entry (tx_id, seq, account, wallet_id, currency, amount_nano)
        SELECT {identity}, e.seq, e.account, e.wallet, 'USD', e.amount
        FROM generate_series(1, {_WALLETS}) i
        CROSS JOIN LATERAL (VALUES (1, 'wallet', {wallet}, {100 * NANO}), (2, 'grant', NULL, {-100 * NANO}))
             AS e (seq, account, wallet, amount)
        """,
        timeout=3600,
    )


async def _add_calls(connection: Any, begin: int, end: int, first_ms: int, step_ms: float) -> None:
    identity = _ID.format(first=first_ms, step=step_ms, salt="'call'")
    wallet = f"('00000000-0000-7000-9000-' || lpad(to_hex(1 + (i * 7919) % {_WALLETS}), 12, '0'))::uuid"
    user = f"('00000000-0000-7000-8000-' || lpad(to_hex(1 + (i * 7919) % {_WALLETS}), 12, '0'))::uuid"
    cost = "(20000 + i % 9000)"
    series = f"generate_series({begin + 1}::bigint, {end}) i"
    nobody = "'00000000-0000-0000-0000-000000000000'::uuid"
    for statement in (
        f"""
        INSERT INTO calls (id, user_id, wallet_id, key_id, worker_id, model, stream, price_id, fx_quote_id, currency, hold_nano,
                           hold_nanousd, available_after_nano, state, opened_at, ended_at, outcome, generation_id, accuracy,
                           cost_nanousd, provider_cost_nanousd, charge_nano, spread_nano)
        SELECT {identity}, {user}, {wallet}, {user}, {nobody}, 'openai/gpt-4o-mini', true, {nobody}, {nobody}, 'USD', 90000, 90000, 1,
               'settled', now(), now(), 'completed', 'gen-' || md5('g' || i), 'exact', {cost}, {cost}, {cost}, 0
        FROM {series}
        """,
        f"""
        INSERT INTO usage (call_id, source, prompt_tokens, completion_tokens, first_byte_ms, duration_ms)
        SELECT {identity}, 'provider_cost', 100, 200, 300, 4000 FROM {series}
        """,
        f"INSERT INTO journal_tx (id, kind, call_id, wallet_id) SELECT {identity}, 'settlement', {identity}, {wallet} FROM {series}",
        f"""
        INSERT INTO journal_entry (tx_id, seq, account, wallet_id, currency, amount_nano)
        SELECT {identity}, e.seq, e.account, e.wallet, 'USD', e.amount
        FROM {series} CROSS JOIN LATERAL (VALUES (1, 'wallet', {wallet}, -{cost}), (2, 'fx_position', NULL, {cost}),
             (4, 'fx_position', NULL, -{cost}), (6, 'revenue', NULL, {cost}), (7, 'provider_cost', NULL, -{cost}),
             (8, 'provider_prepaid', NULL, {cost})) AS e (seq, account, wallet, amount)
        """,
        f"""
        INSERT INTO shadow_usd_ledger (id, kind, amount_nanousd, calls)
        SELECT {_ID.format(first=first_ms, step=step_ms, salt="'batch'").replace("i *", "min(i) *").replace("|| i)", "|| min(i))")},
               'settlement', sum({cost}), count(*)
        FROM {series} GROUP BY i / {_BATCH}
        """,
    ):
        await connection.execute(statement, timeout=3600)


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
        if not await connection.fetchval("SELECT 1 FROM users LIMIT 1"):
            await fill(connection, arguments.calls)
        await connection.close()
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
