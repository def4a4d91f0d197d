"""Whether more workers carry more calls, and what a call then takes."""

from dataclasses import replace

from scripts.bench.gauges import cpu_s_by_process
from scripts.bench.results import Measured
from scripts.bench.rounds import Rounds
from scripts.bench.scenarios import SCENARIOS, WORKERS, Scenario
from scripts.bench.stand import TUMA_KEY, Side

_CONNECTIONS, _TIMES = 64, 2


async def measure_workers(rounds: Rounds) -> Measured:
    """Make plain calls of Tumas with as many workers as the options say, in turns, all on the same books.

    Where the load generator, the provider, Postgres and Redis share the cores with the workers, calls per second cannot grow
    with the workers as they would on cores of their own: what tells of their scaling is the CPU time per call, which stays.
    """
    stand, options = rounds.stand, rounds.options
    of = next(scenario for scenario in SCENARIOS if scenario.name == "plain-32")
    scenario = replace(of, name=WORKERS, connections=_CONNECTIONS, calls=of.calls * _TIMES)
    about = f"plain calls, {_CONNECTIONS} connections, by the number of workers"
    rounds.say(f"{WORKERS}: {about}")
    sides = [
        stand.start_tuma(
            _name_of(count), stand.settings(), stand.tuma.keys, billed_to=TUMA_KEY, workers=count
        )
        for count in options.workers
    ]
    calls = options.calls(scenario)
    found = Measured(WORKERS, about, calls, against=(sides[0].name,), compared=("cpu_ms", "calls_per_s"))
    found.sides = {side.name: {} for side in sides}
    for number in range(options.rounds + 1):
        for side in sides if number % 2 == 0 else sides[::-1]:
            figures = await _round(rounds, side, scenario, calls)
            if number:  # the first is for warming up
                found.add(side.name, figures)
    return found


def _name_of(workers: int) -> str:
    return f"{workers} worker" if workers == 1 else f"{workers} workers"


async def _round(rounds: Rounds, side: Side, scenario: Scenario, calls: int) -> dict[str, float]:
    assert side.pid is not None
    before = cpu_s_by_process(side.pid)
    figures = await rounds.once(side, scenario, calls)
    spent = [used - before.get(pid, 0.0) for pid, used in cpu_s_by_process(side.pid).items()]
    figures["busiest_percent"] = 100 * max(spent) / sum(spent) if sum(spent) else 0.0
    return figures
