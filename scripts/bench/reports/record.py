"""The recorded ratios, and whether a run is worse than they are."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from billing.errors import InputError
from scripts.bench.results import Measured, Result, scenario_json
from scripts.bench.rounds import BESIDE, OTHERS
from scripts.bench.stand import TUMA
from scripts.bench.stats import median_interval, rounded, spread

_DOCS = Path(__file__).resolve().parents[2] / "docs"
RECORD, PAGE, PLOT = (_DOCS / f"benchmarks.{kind}" for kind in ("json", "md", "svg"))
_PAGE_BEGIN, _PAGE_END = "<!-- measured: begin -->", "<!-- measured: end -->"
REGRESSION = 0.15
# What is compared with the floor, the first that was measured; more is worse. Times of the wall clock are the neighbours' as
# much as ours.
_JUDGED = (BESIDE, "cpu_ms", "kib_per_stream")


@dataclass(frozen=True, slots=True)
class Compared:
    """The ratios of some rounds beside the recorded one.

    Args:
        others_percent: what others used of the machine meanwhile: where that is much, or was when it was recorded, a ratio
            is not what it is on a quiet one.
    """

    name: str
    recorded: float
    values: Sequence[float]
    others_percent: float = 0.0

    @property
    def now(self) -> float:
        """Their median."""
        return spread(self.values).median

    @property
    def low(self) -> float:
        """What the true median is surely not below; of a single measurement, itself."""
        return self._interval[0]

    @property
    def high(self) -> float:
        """What the true median is surely not above; of a single measurement, itself."""
        return self._interval[1]

    @property
    def _interval(self) -> tuple[float, float]:
        return (self.now, self.now) if self.name.endswith(".kib_per_stream") else median_interval(self.values)

    @property
    def _limit(self) -> float:
        return self.recorded * (1 + REGRESSION)

    @property
    def is_unsure(self) -> bool:
        """Whether these rounds cannot tell if it is worse by more than 15 percent."""
        return self.low <= self._limit < self.high

    @property
    def is_worse(self) -> bool:
        """Whether it is worse by more than 15 percent, as far as can be told."""
        return self.now > self._limit

    def __str__(self) -> str:
        verdict = "WORSE" if self.is_worse else "ok"
        rounds = f"{len(self.values)} rounds" + (", not sure" if self.is_unsure else "")
        return (
            f"{verdict:<6} {self.name}: {self.now:.2f} of the floor's ({self.low:.2f}…{self.high:.2f}, {rounds}),"
            f" recorded {self.recorded:.2f}; others used {self.others_percent:.0f} % of the machine"
        )


def find_judged(scenario: Measured) -> tuple[str, list[float]] | None:
    """Return the name and the values of the ratio that a scenario is judged by, if it has one."""
    for figure in _JUDGED:
        values = scenario.ratios(figure)
        if values:
            # Memory comes in steps: what few streams take says nothing of what many do.
            name = f"{scenario.name}.{scenario.calls}" if figure == "kib_per_stream" else scenario.name
            return f"{name}.{figure}", values
    return None


def ratios_of(result: Result) -> dict[str, float]:
    """Return the median ratios of Tuma to the floor that are judged, by scenario and figure."""
    found = filter(None, map(find_judged, result.scenarios))
    return {name: rounded(spread(values).median) for name, values in found}


def compare_ratios(recorded: Mapping[str, float], scenarios: Sequence[Measured]) -> list[Compared]:
    """Compare what both have.

    Raises:
        InputError: they have nothing in common, which would prove nothing.
    """
    both = []
    for scenario in scenarios:
        found = find_judged(scenario)
        if found is not None and found[0] in recorded:
            others = scenario.values(TUMA, OTHERS)
            both.append(
                Compared(found[0], recorded[found[0]], found[1], spread(others).median if others else 0.0)
            )
    if not both:
        raise InputError("nothing that was measured has a recorded ratio; record one with --record")
    return both


def is_unsure(recorded: Mapping[str, float], scenario: Measured) -> bool:
    """Whether a scenario's rounds are too few to judge it by."""
    found = find_judged(scenario)
    return (
        found is not None
        and found[0] in recorded
        and Compared(found[0], recorded[found[0]], found[1]).is_unsure
    )


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


def write_record(path: Path, result: Result, *, at: str, anew: bool = False) -> None:
    """Record a run's figures, and on what machine they were measured.

    Args:
        path: of the record.
        result: what is recorded.
        at: the day.
        anew: whether nothing of what is there stays; else the figures of scenarios that the run left out do.
    """
    before: dict[str, Any] = {}
    if path.exists() and not anew:
        before = json.loads(path.read_text(encoding="utf-8"))
    told = {
        "measured_at": at,
        "machine": result.machine,
        "rounds": result.rounds,
        "ratios": {**before.get("ratios", {}), **ratios_of(result)},
        "notes": result.notes or before.get("notes", []),
        "scenarios": {
            **before.get("scenarios", {}),
            **{scenario.name: scenario_json(scenario) for scenario in result.scenarios},
        },
    }
    path.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_page(path: Path, words: str, *, at: str) -> None:
    """Put a run's tables into the page, where its marks are.

    Raises:
        InputError: it has none.
    """
    page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition(_PAGE_BEGIN)
    _, end, after = rest.partition(_PAGE_END)
    if not (begin and end):
        raise InputError(f"{path} has no place for the tables: {_PAGE_BEGIN} … {_PAGE_END}")
    text = f"\n{at}, `tuma bench --all --record`:\n\n```text\n{words}\n```\n"
    path.write_text(f"{before}{begin}{text}{end}{after}", encoding="utf-8")
