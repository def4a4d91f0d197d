"""The recorded ratios, and whether a run is worse than they are."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from billing.errors import InputError
from scripts.bench.run import Result
from scripts.bench.stats import rounded, spread

RECORD = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.json"
REGRESSION = 0.15
# What is compared with the floor; more is worse. Times of the wall clock are the neighbours' as much as ours.
_FIGURES = ("cpu_ms", "kib_per_stream")


@dataclass(frozen=True, slots=True)
class Compared:
    """A ratio beside the recorded one."""

    name: str
    recorded: float
    now: float

    @property
    def is_worse(self) -> bool:
        """Whether it is worse by more than 15 percent."""
        return self.now > self.recorded * (1 + REGRESSION)

    def __str__(self) -> str:
        verdict = "WORSE" if self.is_worse else "ok"
        return f"{verdict:<6} {self.name}: {self.now:.2f} of the floor's, recorded {self.recorded:.2f}"


def ratios_of(result: Result) -> dict[str, float]:
    """Return the median ratios of Tuma to the floor, by scenario and figure."""
    found = {}
    for scenario in result.scenarios:
        for figure in _FIGURES:
            values = scenario.ratios(figure)
            if values:
                # Memory comes in steps: what few streams take says nothing of what many do.
                name = f"{scenario.name}.{scenario.calls}" if figure == "kib_per_stream" else scenario.name
                found[f"{name}.{figure}"] = rounded(spread(values).median)
    return found


def compare_ratios(recorded: Mapping[str, float], now: Mapping[str, float]) -> list[Compared]:
    """Compare what both have.

    Raises:
        InputError: they have nothing in common, which would prove nothing.
    """
    both = [Compared(name, recorded[name], value) for name, value in now.items() if name in recorded]
    if not both:
        raise InputError("nothing that was measured has a recorded ratio; record one with --record")
    return both


def read_record(path: Path) -> dict[str, float]:
    """Read the recorded ratios.

    Raises:
        InputError: there are none.
    """
    try:
        ratios: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))["ratios"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} has no recorded ratios: {error!r}") from None
    return ratios


def write_record(path: Path, result: Result, *, at: str) -> None:
    """Record a run's ratios, and on what machine they were measured; others that are there stay."""
    before: dict[str, Any] = {}
    if path.exists():
        before = read_record(path)
    told = {
        "measured_at": at,
        "machine": result.machine,
        "rounds": result.rounds,
        "ratios": {**before, **ratios_of(result)},
    }
    path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
