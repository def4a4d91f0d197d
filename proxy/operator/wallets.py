"""Wallets: found, made, frozen, credited."""

from aiohttp import web

from billing.wallets.caps import caps_as_json
from billing.wallets.wallets import Wallet
from proxy.http.forms import read_query
from proxy.http.typed_answer import JsonAnswer, answer
from proxy.operator.answers import AnyWalletJson, AnyWalletsJson, AnyWalletWithCapsJson, CreditJson
from proxy.operator.forms import (
    CreditForm,
    OverdraftForm,
    ReasonForm,
    WalletForm,
)
from proxy.operator.requests import (
    idempotency_key,
    page_of,
    read_as,
    read_id,
    read_page,
    services_of,
)


async def list_wallets(request: web.Request) -> JsonAnswer[AnyWalletsJson]:
    """Wallets by age; ``user``, ``limit`` and ``after`` in the query."""
    limit, after = read_page(request, "wallet")
    named = read_query(request, "user")
    user_id = None if named is None else await services_of(request).wallets.get_user(named)
    found = await services_of(request).wallets.find_wallets(user_id=user_id, after=after, limit=limit + 1)
    return answer(request, page_of([_wallet_json(wallet) for wallet in found], limit))


async def create_wallet(request: web.Request) -> JsonAnswer[AnyWalletJson]:
    """Open a wallet for a person, who is named by id or e-mail address."""
    form = await read_as(request, WalletForm)
    wallets = services_of(request).wallets
    wallet_id = await wallets.create_wallet(form.user, currency=form.currency, overdraft_nano=form.overdraft)
    return answer(request, _wallet_json(await wallets.get_wallet(wallet_id)), 201)


async def get_wallet(request: web.Request) -> JsonAnswer[AnyWalletWithCapsJson]:
    """A wallet with its caps."""
    return await _show_wallet(
        request, await services_of(request).wallets.get_wallet(read_id(request, "wallet"))
    )


async def change_wallet(request: web.Request) -> JsonAnswer[AnyWalletWithCapsJson]:
    """Set how far below zero a wallet may go."""
    form = await read_as(request, OverdraftForm)
    wallet = await services_of(request).wallets.set_wallet(
        read_id(request, "wallet"), overdraft_nano=form.overdraft
    )
    return await _show_wallet(request, wallet)


async def freeze_wallet(request: web.Request) -> JsonAnswer[AnyWalletWithCapsJson]:
    """Freeze a wallet: no call is admitted; those under way are settled."""
    form = await read_as(request, ReasonForm)
    wallets = services_of(request).wallets
    wallet = await wallets.set_wallet(read_id(request, "wallet"), status="frozen", reason=form.reason)
    return await _show_wallet(request, wallet)


async def unfreeze_wallet(request: web.Request) -> JsonAnswer[AnyWalletWithCapsJson]:
    """Let a wallet pay again."""
    form = await read_as(request, ReasonForm)
    wallets = services_of(request).wallets
    wallet = await wallets.set_wallet(read_id(request, "wallet"), status="active", reason=form.reason)
    return await _show_wallet(request, wallet)


async def credit_wallet(request: web.Request) -> JsonAnswer[CreditJson]:
    """Put money into a wallet; the header ``Idempotency-Key`` is as good as the form's ``key``."""
    form = await read_as(request, CreditForm)
    credit = await services_of(request).wallets.credit(
        read_id(request, "wallet"), form.amount, reason=form.reason, key=form.key or idempotency_key(request)
    )
    services_of(request).cool_user(credit.wallet.user_id)
    return answer(request, {"transaction_id": str(credit.tx_id), **_wallet_json(credit.wallet)}, 201)


async def _show_wallet(request: web.Request, wallet: Wallet) -> JsonAnswer[AnyWalletWithCapsJson]:
    services = services_of(request)
    if request.method != "GET":
        services.cool_user(wallet.user_id)
    caps = caps_as_json(await services.caps.find_caps(wallet.id))
    return answer(request, {**_wallet_json(wallet), "caps": caps})


def _wallet_json(wallet: Wallet) -> AnyWalletJson:
    return {"object": "wallet", **wallet.as_json(), "user_id": str(wallet.user_id)}
