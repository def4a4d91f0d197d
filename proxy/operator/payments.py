"""``/admin/payments`` and ``/admin/revenue``: what people paid, what waits for a decision, refunds, and what the house earned."""

from aiohttp import web

from billing.ids import parse_id
from billing.money import format_amount
from billing.payments.answers import PaymentFileJson, WholePaymentJson
from billing.payments.units import PaymentProvider
from billing.payments.views import PaymentFilter, parse_provider
from billing.reports.revenue import describe_revenue
from proxy.http.forms import read_moment, read_query
from proxy.http.typed_answer import JsonAnswer, answer
from proxy.operator.answers import (
    AcceptedPaymentJson,
    PaymentsJson,
    RefundedPaymentJson,
    RetriedWebhookJson,
    RevenueJson,
    ReviewsJson,
    WebhookEventsJson,
)
from proxy.operator.forms import AcceptForm, PaymentRefundForm
from proxy.operator.requests import (
    endpoint,
    idempotency_key,
    query,
    read_as,
    read_id,
    read_page,
    services_of,
)


async def list_payments(request: web.Request) -> JsonAnswer[PaymentsJson]:
    """Top-ups and what was paid for them, the newest first.

    ``provider``, ``wallet``, ``user``, ``state``, ``since`` and ``limit`` in the query.
    """
    services = services_of(request)
    limit, _ = read_page(request, "payment")
    wallet, user = read_query(request, "wallet"), read_query(request, "user")
    wanted = PaymentFilter(
        provider=read_query(request, "provider"),
        wallet_id=None if wallet is None else parse_id(wallet, "wallet"),
        user_id=None if user is None else await services.wallets.get_user(user),
        state=read_query(request, "state"),
        since=read_moment(request, "since"),
    )
    found = await services.payment_views.list_payments(wanted, limit=limit)
    return answer(request, {"object": "list", "data": found})


async def list_reviews(request: web.Request) -> JsonAnswer[ReviewsJson]:
    """Payments that wait for a decision, oldest first."""
    return answer(
        request, {"object": "list", "data": await services_of(request).payment_views.list_reviews()}
    )


async def get_topup_of_anybody(request: web.Request) -> JsonAnswer[PaymentFileJson]:
    """Everything about a top-up, named by its id or its reference: payments, reversals, postings, webhooks."""
    return answer(
        request, await services_of(request).payment_views.describe_intent(request.match_info["topup"])
    )


async def get_payment(request: web.Request) -> JsonAnswer[PaymentFileJson]:
    """Everything about a payment, named by the provider's id of it."""
    provider, txn_id = _payment_of(request)
    return answer(request, await services_of(request).payment_views.describe(provider, txn_id))


async def accept_payment(request: web.Request) -> JsonAnswer[AcceptedPaymentJson]:
    """Give what of a payment lies in suspense to a wallet: the one named, or the top-up's."""
    form = await read_as(request, AcceptForm)
    provider, txn_id = _payment_of(request)
    accepted = await services_of(request).reviews.accept(
        provider, txn_id, wallet_id=form.wallet_id, reason=form.reason
    )
    return answer(request, {"accepted": accepted, **await _follow(request)})


async def refund_payment(request: web.Request) -> JsonAnswer[RefundedPaymentJson]:
    """Send a payment's money back: it is set aside at once, then the provider is asked.

    The header ``Idempotency-Key`` is as good as the form's ``key``.
    """
    form = await read_as(request, PaymentRefundForm)
    provider, txn_id = _payment_of(request)
    services_of(request).payments.api_of(provider)  # nothing is set aside that nobody would send
    refund = await services_of(request).refunds.begin(
        provider,
        txn_id,
        amount_nano=form.amount,
        reason=form.reason,
        below_zero=form.below_zero,
        key=form.key or idempotency_key(request),
    )
    services_of(request).payments.ring()
    return answer(
        request,
        {
            "id": str(refund.id),
            "refunded": format_amount(refund.amount_nano),
            "refund_state": refund.state,
            **await _follow(request),
        },
    )


async def list_webhooks(request: web.Request) -> JsonAnswer[WebhookEventsJson]:
    """Webhooks that wait or are in review, or those in a ``state``, the newest first."""
    limit, _ = read_page(request, "webhook")
    found = await services_of(request).payment_views.list_events(
        state=read_query(request, "state"), limit=limit
    )
    return answer(request, {"object": "list", "data": found})


async def retry_webhook(request: web.Request) -> JsonAnswer[RetriedWebhookJson]:
    """Let a webhook that ended in review, or was ignored, be looked at again."""
    event_id = read_id(request, "event")
    await services_of(request).reviews.retry_event(event_id)
    services_of(request).payments.ring()
    return answer(request, {"id": str(event_id), "state": "new"})


async def get_revenue(request: web.Request) -> JsonAnswer[RevenueJson]:
    """What the house earned and owes, per currency; ``since`` and ``until`` in the query."""
    found = await describe_revenue(
        services_of(request).late, since=read_moment(request, "since"), until=read_moment(request, "until")
    )
    return answer(request, {"object": "revenue", **found})


def _payment_of(request: web.Request) -> tuple[PaymentProvider, str]:
    return parse_provider(request.match_info["provider"]), request.match_info["txn"]


async def _follow(request: web.Request) -> WholePaymentJson:
    """Let Redis follow the wallet of the payment that was changed, and return the payment."""
    services = services_of(request)
    shown = (await services.payment_views.describe(*_payment_of(request)))["payments"][0]
    if shown["wallet_id"] is not None:
        owner = await services.wallets.get_wallet(parse_id(shown["wallet_id"], "wallet"))
        services_of(request).cool_user(owner.user_id)
    return shown


ADMIN_PAYMENTS = (
    endpoint(
        "GET",
        "/admin/payments",
        list_payments,
        query=query("provider", "wallet", "user", "state", "since", "limit"),
    ),
    endpoint("GET", "/admin/payments/reviews", list_reviews),
    endpoint("GET", "/admin/payments/webhooks", list_webhooks, query=query("state", "limit")),
    endpoint("POST", "/admin/payments/webhooks/{event}/retry", retry_webhook),
    endpoint("GET", "/admin/payments/topups/{topup}", get_topup_of_anybody),
    endpoint("GET", "/admin/payments/{provider}/{txn}", get_payment),
    endpoint("POST", "/admin/payments/{provider}/{txn}/accept", accept_payment, form=AcceptForm),
    endpoint("POST", "/admin/payments/{provider}/{txn}/refund", refund_payment, form=PaymentRefundForm),
    endpoint("GET", "/admin/revenue", get_revenue, query=query("since", "until")),
)
