"""What one worker among all does now and then."""

from billing.books.proved_days import DayBook
from billing.books.reconcile import Reconciler
from billing.fx.sync import FxFeed
from billing.monitoring.audit import Audit
from billing.postgres.turns import Routine
from billing.provider.quota import QuotaWatch
from billing.wallets.caps import Caps
from billing.wallets.feed import Feeds
from proxy.services.runtime import Runtime

_DAYS_PERIOD_S = 3600.0


_SEAL_PERIOD_S = 15.0


_NEW_WALLETS_PERIOD_S = 15.0


def make_routines(runtime: Runtime) -> list[Routine]:
    """Return what one worker among all does now and then; the provider's quota is watched by the first."""
    settings, database, provider = runtime.settings, runtime.pools["keeper"], runtime.upstream
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
        Routine(database, "alerts", period_s=settings.alerts.period_s, work=runtime.alerts.evaluate),
    ]
    if runtime.payments.providers:
        sweep = runtime.payments.sweep
        begin = runtime.payments.begin_auto_topups
        routines.append(Routine(database, "payments", period_s=settings.payments.sweep_s, work=sweep))
        routines.append(Routine(database, "auto top-ups", period_s=settings.payments.auto_look_s, work=begin))
    if runtime.fx_sources:
        feed = FxFeed(database, runtime.fx_sources, settings.fx)
        routines.append(Routine(database, "fx", period_s=settings.fx.period_s, work=feed.sync, at_once=True))
    return routines
