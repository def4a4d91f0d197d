"""One call, for the operator: how its charge came about, a refund of it, and what it cost where nobody else could tell."""

from aiohttp import web

from billing.ids import parse_id
from billing.money import format_amount
from billing.reports.answers import WholeCallJson
from billing.reports.call_view import describe_call
from proxy.http.typed_answer import JsonAnswer, answer
from proxy.operator.answers import RefundedCallJson
from proxy.operator.forms import DecideForm, RefundForm
from proxy.operator.requests import idempotency_key, read_as, read_id, services_of


async def get_call(request: web.Request) -> JsonAnswer[WholeCallJson]:
    """Everything known about a call: its quote, prices, usage, and postings."""
    return answer(request, await describe_call(services_of(request).database, read_id(request, "call")))


async def refund_call(request: web.Request) -> JsonAnswer[RefundedCallJson]:
    """Give a call's charge back, whole or in part."""
    form = await read_as(request, RefundForm)
    services, call_id = services_of(request), read_id(request, "call")
    done = await services.corrections.refund(
        call_id, amount_nano=form.amount, reason=form.reason, key=form.key or idempotency_key(request)
    )
    shown = await describe_call(services.database, call_id)
    owner = await services.wallets.get_wallet(parse_id(shown["wallet_id"], "wallet"))
    services.cool_user(owner.user_id)
    refunded = format_amount(done.before.charge_nano - done.after.charge_nano)
    tx_id = None if done.tx_id is None else str(done.tx_id)
    return answer(request, {"transaction_id": tx_id, "refunded": refunded, **shown})


async def settle_call(request: web.Request) -> JsonAnswer[WholeCallJson]:
    """End a call in review at what it cost; at nothing it is void, and gives back what it held."""
    form = await read_as(request, DecideForm)
    services, call_id = services_of(request), read_id(request, "call")
    done = await services.call_reviews.end(
        call_id, cost_nanousd=form.cost_usd, reason=form.reason, house=form.house
    )
    services.cool_user((await services.wallets.get_wallet(done.wallet_id)).user_id)
    return answer(request, await describe_call(services.database, call_id))
