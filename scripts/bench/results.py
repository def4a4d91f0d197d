"""What a run is asked to measure, and what it found."""

import os
import platform
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from scripts.bench.books import Standing
from scripts.bench.scenarios import Scenario
from scripts.bench.stand import FLOOR, FLOORS, TUMA, Side
from scripts.bench.stats import ratios, spread

_FILES_SPARE = 500


@dataclass
class Measured:
    """One scenario's figures: by side and name, a value of each round.

    Args:
        against: the sides that the others are compared with.
        compared: the figures that are.
    """

    name: str
    about: str
    calls: int
    sides: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    against: tuple[str, ...] = FLOORS
    compared: tuple[str, ...] = ("cpu_ms", "beside_cpu_ms", "kib_per_stream", "cpu_ms_per_s")

    def add(self, side: str, figures: dict[str, float]) -> None:
        """Note a round's figures."""
        for name, value in figures.items():
            self.sides.setdefault(side, {}).setdefault(name, []).append(value)

    def values(self, side: str, figure: str) -> list[float]:
        """Return a figure's values, round by round; none where it was not measured."""
        return self.sides.get(side, {}).get(figure, [])

    def ratios(self, figure: str, *, side: str = TUMA, by: str = FLOOR) -> list[float]:
        """Return a side's figure by another's, round by round; nothing where one was not measured."""
        above, below = self.values(side, figure), self.values(by, figure)
        return ratios(above, below) if above and below else []

    def all_ratios(self) -> list[tuple[str, str, dict[str, list[float]]]]:
        """Return the ratios of sides to those they are compared with, by figure."""
        pairs = [(side, by) for side in self.sides if side not in self.against for by in self.against]
        found = [
            (
                side,
                by,
                {name: values for name in self.compared if (values := self.ratios(name, side=side, by=by))},
            )
            for side, by in pairs
        ]
        return [each for each in found if each[2]]


def scenario_json(scenario: Measured) -> dict[str, Any]:
    """Return a scenario's figures, a spread of each, and its ratios."""
    sides = {
        side: {name: spread(values).as_json() for name, values in figures.items()}
        for side, figures in scenario.sides.items()
    }
    found = {"name": scenario.name, "about": scenario.about, "calls": scenario.calls, "sides": sides}
    by_side = {
        f"{side} by {by}": {name: spread(values).as_json() for name, values in compared.items()}
        for side, by, compared in scenario.all_ratios()
    }
    return {**found, "ratios": by_side} if by_side else found


@dataclass(frozen=True, slots=True)
class Options:
    """How much is measured.

    Args:
        chosen: names of scenarios.
        share: of each scenario's calls; tests make few.
        peers: gateways to put beside.
        upstream_port: where peers find the bench's provider.
        unsure: whether a scenario needs more rounds before it can be judged; without it none is judged.
        workers: how many of them serve, one Tuma after the other.
        wallets: of the large database.
        filled: ended calls that are in the large database before it is measured.
    """

    chosen: frozenset[str]
    rounds: int
    quick: bool = False
    share: float = 1.0
    peers: tuple[Side, ...] = ()
    upstream_port: int = 0
    unsure: Callable[[Measured], bool] | None = None
    workers: tuple[int, ...] = (1, 2)
    wallets: int = 100_000
    filled: int = 10_000_000

    def calls(self, scenario: Scenario) -> int:
        """Return how many calls a round of a scenario makes."""
        return max(round(scenario.calls * self.share), 1)

    def rounds_of(self, scenario: Scenario) -> int:
        """Return how many rounds a scenario has at least: a quick run has no time for more than one that waits for a pace."""
        return 1 if self.quick and scenario.paced and self.unsure is None else self.rounds

    @property
    def waiting(self) -> int:
        """How many streams wait at once: each takes two files of a proxy."""
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        wanted = 500 if self.quick else 2_000
        return max(min(round(wanted * self.share), (files - _FILES_SPARE) // 2), 1)

    @property
    def waiting_s(self) -> float:
        """How long they are watched."""
        return 2.0 if self.quick else 10.0

    @property
    def batches(self) -> int:
        """How many batches a round settles."""
        return 2 if self.quick else 4


@dataclass
class Result:
    """All that a run found."""

    rounds: int
    machine: dict[str, Any]
    scenarios: list[Measured] = field(default_factory=list)
    books: Standing = field(default_factory=lambda: Standing(0, 0))
    proved: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what a figure cannot say


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on most."""
    return {
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": sys.version.split()[0],
        "load_before": read_load(),
    }


def read_load() -> list[float]:
    """Return the load averages of one, five and fifteen minutes."""
    return [round(load, 1) for load in os.getloadavg()]
