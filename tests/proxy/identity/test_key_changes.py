"""What Postgres tells of a key, or of its owner, reaches a worker that would believe its cache for an hour."""

import asyncio
from collections.abc import Awaitable, Callable

import aiohttp
import pytest

from billing.identity.keys import Keys
from config.settings import Settings
from proxy.cache_drops import CacheDrops
from scripts.office import Office
from tests.proxy.account.test_keys import Client
from tests.support.payers import Payer, make_payer
from tests.support.running import run_proxy

HOUR_S = 3600.0


async def revoke(office: Office, payer: Payer) -> None:
    await Keys(office.database, office.settings.auth, office.settings.limits).revoke(payer.key_id)


async def disable(office: Office, payer: Payer) -> None:
    async with office.database.transaction() as connection:
        await connection.execute("UPDATE users SET status = 'disabled' WHERE id = $1", payer.user_id)


@pytest.mark.parametrize("change", [revoke, disable])
async def test_a_key_is_forgotten_at_once(
    settings: Settings,
    office: Office,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Office, Payer], Awaitable[None]],
) -> None:
    """Neither its age nor a refresh ends what is cached here: both are an hour away."""
    follows = asyncio.Event()
    user_changed = CacheDrops.user_changed

    async def noted(drops: CacheDrops, user_id: str) -> None:
        await user_changed(drops, user_id)
        follows.set()

    monkeypatch.setattr(CacheDrops, "user_changed", noted)
    payer = await make_payer(office)
    auth = settings.auth.model_copy(update={"cache_ttl_s": HOUR_S})
    async with (
        run_proxy(settings.model_copy(update={"auth": auth})) as running,
        aiohttp.ClientSession() as session,
    ):
        async with asyncio.timeout(10):
            await follows.wait()  # when it begins to listen, everything is forgotten once
        client = Client(session, running.base_url, payer.secret)
        assert (await client.ask("GET", "/v1/wallet"))[0] == 200
        await change(office, payer)  # by another process than the proxy's
        async with asyncio.timeout(10):
            while (await client.ask("GET", "/v1/wallet"))[0] != 401:
                await asyncio.sleep(0.02)
