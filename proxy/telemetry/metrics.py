"""What all workers of this master counted, and what Postgres knows, as Prometheus reads it.

``billing/meters.py`` counts, ``billing/monitoring/gauges.py`` asks Postgres, ``proxy/telemetry/shared_counters.py`` carries numbers from worker to
worker; this adds them up and writes them down. Prometheus knows floats only: amounts are exact in the books, here
they are for looking at.
"""

import asyncio
import platform
import time
from collections.abc import Iterator
from decimal import Decimal
from importlib.metadata import version
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from billing.meters import Meters, Metric, Reading, merge
from billing.monitoring.gauges import OBSERVED, Observer
from config.logging import LEVELS, change_level
from config.settings import MetricSettings
from proxy.telemetry.shared_counters import WorkerSlot

_NANO_DECIMALS = 9
_log = structlog.get_logger("tuma.metrics")
_Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
_BUILD = Metric("tuma_build_info", "gauge", "What runs here.", ("version", "python"))
_WORKERS = Metric("tuma_workers", "gauge", "Workers that live.")
_RESTARTS = Metric("tuma_worker_restarts", "counter", "Workers that died and were replaced.")
OF_MASTER = (_BUILD, _WORKERS, _RESTARTS)


class Metrics:
    """The numbers of this worker, and of those beside it.

    Args:
        meters: of this process.
        observer: who asks Postgres.
        settings: pace.
        slot: at the shared counters of the master; None for a worker that is alone.
    """

    def __init__(
        self, meters: Meters, observer: Observer, settings: MetricSettings, slot: WorkerSlot | None = None
    ) -> None:
        self.meters = meters
        self._observer = observer
        self._settings = settings
        self._slot = slot
        self._too_many = False
        if slot is not None:
            meters.carry(slot.before())
            self.publish()
            if slot.shared.level is not None:  # it was changed before this worker replaced another
                change_level(slot.shared.level)

    async def hear_level(self, level: str) -> None:
        """Take over a log level that was set for all; what is none changes nothing."""
        if level not in LEVELS:
            return
        before = change_level("warning")  # so that the change itself is told of
        if before != level:
            _log.warning("log.level_changed", before=before, after=level)
        change_level(level)
        if self._slot is not None:
            self._slot.shared.level = level

    def publish(self) -> Reading:
        """Show this worker's numbers to the others; return them."""
        reading = self.meters.take()
        if self._slot is not None and not self._slot.publish(reading) and not self._too_many:
            self._too_many = True
            _log.error("metrics.too_many")
        return reading

    async def run(self) -> None:
        """Publish at the set pace until cancelled, and see how late the loop comes to it."""
        while True:
            due_s = time.perf_counter() + self._settings.publish_s
            await asyncio.sleep(self._settings.publish_s)
            self.meters.loop_lag.observe(max(time.perf_counter() - due_s, 0.0))
            self.publish()

    async def render(self) -> bytes:
        """Write all numbers down."""
        observed = await self._observer.read()
        # What is shown was published before: should this worker die now, nothing goes back.
        readings = [self.publish(), *([] if self._slot is None else self._slot.others())]
        known = {metric.name: metric for metric in (*self.meters.metrics, *OBSERVED, *OF_MASTER)}
        largest = frozenset(name for name, metric in known.items() if metric.of_all)
        registry = CollectorRegistry()
        registry.register(_Page(known, [merge(readings, largest=largest), observed, self._of_master()]))
        return generate_latest(registry)

    def _of_master(self) -> Reading:
        shared = None if self._slot is None else self._slot.shared
        return Reading(
            {_RESTARTS.name: [[[], 0 if shared is None else shared.restarts]]},
            {},
            {
                _BUILD.name: [[[version("tuma"), platform.python_version()], 1]],
                _WORKERS.name: [[[], 1 if shared is None else shared.taken]],
            },
        )


class _Page(Collector):
    """One scrape's worth."""

    def __init__(self, known: dict[str, Metric], readings: list[Reading]) -> None:
        self._known = known
        self._readings = readings

    def collect(self) -> Iterator[_Family]:
        told: set[str] = set()
        for reading in self._readings:
            for numbers in (reading.counters, reading.histograms, reading.gauges):
                for name, series in numbers.items():
                    told.add(name)
                    yield _family(self._known[name], series)
        for name in sorted(self._known.keys() - told):
            yield _family(self._known[name], ())


def _family(metric: Metric, series: Any) -> _Family:
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        for labels, *counts, total in series:
            histogram.add_metric(labels, _cumulative(metric.bounds, counts), sum_value=total)
        return histogram
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(metric.name, metric.help, labels=metric.labels)
    for labels, value in series:
        family.add_metric(labels, float(Decimal(value).scaleb(-_NANO_DECIMALS)) if metric.nano else value)
    return family


def _cumulative(bounds: tuple[float, ...], counts: list[float]) -> list[tuple[str, float]]:
    buckets, sum_so_far = [], 0.0
    for bound, count in zip((*map(str, bounds), "+Inf"), counts, strict=True):
        sum_so_far += count
        buckets.append((bound, sum_so_far))
    return buckets
