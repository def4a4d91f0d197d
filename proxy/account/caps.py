"""``/v1/wallet/caps``: the limits that a person sets on their own wallet."""

from typing import Any

from aiohttp import web

from billing.identity.caller import Caller
from billing.wallets.caps import caps_as_json
from proxy.account.forms import CapsForm
from proxy.cache_drops import cool_user
from proxy.http.forms import read_form
from proxy.http.request_facts import standard_headers
from proxy.identity.authenticate import acting_as, authenticate, owner_of
from proxy.services import SERVICES, Services


async def get_caps(request: web.Request) -> web.Response:
    """The caps on the caller's wallet, key and user, and what is left of each."""
    services, caller = request.app[SERVICES], await authenticate(request)
    return web.json_response(await describe_caps(services, caller), headers=standard_headers(request))


async def put_caps(request: web.Request) -> web.Response:
    """Set caps on the caller's wallet: named periods change, null lifts one; the operator's ceilings stay."""
    services, caller = request.app[SERVICES], await authenticate(request)
    owner_of(caller)
    form = await read_form(request, CapsForm, services.settings.limits)
    body = await change_caps(request, services, caller, form)
    return web.json_response(body, headers=standard_headers(request))


async def change_caps(
    request: web.Request, services: Services, caller: Caller, form: CapsForm
) -> dict[str, Any]:
    """Set caps as a caller who may (``owner_of``), and return them all."""
    if form.limits:
        with acting_as(request):
            await services.caps.set_caps("wallet", caller.wallet_id, form.limits, owner=caller.user_id)
        cool_user(services, caller.user_id)
    return await describe_caps(services, caller)


async def describe_caps(services: Services, caller: Caller) -> dict[str, Any]:
    """Return the caps on the caller's wallet, user and key."""
    scopes = {"wallet": caller.wallet_id, "user": caller.user_id}
    if caller.key_id is not None:
        scopes["key"] = caller.key_id
    found = await services.caps.find_own_caps(caller.user_id, *scopes.values())
    by_scope = {
        f"{scope}_caps" if scope != "wallet" else "caps": caps_as_json(
            cap for cap in found if cap.scope == scope
        )
        for scope in scopes
    }
    return {
        "object": "wallet.caps",
        "wallet_id": str(caller.wallet_id),
        "currency": caller.currency,
        **by_scope,
    }
