"""``/admin``: the operator's desk. Every change is audited as the admin's, with the request's id."""

from typing import Any
from uuid import UUID

from aiohttp import web

from billing.accounts import describe_quota, describe_reconciliations
from billing.acting import acting
from billing.alerts import describe_alerts
from billing.callbook import describe_call
from billing.caps import Scope, caps_as_json
from billing.changes import announce
from billing.errors import InvalidKeyError, NotPermittedError
from billing.keys import Key
from billing.money import format_amount
from billing.wallets import Wallet, parse_id
from proxy.admin_parts import (
    Handler,
    answer,
    desk_of,
    endpoint,
    idempotency_key,
    page_of,
    query,
    read_as,
    read_id,
    read_page,
)
from proxy.admin_payments import ADMIN_PAYMENTS
from proxy.auth import bears, count_failure
from proxy.context import call_id_of
from proxy.errors import BadRequestError
from proxy.feed import stream_wallet_events
from proxy.forms import (
    CapsForm,
    CreditForm,
    KeyForm,
    LogLevelForm,
    OverdraftForm,
    ReasonForm,
    RefundForm,
    RotateForm,
    UserChangeForm,
    UserForm,
    WalletForm,
    read_flag,
    read_moment,
    read_query,
)
from proxy.openapi import Endpoint
from proxy.services import SERVICES, cool_user


@web.middleware
async def guard_admin(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let nobody to ``/admin`` without the operator's token, whatever is asked there; who comes in acts as the admin.

    Raises:
        NotPermittedError: there is no such token.
        InvalidKeyError: it is another.
    """
    if not _is_guarded(request):
        return await handler(request)
    services = request.app[SERVICES]
    token = services.settings.admin.token.get_secret_value()
    if not token:
        raise NotPermittedError("There is no operator's API here: TUMA_ADMIN__TOKEN is not set.")
    if not bears(request, token):
        await count_failure(request, services)
        raise InvalidKeyError("The operator's token is not valid.")
    with acting("admin", str(call_id_of(request))):
        return await handler(request)


def _is_guarded(request: web.Request) -> bool:
    """Whether the path, or the route that was found for it, is the operator's; it takes only one of the two."""
    resource = request.match_info.route.resource
    paths = (request.path, "" if resource is None else resource.canonical)
    return any(is_admins(path) for path in paths)


def is_admins(path: str) -> bool:
    """Whether a path is the operator's."""
    return path == "/admin" or path.startswith("/admin/")


# Users


async def list_users(request: web.Request) -> web.Response:
    """Users by age; ``email``, ``limit`` and ``after`` in the query."""
    limit, after = read_page(request, "user")
    found = await desk_of(request).wallets.find_users(
        email=read_query(request, "email"), after=after, limit=limit + 1
    )
    return answer(request, page_of([user.as_json() for user in found], limit))


async def create_user(request: web.Request) -> web.Response:
    """Register a person."""
    form = await read_as(request, UserForm)
    wallets = desk_of(request).wallets
    user_id = await wallets.create_user(form.email, subject=form.subject)
    return answer(request, (await wallets.describe_user(user_id)).as_json(), 201)


async def get_user(request: web.Request) -> web.Response:
    """A person, with their wallets and the caps over all of them."""
    return await _show_user(request, read_id(request, "user"))


async def change_user(request: web.Request) -> web.Response:
    """Disable or enable a person, set the limits over all their keys, or the clock that their caps follow."""
    form = await read_as(request, UserChangeForm)
    desk, user_id = desk_of(request), read_id(request, "user")
    if form.timezone is not None or form.week_starts is not None:
        clock = await desk.caps.get_clock(user_id)
        await desk.caps.set_clock(
            user_id,
            timezone=form.timezone or clock.timezone,
            week_starts=form.week_starts or clock.week_starts,
        )
    changes = form.model_dump(exclude={"timezone", "week_starts"}, exclude_none=True)
    if changes:
        await desk.wallets.set_user(user_id, **changes)
    return await _show_user(request, user_id)


async def _show_user(request: web.Request, user_id: UUID) -> web.Response:
    desk = desk_of(request)
    user = await desk.wallets.describe_user(user_id)
    found = await desk.wallets.find_wallets(user_id=user_id)
    body = {
        **user.as_json(),
        "wallets": [_wallet_json(wallet) for wallet in found],
        "caps": caps_as_json(await desk.caps.find_caps(user_id)),
    }
    return answer(request, body)


# Wallets


async def list_wallets(request: web.Request) -> web.Response:
    """Wallets by age; ``user``, ``limit`` and ``after`` in the query."""
    limit, after = read_page(request, "wallet")
    named = read_query(request, "user")
    user_id = None if named is None else await desk_of(request).wallets.get_user(named)
    found = await desk_of(request).wallets.find_wallets(user_id=user_id, after=after, limit=limit + 1)
    return answer(request, page_of([_wallet_json(wallet) for wallet in found], limit))


async def create_wallet(request: web.Request) -> web.Response:
    """Open a wallet for a person, who is named by id or e-mail address."""
    form = await read_as(request, WalletForm)
    wallets = desk_of(request).wallets
    wallet_id = await wallets.create_wallet(form.user, currency=form.currency, overdraft_nano=form.overdraft)
    return answer(request, _wallet_json(await wallets.get_wallet(wallet_id)), 201)


async def get_wallet(request: web.Request) -> web.Response:
    """A wallet with its caps."""
    return await _show_wallet(request, await desk_of(request).wallets.get_wallet(read_id(request, "wallet")))


async def change_wallet(request: web.Request) -> web.Response:
    """Set how far below zero a wallet may go."""
    form = await read_as(request, OverdraftForm)
    wallet = await desk_of(request).wallets.set_wallet(
        read_id(request, "wallet"), overdraft_nano=form.overdraft
    )
    return await _show_wallet(request, wallet)


async def freeze_wallet(request: web.Request) -> web.Response:
    """Freeze a wallet: no call is admitted; those under way are settled."""
    form = await read_as(request, ReasonForm)
    wallets = desk_of(request).wallets
    wallet = await wallets.set_wallet(read_id(request, "wallet"), status="frozen", reason=form.reason)
    return await _show_wallet(request, wallet)


async def unfreeze_wallet(request: web.Request) -> web.Response:
    """Let a wallet pay again."""
    form = await read_as(request, ReasonForm)
    wallets = desk_of(request).wallets
    wallet = await wallets.set_wallet(read_id(request, "wallet"), status="active", reason=form.reason)
    return await _show_wallet(request, wallet)


async def credit_wallet(request: web.Request) -> web.Response:
    """Put money into a wallet; the header ``Idempotency-Key`` is as good as the form's ``key``."""
    form = await read_as(request, CreditForm)
    credit = await desk_of(request).wallets.credit(
        read_id(request, "wallet"), form.amount, reason=form.reason, key=form.key or idempotency_key(request)
    )
    cool_user(request.app[SERVICES], credit.wallet.user_id)
    return answer(request, {"transaction_id": str(credit.tx_id), **_wallet_json(credit.wallet)}, 201)


async def _show_wallet(request: web.Request, wallet: Wallet) -> web.Response:
    services = request.app[SERVICES]
    if request.method != "GET":
        cool_user(services, wallet.user_id)
    caps = caps_as_json(await services.desk.caps.find_caps(wallet.id))
    return answer(request, {**_wallet_json(wallet), "caps": caps})


def _wallet_json(wallet: Wallet) -> dict[str, Any]:
    return {"object": "wallet", **wallet.as_json(), "user_id": str(wallet.user_id)}


# Caps: ceilings, which no user can lift


async def get_user_caps(request: web.Request) -> web.Response:
    """The caps over all wallets of a person, in USD of cost."""
    user_id = read_id(request, "user")
    await desk_of(request).wallets.describe_user(user_id)
    return await _show_caps(request, "user", user_id, "USD")


async def put_user_caps(request: web.Request) -> web.Response:
    """Set caps over all wallets of a person: named periods change, null lifts one."""
    return await _put_caps(
        request, "user", read_id(request, "user"), user_id=read_id(request, "user"), currency="USD"
    )


async def get_wallet_caps(request: web.Request) -> web.Response:
    """A wallet's caps, in its currency."""
    wallet = await desk_of(request).wallets.get_wallet(read_id(request, "wallet"))
    return await _show_caps(request, "wallet", wallet.id, wallet.currency)


async def put_wallet_caps(request: web.Request) -> web.Response:
    """Set a wallet's ceilings: named periods change, null lifts one; the user's own limits stay."""
    wallet = await desk_of(request).wallets.get_wallet(read_id(request, "wallet"))
    return await _put_caps(request, "wallet", wallet.id, user_id=wallet.user_id, currency=wallet.currency)


async def get_key_caps(request: web.Request) -> web.Response:
    """A key's caps, in the currency of its wallet."""
    key = await desk_of(request).keys.get_key(read_id(request, "key"))
    return await _show_caps(request, "key", key.id, key.currency)


async def put_key_caps(request: web.Request) -> web.Response:
    """Set a key's ceilings: named periods change, null lifts one."""
    key = await desk_of(request).keys.get_key(read_id(request, "key"))
    return await _put_caps(request, "key", key.id, user_id=key.user_id, currency=key.currency)


async def _put_caps(
    request: web.Request, scope: Scope, scope_id: UUID, *, user_id: UUID, currency: str
) -> web.Response:
    form = await read_as(request, CapsForm)
    if form.limits:
        await desk_of(request).caps.set_caps(scope, scope_id, form.limits)
        cool_user(request.app[SERVICES], user_id)
    return await _show_caps(request, scope, scope_id, currency)


async def _show_caps(request: web.Request, scope: Scope, scope_id: UUID, currency: str) -> web.Response:
    caps = caps_as_json(await desk_of(request).caps.find_caps(scope_id))
    return answer(
        request, {"object": "caps", "scope": scope, "id": str(scope_id), "currency": currency, "caps": caps}
    )


# Keys


async def list_keys(request: web.Request) -> web.Response:
    """Keys by age; ``wallet``, ``user``, ``revoked``, ``limit`` and ``after`` in the query."""
    limit, after = read_page(request, "key")
    user, wallet = read_query(request, "user"), read_query(request, "wallet")
    found = await desk_of(request).keys.find_keys(
        user_id=None if user is None else await desk_of(request).wallets.get_user(user),
        wallet_id=None if wallet is None else parse_id(wallet, "wallet"),
        revoked=read_flag(request, "revoked"),
        after=after,
        limit=limit + 1,
    )
    return answer(request, page_of([_key_json(key) for key in found], limit))


async def create_key(request: web.Request) -> web.Response:
    """Make a key for a wallet; its caps are ceilings. The secret is shown now and never again."""
    form = await read_as(request, KeyForm)
    if form.wallet_id is None:
        raise BadRequestError("Name the wallet that pays.", param="wallet_id")
    keys = desk_of(request).keys
    made = await keys.create(form.wallet_id, form.rules)
    return answer(request, {**_key_json(await keys.get_key(made.id)), "secret": made.secret}, 201)


async def rotate_key(request: web.Request) -> web.Response:
    """Give a key another secret; the one before stays good for ``overlap_s`` seconds."""
    form = await read_as(request, RotateForm)
    keys = desk_of(request).keys
    made = await keys.rotate(read_id(request, "key"), overlap_s=form.overlap_s)
    return answer(request, {**_key_json(await keys.get_key(made.id)), "secret": made.secret})


async def delete_key(request: web.Request) -> web.Response:
    """Revoke a key, on every worker."""
    key_id = read_id(request, "key")
    await desk_of(request).keys.revoke(key_id)
    await request.app[SERVICES].keys.forget(str(key_id))
    return answer(request, {"id": str(key_id), "object": "api_key", "deleted": True, "status": "revoked"})


def _key_json(key: Key) -> dict[str, Any]:
    return {"object": "api_key", **key.as_json(), "user_id": str(key.user_id), "currency": key.currency}


# Calls and the house's books


async def get_call(request: web.Request) -> web.Response:
    """Everything known about a call: its quote, prices, usage, and postings."""
    return answer(request, await describe_call(desk_of(request).database, read_id(request, "call")))


async def refund_call(request: web.Request) -> web.Response:
    """Give a call's charge back, whole or in part."""
    form = await read_as(request, RefundForm)
    services, call_id = request.app[SERVICES], read_id(request, "call")
    done = await services.desk.corrections.refund(
        call_id, amount_nano=form.amount, reason=form.reason, key=form.key or idempotency_key(request)
    )
    shown = await describe_call(services.desk.database, call_id)
    owner = await services.desk.wallets.get_wallet(parse_id(shown["wallet_id"], "wallet"))
    cool_user(services, owner.user_id)
    refunded = format_amount(done.before.charge_nano - done.after.charge_nano)
    tx_id = None if done.tx_id is None else str(done.tx_id)
    return answer(request, {"transaction_id": tx_id, "refunded": refunded, **shown})


async def get_quota(request: web.Request) -> web.Response:
    """The shadow ledger's sums, and what is left of the provider's quota."""
    return answer(request, await describe_quota(desk_of(request).database))


async def list_reconciliations(request: web.Request) -> web.Response:
    """The latest reconciliations and what they found."""
    return answer(request, await describe_reconciliations(desk_of(request).database))


async def reconcile(request: web.Request) -> web.Response:
    """Reconcile with the provider now, as a running server does by itself every hour."""
    return answer(request, (await desk_of(request).reconciler.run()).as_json())


async def list_alerts(request: web.Request) -> web.Response:
    """The alerts that last, the latest that ended, and the messages that nobody took yet."""
    return answer(request, await describe_alerts(desk_of(request).database))


async def list_audit(request: web.Request) -> web.Response:
    """The newest rows of the audit log; ``wallet``, ``user``, ``actor``, ``since`` and ``limit`` in the query."""
    desk = desk_of(request)
    limit, _ = read_page(request, "row")
    wallet, user = read_query(request, "wallet"), read_query(request, "user")
    rows = await desk.audit.list_rows(
        wallet_id=None if wallet is None else parse_id(wallet, "wallet"),
        user_id=None if user is None else await desk.wallets.get_user(user),
        actor=read_query(request, "actor"),
        since=read_moment(request, "since"),
        limit=limit,
    )
    return answer(request, {"object": "list", "data": rows})


async def verify_audit(request: web.Request) -> web.Response:
    """Find altered, removed and reordered rows; ``expect``: a head noted before. Note the head that it returns."""
    return answer(
        request, (await desk_of(request).audit.verify(expect=read_query(request, "expect"))).as_json()
    )


async def put_log_level(request: web.Request) -> web.Response:
    """Change how much every worker logs, on every machine, until it is started anew; nothing is restarted."""
    services = request.app[SERVICES]
    form = await read_as(request, LogLevelForm)
    await announce(services.desk.database, "log", form.level)
    await services.metrics.hear_level(form.level)
    return answer(request, {"level": form.level})


ADMIN = (
    endpoint("GET", "/admin/users", list_users, query=query("email", "limit", "after")),
    endpoint("POST", "/admin/users", create_user, form=UserForm, status=201),
    endpoint("GET", "/admin/users/{user}", get_user),
    endpoint("PATCH", "/admin/users/{user}", change_user, form=UserChangeForm),
    endpoint("GET", "/admin/users/{user}/caps", get_user_caps),
    endpoint("PUT", "/admin/users/{user}/caps", put_user_caps, form=CapsForm),
    endpoint("GET", "/admin/wallets", list_wallets, query=query("user", "limit", "after")),
    endpoint("POST", "/admin/wallets", create_wallet, form=WalletForm, status=201),
    endpoint("GET", "/admin/wallets/{wallet}", get_wallet),
    endpoint("PATCH", "/admin/wallets/{wallet}", change_wallet, form=OverdraftForm),
    endpoint("POST", "/admin/wallets/{wallet}/freeze", freeze_wallet, form=ReasonForm),
    endpoint("POST", "/admin/wallets/{wallet}/unfreeze", unfreeze_wallet, form=ReasonForm),
    endpoint("POST", "/admin/wallets/{wallet}/credits", credit_wallet, form=CreditForm, status=201),
    Endpoint(
        "GET",
        "/admin/wallets/{wallet}/events",
        stream_wallet_events,
        "WalletEvent",
        "operator",
        query=query("last_event_id"),
        streams=True,
        operator=True,
    ),
    endpoint("GET", "/admin/wallets/{wallet}/caps", get_wallet_caps),
    endpoint("PUT", "/admin/wallets/{wallet}/caps", put_wallet_caps, form=CapsForm),
    endpoint("GET", "/admin/keys", list_keys, query=query("wallet", "user", "revoked", "limit", "after")),
    endpoint("POST", "/admin/keys", create_key, form=KeyForm, status=201),
    endpoint("POST", "/admin/keys/{key}/rotate", rotate_key, form=RotateForm),
    endpoint("DELETE", "/admin/keys/{key}", delete_key),
    endpoint("GET", "/admin/keys/{key}/caps", get_key_caps),
    endpoint("PUT", "/admin/keys/{key}/caps", put_key_caps, form=CapsForm),
    endpoint("GET", "/admin/calls/{call}", get_call),
    endpoint("POST", "/admin/calls/{call}/refund", refund_call, form=RefundForm),
    endpoint("GET", "/admin/quota", get_quota),
    endpoint("GET", "/admin/reconciliation", list_reconciliations),
    endpoint("POST", "/admin/reconciliation", reconcile),
    endpoint("GET", "/admin/alerts", list_alerts),
    endpoint("GET", "/admin/audit", list_audit, query=query("wallet", "user", "actor", "since", "limit")),
    endpoint("GET", "/admin/audit/verify", verify_audit, query=query("expect")),
    endpoint("PUT", "/admin/log-level", put_log_level, form=LogLevelForm),
    *ADMIN_PAYMENTS,
)
