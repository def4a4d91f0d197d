"""A revoked key stops within a second on every worker process, told or not."""

import asyncio
import time
from contextlib import AsyncExitStack

import aiohttp
import psutil
import pytest

from billing.identity.key import KeyRules
from billing.identity.keys import Keys
from config.settings import Settings
from scripts.office import Office
from tests.faults.test_kill import serving
from tests.support.payers import make_payer, sync_models

WORKERS = 3
CONNECTIONS = 30


@pytest.mark.parametrize("told", [True, False])
async def test_a_revoked_key_stops_on_every_worker(settings: Settings, office: Office, told: bool) -> None:
    """Without the trigger nobody is told of the revocation: what a worker has cached ends by itself."""
    await sync_models(office)
    payer = await make_payer(office)
    room = Keys(office.database, office.settings.auth, office.settings.limits)
    if not told:
        async with office.database.connection() as connection:
            await connection.execute("ALTER TABLE api_keys DISABLE TRIGGER api_keys_changed")
    async with AsyncExitStack() as stack:
        master, url = await stack.enter_async_context(serving(settings, workers=WORKERS))
        made = await room.create(payer.wallet_id, KeyRules(name="to be revoked"))
        # A session per connection, so that each stays with the worker that accepted it.
        sessions = [
            await stack.enter_async_context(
                aiohttp.ClientSession(headers={"Authorization": f"Bearer {made.secret}"})
            )
            for _ in range(CONNECTIONS)
        ]

        async def ask(session: aiohttp.ClientSession) -> int:
            async with session.get(f"{url}/v1/wallet") as response:
                await response.read()
                return response.status

        async with asyncio.timeout(20):  # until each worker holds some of them
            while True:
                assert {await ask(session) for session in sessions} == {200}
                workers = psutil.Process(master.pid).children(recursive=True)
                port = int(url.rpartition(":")[2])
                busy = [
                    worker.pid
                    for worker in workers
                    if any(
                        link.status == psutil.CONN_ESTABLISHED and link.laddr.port == port
                        for link in worker.net_connections("tcp4")
                    )
                ]
                if len(busy) == WORKERS:
                    break
                sessions.append(
                    await stack.enter_async_context(
                        aiohttp.ClientSession(headers={"Authorization": f"Bearer {made.secret}"})
                    )
                )

        await asyncio.gather(*(ask(session) for session in sessions))  # all caches are as fresh as can be
        await room.revoke(made.id)
        revoked = time.monotonic()
        late = []

        async def follow(session: aiohttp.ClientSession) -> None:
            while (began := time.monotonic()) < revoked + 2:
                if await ask(session) == 200:  # afterwards 401, and 429 when there were many
                    late.append(began - revoked)

        await asyncio.gather(*(follow(session) for session in sessions))
        assert max(late, default=0.0) < 1.0
