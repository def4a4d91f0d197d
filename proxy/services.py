"""What a request handler calls: the rooms of the house, made once per worker and handed over by the application."""

from dataclasses import dataclass
from uuid import UUID

from aiohttp import web

from billing.books.reconcile import Reconciler
from billing.calls.calls import Calls
from billing.calls.corrections import Corrections
from billing.calls.sweeper import Sweeper
from billing.fx.book import FxBook
from billing.fx.sync import RateSource
from billing.holds.holds import Holds
from billing.identity.auth_failures import AuthFailures
from billing.identity.keys import Keys
from billing.identity.sign_ins import People
from billing.monitoring.alerts import Alerts
from billing.monitoring.audit import Audit
from billing.payments.auto_topups import AutoTopups
from billing.payments.intents import Intents
from billing.payments.operations import PaymentOffice
from billing.payments.status_checks import PaymentLooks
from billing.payments.views import PaymentViews
from billing.payments.worker import PaymentDesk
from billing.postgres.database import Database
from billing.postgres.replica import Late
from billing.pricing.price_book import PriceBook
from billing.pricing.tokens import TokenCounter
from billing.provider.quota import Quota
from billing.redis.client import RedisWay
from billing.reports.call_view import OwnCalls
from billing.reports.statement import Statements
from billing.reports.usage import UsageBook
from billing.tasks import TrackedTasks
from billing.wallets.caps import Caps
from billing.wallets.wallets import Wallets
from config.settings import Settings
from proxy.identity.jwt import JwtVerifier
from proxy.live.watchers import Watchers
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.tracing import Tracing
from proxy.upstream.adapter import Upstream


@dataclass(frozen=True, slots=True)
class Services:
    """The rooms, ready for use."""

    settings: Settings
    worker_id: UUID
    database: Database
    keeper: Database
    desk: "Desk"
    pipe: RedisWay
    holds: Holds
    calls: Calls
    quota: Quota
    keys: Keys
    tokens: JwtVerifier
    signed_in: People
    failures: AuthFailures
    wallets: Wallets
    caps: Caps
    statements: Statements
    usage: UsageBook
    own_calls: OwnCalls
    intents: Intents
    auto_topups: AutoTopups
    payments: PaymentDesk
    looks: PaymentLooks
    prices: PriceBook
    fx: FxBook
    fx_sources: list[RateSource]
    counter: TokenCounter
    upstream: Upstream
    sweeper: Sweeper
    alerts: Alerts
    metrics: Metrics
    tracing: Tracing | None  # where nobody traces, nothing of it is there
    watchers: Watchers
    tasks: TrackedTasks  # loops that run as long as the worker
    conclusions: TrackedTasks  # ends of calls, which the worker waits for


@dataclass(frozen=True, slots=True)
class Desk:
    """What the operator's API works with, by the operator's role; reconciliation by the keeper's."""

    database: Database
    wallets: Wallets
    caps: Caps
    keys: Keys
    corrections: Corrections
    audit: Audit
    payments: PaymentOffice
    payment_views: PaymentViews
    reconciler: Reconciler
    late: Late


SERVICES = web.AppKey("services", Services)
