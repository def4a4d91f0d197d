"""An operator watches any wallet."""

import aiohttp

from billing.calls.ledger import Ledger
from billing.ids import new_id
from config.settings import Settings
from scripts.office import Office
from tests.proxy.live.feed_client import ADMIN
from tests.support.feeds import pay, watching
from tests.support.payers import make_payer
from tests.support.running import run_proxy


async def test_an_operator_watches_any_wallet(settings: Settings, office: Office, ledger: Ledger) -> None:
    secret = type(settings.auth.key_pepper)(ADMIN)
    payer = await make_payer(office)
    async with run_proxy(
        settings.model_copy(update={"admin": settings.admin.model_copy(update={"token": secret})})
    ) as house:
        path = f"/admin/wallets/{payer.wallet_id}/events"
        async with watching(house.base_url, ADMIN, path=path) as stream:
            await stream.take(1)
            await pay(ledger, payer, 5)
            assert [event["type"] for event in await stream.take(2)] == ["hold", "settlement"]
        async with aiohttp.ClientSession() as session:
            for bearer, wallet, status in ((payer.secret, payer.wallet_id, 401), (ADMIN, new_id(), 404)):
                async with session.get(
                    f"{house.base_url}/admin/wallets/{wallet}/events",
                    headers={"Authorization": f"Bearer {bearer}"},
                ) as response:
                    assert response.status == status
