"""Keys, made and revoked by the operator."""

from aiohttp import web

from billing.identity.key import Key
from billing.ids import parse_id
from proxy.account.answers import DeletedKeyJson
from proxy.account.forms import KeyForm, RotateForm
from proxy.http.errors import BadRequestError
from proxy.http.forms import read_flag, read_query
from proxy.http.typed_answer import JsonAnswer, answer
from proxy.operator.answers import AnyKeyJson, AnyKeysJson, AnyNewKeyJson
from proxy.operator.requests import (
    page_of,
    read_as,
    read_id,
    read_page,
    services_of,
)


async def list_keys(request: web.Request) -> JsonAnswer[AnyKeysJson]:
    """Keys by age; ``wallet``, ``user``, ``revoked``, ``limit`` and ``after`` in the query."""
    limit, after = read_page(request, "key")
    user, wallet = read_query(request, "user"), read_query(request, "wallet")
    found = await services_of(request).keys.find_keys(
        user_id=None if user is None else await services_of(request).wallets.get_user(user),
        wallet_id=None if wallet is None else parse_id(wallet, "wallet"),
        revoked=read_flag(request, "revoked"),
        after=after,
        limit=limit + 1,
    )
    return answer(request, page_of([_key_json(key) for key in found], limit))


async def create_key(request: web.Request) -> JsonAnswer[AnyNewKeyJson]:
    """Make a key for a wallet; its caps are ceilings. The secret is shown now and never again."""
    form = await read_as(request, KeyForm)
    if form.wallet_id is None:
        raise BadRequestError("Name the wallet that pays.", param="wallet_id")
    keys = services_of(request).keys
    made = await keys.create(form.wallet_id, form.rules)
    return answer(request, {**_key_json(await keys.get_key(made.id)), "secret": made.secret}, 201)


async def rotate_key(request: web.Request) -> JsonAnswer[AnyNewKeyJson]:
    """Give a key another secret; the one before stays good for ``overlap_s`` seconds."""
    form = await read_as(request, RotateForm)
    keys = services_of(request).keys
    made = await keys.rotate(read_id(request, "key"), overlap_s=form.overlap_s)
    return answer(request, {**_key_json(await keys.get_key(made.id)), "secret": made.secret})


async def delete_key(request: web.Request) -> JsonAnswer[DeletedKeyJson]:
    """Revoke a key, on every worker."""
    key_id = read_id(request, "key")
    await services_of(request).keys.revoke(key_id)
    await services_of(request).forget_key(str(key_id))
    return answer(request, {"id": str(key_id), "object": "api_key", "deleted": True, "status": "revoked"})


def _key_json(key: Key) -> AnyKeyJson:
    return {"object": "api_key", **key.as_json(), "user_id": str(key.user_id), "currency": key.currency}
