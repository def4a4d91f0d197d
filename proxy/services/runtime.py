"""What a worker runs, starts and stops: loops, leases, connections. No handler is given it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aiohttp import web

from billing.calls.calls import Calls
from billing.calls.sweeper import Sweeper
from billing.fx.book import FxBook
from billing.fx.sync import RateSource
from billing.holds.holds import Holds
from billing.identity.keys import Keys
from billing.identity.sign_ins import People
from billing.monitoring.alerts import Alerts
from billing.payments.worker import PaymentWorker
from billing.postgres.database import Database
from billing.postgres.roles import Role
from billing.pricing.price_book import PriceBook
from billing.pricing.tokens import TokenCounter
from billing.provider.quota import Quota
from billing.redis.client import RedisWay
from billing.tasks import TrackedTasks
from billing.threads import FairThreads
from config.settings import Settings
from proxy.identity.jwt import JwtVerifier
from proxy.live.watchers import Watchers
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.tracing import Tracing
from proxy.upstream.adapter import Upstream


@dataclass(frozen=True, slots=True)
class Runtime:
    """All that lives as long as the worker, for whoever starts and stops it.

    ``tasks`` are loops that run as long as the worker, ``conclusions`` ends of calls, which it waits for.
    """

    settings: Settings
    pools: Mapping[Role, Database]
    replicas: Sequence[Database]
    pipe: RedisWay
    holds: Holds
    calls: Calls
    quota: Quota
    keys: Keys
    tokens: JwtVerifier
    signed_in: People
    payments: PaymentWorker
    prices: PriceBook
    fx: FxBook
    fx_sources: Sequence[RateSource]
    counter: TokenCounter
    threads: FairThreads
    upstream: Upstream
    sweeper: Sweeper
    alerts: Alerts
    metrics: Metrics
    tracing: Tracing | None  # where nobody traces, nothing of it is there
    watchers: Watchers
    tasks: TrackedTasks
    conclusions: TrackedTasks


RUNTIME = web.AppKey("runtime", Runtime)
