"""How long each stage of one request took. Pure: a clock and a list."""

import time
from collections.abc import Mapping
from typing import Protocol


class Trace(Protocol):
    """What follows one request for somebody outside (``proxy/telemetry/tracing.py``)."""

    def begin_upstream(self) -> Mapping[str, str]:
        """Begin the provider's part; return the headers that tell the provider of it."""


class Stages:
    """The stages of one request, one after the other: each mark ends the stage that began with the mark before.

    Times are seconds of ``time.perf_counter``.
    """

    __slots__ = ("_since_s", "_summed", "_sums_s", "began_s", "spans", "trace")

    def __init__(self) -> None:
        self._sums_s: dict[str, float] = {}
        self._summed = 0  # spans that are in it
        self.began_s = self._since_s = time.perf_counter()
        self.spans: list[tuple[str, float, float]] = []
        self.trace: Trace | None = None

    def mark(self, stage: str) -> None:
        """End a stage; one that is named twice has taken both times together."""
        now_s = time.perf_counter()
        self.spans.append((stage, self._since_s, now_s))
        self._since_s = now_s

    def begin_upstream(self) -> Mapping[str, str]:
        """Return the headers that tell the provider which trace this is part of; none, while nobody traces."""
        return {} if self.trace is None else self.trace.begin_upstream()

    def sums_s(self) -> dict[str, float]:
        """Return the seconds of each stage so far."""
        sums = self._sums_s
        for stage, began_s, ended_s in self.spans[self._summed :]:
            sums[stage] = sums.get(stage, 0.0) + ended_s - began_s
        self._summed = len(self.spans)
        return sums
