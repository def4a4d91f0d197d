"""What one of each carries at most: a worker's core, a Redis, a Postgres."""

import asyncio
import json
import subprocess
import time
from dataclasses import replace
from typing import Any

from billing.books.opening_balance import record_openings
from billing.calls.ledger import Ledger
from billing.ids import new_id
from billing.postgres.migrate import migrate
from scripts.bench.books import BenchError, prove
from scripts.bench.measures.settle import COST_NANO, Payer, make_payers, open_batch, settle_calls
from scripts.bench.results import Measured
from scripts.bench.rounds import Rounds
from scripts.bench.scenarios import CAPACITY, SCENARIOS
from scripts.bench.stand import CAPACITY_KEY
from scripts.office import Office, open_office

_CONNECTIONS = 128
_CALLS = ("plain-32", "stream-32")
_ROUNDS_MAX = 5
_CLIENTS = (1, 2)
_CALLERS = 256  # of each client: as many calls at once as fill its pipelines
_DATABASE = "tuma_capacity"
_WALLETS = 1_000
_ROWS = (20, 500)  # of a batch: of a worker that is half idle, and the most there are
_WRITERS = (1, 4)  # workers that write at a time
_TABLES = ("calls", "usage", "journal_tx", "journal_entry", "usage_rollup", "shadow_usd_ledger")


async def measure_capacity(rounds: Rounds) -> tuple[list[Measured], list[str]]:
    """Load one after the other until it, or the machine, carries no more.

    What the others on the machine leave of it limits calls per second; the CPU time per call does not depend on them so
    much, and tells what a core of its own would carry.

    Returns:
        the scenarios, and what else is to be said.

    Raises:
        BenchError: a call failed, or the books do not hold afterwards.
    """
    rounds.say(f"{CAPACITY}: a worker, Redis, Postgres")
    postgres, note = await _postgres(rounds)
    return [await _worker(rounds), await _redis(rounds), postgres], [note]


async def _worker(rounds: Rounds) -> Measured:
    options = rounds.options
    found = Measured(f"{CAPACITY}-worker", f"one worker, {_CONNECTIONS} connections", 0, compared=())
    for of in SCENARIOS:
        if of.name in _CALLS:
            scenario = replace(of, connections=_CONNECTIONS, calls=of.calls * 2)
            found.calls = options.calls(scenario)
            for number in range(min(options.rounds, _ROUNDS_MAX) + 1):
                figures = await rounds.once(rounds.stand.tuma, scenario, found.calls)
                figures["own_percent"] = figures["cpu_ms"] * figures["calls_per_s"] / 10
                figures["calls_per_core_s"] = 1000 / figures["cpu_ms"]
                if number:  # the first is for warming up
                    found.add(of.name.partition("-")[0], figures)
    return found


async def _redis(rounds: Rounds) -> Measured:
    """Reserve and release by Tuma's own code, from processes that do nothing else."""
    seconds = max(3.0 * rounds.options.share, 0.2)
    found = Measured(
        f"{CAPACITY}-redis", "reserve and release, by processes that do nothing else", 0, compared=()
    )
    for number in range(min(rounds.options.rounds, _ROUNDS_MAX)):
        for clients in _CLIENTS if number % 2 == 0 else _CLIENTS[::-1]:
            side = f"{clients} client" + ("s" if clients > 1 else "")
            found.add(side, await _admit(rounds, clients, seconds))
    return found


async def _admit(rounds: Rounds, clients: int, seconds: float) -> dict[str, float]:
    stand = rounds.stand
    with stand.admitting(clients, "--seconds", str(seconds), "--callers", str(_CALLERS)) as processes:
        # Starting them takes nothing of Redis.
        clocks = stand.clocks(stand.tuma)
        said = [json.loads(await asyncio.to_thread(_read_all, process) or "null") for process in processes]
        redis_ms = clocks.ms()["redis_cpu_ms"]
    if not all(said):
        raise BenchError("a client of Redis ended without a word")
    pairs = sum(each["pairs"] for each in said)
    longest = max(each["seconds"] for each in said)
    return {
        "pairs_per_s": pairs / longest,
        "redis_us": redis_ms * 1000 / pairs,
        "own_percent": redis_ms / 10 / longest,
        "pairs_per_core_s": pairs * 1000 / redis_ms,
    }


def _read_all(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.read()


async def _postgres(rounds: Rounds) -> tuple[Measured, str]:
    stand, options = rounds.stand, rounds.options
    about = "calls opened and settled, by writers and rows of a batch"
    found = Measured(f"{CAPACITY}-postgres", about, 0, compared=())
    stand.add_database(_DATABASE)
    async with open_office(stand.settings(database=_DATABASE, upstream_key=CAPACITY_KEY)) as office:
        await migrate(office.database)
        await record_openings(office.database, office.upstream)
        payers = await make_payers(office, max(round(_WALLETS * options.share), 2), name="capacity")
        ledgers = [Ledger(office.database, worker_id=new_id()) for _ in range(max(_WRITERS))]
        before = await _stored(office)
        calls = 0
        for number in range(min(options.rounds, _ROUNDS_MAX) + 1):
            for writers in _WRITERS:
                for rows in _ROWS:
                    figures, made = await _write(rounds, office, ledgers[:writers], payers, rows)
                    calls += made
                    if number:  # the first is for warming up
                        found.add(f"{writers} by {rows}", figures)
            if not number:
                await _analyze(office)
        stored = {name: (rows, bytes_) for name, (rows, bytes_) in (await _stored(office)).items()}
        parts = [
            f"{name} {(stored[name][0] - before[name][0]) / calls:.2f} rows and {(stored[name][1] - before[name][1]) / calls:,.0f}"
            for name in _TABLES
        ]
        await rounds.bill(CAPACITY_KEY, calls, COST_NANO)
        await rounds.compare(office, CAPACITY_KEY)
        await prove(office)
    return found, f"Postgres stores of each of {calls:,} calls, in bytes with indexes: {', '.join(parts)}."


async def _write(
    rounds: Rounds, office: Office, ledgers: list[Ledger], payers: list[Payer], rows: int
) -> tuple[dict[str, float], int]:
    """Open calls and settle them, by all ledgers at once; return the figures, and how many calls there were."""
    batches = max(round(4_000 * rounds.options.share / rows / len(ledgers)), 1)
    calls = rows * batches * len(ledgers)
    shares = [payers[number :: len(ledgers)] for number in range(len(ledgers))]
    opened: list[list[Any]] = []

    async def open_all(ledger: Ledger, own: list[Payer]) -> None:
        opened.extend([await open_batch(ledger, own, rows) for _ in range(batches)])

    async def settle_all(ledger: Ledger) -> None:
        while opened:
            await settle_calls(ledger, opened.pop())

    figures: dict[str, float] = {}
    for name, works in (
        ("open", [open_all(ledger, own) for ledger, own in zip(ledgers, shares, strict=True)]),
        ("settle", [settle_all(ledger) for ledger in ledgers]),
    ):
        clocks, written = rounds.stand.clocks(rounds.stand.tuma), await _wal_bytes(office)
        began = time.perf_counter()
        await asyncio.gather(*works)
        took_s = time.perf_counter() - began
        spent = clocks.ms()["postgres_cpu_ms"]
        figures[f"{name}_per_s"] = calls / took_s
        figures[f"{name}_postgres_us"] = spent * 1000 / calls
        figures[f"{name}_wal_bytes"] = (await _wal_bytes(office) - written) / calls
    both_us = figures["open_postgres_us"] + figures["settle_postgres_us"]
    figures["calls_per_core_s"] = 1_000_000 / both_us
    return figures, calls


async def _analyze(office: Office) -> None:
    """Have Postgres know that the tables are no longer empty, as autovacuum would sooner or later."""
    async with office.database.connection() as connection:
        await connection.execute("ANALYZE")


async def _wal_bytes(office: Office) -> int:
    async with office.database.connection() as connection:
        return int(
            await connection.fetchval("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint")
        )


async def _stored(office: Office) -> dict[str, tuple[int, int]]:
    """Return rows and bytes of each table, its partitions and indexes with it."""
    async with office.database.connection() as connection:
        return {
            name: (
                await connection.fetchval(f"SELECT count(*) FROM {name}"),  # noqa: S608 - a name of the list above
                await connection.fetchval(
                    "SELECT coalesce(sum(pg_total_relation_size(relid)), pg_total_relation_size($1::text::regclass))::bigint"
                    " FROM pg_partition_tree($1::text::regclass)",
                    name,
                ),
            )
            for name in _TABLES
        }
