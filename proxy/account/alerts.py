"""``/v1/wallet/alerts``: what a wallet's owner wants to be told."""

from aiohttp import web

from billing.identity.caller import Caller
from billing.money import format_amount
from proxy.account.answers import WalletAlertsJson
from proxy.account.forms import WalletAlertsForm
from proxy.account.requests import enter, enter_as_owner
from proxy.http.forms import read_form
from proxy.http.typed_answer import JsonAnswer, answer
from proxy.identity.authenticate import acting_as
from proxy.services.account import AccountServices


async def get_wallet_alerts(request: web.Request) -> JsonAnswer[WalletAlertsJson]:
    """Below which balance the wallet's owner is told, as the event `wallet.low`; null: never."""
    return await _show(request, *await enter(request))


async def put_wallet_alerts(request: web.Request) -> JsonAnswer[WalletAlertsJson]:
    """Set below which balance the event `wallet.low` is told, once each time the balance falls there; null: never."""
    services, caller, _ = await enter_as_owner(request)
    form = await read_form(request, WalletAlertsForm, services.settings.limits)
    with acting_as(request):
        await services.wallets.set_own_low(caller.user_id, caller.wallet_id, form.low)
    return await _show(request, services, caller)


async def _show(
    request: web.Request, services: AccountServices, caller: Caller
) -> JsonAnswer[WalletAlertsJson]:
    low_nano = await services.wallets.find_own_low(caller.user_id, caller.wallet_id)
    body: WalletAlertsJson = {
        "object": "wallet.alerts",
        "wallet_id": str(caller.wallet_id),
        "currency": caller.currency,
        "low": None if low_nano is None else format_amount(low_nano),
    }
    return answer(request, body)
