"""Many slow streams at once: what each takes of memory and CPU time while it waits for its next chunk."""

from scripts.bench.books import BenchError
from scripts.bench.gauges import memory_bytes
from scripts.bench.processes.upstream import SLOW_PACE_S
from scripts.bench.results import Measured
from scripts.bench.rounds import Rounds, add_differences
from scripts.bench.scenarios import SLOW, WAITING
from scripts.bench.stand import JOB_S, Side

_WARM_STREAMS = 50
_WARM_S = 0.2


async def measure_waiting(rounds: Rounds, sides: list[Side]) -> Measured:
    """Hold streams open on one side after the other, each on one process; to be done before that has worked hard.

    Later it has memory to spare, and streams would seem to take none.
    """
    options = rounds.options
    count = options.waiting
    about = f"{count:,} streams at once on one worker, a chunk every {SLOW_PACE_S:g} s"
    rounds.say(f"{WAITING}: {about}")
    found = Measured(WAITING, about, count)
    for side in sides:
        assert side.pid is not None
        await _hold(rounds, side, min(_WARM_STREAMS, count), _WARM_S)
        before = memory_bytes(side.pid)
        figures = await _hold(rounds, side, count, options.waiting_s)
        figures["kib_per_stream"] = (figures.pop("bytes") - before) / 1024 / count
        found.add(side.name, figures)
    add_differences(found)
    return found


async def _hold(rounds: Rounds, side: Side, count: int, seconds: float) -> dict[str, float]:
    """Hold so many streams open for a while, then have them end; return what they took meanwhile."""
    stand = rounds.stand
    said = await stand.load(side, SLOW, do="open", calls=count)
    if said["error"] or said["waiting"] != count:
        raise BenchError(f"{side.name}: {said['waiting']} of {count} streams began: {said['error']}")
    assert side.pid is not None
    clocks = stand.clocks(side)
    told = await stand.load(side, SLOW, do="rest", seconds=seconds)
    passed_s, spent = clocks.seconds(), clocks.ms()
    held = memory_bytes(side.pid)
    figures = {name: value for name, value in told["figures"].items() if name.startswith("chunk_delay")}
    figures["cpu_ms_per_s"] = spent["cpu_ms"] / passed_s
    if side.billed_to:
        figures["postgres_cpu_ms_per_s"] = spent["postgres_cpu_ms"] / passed_s
        figures["redis_cpu_ms_per_s"] = spent["redis_cpu_ms"] / passed_s
    await stand.ask_upstream("/bench/release", side.billed_to, {})
    rounds.demand(side, await stand.load(side, SLOW, do="finish", timeout_s=JOB_S), count)
    return {**figures, "bytes": float(held)}
