"""Fill a Postgres of its own with millions of usage rows, and time what must stay fast: settling, and reading the sums.

Run it with ``python -m tests.measure.usage --calls 10000000 --folder FOLDER`` from the checkout's environment. It needs about 1 kB
of disk per call and stops its server at the end; the data stay in the folder, and are used again if they are there.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg

from billing.books.usage_proof import FIRST_ID, LAST_ID, compare_usage
from billing.ids import id_floor, new_id
from billing.postgres.database import Database
from billing.postgres.migrate import migrate
from billing.reports.usage import UsageBook, UsageQuery
from config.settings import load_settings
from scripts.bench.measures.fill import DAYS, add_partitions
from scripts.programs.embedded import EmbeddedPostgres

_WALLETS = 100_000
_PER_STEP = 250_000
_BATCH = 200
_ROUNDS = 60
_BUSY = UUID("00000000-0000-7000-9000-000000000001")  # three calls of ten are this wallet's
_OWNER = UUID("00000000-0000-7000-8000-000000000001")
_SPARSE = UUID("00000000-0000-7000-9000-000000000777")
_SPARSE_OWNER = UUID("00000000-0000-7000-8000-000000000777")
_NUMBER = f"(CASE WHEN i % 10 < 3 THEN 1 ELSE 2 + (i * 7919) % ({_WALLETS} - 1) END)"
_WALLET = f"('00000000-0000-7000-9000-' || lpad(to_hex({_NUMBER}), 12, '0'))::uuid"
_USER = f"('00000000-0000-7000-8000-' || lpad(to_hex({_NUMBER}), 12, '0'))::uuid"
_KEY = "('00000000-0000-7000-a000-' || lpad(to_hex(i / 10 % 3), 12, '0'))::uuid"


async def fill(connection: Any, calls: int) -> None:
    """Write ``calls`` ended calls with their usage over the last days, evenly, to 100,000 wallets and five models."""
    people = (
        "INSERT INTO users (id, email) SELECT ('00000000-0000-7000-8000-' || lpad(to_hex(i), 12, '0'))::uuid,"
        " 'user' || i || '@example.com' FROM generate_series(1, $1) i"
    )
    wallets = (
        "INSERT INTO wallets (id, user_id, currency) SELECT ('00000000-0000-7000-9000-' || lpad(to_hex(i), 12, '0'))::uuid,"
        " ('00000000-0000-7000-8000-' || lpad(to_hex(i), 12, '0'))::uuid, 'USD' FROM generate_series(1, $1) i"
    )
    for statement in (people, wallets):
        await connection.execute(statement, _WALLETS)
    now = datetime.now(UTC)
    first_ms = int((now - timedelta(days=DAYS)).timestamp() * 1000)
    step_ms = (DAYS * 24 * 3600 * 1000 - 3_600_000) / calls
    await add_partitions(connection, now)
    identity = (
        f"(lpad(to_hex(({first_ms} + (i * {step_ms})::bigint)), 12, '0') || '7' || substr(md5('c' || i), 1, 3)"
        " || '8' || substr(md5('c' || i), 4, 15))::uuid"
    )
    nobody = "'00000000-0000-0000-0000-000000000000'::uuid"
    for done in range(0, calls, _PER_STEP):
        began = time.monotonic()
        series = f"generate_series({done + 1}::bigint, {min(done + _PER_STEP, calls)}) i"
        await connection.execute(
            f"""
            INSERT INTO calls (id, user_id, wallet_id, key_id, worker_id, model, stream, price_id, fx_quote_id, currency,
                               hold_nano, hold_nanousd, available_after_nano, state, opened_at, ended_at, outcome,
                               generation_id, accuracy, cost_nanousd, provider_cost_nanousd, charge_nano, spread_nano)
            SELECT {identity}, {_USER}, {_WALLET}, {_KEY}, {nobody}, 'maker/model-' || i / 30 % 5, true, {nobody}, {nobody},
                   'USD', 90000, 90000, 1, 'settled', now(), now(), 'completed', 'gen-' || md5('g' || i),
                   CASE WHEN i % 50 = 0 THEN 'estimated' ELSE 'exact' END, 20000 + i % 9000, 20000 + i % 9000, 20000 + i % 9000, 0
            FROM {series}
            """,
            timeout=3600,
        )
        await connection.execute(
            "INSERT INTO usage (call_id, source, prompt_tokens, completion_tokens, first_byte_ms, duration_ms)"
            f" SELECT {identity}, 'provider_cost', 100 + i % 900, 200, 100 + i % 3000, 1000 + i % 60000 FROM {series}",
            timeout=3600,
        )
        rate = _PER_STEP / (time.monotonic() - began)
        print(f"{min(done + _PER_STEP, calls):>12} calls, {rate:.0f}/s", flush=True)
    await sum_up(connection)
    await connection.execute("VACUUM (ANALYZE)", timeout=3600)


async def sum_up(connection: Any) -> None:
    """Make the sums of usage anew, as an operator may."""
    began = time.monotonic()
    await connection.execute("SELECT rebuild_usage($1, $2)", FIRST_ID, LAST_ID, timeout=3600)
    print(f"all sums made anew: {time.monotonic() - began:.0f} s", flush=True)


async def _time(name: str, work: Callable[[], Awaitable[object]], times: int = 7) -> None:
    took_ms = []
    for _ in range(times):
        began = time.monotonic()
        await work()
        took_ms.append((time.monotonic() - began) * 1000)
    print(f"{name}: first {took_ms[0]:.1f} ms, median {statistics.median(took_ms):.1f} ms", flush=True)


async def measure_reading(database: Database) -> None:
    """Time what `GET /v1/usage` and `tuma usage` ask, and the proof of a day."""
    book = UsageBook(database)
    now = datetime.now(UTC)
    month = UsageQuery(since=now.date() - timedelta(days=30), until=now.date() + timedelta(days=1))
    for name, owner, wallet in (("busy", _OWNER, _BUSY), ("sparse", _SPARSE_OWNER, _SPARSE)):
        for by in (("day", "model"), ("hour",), ("day", "model", "key")):
            wanted = UsageQuery(since=month.since, until=month.until, by=by, rows_max=50_000)
            await _time(
                f"{name} wallet, 31 days by {' and '.join(by)}", partial(book.read_own, owner, wallet, wanted)
            )
    await _time("everybody, 31 days by day", lambda: book.read_all(month), times=3)
    yesterday = now.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=1)
    async with database.transaction(isolation="repeatable_read", readonly=True) as connection:
        ends = (id_floor(yesterday), id_floor(yesterday + timedelta(days=1)))
        await _time("the proof of a day", lambda: compare_usage(connection, *ends), times=3)
    await _time(
        "the rows, without sums: busy wallet, 31 days by day and model", lambda: _read_rows(database), times=1
    )


async def _read_rows(database: Database) -> None:
    async with database.connection() as connection:
        await connection.fetch(
            "SELECT uuid_moment(c.id)::date, c.model, count(*), sum(u.prompt_tokens), sum(c.charge_nano) FROM calls c"
            " JOIN usage u ON u.call_id = c.id WHERE c.wallet_id = $1 AND c.id >= uuid_floor(now() - interval '31 days')"
            " GROUP BY 1, 2",
            _BUSY,
            timeout=3600,
        )


async def measure_settling(connection: Any) -> None:
    """Settle batches with and without the sums, in turns, by many wallets and by one."""
    text = await connection.fetchval(
        "SELECT pg_get_functiondef(oid) FROM pg_proc WHERE proname = 'settle_batch' ORDER BY pronargs DESC LIMIT 1"
    )
    plain = text.replace("PERFORM add_usage(winners, 1);", "").replace(".settle_batch(", ".settle_plainly(")
    await connection.execute(plain)
    for name, wallets in (
        ("wallets not seen for long", _WALLETS),
        ("1,000 wallets", 1_000),
        ("one wallet", 1),
    ):
        took_s: dict[str, list[float]] = {"settle_plainly": [], "settle_batch": []}
        for number in range(_ROUNDS):
            for function, found in took_s.items():
                found.append(await _settle(connection, function, number, wallets))
        rates = {key: _BATCH / statistics.median(found[5:]) for key, found in took_s.items()}
        best = {key: _BATCH / min(found) for key, found in took_s.items()}
        print(
            f"settling, {name}: {rates['settle_plainly']:.0f}/s without, {rates['settle_batch']:.0f}/s with the sums;"
            f" ratio {rates['settle_plainly'] / rates['settle_batch']:.2f},"
            f" of the best {best['settle_plainly'] / best['settle_batch']:.2f}",
            flush=True,
        )


async def _settle(connection: Any, function: str, number: int, wallets: int) -> float:
    ids = [new_id() for _ in range(_BATCH)]
    await connection.execute(
        """
        INSERT INTO calls (id, user_id, wallet_id, worker_id, model, stream, price_id, fx_quote_id, currency, hold_nano, hold_nanousd)
        SELECT a.id, w.user_id, w.id, $4, 'maker/model-1', true, $4, $4, 'USD', 0, 0
        FROM unnest($1::uuid[]) WITH ORDINALITY AS a (id, i)
        JOIN wallets w ON w.id = ('00000000-0000-7000-9000-' || lpad(to_hex(1 + (a.i + $2::bigint * 201) % $3::bigint), 12, '0'))::uuid
        """,
        ids,
        number,
        wallets,
        UUID(int=0),
    )
    count = len(ids)
    columns: list[list[Any]] = [
        ids,
        *(["settled"] * count, ["completed"] * count, ["exact"] * count, ["provider_cost"] * count),
        [f"gen-{call_id}" for call_id in ids],
        *([20_000] * count, [20_000] * count, [20_000] * count, [0] * count, [0] * count),
        *([100] * count, [200] * count, [0] * count, [0] * count, [0] * count),
        *([300] * count, [4_000] * count),
        *([], [], [], []),
    ]
    marks = ", ".join(f"${i}" for i in range(1, 24))
    began = time.monotonic()
    await connection.fetch(f"SELECT * FROM {function}({marks})", new_id(), *columns)
    return time.monotonic() - began


async def run(arguments: argparse.Namespace) -> None:
    with EmbeddedPostgres(arguments.folder / "postgres", fast=True) as postgres:
        dsn = postgres.dsn()
        database = Database(load_settings(postgres={"dsn": dsn, "command_timeout_s": 3600}).postgres)
        await migrate(database)
        connection = await asyncpg.connect(dsn)
        if not await connection.fetchval("SELECT 1 FROM users LIMIT 1"):
            await fill(connection, arguments.calls)
        print(
            f"{await connection.fetchval('SELECT count(*) FROM usage', timeout=3600)} usage rows,"
            f" {await connection.fetchval('SELECT count(*) FROM usage_rollup', timeout=3600)} sums",
            flush=True,
        )
        await measure_reading(database)
        await measure_settling(connection)
        await connection.close()
        await database.close()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, required=True)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
