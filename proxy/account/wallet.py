"""``GET /v1/wallet``: the caller's own money."""

from aiohttp import web

from billing.identity.caller import Caller
from proxy.account.answers import WalletJson
from proxy.account.requests import enter
from proxy.http.typed_answer import JsonAnswer, answer
from proxy.services.account import AccountServices


async def get_wallet(request: web.Request) -> JsonAnswer[WalletJson]:
    """The wallet that the caller's key pays from; amounts are decimal strings in major units."""
    services, caller = await enter(request)
    return answer(request, await describe_wallet(services, caller))


async def describe_wallet(services: AccountServices, caller: Caller) -> WalletJson:
    """Return the wallet that the caller pays from."""
    wallet = await services.wallets.get_own_wallet(caller.user_id, caller.wallet_id)
    return {"object": "wallet", **wallet.as_json()}
