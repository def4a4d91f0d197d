"""``GET /v1/wallet``: the caller's own money."""

from aiohttp import web

from proxy.auth import authenticate
from proxy.context import standard_headers
from proxy.services import SERVICES


async def get_wallet(request: web.Request) -> web.Response:
    """The wallet that the caller's key pays from; amounts are decimal strings in major units."""
    caller = await authenticate(request)
    wallet = await request.app[SERVICES].wallets.get_own_wallet(caller.user_id, caller.wallet_id)
    return web.json_response({"object": "wallet", **wallet.as_json()}, headers=standard_headers(request))
