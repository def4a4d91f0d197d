"""What a run found, in words and as JSON."""

from typing import Any

from billing.money import format_usd
from scripts.bench.reports.record import Compared
from scripts.bench.results import Measured, Result, scenario_json
from scripts.bench.stats import rounded, spread

_LABELS = {
    "cpu_ms": "CPU ms per call",
    "beside_cpu_ms": "CPU ms per call, side by side",
    "postgres_cpu_ms": "Postgres' CPU ms per call",
    "redis_cpu_ms": "Redis' CPU ms per call",
    "calls_per_s": "calls/s",
    "cores_busy": "cores busy, all together",
    "others_percent": "of the machine, what others used, %",
    "busiest_percent": "of that CPU, the busiest worker's, %",
    "latency_p50_ms": "latency p50 ms",
    "latency_p99_ms": "latency p99 ms",
    "first_byte_p50_ms": "first byte p50 ms",
    "first_byte_p99_ms": "first byte p99 ms",
    "added_first_byte_p50_ms": "added to first byte p50 ms",
    "added_first_byte_p99_ms": "added to first byte p99 ms",
    "gap_p50_ms": "between chunks p50 ms",
    "gap_p99_ms": "between chunks p99 ms",
    "chunk_delay_p50_ms": "a chunk's way p50 ms",
    "chunk_delay_p99_ms": "a chunk's way p99 ms",
    "added_chunk_delay_p50_ms": "added to a chunk's way p50 ms",
    "added_chunk_delay_p99_ms": "added to a chunk's way p99 ms",
    "kib_per_stream": "KiB per waiting stream",
    "cpu_ms_per_s": "CPU ms per second, all streams",
    "postgres_cpu_ms_per_s": "Postgres' CPU ms per second",
    "redis_cpu_ms_per_s": "Redis' CPU ms per second",
    "settlements_per_s": "settlements/s",
    "own_percent": "of a core, %",
    "calls_per_core_s": "calls/s that a core of its own would carry",
    "pairs_per_s": "reserved and released, calls/s",
    "redis_us": "Redis' CPU µs per call",
    "pairs_per_core_s": "calls/s that a core of its own would carry",
    "open_per_s": "opened/s",
    "settle_per_s": "settled/s",
    "open_postgres_us": "Postgres' CPU µs per opening",
    "settle_postgres_us": "Postgres' CPU µs per settlement",
    "open_wal_bytes": "WAL bytes per opening",
    "settle_wal_bytes": "WAL bytes per settlement",
}


def as_json(result: Result, compared: list[Compared]) -> dict[str, Any]:
    """Return everything as one JSON object; ``ok`` is false where a ratio is worse than it was."""
    return {
        "ok": not any(each.is_worse for each in compared),
        "machine": result.machine,
        "rounds": result.rounds,
        "scenarios": [scenario_json(scenario) for scenario in result.scenarios],
        "books": {
            "calls": result.books.calls,
            "cost_usd": format_usd(result.books.nanousd),
            "proved": result.proved,
        },
        "notes": result.notes,
        "check": [
            {
                "name": each.name,
                "recorded": each.recorded,
                **{part: rounded(getattr(each, part)) for part in ("now", "low", "high")},
                "rounds": len(each.values),
                "others_percent": rounded(each.others_percent),
                "ok": not each.is_worse,
            }
            for each in compared
        ],
    }


def in_words(result: Result, compared: list[Compared]) -> str:
    """Write tables: a row for each figure, a column for each side; medians, and least…most of the rounds."""
    before, after = (
        " ".join(f"{load:.1f}" for load in result.machine[name]) for name in ("load_before", "load_after")
    )
    lines = [
        f"{result.machine['cpus']} CPUs, Python {result.machine['python']}; load average {before} before, {after} after",
        f"medians of {result.rounds} rounds in turns (least…most)",
    ]
    for scenario in result.scenarios:
        lines += ["", *_table(scenario)]
    lines += [
        "",
        *result.notes,
        f"The books have {result.books}, as the provider counted; proved: {', '.join(result.proved)}.",
        *map(str, compared),
    ]
    return "\n".join(lines)


def _table(scenario: Measured) -> list[str]:
    sides = list(scenario.sides)
    rows = [[f"{scenario.name}: {scenario.about}", *sides]]
    for name, label in _LABELS.items():
        values = [scenario.sides[side].get(name) for side in sides]
        if not any(values):
            continue
        row = [f"  {label}", *("" if each is None else str(spread(each)) for each in values)]
        rows.append(row)
        for by in scenario.against:
            ratios = {
                side: compared[name]
                for side, of, compared in scenario.all_ratios()
                if of == by and name in compared
            }
            if ratios:
                cells = (str(spread(ratios[side])) if side in ratios else "" for side in sides)
                rows.append([f"    by {by}", *cells])
    widths = [max(len(row[at]) for row in rows if at < len(row)) for at in range(max(map(len, rows)))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        for row in rows
    ]
