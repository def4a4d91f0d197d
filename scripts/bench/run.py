"""A run of the bench: rounds of all sides in turns, scenario by scenario, the books compared after each."""

import os
import platform
import resource
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.bench.books import BenchError, Standing, compare, prove
from scripts.bench.scenarios import SCENARIOS, SETTLE, SLOW, WAITING, Scenario
from scripts.bench.settle import measure_settle
from scripts.bench.stand import JOB_S, TUMA_KEY, Side, Stand, begin, cpu_s, memory_bytes, standing
from scripts.bench.stats import ratios
from scripts.office import Office, open_office

_WARM_STREAMS = 50
_FILES_SPARE = 500


@dataclass(frozen=True, slots=True)
class Options:
    """How much is measured.

    Args:
        chosen: names of scenarios.
        share: of each scenario's calls; tests make few.
        peers: gateways to put beside.
        upstream_port: where peers find the bench's provider.
    """

    chosen: frozenset[str]
    rounds: int
    quick: bool = False
    share: float = 1.0
    peers: tuple[Side, ...] = ()
    upstream_port: int = 0

    def calls(self, scenario: Scenario) -> int:
        """Return how many calls a round of a scenario makes."""
        calls = scenario.quick_calls if self.quick else scenario.calls
        return max(round(calls * self.share), 1)

    @property
    def waiting(self) -> int:
        """How many streams wait at once: each takes two files of a proxy."""
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        wanted = 500 if self.quick else 2_000
        return max(min(round(wanted * self.share), (files - _FILES_SPARE) // 2), 1)

    @property
    def batches(self) -> int:
        """How many batches a round settles."""
        return 2 if self.quick else 4


@dataclass
class Measured:
    """One scenario's figures: by side and name, a value of each round."""

    name: str
    about: str
    calls: int
    sides: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, side: str, figures: dict[str, float]) -> None:
        """Note a round's figures."""
        for name, value in figures.items():
            self.sides.setdefault(side, {}).setdefault(name, []).append(value)

    def ratios(self, figure: str) -> list[float]:
        """Return Tuma's figure by the floor's, round by round; nothing where it was not measured."""
        tuma, floor = (self.sides.get(side, {}).get(figure, []) for side in ("tuma", "floor"))
        return ratios(tuma, floor)


@dataclass
class Result:
    """All that a run found."""

    rounds: int
    machine: dict[str, Any]
    scenarios: list[Measured] = field(default_factory=list)
    books: Standing = field(default_factory=lambda: Standing(0, 0))
    proved: list[str] = field(default_factory=list)


async def run(options: Options, say: Callable[[str], None]) -> Result:
    """Start everything, measure, prove the books, and end everything.

    Raises:
        BenchError: a call failed, or the books lost something.
        EmbeddedError: a part does not start.
    """
    result = Result(options.rounds, _machine())
    with (
        tempfile.TemporaryDirectory(prefix="tuma-bench-") as folder,
        standing(Path(folder), upstream_port=options.upstream_port) as stand,
    ):
        await begin(stand)
        say(f"provider {stand.upstream_url}, floor {stand.floor.base_url}, Tuma {stand.tuma.base_url}")
        async with open_office(stand.settings()) as office:
            await _Run(stand, office, options, result, say).all()
    result.machine["load_after"] = [round(load, 1) for load in os.getloadavg()]
    return result


def _machine() -> dict[str, Any]:
    return {
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": sys.version.split()[0],
        "load_before": [round(load, 1) for load in os.getloadavg()],
    }


class _Run:
    def __init__(
        self, stand: Stand, office: Office, options: Options, result: Result, say: Callable[[str], None]
    ) -> None:
        self._stand = stand
        self._office = office
        self._options = options
        self._result = result
        self._say = say
        self._made = 0  # calls that Tuma answered

    async def all(self) -> None:
        options = self._options
        # First: later, a process that has worked hard has memory to spare, and waiting streams would seem to take none.
        if WAITING in options.chosen:
            await self._wait()
        for scenario in SCENARIOS:
            if scenario.name in options.chosen:
                await self._measure(scenario)
        if SETTLE in options.chosen:
            await self._settle()
        self._result.proved = await prove(self._office)

    async def _measure(self, scenario: Scenario) -> None:
        self._say(f"{scenario.name}: {scenario.about}")
        stand, options = self._stand, self._options
        calls = options.calls(scenario)
        found = Measured(scenario.name, scenario.about, calls)
        sides = [stand.floor, stand.tuma, *options.peers]
        for side in sides:
            await self._round(side, scenario, max(calls // 4, 1))
        for number in range(options.rounds):
            # The other way round every second time: who comes first finds another machine than who comes last.
            for side in sides if number % 2 == 0 else sides[::-1]:
                found.add(side.name, await self._round(side, scenario, calls))
        _add_first_byte(found, options.peers)
        self._result.scenarios.append(found)
        await self._compare()

    async def _round(self, side: Side, scenario: Scenario, calls: int) -> dict[str, float]:
        stand = self._stand
        before, stores = 0.0 if side.pid is None else cpu_s(side.pid), stand.stores_cpu_s()
        connections = min(scenario.connections, calls)
        said = await stand.load(side, scenario, do="calls", calls=calls, connections=connections)
        self._demand(side, said, calls)
        figures: dict[str, float] = said["figures"]
        if side.pid is not None:
            figures["cpu_ms"] = (cpu_s(side.pid) - before) * 1000 / calls
        if side is stand.tuma:
            figures["stores_cpu_ms"] = (stand.stores_cpu_s() - stores) * 1000 / calls
        return figures

    def _demand(self, side: Side, said: dict[str, Any], calls: int) -> None:
        if said["errors"] or said["calls"] != calls:
            raise BenchError(f"{side.name}: {said['errors']} of {calls} calls failed, first: {said['error']}")
        if side is self._stand.tuma:
            self._made += calls

    async def _wait(self) -> None:
        count = self._options.waiting
        self._say(f"{WAITING}: {count} streams at once that wait after their first chunk")
        found = Measured(WAITING, f"{count:,} streams that wait, on one worker", count)
        for side in (self._stand.floor, self._stand.tuma):
            assert side.pid is not None
            await self._hold(side, min(_WARM_STREAMS, count))
            before = memory_bytes(side.pid)
            grown = await self._hold(side, count) - before
            found.add(side.name, {"kib_per_stream": grown / 1024 / count})
        self._result.scenarios.append(found)
        await self._compare()

    async def _hold(self, side: Side, count: int) -> int:
        """Hold so many streams open; return the proxy's memory meanwhile."""
        stand = self._stand
        said = await stand.load(side, SLOW, do="open", calls=count)
        if said["error"] or said["waiting"] != count:
            raise BenchError(f"{side.name}: {said['waiting']} of {count} streams began: {said['error']}")
        assert side.pid is not None
        held = memory_bytes(side.pid)
        await stand.ask_upstream("/bench/release", TUMA_KEY, {})
        self._demand(side, await stand.load(side, SLOW, do="finish", timeout_s=JOB_S), count)
        return held

    async def _settle(self) -> None:
        options = self._options
        self._say(f"{SETTLE}: settlements into Postgres, in batches")
        found = Measured(SETTLE, "settlements in batches, by the ledger", options.batches)
        by_way = await measure_settle(self._stand, rounds=options.rounds, batches=options.batches)
        for way, values in by_way.items():
            found.sides[way] = {"settlements_per_s": values}
        self._result.scenarios.append(found)

    async def _compare(self) -> None:
        """Tuma's books, the provider's count and sum, and the client's count are one."""
        self._result.books = await compare(
            self._stand.ask_upstream, self._office, TUMA_KEY, answered=self._made
        )


def _add_first_byte(found: Measured, peers: Sequence[Side]) -> None:
    """Note how much later than the floor's the first byte came, round by round."""
    floor = found.sides["floor"]
    for name in ("tuma", *(peer.name for peer in peers)):
        for part in ("p50", "p99"):
            ours = found.sides[name][f"first_byte_{part}_ms"]
            theirs = floor[f"first_byte_{part}_ms"]
            found.sides[name][f"added_first_byte_{part}_ms"] = [
                late - soon for late, soon in zip(ours, theirs, strict=True)
            ]
