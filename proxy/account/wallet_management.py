"""``POST /api/wallet-management``: what a chat frontend asks of the caller's wallet, by ``action``; each does as a path of /v1 does."""

from aiohttp import web

from billing.identity.caller import Caller
from billing.ids import parse_id
from billing.reports.statement import Filter
from proxy.account.answers import WalletAnswerJson
from proxy.account.caps import change_caps, describe_caps
from proxy.account.forms import (
    WALLET_ACTIONS,
    CapAction,
    CapsAction,
    TopupAction,
    TopupStatusAction,
    TransactionsAction,
)
from proxy.account.requests import enter
from proxy.account.topups import describe_topup, make_topup
from proxy.account.transactions import PAGE, describe_page
from proxy.account.wallet import describe_wallet
from proxy.http.errors import BadRequestError
from proxy.http.forms import Form, check_form, read_fields
from proxy.http.typed_answer import JsonAnswer, answer
from proxy.identity.authenticate import owner_of
from proxy.services.account import AccountServices


async def manage_wallet(request: web.Request) -> JsonAnswer[WalletAnswerJson]:
    """The caller's wallet by `action`: balance, topup, topup_status, cap, caps or transactions.

    Each answers as its path under `/v1/wallet` does; `topup` heeds the header `Idempotency-Key` and answers 201.
    """
    services, caller = await enter(request)
    fields = await read_fields(request, services.settings.limits)
    named = fields.get("action") if isinstance(fields, dict) else None
    kind = WALLET_ACTIONS.get(named) if isinstance(named, str) else None
    if kind is None:
        raise BadRequestError(f"'action' must be one of {', '.join(WALLET_ACTIONS)}.", param="action")
    form = check_form(fields, kind)
    body = await _do(request, services, caller, form)
    status = 201 if isinstance(form, TopupAction) else 200
    return answer(request, body, status)


async def _do(
    request: web.Request, services: AccountServices, caller: Caller, form: Form
) -> WalletAnswerJson:
    match form:
        case TopupAction():
            owner_of(caller)
            await services.writes.count(caller.user_id)
            return await make_topup(request, services, caller, form)
        case TopupStatusAction():
            return await describe_topup(services, caller, parse_id(form.id, "top-up"))
        case CapAction():
            owner_of(caller)
            await services.writes.count(caller.user_id)
            return await change_caps(request, services, caller, form)
        case CapsAction():
            return await describe_caps(services, caller)
        case TransactionsAction():
            return await describe_page(services, caller, Filter(), after=None, limit=PAGE)
        case _:
            return await describe_wallet(services, caller)
