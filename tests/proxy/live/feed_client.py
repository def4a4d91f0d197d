"""Who watches a wallet, and how."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from config.settings import Settings
from scripts.office import Office
from tests.support.feeds import watching
from tests.support.payers import Payer
from tests.support.running import Running

ADMIN = "the operator's token, long enough"


def fed(settings: Settings, **feed: float) -> Settings:
    return settings.model_copy(update={"feed": settings.feed.model_copy(update=feed)})


async def shown(office: Office, payer: Payer) -> dict[str, str]:
    """The wallet as it is, in the fields that an event has of it."""
    wallet = (await office.wallets.get_wallet(payer.wallet_id)).as_json()
    return {name: str(value) for name, value in wallet.items() if name != "id"}


def balance_of(event: dict[str, Any]) -> dict[str, str]:
    return {name: event[name] for name in ("currency", "posted", "held", "available", "overdraft", "status")}


async def first_of(house: Running, payer: Payer, after: str | None = None) -> dict[str, Any]:
    async with watching(house.base_url, payer.secret, after=after) as stream:
        return (await stream.take(1))[0]


async def refusal(house: Running, payer: Payer) -> tuple[int, str]:
    async with (
        aiohttp.ClientSession() as session,
        session.get(
            f"{house.base_url}/v1/wallet/events", headers={"Authorization": f"Bearer {payer.secret}"}
        ) as response,
    ):
        assert response.headers["Retry-After"]
        return response.status, (await response.json())["error"]["code"]


@asynccontextmanager
async def talking(house: Running, secret: str, **how: Any) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    how.setdefault("headers", {"Authorization": f"Bearer {secret}"})
    async with aiohttp.ClientSession() as session:
        query = how.pop("query", "")
        async with session.ws_connect(f"{house.base_url}/v1/wallet/ws{query}", **how) as socket:
            yield socket
