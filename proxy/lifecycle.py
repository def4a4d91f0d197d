"""Makes the rooms, opens and closes them in order."""

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from billing.books.opening_balance import record_openings
from billing.books.reconcile import Reconciler
from billing.calls.calls import Calls
from billing.calls.corrections import Corrections
from billing.calls.ledger import Ledger
from billing.calls.sweeper import Sweeper
from billing.errors import ProviderUnavailableError
from billing.fx.book import FxBook
from billing.holds.holds import Holds
from billing.identity.auth_failures import AuthFailures
from billing.identity.keys import Keys
from billing.identity.sign_ins import People
from billing.ids import new_id
from billing.meters import Meters
from billing.monitoring.alerts import Alerts
from billing.monitoring.audit import Audit
from billing.monitoring.gauges import Observer
from billing.payments.auto_topups import AutoTopups
from billing.payments.intents import Intents
from billing.payments.operations import PaymentOffice
from billing.payments.status_checks import PaymentLooks
from billing.payments.views import PaymentViews
from billing.payments.worker import PaymentDesk
from billing.postgres.database import Database
from billing.postgres.migrate import require_current
from billing.postgres.notifications import ChangeFeed
from billing.postgres.pooler import require_sessions
from billing.postgres.replica import open_late
from billing.postgres.roles import Role
from billing.pricing.price_book import PriceBook
from billing.pricing.tokens import TokenCounter
from billing.provider.quota import Quota
from billing.redis.client import make_redis
from billing.reports.call_view import OwnCalls
from billing.reports.statement import Statements
from billing.reports.usage import UsageBook
from billing.tasks import TrackedTasks
from billing.wallets.caps import Caps
from billing.wallets.feed import Feeds
from billing.wallets.wallets import Wallets
from config.settings import Settings
from proxy.cache_drops import changed_key, changed_user, cool_wallet
from proxy.identity.jwt import JwtVerifier
from proxy.live.watchers import Watchers
from proxy.outbound.alert_webhook import make_messenger
from proxy.outbound.fx_sources import make_sources
from proxy.payments.providers import make_payment_apis
from proxy.routines import make_routines
from proxy.services import Desk, Services
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.shared_counters import Seat
from proxy.telemetry.tracing import open_tracing
from proxy.upstream.adapter import Upstream
from proxy.upstream.openai import OpenAIUpstream
from proxy.upstream.openrouter import OpenRouterUpstream

_NAME = "tuma serve"


# Connections of a worker by role; of the proxy's own, TUMA_POSTGRES__POOL_MAX.
_POOLS: Mapping[Role, int | None] = {
    "proxy": None,
    "settler": 4,
    "keeper": 4,
    "api": 4,
    "webhook": 4,
    "operator": 2,
}


def make_upstream(settings: Settings) -> Upstream:
    """Return the adapter for the configured provider, not started."""
    kinds: dict[str, type[Upstream]] = {"openrouter": OpenRouterUpstream, "openai": OpenAIUpstream}
    return kinds[settings.upstream.kind](settings.upstream)


@asynccontextmanager
async def open_services(settings: Settings, seat: Seat | None = None) -> AsyncIterator[Services]:
    """Make the rooms, warm what a first call would wait for, and close everything in order afterwards.

    Args:
        settings: everything configurable.
        seat: of this worker at its master's board; None for a worker that is alone.

    Raises:
        MigrationError: the schema is not this version's.
        PostgresUnavailableError, RedisUnavailableError: a server is away.
        InputError: a setting is missing.
    """
    worker_id = new_id()
    meters = Meters(models_max=settings.metrics.models_max)
    pools = _make_pools(settings, meters)
    database, people, keeper, operator = pools["proxy"], pools["api"], pools["keeper"], pools["operator"]
    late, replica = open_late(people, name=_NAME, meters=meters)
    late_for_operator, operators_replica = open_late(operator, name=_NAME, meters=meters)
    pipe = make_redis(settings.redis, meters)
    holds = Holds(pipe, settings.holds, Ledger(database, worker_id=worker_id).read_mirror, meters)
    upstream = make_upstream(settings)
    quota = Quota(database, upstream, worker_id=worker_id, settings=settings.quota)
    calls = Calls(
        database,
        holds,
        quota,
        worker_id=worker_id,
        settings=settings,
        settler=pools["settler"],
        keeper=keeper,
        meters=meters,
    )
    payments = PaymentDesk(pools["webhook"], make_payment_apis(settings), settings.payments, meters)
    services = Services(
        settings=settings,
        worker_id=worker_id,
        database=database,
        keeper=keeper,
        desk=Desk(
            database=operator,
            wallets=Wallets(operator),
            caps=Caps(operator),
            keys=Keys(operator, settings.auth, settings.limits),
            corrections=Corrections(
                operator, charge_estimates_upward=settings.reconcile.charge_estimates_upward
            ),
            audit=Audit(operator),
            payments=PaymentOffice(operator),
            payment_views=PaymentViews(operator),
            reconciler=Reconciler(keeper, upstream, settings.reconcile),
            late=late_for_operator,
        ),
        pipe=pipe,
        holds=holds,
        calls=calls,
        quota=quota,
        keys=Keys(database, settings.auth, settings.limits, people=people),
        tokens=JwtVerifier(settings.auth),
        signed_in=People(database, settings.auth, settings.limits),
        failures=AuthFailures(pipe, per_min=settings.limits.auth_failures_per_min),
        wallets=Wallets(people),
        caps=Caps(people),
        statements=Statements(people, late),
        usage=UsageBook(late),
        own_calls=OwnCalls(people),
        intents=Intents(people),
        auto_topups=AutoTopups(people),
        payments=payments,
        looks=PaymentLooks(payments, pipe, settings.payments),
        prices=PriceBook(database),
        fx=FxBook(database, settings.fx),
        fx_sources=make_sources(settings.fx),
        counter=TokenCounter(remembered=settings.holds.counted_texts),
        upstream=upstream,
        sweeper=Sweeper(keeper, holds, upstream, settings.sweep, meters),
        alerts=Alerts(keeper, settings, make_messenger(settings.alerts)),
        metrics=Metrics(meters, Observer(operator, settings.metrics, settings.fx), settings.metrics, seat),
        tracing=open_tracing(settings),
        watchers=Watchers(Feeds(database, settings.feed), settings.feed),
        tasks=TrackedTasks(),
        conclusions=TrackedTasks(),
    )
    try:
        await _start(services)
        yield services
    finally:
        await _stop(services)
        for pool in (*pools.values(), replica, operators_replica):
            if pool is not None:
                await pool.close()
        services.metrics.publish()
        if services.tracing is not None:
            await services.tracing.close()


def _make_pools(settings: Settings, meters: Meters) -> dict[Role, Database]:
    """Return one pool per role: nothing on the way of a call may do more than that way needs (billing/postgres/roles.py)."""
    return {
        role: Database(settings.postgres, name=_NAME, role=role, connections_max=most, meters=meters)
        for role, most in _POOLS.items()
    }


async def _stop(services: Services) -> None:
    """First the calls, while leases are still renewed; then what serves them."""
    settings = services.settings
    await services.conclusions.drain(settings.upstream.generation_wait_s + 1)
    await services.calls.close(settings.shutdown_s)
    await services.quota.close()
    await services.keys.note_used()
    services.tasks.cancel()
    await services.tasks.drain(1.0)
    await services.tokens.close()
    await services.upstream.close()
    services.counter.close()
    await services.pipe.close()
    await services.payments.close()


async def _start(services: Services) -> None:
    await require_current(services.database)
    await require_sessions(services.database, wait_s=services.settings.postgres.connect_timeout_s)
    await services.pipe.ping()
    await services.upstream.start()
    await services.prices.load()
    await services.fx.load()
    services.counter.warm()
    await services.calls.register_worker(host=socket.gethostname(), pid=os.getpid())
    feed = ChangeFeed(
        services.database,
        {
            "feed": services.watchers.hear,
            "key": lambda key_id: changed_key(services, key_id),
            "wallet": lambda wallet_id: cool_wallet(services, wallet_id),
            "user": lambda user_id: changed_user(services, user_id),
            "prices": services.prices.load,
            "fx": services.fx.load,
            "quota": services.quota.load,
            "log": services.metrics.hear_level,
        },
    )
    with contextlib.suppress(ProviderUnavailableError):  # I8 then says that it was never recorded
        await record_openings(services.keeper, services.upstream)
    routines = make_routines(services)
    await routines[0].take_turn()  # the quota, before the first call is admitted by it
    await services.quota.load()
    services.tasks.keep(feed.run, name="changes")
    services.tasks.keep(services.metrics.run, name="metrics")
    services.tasks.keep(services.watchers.run, name="feed")
    services.tasks.keep(services.watchers.run_upkeep, name="feed's upkeep")
    services.tasks.keep(services.watchers.run_checks, name="feed's checks")
    services.tasks.keep(services.calls.run, name="leases")
    services.tasks.keep(services.calls.run_notes, name="notes")
    services.tasks.keep(services.quota.run, name="quota")
    services.tasks.keep(services.keys.run_notes, name="keys used")
    services.tasks.keep(services.keys.run_refresh, name="keys in use")
    services.tasks.keep(services.sweeper.run, name="sweeper")
    services.tasks.keep(services.alerts.run, name="alert messages")
    if services.payments.providers:
        services.tasks.keep(services.payments.run, name="payments")
    for routine in routines:
        services.tasks.keep(routine.run, name=routine.name)
