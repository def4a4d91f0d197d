"""``/v1/wallet/caps``: the limits that a person sets on their own wallet."""

from aiohttp import web

from billing.identity.caller import Caller
from billing.wallets.caps import caps_as_json
from proxy.account.answers import CapsJson
from proxy.account.forms import CapsForm
from proxy.account.requests import enter, enter_as_owner
from proxy.http.forms import read_form
from proxy.http.typed_answer import JsonAnswer, answer
from proxy.identity.authenticate import acting_as
from proxy.services.account import AccountServices


async def get_caps(request: web.Request) -> JsonAnswer[CapsJson]:
    """The caps on the caller's wallet, key and user, and what is left of each."""
    services, caller = await enter(request)
    return answer(request, await describe_caps(services, caller))


async def put_caps(request: web.Request) -> JsonAnswer[CapsJson]:
    """Set caps on the caller's wallet: named periods change, null lifts one; the operator's ceilings stay."""
    services, caller, _ = await enter_as_owner(request)
    form = await read_form(request, CapsForm, services.settings.limits)
    body = await change_caps(request, services, caller, form)
    return answer(request, body)


async def change_caps(
    request: web.Request, services: AccountServices, caller: Caller, form: CapsForm
) -> CapsJson:
    """Set caps as a caller who may (``owner_of``), and return them all."""
    if form.limits:
        with acting_as(request):
            await services.caps.set_caps("wallet", caller.wallet_id, form.limits, owner=caller.user_id)
        services.cool_user(caller.user_id)
    return await describe_caps(services, caller)


async def describe_caps(services: AccountServices, caller: Caller) -> CapsJson:
    """Return the caps on the caller's wallet, user and key."""
    scopes = {"wallet": caller.wallet_id, "user": caller.user_id}
    if caller.key_id is not None:
        scopes["key"] = caller.key_id
    found = await services.caps.find_own_caps(caller.user_id, *scopes.values())
    caps = {scope: caps_as_json(cap for cap in found if cap.scope == scope) for scope in scopes}
    shown: CapsJson = {
        "object": "wallet.caps",
        "wallet_id": str(caller.wallet_id),
        "currency": caller.currency,
        "caps": caps["wallet"],
        "user_caps": caps["user"],
    }
    if "key" in caps:
        shown["key_caps"] = caps["key"]
    return shown
