"""A few workers on one database, for each test of this room."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from tests.billing.wallets.caps_shop import NGN_RATE, Shop
from tests.stateful.world import (
    Connections,
    LittleProvider,
    Worker,
    furnish,
)
from tests.support.settings import make_settings


@pytest.fixture
async def shop(dsn: str, redis_url: str) -> AsyncIterator[Shop]:
    settings = make_settings(
        postgres_dsn=dsn,
        redis_url=redis_url,
        holds={"lease_s": 600, "renew_s": 60},
        sweep={"worker_lease_s": 600},
        quota={"slab_usd": 10**5},
        postgres={"pool_max": 4},
    )
    provider = LittleProvider()
    async with AsyncExitStack() as stack:
        workers = []
        for _ in range(3):
            connections = Connections(settings)
            stack.push_async_callback(connections.close)
            workers.append(Worker(connections, provider))
        house = await furnish(workers[0].connections, provider, rates={"NGN": (str(NGN_RATE), 0)})
        for worker in workers:
            await worker.register()
            await worker.quota.load()
        yield Shop(workers, provider, house)
