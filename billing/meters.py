"""What this process counts: plain numbers in dictionaries, without locks, as one event loop alone writes them.

A counter costs a few hundred nanoseconds. Nothing here knows Prometheus: ``take`` returns numbers that can be sent to
another process, ``merge`` adds those of several, and ``proxy/telemetry/metrics.py`` writes them down.

Money is whole nano units, as everywhere. Labels are few and bounded: never an id of a person, a wallet or a key, and a
model only while there are few of them.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

OTHER = "other"
Kind = Literal["counter", "gauge", "histogram"]
_SECONDS = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
)
_ROWS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)
# A series is its labels' values and its number; of a histogram: a count per bucket, then the sum.
Series = Sequence[Any]
Numbers = Mapping[str, Sequence[Series]]


@dataclass(frozen=True, slots=True)
class Metric:
    """What a number means.

    Args:
        name: as Prometheus knows it, a counter's without ``_total``.
        labels: names, in the order of the values.
        nano: its numbers are nano units, shown in major ones.
        bounds: a histogram's, without the last, which is infinite.
        of_all: a gauge of several processes is the largest of them, not their sum.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    nano: bool = False
    bounds: tuple[float, ...] = ()
    of_all: bool = False


class Counter:
    """Only grows."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.values: dict[tuple[str, ...], int] = {}

    def add(self, amount: int, *labels: str) -> None:
        """Add a whole amount."""
        self.values[labels] = self.values.get(labels, 0) + amount


class Histogram:
    """Counts observations by size."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self._bounds = metric.bounds
        self.values: dict[tuple[str, ...], list[float]] = {}

    def observe(self, value: float, *labels: str) -> None:
        """Count one."""
        row = self.values.get(labels)
        if row is None:
            row = self.values[labels] = [0] * (len(self._bounds) + 1) + [0.0]
        row[bisect_left(self._bounds, value)] += 1
        row[-1] += value


@dataclass(frozen=True, slots=True)
class _Gauge:
    metric: Metric
    read: Callable[[], Iterable[tuple[tuple[str, ...], float]]]


@dataclass(frozen=True, slots=True)
class Reading:
    """Numbers of one process at one moment, by the names of their metrics."""

    counters: Numbers = field(default_factory=dict)
    histograms: Numbers = field(default_factory=dict)
    gauges: Numbers = field(default_factory=dict)


class Meters:
    """The meters of a process, handed to the rooms that have something to count.

    Args:
        models_max: models with series of their own; what comes later is counted as ``other``.
    """

    def __init__(self, *, models_max: int = 100) -> None:
        self._models_max = models_max
        self._models: set[str] = set()
        self._counters: list[Counter] = []
        self._histograms: list[Histogram] = []
        self._gauges: list[_Gauge] = []
        counter, histogram = self._counter, self._histogram
        self.requests = counter("tuma_requests", "Requests answered.", "method", "route", "status")
        self.refusals = counter("tuma_refusals", "Requests refused, by the error's code.", "code")
        self.calls = counter("tuma_calls", "Calls that ended, by outcome.", "outcome", "model")
        self.settlements = counter(
            "tuma_settlements", "Calls settled by this server's workers.", "state", "accuracy"
        )
        self.tokens = counter("tuma_tokens", "Tokens of settled calls.", "model", "kind")
        self.cost = counter(
            "tuma_cost_usd", "What settled calls cost us at the provider.", "model", nano=True
        )
        self.charged = counter(
            "tuma_charged", "What wallets paid for settled calls, in major units.", "currency", nano=True
        )
        self.house = counter("tuma_house_loss_usd", "What the house paid for calls.", nano=True)
        self.extensions = counter("tuma_hold_extensions", "Holds that had to grow.", "result")
        self.rebuilds = counter("tuma_mirror_rebuilds", "Mirrors in Redis rebuilt from Postgres.")
        self.swept = counter(
            "tuma_swept", "What sweeps did: calls by how they ended, holds dropped.", "result"
        )
        self.sweeps = counter("tuma_sweeps", "Sweeps.", "result")
        self.webhooks = counter(
            "tuma_webhooks", "Webhooks that came, by what was done first.", "provider", "result"
        )
        self.webhook_ends = counter(
            "tuma_webhooks_ended", "Webhooks looked into, by what became of them.", "result"
        )
        self.replica_reads = counter(
            "tuma_replica_reads", "Reads that a replica may answer: by it, or why by the primary.", "answered"
        )
        self.first_byte = histogram(
            "tuma_first_byte_seconds", "From a call's arrival to the provider's first byte.", "stream"
        )
        self.duration = histogram("tuma_call_seconds", "From a call's arrival to its end.", "stream")
        self.stage = histogram(
            "tuma_stage_seconds", "Time of a call's stages; ours are all but upstream and relay.", "stage"
        )
        self.settle_lag = histogram(
            "tuma_settle_lag_seconds", "From an answer's end to its settlement's commit."
        )
        self.batch_rows = histogram("tuma_batch_rows", "Rows committed together.", "batch", bounds=_ROWS)
        self.pool_wait = histogram("tuma_pool_wait_seconds", "Waiting for a connection to Postgres.", "role")
        self.redis_wait = histogram("tuma_redis_wait_seconds", "From a command to its pipeline's departure.")
        self.redis_rows = histogram(
            "tuma_redis_pipeline_commands", "Redis commands sent together.", bounds=_ROWS
        )
        self.loop_lag = histogram("tuma_loop_lag_seconds", "How late the event loop comes to what is due.")

    @property
    def metrics(self) -> list[Metric]:
        """What all of them mean."""
        counters = [item.metric for item in self._counters]
        histograms = [item.metric for item in self._histograms]
        return [*counters, *histograms, *(item.metric for item in self._gauges)]

    def _counter(self, name: str, text: str, *labels: str, nano: bool = False) -> Counter:
        made = Counter(Metric(name, "counter", text, labels, nano=nano))
        if not labels:
            made.add(
                0
            )  # shown from the start: of what first shows with its first event nobody sees that it rose
        self._counters.append(made)
        return made

    def _histogram(
        self, name: str, text: str, *labels: str, bounds: tuple[float, ...] = _SECONDS
    ) -> Histogram:
        made = Histogram(Metric(name, "histogram", text, labels, bounds=bounds))
        self._histograms.append(made)
        return made

    def gauge(self, metric: Metric, read: Callable[[], Iterable[tuple[tuple[str, ...], float]]]) -> None:
        """Have a number read when it is asked for; ``read`` returns labels and values."""
        self._gauges.append(_Gauge(metric, read))

    def model(self, name: str) -> str:
        """Return a model's label: the number of those is bounded.

        Args:
            name: of a model in the price book; what a caller made up never gets so far.
        """
        if name in self._models:
            return name
        if len(self._models) >= self._models_max:
            return OTHER
        self._models.add(name)
        return name

    def take(self) -> Reading:
        """Return the numbers as they are now."""
        return Reading(
            {
                item.metric.name: [[list(key), value] for key, value in item.values.items()]
                for item in self._counters
            },
            {
                item.metric.name: [[list(key), *row] for key, row in item.values.items()]
                for item in self._histograms
            },
            {item.metric.name: [[list(key), value] for key, value in item.read()] for item in self._gauges},
        )

    def carry(self, before: Reading) -> None:
        """Go on counting where a process that ended had stopped; what it had open ended with it."""
        for counter in self._counters:
            for labels, value in before.counters.get(counter.metric.name, ()):
                counter.add(value, *labels)
        for histogram in self._histograms:
            for labels, *row in before.histograms.get(histogram.metric.name, ()):
                histogram.values[tuple(labels)] = list(row)
        for labels, _ in before.counters.get(self.calls.metric.name, ()):
            self.model(labels[1])


def merge(readings: Sequence[Reading], *, largest: frozenset[str] = frozenset()) -> Reading:
    """Add the numbers of several processes; of the gauges named ``largest`` the largest counts."""
    counters: dict[str, dict[tuple[str, ...], int]] = {}
    histograms: dict[str, dict[tuple[str, ...], list[float]]] = {}
    gauges: dict[str, dict[tuple[str, ...], float]] = {}
    for reading in readings:
        for name, series in reading.counters.items():
            sums = counters.setdefault(name, {})
            for labels, value in series:
                sums[tuple(labels)] = sums.get(tuple(labels), 0) + value
        for name, series in reading.histograms.items():
            rows = histograms.setdefault(name, {})
            for labels, *row in series:
                before = rows.get(tuple(labels))
                rows[tuple(labels)] = (
                    row if before is None else [a + b for a, b in zip(before, row, strict=True)]
                )
        for name, series in reading.gauges.items():
            found = gauges.setdefault(name, {})
            for labels, value in series:
                so_far = found.get(tuple(labels))
                if so_far is None:
                    found[tuple(labels)] = value
                else:
                    found[tuple(labels)] = max(so_far, value) if name in largest else so_far + value
    return Reading(
        {name: [[list(key), value] for key, value in sums.items()] for name, sums in counters.items()},
        {name: [[list(key), *row] for key, row in rows.items()] for name, rows in histograms.items()},
        {name: [[list(key), value] for key, value in found.items()] for name, found in gauges.items()},
    )
