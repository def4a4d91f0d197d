"""The proxy in this process, over a real socket."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from billing.calls.calls import Calls
from billing.fx.book import FxBook
from billing.holds.holds import Holds
from billing.identity.auth_failures import AuthFailures
from billing.identity.keys import Keys
from billing.payments.status_checks import StatusChecks
from billing.payments.worker import PaymentWorker
from billing.pricing.price_book import PriceBook
from billing.provider.quota import Quota
from billing.reports.statement import Statements
from billing.reports.usage import UsageBook
from billing.wallets.wallets import Wallets
from config.settings import Settings
from proxy.app import init_app
from proxy.http.connection import ClientRunner, ClientServer
from proxy.identity.authenticate import IDENTITY
from proxy.live.watchers import Watchers
from proxy.services.account import ACCOUNT
from proxy.services.operator import OPERATOR, OperatorServices
from proxy.services.runtime import RUNTIME, Runtime
from proxy.telemetry.tracing import Tracing
from proxy.upstream.adapter import Upstream


@dataclass(frozen=True, slots=True)
class Rooms:
    """What tests look at, of everybody's records; nothing of the product has it all."""

    runtime: Runtime
    operator: OperatorServices
    settings: Settings
    calls: Calls
    failures: AuthFailures
    fx: FxBook
    holds: Holds
    keys: Keys
    payments: PaymentWorker
    prices: PriceBook
    quota: Quota
    statements: Statements
    status_checks: StatusChecks
    tracing: Tracing | None
    upstream: Upstream
    usage: UsageBook
    wallets: Wallets
    watchers: Watchers

    @classmethod
    def of(cls, app: web.Application) -> "Rooms":
        runtime, account = app[RUNTIME], app[ACCOUNT]
        return cls(
            runtime=runtime,
            operator=app[OPERATOR],
            settings=runtime.settings,
            calls=runtime.calls,
            failures=app[IDENTITY].failures,
            fx=runtime.fx,
            holds=runtime.holds,
            keys=runtime.keys,
            payments=runtime.payments,
            prices=runtime.prices,
            quota=runtime.quota,
            statements=account.statements,
            status_checks=account.status_checks,
            tracing=runtime.tracing,
            upstream=runtime.upstream,
            usage=account.usage,
            wallets=account.wallets,
            watchers=runtime.watchers,
        )


@dataclass(frozen=True, slots=True)
class Running:
    """A proxy that runs in this process, over a real socket."""

    base_url: str
    services: Rooms
    app: web.Application
    server: Any

    async def quiet(self, timeout_s: float = 15) -> None:
        async with asyncio.timeout(timeout_s):
            while len(self.services.calls) or len(self.services.calls._endings):
                await asyncio.sleep(0.01)


@asynccontextmanager
async def run_proxy(settings: Settings) -> AsyncIterator[Running]:
    app = init_app(settings)
    limits = settings.limits.model_copy(update={"lingering_s": min(settings.limits.lingering_s, 1.0)})
    runner = ClientRunner(app, limits=limits, shutdown_timeout=1.0)
    await runner.setup()
    try:
        assert isinstance(runner.server, ClientServer)
        app[RUNTIME].tasks.keep(runner.server.drop_slow_clients, name="slow clients")
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
        await site.start()
        port = runner.addresses[0][1]
        yield Running(f"http://127.0.0.1:{port}", Rooms.of(app), app, runner.server)
    finally:
        await runner.cleanup()
