"""What Postgres alone knows of the house, for whoever watches it: read when asked for, at most every few seconds."""

import asyncio
import time
from typing import Any

import structlog

from billing.errors import PostgresUnavailableError
from billing.meters import Metric, Reading
from billing.postgres.database import Database
from config.settings import FxSettings, MetricSettings

_log = structlog.get_logger("tuma.observer")
UP = Metric("tuma_postgres_up", "gauge", "Whether Postgres answered when it was asked for the numbers below.")
OBSERVED = (
    UP,
    Metric("tuma_holds_open", "gauge", "Calls whose money is held, by state: open, review.", ("state",)),
    Metric("tuma_held", "gauge", "Money held for calls, in major units.", ("currency",), nano=True),
    Metric(
        "tuma_provider_quota_left_usd",
        "gauge",
        "What the provider lets us consume yet; absent: no limit.",
        nano=True,
    ),
    Metric("tuma_provider_quota_low", "gauge", "Whether that is less than TUMA_QUOTA__LOW_USD."),
    Metric("tuma_provider_paused", "gauge", "Whether nothing is sent, as the provider refuses us."),
    Metric(
        "tuma_drift_usd",
        "gauge",
        "The provider's total less ours, by the last reconciliation that could tell.",
        nano=True,
    ),
    Metric(
        "tuma_reconciled_age_seconds",
        "gauge",
        "Time since a reconciliation with all of the provider's records ended.",
    ),
    Metric(
        "tuma_fx_age_seconds",
        "gauge",
        "Time since a rate was confirmed; none for a rate that is good for ever.",
        ("currency",),
    ),
    Metric(
        "tuma_fx_good_for_seconds", "gauge", "The age at which a rate prices no new calls.", ("currency",)
    ),
    Metric("tuma_payments_review", "gauge", "Payments that wait for an operator's word."),
    Metric("tuma_webhooks_waiting", "gauge", "Webhooks not yet looked into."),
    Metric("tuma_webhooks_waiting_age_seconds", "gauge", "Age of the oldest of them; 0 without any."),
    Metric(
        "tuma_credited",
        "counter",
        "What payments brought into wallets, in major units.",
        ("currency",),
        nano=True,
    ),
)
_LIVE = "SELECT state, count(*) FROM calls WHERE state IN ('open', 'review') GROUP BY state"
_HELD = "SELECT currency, sum(held_nano) FROM wallets WHERE held_nano > 0 GROUP BY currency"
_QUOTA = "SELECT left_nanousd, low, coalesce(paused_until > now(), false) AS paused FROM provider_quota"
_RUN = (
    "SELECT drift_nanousd, extract(epoch FROM now() - ended_at)::double precision AS age_s FROM reconciliation_runs"
    " WHERE ended_at IS NOT NULL AND away = '{}' ORDER BY id DESC LIMIT 1"
)
_FX = (
    "SELECT currency, extract(epoch FROM clock_timestamp() - confirmed_at)::double precision AS age_s,"
    " extract(epoch FROM good_for)::double precision AS good_for_s FROM fx_quotes"
    " WHERE superseded_at IS NULL AND confirmed_at IS NOT NULL"
)
_PAID = (
    "SELECT currency, sum(credited_nano) AS credited, count(*) FILTER (WHERE state = 'review') AS review"
    " FROM payment_credits GROUP BY currency"
)
_WEBHOOKS = (
    "SELECT count(*) AS waiting, coalesce(extract(epoch FROM now() - min(received_at)), 0)::double precision AS age_s"
    " FROM webhook_events WHERE state = 'new'"
)


class Observer:
    """Reads them, for this process.

    Args:
        database: by a role that may read everything.
        settings: how long what was read is good, and how long it may take.
        fx: how long a rate is good that does not say so itself.
    """

    def __init__(self, database: Database, settings: MetricSettings, fx: FxSettings) -> None:
        self._database = database
        self._settings = settings
        self._fx = fx
        self._turn = asyncio.Lock()
        self._read_at_s = float("-inf")
        self._latest = Reading()

    async def read(self) -> Reading:
        """Return what is known; while Postgres is away that it is, and nothing else."""
        async with self._turn:
            if time.monotonic() - self._read_at_s >= self._settings.cache_s:
                try:
                    async with asyncio.timeout(self._settings.timeout_s):
                        self._latest = await self._ask()
                except (PostgresUnavailableError, TimeoutError) as error:
                    _log.warning("observer.failed", error=str(error) or type(error).__name__)
                    self._latest = Reading(gauges={UP.name: [[[], 0]]})
                self._read_at_s = time.monotonic()
            return self._latest

    async def _ask(self) -> Reading:
        async with self._database.transaction(readonly=True) as connection:
            live = dict(await connection.fetch(_LIVE))
            held = await connection.fetch(_HELD)
            quota = await connection.fetchrow(_QUOTA)
            run = await connection.fetchrow(_RUN)
            rates = await connection.fetch(_FX)
            paid = await connection.fetch(_PAID)
            webhooks = await connection.fetchrow(_WEBHOOKS)
        gauges: dict[str, list[list[Any]]] = {
            UP.name: [[[], 1]],
            "tuma_holds_open": [[[state], live.get(state, 0)] for state in ("open", "review")],
            "tuma_held": [[[currency], int(nano)] for currency, nano in held],
            "tuma_provider_quota_low": [[[], int(quota["low"])]],
            "tuma_provider_paused": [[[], int(quota["paused"])]],
            "tuma_fx_age_seconds": [[[row["currency"]], row["age_s"]] for row in rates],
            "tuma_fx_good_for_seconds": [
                [[row["currency"]], row["good_for_s"] or self._fx.stale_after_s] for row in rates
            ],
            "tuma_payments_review": [[[], sum(row["review"] for row in paid)]],
            "tuma_webhooks_waiting": [[[], webhooks["waiting"]]],
            "tuma_webhooks_waiting_age_seconds": [[[], webhooks["age_s"]]],
        }
        if quota["left_nanousd"] is not None:
            gauges["tuma_provider_quota_left_usd"] = [[[], quota["left_nanousd"]]]
        if run is not None:
            gauges["tuma_reconciled_age_seconds"] = [[[], run["age_s"]]]
            if run["drift_nanousd"] is not None:
                gauges["tuma_drift_usd"] = [[[], run["drift_nanousd"]]]
        return Reading(
            {"tuma_credited": [[[row["currency"]], int(row["credited"])] for row in paid]}, {}, gauges
        )
