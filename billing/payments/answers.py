"""The shapes of payments as an operator sees them; amounts in major units of the currency beside them."""

from typing import Literal

from typing_extensions import TypedDict

from billing.payments.payment import IntentKind, IntentState, RefundState
from billing.payments.units import PaymentProvider
from billing.shapes import Amount, Id, Moment

PaymentViewState = Literal[
    "creating", "pending", "failed", "expired", "paid", "review", "resolved", "returned"
]
WebhookState = Literal["new", "review", "ignored", "done"]


class PaymentJson(TypedDict):
    """A wish to pay, and what was paid for it; a payment that nobody wished has no `intent_id`."""

    provider: PaymentProvider
    provider_txn_id: str | None
    intent_id: Id | None
    kind: IntentKind | None
    wallet_id: Id | None
    state: PaymentViewState
    currency: str
    asked: Amount | None
    asked_currency: str | None
    paid: Amount | None
    credited: Amount | None
    suspense: Amount
    reversed: Amount
    fee: Amount | None
    fee_currency: str | None
    note: str
    created_at: Moment


class ReviewJson(TypedDict):
    """A payment that waits for a decision."""

    provider: PaymentProvider
    provider_txn_id: str
    intent_id: Id | None
    wallet_id: Id | None
    currency: str
    paid: Amount
    suspense: Amount
    note: str
    created_at: Moment


class ReversalJson(TypedDict):
    """What of a payment went back, or is disputed; in the payment's currency."""

    id: Id
    kind: Literal["refund", "dispute"]
    provider_reversal_id: str | None
    state: RefundState
    amount: Amount
    of_suspense: Amount
    reason: str
    created_at: Moment
    ended_at: Moment | None


class PaymentPostingJson(TypedDict):
    """An entry of the journal, with the journal's sign."""

    transaction_id: Id
    kind: str
    account: str
    currency: str
    amount: Amount
    memo: str
    at: Moment


class ConsequencesFields(TypedDict):
    """What became of a payment."""

    reversals: list[ReversalJson]
    postings: list[PaymentPostingJson]


class WholePaymentJson(PaymentJson):
    """A payment with what became of it."""

    reversals: list[ReversalJson]
    postings: list[PaymentPostingJson]


class IntentJson(TypedDict):
    """A wish to pay, as its provider and its payer know it."""

    id: Id
    reference: str
    kind: IntentKind
    user_id: Id
    wallet_id: Id
    provider: PaymentProvider
    provider_id: str | None
    amount: Amount
    currency: str
    state: IntentState
    attempt: int
    url: str | None
    note: str
    created_at: Moment
    expires_at: Moment
    ended_at: Moment | None


class WebhookEventJson(TypedDict):
    """What a payment provider told; ``deliveries`` and ``tries`` are counted."""

    id: Id
    provider: PaymentProvider
    event: str
    state: WebhookState
    note: str
    deliveries: int
    tries: int
    received_at: Moment
    next_at: Moment | None
    ended_at: Moment | None


class PaymentFileJson(TypedDict):
    """Everything about a wish to pay: what was paid for it, what became of that, and what its provider told."""

    intent: IntentJson | None
    payments: list[WholePaymentJson]
    webhooks: list[WebhookEventJson]
