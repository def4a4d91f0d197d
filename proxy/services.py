"""What a request handler calls: the rooms of the house, made once per worker and handed over by the application."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from uuid import UUID

from aiohttp import web

from billing.access import Role
from billing.alerts import Alerts
from billing.audit import Audit
from billing.auto_topups import AutoTopups
from billing.callbook import OwnCalls
from billing.calls import Calls
from billing.caps import Caps
from billing.changes import ChangeFeed
from billing.corrections import Corrections
from billing.daybook import DayBook
from billing.db import Database
from billing.errors import ProviderUnavailableError, RedisUnavailableError
from billing.failures import AuthFailures
from billing.feed import Feeds
from billing.fxbook import FxBook
from billing.fxfeed import FxFeed, RateSource
from billing.holds import Holds
from billing.ids import new_id
from billing.keys import Keys
from billing.ledger import Ledger
from billing.meters import Meters
from billing.migrate import require_current
from billing.observer import Observer
from billing.opening import record_openings
from billing.payment_desk import PaymentDesk
from billing.payment_looks import PaymentLooks
from billing.payment_office import PaymentOffice
from billing.payment_views import PaymentViews
from billing.payments import Intents
from billing.people import People
from billing.pricebook import PriceBook
from billing.quota import Quota, QuotaWatch
from billing.reconcile import Reconciler
from billing.redis_pipe import RedisPipe
from billing.routine import Routine
from billing.statement import Statements
from billing.sweeper import Sweeper
from billing.tasks import TrackedTasks
from billing.tokens import TokenCounter
from billing.usage import UsageBook
from billing.wallets import Wallets, parse_id
from config.settings import Settings
from proxy.alerthook import make_messenger
from proxy.board import Seat
from proxy.fxsources import make_sources
from proxy.jwt import JwtVerifier
from proxy.metrics import Metrics
from proxy.payments.making import make_payment_apis
from proxy.tracing import Tracing, open_tracing
from proxy.upstream.adapter import Upstream
from proxy.upstream.openai import OpenAIUpstream
from proxy.upstream.openrouter import OpenRouterUpstream
from proxy.watchers import Watchers

_COOL_AGAIN_S = 1.0
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
_DAYS_PERIOD_S = 3600.0
_SEAL_PERIOD_S = 15.0
_NEW_WALLETS_PERIOD_S = 15.0


@dataclass(frozen=True, slots=True)
class Services:
    """The rooms, ready for use."""

    settings: Settings
    worker_id: UUID
    database: Database
    keeper: Database
    desk: "Desk"
    pipe: RedisPipe
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


SERVICES = web.AppKey("services", Services)


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
    pipe = RedisPipe(settings.redis, meters)
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
        statements=Statements(people),
        usage=UsageBook(people),
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
        for pool in pools.values():
            await pool.close()
        services.metrics.publish()
        if services.tracing is not None:
            await services.tracing.close()


def _make_pools(settings: Settings, meters: Meters) -> dict[Role, Database]:
    """Return one pool per role: nothing on the way of a call may do more than that way needs (billing/access.py)."""
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
    await services.pipe.run("PING")
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
    services.tasks.keep(services.sweeper.run, name="sweeper")
    services.tasks.keep(services.alerts.run, name="alert messages")
    if services.payments.providers:
        services.tasks.keep(services.payments.run, name="payments")
    for routine in routines:
        services.tasks.keep(routine.run, name=routine.name)


def make_routines(services: Services) -> list[Routine]:
    """Return what one worker among all does now and then; the provider's quota is watched by the first."""
    settings, database, provider = services.settings, services.keeper, services.upstream
    watch = QuotaWatch(database, provider, settings.quota)
    reconciler = Reconciler(database, provider, settings.reconcile)
    routines = [
        Routine(database, "quota", period_s=settings.quota.observe_s, work=watch.observe),
        Routine(database, "reconcile", period_s=settings.reconcile.period_s, work=reconciler.run_quietly),
        Routine(database, "caps", period_s=_DAYS_PERIOD_S, work=Caps(database).forget_windows),
        Routine(
            database, "feed", period_s=settings.feed.forget_s, work=Feeds(database, settings.feed).forget
        ),
        Routine(database, "days", period_s=_DAYS_PERIOD_S, work=DayBook(database).verify_all),
        Routine(database, "audit", period_s=_SEAL_PERIOD_S, work=Audit(database).seal),
        Routine(database, "alerts", period_s=settings.alerts.period_s, work=services.alerts.evaluate),
    ]
    if services.payments.providers:
        sweep = services.payments.sweep
        begin = services.payments.begin_auto_topups
        routines.append(Routine(database, "payments", period_s=settings.payments.sweep_s, work=sweep))
        routines.append(Routine(database, "auto top-ups", period_s=settings.payments.auto_look_s, work=begin))
    if services.fx_sources:
        feed = FxFeed(database, services.fx_sources, settings.fx)
        routines.append(Routine(database, "fx", period_s=settings.fx.period_s, work=feed.sync, at_once=True))
    return routines


async def cool_wallet(services: Services, wallet_id: str) -> None:
    """Drop the mirror of a wallet that changed otherwise than through a settlement.

    A change that was missed needs nothing: the mirror's own end of life bounds how long it can be stale.
    """
    if wallet_id == "*":
        services.signed_in.callers.drop(None)
    else:
        services.signed_in.callers.drop(lambda caller: str(caller.wallet_id) == wallet_id)
        owner = await Wallets(services.database).find_owner(parse_id(wallet_id, "wallet"))
        if owner is not None:
            cool_user(services, owner)


def cool_user(services: Services, user_id: UUID) -> None:
    """Drop the mirror of a user whose caps or clock changed."""
    services.tasks.start(_cool(services, user_id), name=f"cool {user_id}")


async def changed_key(services: Services, key_id: str) -> None:
    """Drop what is cached of a key, and look whether it may still watch."""
    await services.keys.forget(key_id)
    services.watchers.doubt(None if key_id == "*" else lambda caller: str(caller.key_id) == key_id)


async def changed_user(services: Services, user_id: str) -> None:
    """Drop what is cached of a user, their keys and their mirror, and look whether they may still watch."""
    services.keys.callers.drop_user(user_id)
    services.signed_in.callers.drop_user(user_id)
    services.watchers.doubt(None if user_id == "*" else lambda caller: str(caller.user_id) == user_id)
    if user_id != "*":
        cool_user(services, parse_id(user_id, "user"))


async def _cool(services: Services, user_id: UUID) -> None:
    """Drop a mirror, though Redis be away just now: it may come back with the stale one."""
    while True:
        try:
            await services.holds.cool(user_id)
        except RedisUnavailableError:
            await asyncio.sleep(_COOL_AGAIN_S)
        else:
            return
