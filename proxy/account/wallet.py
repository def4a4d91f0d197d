"""``GET /v1/wallet``: the caller's own money."""

from typing import Any

from aiohttp import web

from billing.identity.caller import Caller
from proxy.http.request_facts import standard_headers
from proxy.identity.authenticate import authenticate
from proxy.services import SERVICES, Services


async def get_wallet(request: web.Request) -> web.Response:
    """The wallet that the caller's key pays from; amounts are decimal strings in major units."""
    services, caller = request.app[SERVICES], await authenticate(request)
    return web.json_response(await describe_wallet(services, caller), headers=standard_headers(request))


async def describe_wallet(services: Services, caller: Caller) -> dict[str, Any]:
    """Return the wallet that the caller pays from."""
    wallet = await services.wallets.get_own_wallet(caller.user_id, caller.wallet_id)
    return {"object": "wallet", **wallet.as_json()}
