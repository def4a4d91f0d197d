"""A run of the bench: everything started, what was chosen measured, the books proved, everything ended."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from scripts.bench.books import prove
from scripts.bench.measures.big import measure_big
from scripts.bench.measures.capacity import measure_capacity
from scripts.bench.measures.settle import measure_settle
from scripts.bench.measures.waiting import measure_waiting
from scripts.bench.measures.workers import measure_workers
from scripts.bench.results import Measured, Options, Result, describe_machine, read_load
from scripts.bench.rounds import Rounds
from scripts.bench.scenarios import BIG, CAPACITY, SCENARIOS, SETTLE, WAITING, WORKERS
from scripts.bench.stand import TUMA_KEY, Side, begin, standing
from scripts.office import Office, open_office


async def run(options: Options, say: Callable[[str], None]) -> Result:
    """Start everything, measure, prove the books, and end everything.

    Raises:
        BenchError: a call failed, or the books lost something.
        EmbeddedError: a part does not start.
    """
    result = Result(options.rounds, describe_machine())
    with (
        tempfile.TemporaryDirectory(prefix="tuma-bench-") as folder,
        standing(Path(folder), upstream_port=options.upstream_port) as stand,
    ):
        await begin(stand)
        floors = ", ".join(f"{floor.name} {floor.base_url}" for floor in stand.floors)
        say(f"provider {stand.upstream_url}, {floors}, Tuma {stand.tuma.base_url}")
        async with open_office(stand.settings()) as office:
            await _measure(Rounds(stand, options, say), office, result)
            result.proved = await prove(office)
    result.machine["load_after"] = read_load()
    return result


async def _measure(rounds: Rounds, office: Office, result: Result) -> None:
    chosen = rounds.options.chosen

    async def keep(found: Measured) -> None:
        result.scenarios.append(found)
        result.books = await rounds.compare(office, TUMA_KEY)

    if WAITING in chosen:
        await keep(await measure_waiting(rounds, _sides(rounds, slow=True)))
    for scenario in SCENARIOS:
        if scenario.name in chosen:
            sides = [*_sides(rounds, slow=scenario.paced), *rounds.options.peers]
            await keep(await rounds.measure(scenario, sides))
    if WORKERS in chosen:
        await keep(await measure_workers(rounds))
    if SETTLE in chosen:
        result.scenarios.append(await measure_settle(rounds))
    if CAPACITY in chosen:
        found, notes = await measure_capacity(rounds)
        result.scenarios += found
        result.notes += notes
        result.books = await rounds.compare(office, TUMA_KEY)
    if BIG in chosen:
        found, notes = await measure_big(rounds, office)
        result.scenarios += found
        result.notes += notes
        result.books = await rounds.compare(office, TUMA_KEY)


def _sides(rounds: Rounds, *, slow: bool) -> list[Side]:
    """Return who is put side by side: where time is short, one floor."""
    options, stand = rounds.options, rounds.stand
    short = options.unsure is not None or (options.quick and slow)
    return [*(stand.floors[:1] if short else stand.floors), stand.tuma]
