"""Limits, and what is left of them (cuts the circle)."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a key or a user; ``calls_in_flight`` 0 means none."""

    requests_per_min: int
    tokens_per_min: int
    calls_in_flight: int = 0


@dataclass(frozen=True, slots=True)
class RateState:
    """What is left of a caller's tighter windows: counts, and milliseconds until they are full again."""

    limits: Limits
    remaining_requests: int
    reset_requests_ms: int
    remaining_tokens: int
    reset_tokens_ms: int
