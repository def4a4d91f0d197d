"""``/v1/wallet/alerts``: what a wallet's owner wants to be told."""

from aiohttp import web

from billing.identity.caller import Caller
from billing.money import format_amount
from proxy.account.forms import WalletAlertsForm
from proxy.http.forms import read_form
from proxy.http.request_facts import standard_headers
from proxy.identity.authenticate import acting_as, authenticate, owner_of
from proxy.services import SERVICES, Services


async def get_wallet_alerts(request: web.Request) -> web.Response:
    """Below which balance the wallet's owner is told, as the event `wallet.low`; null: never."""
    return await _show(request, request.app[SERVICES], await authenticate(request))


async def put_wallet_alerts(request: web.Request) -> web.Response:
    """Set below which balance the event `wallet.low` is told, once each time the balance falls there; null: never."""
    services, caller = request.app[SERVICES], await authenticate(request)
    owner_of(caller)
    form = await read_form(request, WalletAlertsForm, services.settings.limits)
    with acting_as(request):
        await services.wallets.set_own_low(caller.user_id, caller.wallet_id, form.low)
    return await _show(request, services, caller)


async def _show(request: web.Request, services: Services, caller: Caller) -> web.Response:
    low_nano = await services.wallets.find_own_low(caller.user_id, caller.wallet_id)
    body = {
        "object": "wallet.alerts",
        "wallet_id": str(caller.wallet_id),
        "currency": caller.currency,
        "low": None if low_nano is None else format_amount(low_nano),
    }
    return web.json_response(body, headers=standard_headers(request))
