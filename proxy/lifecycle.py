"""Makes the rooms, opens and closes them in order."""

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from billing.books.opening_balance import record_openings
from billing.books.reconcile import Reconciler
from billing.calls.calls import Calls
from billing.calls.corrections import Corrections
from billing.calls.ledger import Ledger
from billing.calls.reviews import CallReviews
from billing.calls.sweeper import Sweeper
from billing.errors import ProviderUnavailableError, RedisUnavailableError
from billing.fx.book import FxBook
from billing.holds.holds import Holds
from billing.identity.auth_failures import AuthFailures, UserWrites
from billing.identity.keys import Keys
from billing.identity.sign_ins import People
from billing.ids import new_id
from billing.meters import Meters
from billing.monitoring.alerts import Alerts
from billing.monitoring.audit import Audit
from billing.monitoring.gauges import Observer
from billing.payments.auto_topups import AutoTopups
from billing.payments.intents import Intents
from billing.payments.refunds import Refunds
from billing.payments.reviews import Reviews
from billing.payments.status_checks import StatusChecks
from billing.payments.views import PaymentViews
from billing.payments.worker import PaymentWorker
from billing.postgres.database import Database
from billing.postgres.migrate import require_current
from billing.postgres.notifications import ChangeFeed
from billing.postgres.pooler import require_sessions
from billing.postgres.replica import Late, open_late
from billing.postgres.roles import Role
from billing.pricing.price_book import PriceBook
from billing.pricing.tokens import TokenCounter
from billing.provider.quota import Quota
from billing.redis.client import RedisWay, make_redis
from billing.reports.call_view import OwnCalls
from billing.reports.statement import Statements
from billing.reports.usage import UsageBook
from billing.tasks import TrackedTasks
from billing.threads import FairThreads
from billing.wallets.caps import Caps
from billing.wallets.feed import Feeds
from billing.wallets.wallets import Wallets
from config.settings import Settings
from proxy.cache_drops import CacheDrops
from proxy.identity.authenticate import Identity
from proxy.identity.jwt import JwtVerifier
from proxy.live.watchers import Watchers
from proxy.outbound.alert_webhook import make_messenger
from proxy.outbound.fx_sources import make_sources
from proxy.payments.providers import make_payment_apis
from proxy.protocol.members import Policy
from proxy.routines import make_routines
from proxy.services.account import AccountServices
from proxy.services.call import CallServices
from proxy.services.operator import OperatorServices
from proxy.services.public import PublicServices
from proxy.services.runtime import Runtime
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.request_log import Telemetry
from proxy.telemetry.shared_counters import WorkerSlot
from proxy.telemetry.tracing import open_tracing
from proxy.upstream.upstreams import make_upstream

_NAME = "tuma serve"
_PINGS = 5


# Connections of a worker by role; of the proxy's own, TUMA_POSTGRES__POOL_MAX.
_POOLS: Mapping[Role, int | None] = {
    "proxy": None,
    "settler": 4,
    "keeper": 4,
    "api": 4,
    "webhook": 4,
    "operator": 2,
}


@dataclass(frozen=True, slots=True)
class Records:
    """What the application hands over: to each kind of handler its own, to nobody everything."""

    runtime: Runtime
    call: CallServices
    account: AccountServices
    operator: OperatorServices
    public: PublicServices
    identity: Identity
    telemetry: Telemetry


@asynccontextmanager
async def open_services(settings: Settings, slot: WorkerSlot | None = None) -> AsyncIterator[Records]:
    """Make the rooms, warm what a first call would wait for, and close everything in order afterwards.

    Args:
        settings: everything configurable.
        slot: of this worker in its master's shared counters; None for a worker that is alone.

    Raises:
        MigrationError: the schema is not this version's.
        PostgresUnavailableError, RedisUnavailableError: a server is away.
        InputError: a setting is missing.
    """
    meters = Meters(models_max=settings.metrics.models_max)
    pools = _make_pools(settings, meters)
    late, replica = open_late(pools["api"], name=_NAME, meters=meters)
    operators_late, operators_replica = open_late(pools["operator"], name=_NAME, meters=meters)
    replicas = [found for found in (replica, operators_replica) if found is not None]
    runtime = _make_runtime(settings, pools, replicas, meters, slot)
    drops = CacheDrops(
        Wallets(pools["proxy"]),
        holds=runtime.holds,
        keys=runtime.keys,
        signed_in=runtime.signed_in,
        watchers=runtime.watchers,
        tasks=runtime.tasks,
    )
    try:
        await _start(runtime, drops)
        yield Records(
            runtime=runtime,
            call=_for_calls(runtime),
            account=_for_accounts(runtime, drops, late),
            operator=_for_operators(runtime, drops, operators_late),
            public=_for_the_public(runtime),
            identity=_for_identity(runtime),
            telemetry=Telemetry(runtime.metrics, runtime.tracing),
        )
    finally:
        await _stop(runtime)


def _make_runtime(
    settings: Settings,
    pools: Mapping[Role, Database],
    replicas: Sequence[Database],
    meters: Meters,
    slot: WorkerSlot | None,
) -> Runtime:
    worker_id = new_id()
    database, keeper, operator = pools["proxy"], pools["keeper"], pools["operator"]
    pipe = make_redis(settings.redis, meters)
    holds = Holds(pipe, settings.holds, Ledger(database, worker_id=worker_id).read_mirror, meters)
    upstream = make_upstream(settings)
    threads = FairThreads(name="large bodies")
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
    return Runtime(
        settings=settings,
        pools=pools,
        replicas=replicas,
        pipe=pipe,
        holds=holds,
        calls=calls,
        quota=quota,
        keys=Keys(database, settings.auth, settings.limits, people=pools["api"]),
        tokens=JwtVerifier(settings.auth),
        signed_in=People(database, settings.auth, settings.limits),
        payments=PaymentWorker(pools["webhook"], make_payment_apis(settings), settings.payments, meters),
        prices=PriceBook(database),
        fx=FxBook(database, settings.fx),
        fx_sources=make_sources(settings.fx),
        counter=TokenCounter(threads, remembered=settings.holds.counted_texts),
        threads=threads,
        upstream=upstream,
        sweeper=Sweeper(keeper, holds, upstream, settings.sweep, meters),
        alerts=Alerts(keeper, settings, make_messenger(settings.alerts)),
        metrics=Metrics(meters, Observer(operator, settings.metrics, settings.fx), settings.metrics, slot),
        tracing=open_tracing(settings),
        watchers=Watchers(Feeds(database, settings.feed), settings.feed),
        tasks=TrackedTasks(),
        conclusions=TrackedTasks(),
    )


def _for_calls(runtime: Runtime) -> CallServices:
    upstream = runtime.settings.upstream
    return CallServices(
        settings=runtime.settings,
        calls=runtime.calls,
        quota=runtime.quota,
        prices=runtime.prices,
        fx=runtime.fx,
        counter=runtime.counter,
        threads=runtime.threads,
        upstream=runtime.upstream,
        conclusions=runtime.conclusions,
        policy=Policy(upstream.unknown_members, frozenset(upstream.extra_members)),
    )


def _for_accounts(runtime: Runtime, drops: CacheDrops, late: Late) -> AccountServices:
    people = runtime.pools["api"]
    return AccountServices(
        settings=runtime.settings,
        keys=runtime.keys,
        wallets=Wallets(people),
        caps=Caps(people),
        statements=Statements(people, late),
        usage=UsageBook(late),
        own_calls=OwnCalls(people),
        intents=Intents(people),
        auto_topups=AutoTopups(people),
        payments=runtime.payments,
        status_checks=StatusChecks(runtime.payments, runtime.pipe, runtime.settings.payments),
        watchers=runtime.watchers,
        tasks=runtime.tasks,
        writes=UserWrites(runtime.pipe, per_min=runtime.settings.limits.user_writes_per_min),
        cool_user=drops.cool_user,
    )


def _for_operators(runtime: Runtime, drops: CacheDrops, late: Late) -> OperatorServices:
    settings, database = runtime.settings, runtime.pools["operator"]
    upward = settings.reconcile.charge_estimates_upward
    return OperatorServices(
        settings=settings,
        database=database,
        wallets=Wallets(database),
        caps=Caps(database),
        keys=Keys(database, settings.auth, settings.limits),
        corrections=Corrections(database, charge_estimates_upward=upward),
        call_reviews=CallReviews(database),
        audit=Audit(database),
        refunds=Refunds(database),
        reviews=Reviews(database),
        payment_views=PaymentViews(database),
        payments=runtime.payments,
        reconciler=Reconciler(runtime.pools["keeper"], runtime.upstream, settings.reconcile),
        late=late,
        metrics=runtime.metrics,
        cool_user=drops.cool_user,
        forget_key=runtime.keys.forget,
    )


def _for_the_public(runtime: Runtime) -> PublicServices:
    return PublicServices(
        settings=runtime.settings,
        database=runtime.pools["proxy"],
        pipe=runtime.pipe,
        quota=runtime.quota,
        prices=runtime.prices,
        payments=runtime.payments,
        metrics=runtime.metrics,
        unsigned=AuthFailures(
            runtime.pipe,
            per_min=runtime.settings.limits.webhook_failures_per_min,
            kind="h",
            what="webhooks with signatures",
        ),
    )


def _for_identity(runtime: Runtime) -> Identity:
    per_min = runtime.settings.limits.auth_failures_per_min
    failures = AuthFailures(runtime.pipe, per_min=per_min)
    return Identity(runtime.settings, runtime.keys, runtime.tokens, runtime.signed_in, failures)


def _make_pools(settings: Settings, meters: Meters) -> dict[Role, Database]:
    """Return one pool per role: nothing on the way of a call may do more than that way needs (billing/postgres/roles.py)."""
    return {
        role: Database(settings.postgres, name=_NAME, role=role, connections_max=most, meters=meters)
        for role, most in _POOLS.items()
    }


async def _stop(runtime: Runtime) -> None:
    """First the calls, while leases are still renewed; then what serves them."""
    settings = runtime.settings
    await runtime.conclusions.drain(settings.upstream.generation_wait_s + 1)
    await runtime.calls.close(settings.shutdown_s)
    await runtime.quota.close()
    await runtime.keys.note_used()
    runtime.tasks.cancel()
    await runtime.tasks.drain(1.0)
    await runtime.tokens.close()
    await runtime.upstream.close()
    runtime.counter.close()
    await runtime.pipe.close()
    await runtime.payments.close()
    for pool in (*runtime.pools.values(), *runtime.replicas):
        await pool.close()
    runtime.metrics.publish()
    if runtime.tracing is not None:
        await runtime.tracing.close()


async def _wait_for_redis(pipe: RedisWay) -> None:
    """Ask Redis a few times: one that is slow when a busy machine starts is not away.

    Raises:
        RedisUnavailableError: it did not answer.
    """
    for _ in range(_PINGS - 1):
        with contextlib.suppress(RedisUnavailableError):
            await pipe.ping()
            return
    await pipe.ping()


async def _start(runtime: Runtime, drops: CacheDrops) -> None:
    database = runtime.pools["proxy"]
    await require_current(database)
    await require_sessions(database, wait_s=runtime.settings.postgres.connect_timeout_s)
    await _wait_for_redis(runtime.pipe)
    await runtime.upstream.start()
    await runtime.prices.load()
    await runtime.fx.load()
    runtime.counter.warm()
    await runtime.calls.leases.register_worker(host=socket.gethostname(), pid=os.getpid())
    feed = ChangeFeed(
        database,
        {
            "feed": runtime.watchers.hear,
            "key": drops.key_changed,
            "wallet": drops.wallet_changed,
            "user": drops.user_changed,
            "prices": runtime.prices.load,
            "fx": runtime.fx.load,
            "quota": runtime.quota.load,
            "log": runtime.metrics.hear_level,
        },
    )
    with contextlib.suppress(ProviderUnavailableError):  # I8 then says that it was never recorded
        await record_openings(runtime.pools["keeper"], runtime.upstream)
    routines = make_routines(runtime)
    await routines[0].take_turn()  # the quota, before the first call is admitted by it
    await runtime.quota.load()
    _keep_running(runtime, feed)
    for routine in routines:
        runtime.tasks.keep(routine.run, name=routine.name)


def _keep_running(runtime: Runtime, feed: ChangeFeed) -> None:
    """Start the loops that each worker runs."""
    runtime.tasks.keep(feed.run, name="changes")
    runtime.tasks.keep(runtime.metrics.run, name="metrics")
    runtime.tasks.keep(runtime.watchers.run, name="feed")
    runtime.tasks.keep(runtime.watchers.run_upkeep, name="feed's upkeep")
    runtime.tasks.keep(runtime.watchers.run_checks, name="feed's checks")
    runtime.tasks.keep(runtime.calls.leases.run, name="leases")
    runtime.tasks.keep(runtime.calls.leases.run_notes, name="notes")
    runtime.tasks.keep(runtime.quota.run, name="quota")
    runtime.tasks.keep(runtime.keys.run_notes, name="keys used")
    runtime.tasks.keep(runtime.keys.run_refresh, name="keys in use")
    runtime.tasks.keep(runtime.sweeper.run, name="sweeper")
    runtime.tasks.keep(runtime.alerts.run, name="alert messages")
    if runtime.payments.providers:
        runtime.tasks.keep(runtime.payments.run, name="payments")
