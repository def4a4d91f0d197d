"""``/v1/keys``: a person's own keys; a secret is shown once, when it is made."""

from uuid import UUID

from aiohttp import web

from billing.errors import NotPermittedError
from billing.identity.caller import Caller
from billing.identity.key import Key, Owner
from billing.ids import parse_id
from billing.wallets.caps import caps_as_json
from proxy.account.answers import DeletedKeyJson, KeyJson, KeysJson, NewKeyJson
from proxy.account.forms import KeyForm, RotateForm
from proxy.account.requests import answer_secret, enter, enter_as_owner
from proxy.http.errors import BadRequestError
from proxy.http.forms import read_flag, read_form, read_limit, read_query
from proxy.http.typed_answer import JsonAnswer, answer
from proxy.identity.authenticate import acting_as, owner_of
from proxy.services.account import AccountServices

_PAGE = 100


async def list_keys(request: web.Request) -> JsonAnswer[KeysJson]:
    """The keys that the caller may manage, by age; ``limit``, ``after`` and ``revoked=true`` in the query."""
    services, caller = await enter(request)
    owner = owner_of(caller)
    limit = read_limit(request, most=_PAGE)
    after = read_query(request, "after")
    found = await services.keys.find_keys(
        owner=owner,
        revoked=read_flag(request, "revoked"),
        after=None if after is None else parse_id(after, "key"),
        limit=limit + 1,
    )
    page = found[:limit]
    body: KeysJson = {
        "object": "list",
        "data": await _describe(services, page),
        "has_more": len(found) > limit,
        "first_id": str(page[0].id) if page else None,
        "last_id": str(page[-1].id) if page else None,
    }
    return answer(request, body)


async def create_key(request: web.Request) -> JsonAnswer[NewKeyJson]:
    """Make a key on the caller's wallet, or on another of theirs; its caps are the user's, not the operator's."""
    services, caller, owner = await enter_as_owner(request)
    form = await read_form(request, KeyForm, services.settings.limits)
    wallet_id = form.wallet_id or caller.wallet_id
    with acting_as(request):
        made = await services.keys.create(wallet_id, form.rules, owner=owner)
    shown = (await _describe(services, [await services.keys.get_key(made.id, owner=owner)]))[0]
    return answer_secret(request, {**shown, "secret": made.secret}, 201)


async def get_key(request: web.Request) -> JsonAnswer[KeyJson]:
    """One key, with its caps and what is left of them; a key may always look at itself."""
    services, caller = await enter(request)
    key_id = parse_id(request.match_info["key"], "key")
    found = await services.keys.get_key(key_id, owner=_owner_of(caller, key_id))
    return answer(request, (await _describe(services, [found]))[0])


async def rotate_key(request: web.Request) -> JsonAnswer[NewKeyJson]:
    """Give a key another secret; the one before stays good for ``overlap_s`` seconds."""
    services, _, owner = await enter_as_owner(request)
    form = await read_form(request, RotateForm, services.settings.limits)
    key_id = parse_id(request.match_info["key"], "key")
    with acting_as(request):
        made = await services.keys.rotate(key_id, owner=owner, overlap_s=form.overlap_s)
    shown = (await _describe(services, [await services.keys.get_key(key_id, owner=owner)]))[0]
    return answer_secret(request, {**shown, "secret": made.secret})


async def delete_key(request: web.Request) -> JsonAnswer[DeletedKeyJson]:
    """Revoke a key, named in the path or as ``?id=``; a key may always revoke itself: whoever finds one can end it."""
    services, caller = await enter(request)
    named = request.match_info.get("key") or read_query(request, "id")
    if not named:
        raise BadRequestError("Name the key: DELETE /v1/keys/{id}.", param="id")
    key_id = parse_id(named, "key")
    with acting_as(request):
        await services.keys.revoke(key_id, owner=_owner_of(caller, key_id))
    await services.keys.forget(str(key_id))
    body: DeletedKeyJson = {
        "id": str(key_id),
        "object": "api_key",
        "deleted": True,
        "status": "revoked",
    }
    return answer(request, body)


def _owner_of(caller: Caller, key_id: UUID) -> Owner:
    try:
        return owner_of(caller)
    except NotPermittedError:
        if caller.key_id == key_id:
            return Owner(caller.user_id, caller.wallet_id)
        raise


async def _describe(services: AccountServices, keys: list[Key]) -> list[KeyJson]:
    caps = await services.caps.find_own_caps(keys[0].user_id, *(key.id for key in keys)) if keys else []
    return [
        {
            "object": "api_key",
            **key.as_json(),
            "currency": key.currency,
            "caps": caps_as_json(cap for cap in caps if cap.scope_id == key.id),
        }
        for key in keys
    ]
