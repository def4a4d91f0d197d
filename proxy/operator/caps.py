"""Caps of users, wallets and keys, set by the operator."""

from uuid import UUID

from aiohttp import web

from billing.wallets.caps import Scope, caps_as_json
from proxy.account.forms import CapsForm
from proxy.http.typed_answer import JsonAnswer, answer
from proxy.operator.answers import AnyCapsJson
from proxy.operator.requests import read_as, read_id, services_of


async def get_user_caps(request: web.Request) -> JsonAnswer[AnyCapsJson]:
    """The caps over all wallets of a person, in USD of cost."""
    user_id = read_id(request, "user")
    await services_of(request).wallets.describe_user(user_id)
    return await _show_caps(request, "user", user_id, "USD")


async def put_user_caps(request: web.Request) -> JsonAnswer[AnyCapsJson]:
    """Set caps over all wallets of a person: named periods change, null lifts one."""
    return await _put_caps(
        request, "user", read_id(request, "user"), user_id=read_id(request, "user"), currency="USD"
    )


async def get_wallet_caps(request: web.Request) -> JsonAnswer[AnyCapsJson]:
    """A wallet's caps, in its currency."""
    wallet = await services_of(request).wallets.get_wallet(read_id(request, "wallet"))
    return await _show_caps(request, "wallet", wallet.id, wallet.currency)


async def put_wallet_caps(request: web.Request) -> JsonAnswer[AnyCapsJson]:
    """Set a wallet's ceilings: named periods change, null lifts one; the user's own limits stay."""
    wallet = await services_of(request).wallets.get_wallet(read_id(request, "wallet"))
    return await _put_caps(request, "wallet", wallet.id, user_id=wallet.user_id, currency=wallet.currency)


async def get_key_caps(request: web.Request) -> JsonAnswer[AnyCapsJson]:
    """A key's caps, in the currency of its wallet."""
    key = await services_of(request).keys.get_key(read_id(request, "key"))
    return await _show_caps(request, "key", key.id, key.currency)


async def put_key_caps(request: web.Request) -> JsonAnswer[AnyCapsJson]:
    """Set a key's ceilings: named periods change, null lifts one."""
    key = await services_of(request).keys.get_key(read_id(request, "key"))
    return await _put_caps(request, "key", key.id, user_id=key.user_id, currency=key.currency)


async def _put_caps(
    request: web.Request, scope: Scope, scope_id: UUID, *, user_id: UUID, currency: str
) -> JsonAnswer[AnyCapsJson]:
    form = await read_as(request, CapsForm)
    if form.limits:
        await services_of(request).caps.set_caps(scope, scope_id, form.limits)
        services_of(request).cool_user(user_id)
    return await _show_caps(request, scope, scope_id, currency)


async def _show_caps(
    request: web.Request, scope: Scope, scope_id: UUID, currency: str
) -> JsonAnswer[AnyCapsJson]:
    caps = caps_as_json(await services_of(request).caps.find_caps(scope_id))
    return answer(
        request, {"object": "caps", "scope": scope, "id": str(scope_id), "currency": currency, "caps": caps}
    )
