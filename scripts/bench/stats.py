"""Medians with their spread, percentiles, and the ratios of two sides that were measured in turns."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """What several rounds gave."""

    median: float
    least: float
    most: float

    def as_json(self) -> dict[str, float]:
        """Return it with six significant digits."""
        return {
            "median": rounded(self.median),
            "least": rounded(self.least),
            "most": rounded(self.most),
        }

    def __str__(self) -> str:
        return f"{shown(self.median)} ({shown(self.least)}…{shown(self.most)})"


def spread(values: Sequence[float]) -> Spread:
    """Return median, least and most.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no rounds, no median")
    return Spread(statistics.median(values), min(values), max(values))


def median_interval(values: Sequence[float], *, sure: float = 0.95) -> tuple[float, float]:
    """Return between what values the median lies, as surely as is asked, whatever the distribution is.

    These are two of the values, as many from the least as from the most: the sign test's interval (binomial with p = 1/2).
    Too few values cannot say it so surely: then it reaches from minus to plus infinity.
    """
    count, ordered = len(values), sorted(values)
    outside, at = 0.0, 0
    while True:
        outside += (
            2 * math.comb(count, at) / 2**count
        )  # that the median lies below the (at + 1)th value, or above its like
        if outside > 1 - sure:
            break
        at += 1
    return (ordered[at - 1], ordered[count - at]) if at else (-math.inf, math.inf)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the least value that is not below ``percent`` of all (nearest rank).

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values, no percentile")
    rank = math.ceil(len(values) * percent / 100)
    return sorted(values)[max(rank, 1) - 1]


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the ratios round by round: both sides of one round had the same neighbours.

    Raises:
        ValueError: not as many rounds of one as of the other.
    """
    return [over / under for over, under in zip(above, below, strict=True) if under > 0]


def rounded(value: float) -> float:
    """Return the value with six significant digits."""
    return float(f"{value:.6g}")


def shown(value: float) -> str:
    """Write a value for people: three significant digits, whole numbers above a hundred."""
    if abs(value) >= 100:  # noqa: PLR2004 - digits
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"  # noqa: PLR2004 - digits
