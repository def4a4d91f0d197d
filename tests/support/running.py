"""The proxy in this process, over a real socket."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from config.settings import Settings
from proxy.app import init_app
from proxy.http.connection import ClientRunner, ClientServer
from proxy.services import SERVICES, Services


@dataclass(frozen=True, slots=True)
class Running:
    """A proxy that runs in this process, over a real socket."""

    base_url: str
    services: Services
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
        app[SERVICES].tasks.keep(runner.server.drop_slow_clients, name="slow clients")
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
        await site.start()
        port = runner.addresses[0][1]
        yield Running(f"http://127.0.0.1:{port}", app[SERVICES], app, runner.server)
    finally:
        await runner.cleanup()
