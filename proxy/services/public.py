"""What is served without a key uses: webhooks of payment providers, health, the metrics page."""

from dataclasses import dataclass

from aiohttp import web

from billing.identity.auth_failures import AuthFailures
from billing.payments.worker import PaymentWorker
from billing.postgres.database import Database
from billing.pricing.price_book import PriceBook
from billing.provider.quota import Quota
from billing.redis.client import RedisWay
from config.settings import Settings
from proxy.telemetry.metrics import Metrics


@dataclass(frozen=True, slots=True)
class PublicServices:
    """Webhooks, health, metrics."""

    settings: Settings
    database: Database
    pipe: RedisWay
    quota: Quota
    prices: PriceBook
    payments: PaymentWorker
    metrics: Metrics
    unsigned: AuthFailures


PUBLIC = web.AppKey("public", PublicServices)
