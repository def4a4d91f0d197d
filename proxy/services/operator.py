"""What the operator's API uses, by the operator's role; reconciliation by the keeper's."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from uuid import UUID

from aiohttp import web

from billing.books.reconcile import Reconciler
from billing.calls.corrections import Corrections
from billing.calls.reviews import CallReviews
from billing.identity.keys import Keys
from billing.monitoring.audit import Audit
from billing.payments.refunds import Refunds
from billing.payments.reviews import Reviews
from billing.payments.views import PaymentViews
from billing.payments.worker import PaymentWorker
from billing.postgres.database import Database
from billing.postgres.replica import Late
from billing.wallets.caps import Caps
from billing.wallets.wallets import Wallets
from config.settings import Settings
from proxy.telemetry.metrics import Metrics


@dataclass(frozen=True, slots=True)
class OperatorServices:
    """The operator's API.

    ``cool_user`` drops what Redis knows of a user whose caps have changed, ``forget_key`` what this worker does of a key.
    """

    settings: Settings
    database: Database
    wallets: Wallets
    caps: Caps
    keys: Keys
    corrections: Corrections
    call_reviews: CallReviews
    audit: Audit
    refunds: Refunds
    reviews: Reviews
    payment_views: PaymentViews
    payments: PaymentWorker
    reconciler: Reconciler
    late: Late
    metrics: Metrics
    cool_user: Callable[[UUID], None]
    forget_key: Callable[[str], Awaitable[None]]


OPERATOR = web.AppKey("operator", OperatorServices)
