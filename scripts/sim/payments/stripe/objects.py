"""How simulated Stripe shows its objects and tells of them, as of API version 2026-10-28. Whole minor units.

Source: https://docs.stripe.com/api (checkout sessions, payment intents, charges, balance transactions, refunds, disputes, events).
"""

from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from scripts.sim.payments.books import Books, Checkout, Dispute, Payment, Refund
from scripts.sim.payments.currencies import digits
from scripts.sim.payments.fees import fee_minor
from scripts.sim.payments.till import Told, new_id

API_VERSION = "2026-10-28.endive"
_EVENT_ID = "evt"
_AVAILABLE_AFTER_S = 2 * 86_400
_CHARGE = {"succeeded": "succeeded", "failed": "failed", "pending": "pending"}
_CARD = {"brand": "visa", "last4": "4242", "exp_month": 12, "exp_year": 2034, "funding": "credit"}


@dataclass(frozen=True, slots=True)
class Settlement:
    """The currency that Stripe's account is kept in, and what one unit of a payment's currency is worth in it."""

    currency: str
    rate: Decimal


class StripeVoice:
    """How Stripe shows and tells what happened.

    Args:
        books: for what was asked of a payment.
    """

    def __init__(self, books: Books) -> None:
        self._books = books
        # In which currency payments are settled; without one, in their own.
        self.settlement: Settlement | None = None
        # Whether a charge has no balance transaction yet, as for the first moments after a card was charged.
        self.balances_wait = False

    # Events

    def of_expiry(self, checkout: Checkout) -> list[Told]:
        """Tell that a session expired."""
        return [self._told("checkout.session.expired", self.session(checkout))]

    def of_payment(self, payment: Payment) -> list[Told]:
        """Tell of a payment that came, failed, or is on its way; and of the session that it paid."""
        intent, charge = self.payment_intent(payment), self.charge(payment)
        kind = {"succeeded": "succeeded", "failed": "payment_failed", "pending": "processing"}[payment.status]
        told = [self._told(f"payment_intent.{kind}", intent)]
        if payment.status != "pending":
            told.append(self._told(f"charge.{payment.status}", charge))
        checkout = self._books.checkouts.get(payment.checkout_id or "")
        if checkout is None:
            return told
        if payment.status == "pending" or (payment.status == "succeeded" and not payment.was_pending):
            told.append(self._told("checkout.session.completed", self.session(checkout)))
        elif payment.was_pending:
            kind = f"checkout.session.async_payment_{payment.status}"
            told.append(self._told(kind, self.session(checkout)))
        return told

    def of_balance(self, payment: Payment) -> list[Told]:
        """Tell that a charge has its balance transaction."""
        return [self._told("charge.updated", self.charge(payment))]

    def of_refund(self, refund: Refund, payment: Payment) -> list[Told]:
        """Tell of a refund that began, arrived or failed."""
        kind = {"pending": "created", "succeeded": "updated", "failed": "failed"}[refund.status]
        told = [self._told(f"refund.{kind}", self.refund(refund, payment))]
        if refund.status == "pending":
            told.append(self._told("charge.refunded", self.charge(payment)))
        return told

    def of_dispute(self, dispute: Dispute, payment: Payment) -> list[Told]:
        """Tell of a dispute or an inquiry: begun, answered, turned into a dispute, or closed."""
        shown, prefix = self.dispute(dispute, payment), "charge.dispute"
        if dispute.status in ("won", "dropped"):
            told = [self._told(f"{prefix}.closed", shown)]
            if dispute.status == "won":
                told.append(self._told(f"{prefix}.funds_reinstated", shown))
            return told
        if dispute.status == "lost":
            return [self._told(f"{prefix}.closed", shown)]
        if dispute.reminders:
            return [self._told(f"{prefix}.updated", shown)]
        told = [self._told(f"{prefix}.updated" if dispute.was_inquiry else f"{prefix}.created", shown)]
        if dispute.status == "inquiry":
            return [self._told(f"{prefix}.created", shown)]
        return [*told, self._told(f"{prefix}.funds_withdrawn", shown)]

    def _told(self, kind: str, shown: dict[str, Any]) -> Told:
        event = {
            "id": new_id(_EVENT_ID),
            "object": "event",
            "api_version": API_VERSION,
            "created": self._books.now_s(),
            "data": {"object": shown},
            "livemode": False,
            "pending_webhooks": 1,
            "request": {"id": None, "idempotency_key": None},
            "type": kind,
        }
        return Told(kind, event)

    # Objects

    def session(self, checkout: Checkout) -> dict[str, Any]:
        """Return a checkout session as the API shows it."""
        payment = self._books.settled_of(checkout)
        paid = payment is not None and payment.status == "succeeded"
        return {
            "id": checkout.id,
            "object": "checkout.session",
            "amount_subtotal": checkout.amount_minor,
            "amount_total": checkout.amount_minor,
            "cancel_url": checkout.cancel_url,
            "client_reference_id": checkout.given["client_reference_id"],
            "created": checkout.created_s,
            "currency": checkout.currency.lower(),
            "customer": checkout.given["payment"]["customer_id"],
            "customer_creation": checkout.given["customer_creation"],
            "customer_details": {"email": checkout.email},
            "customer_email": checkout.given["customer_email"],
            "expires_at": checkout.expires_s,
            "livemode": False,
            "metadata": checkout.metadata,
            "mode": "payment",
            "payment_intent": None if payment is None else payment.id,
            "payment_method_types": checkout.given["payment_method_types"],
            "payment_status": "paid" if paid else "unpaid",
            "status": checkout.status,
            "success_url": checkout.success_url,
            "url": checkout.given["url"] if checkout.status == "open" else None,
        }

    def payment_intent(self, payment: Payment) -> dict[str, Any]:
        """Return a payment intent as the API shows it."""
        checkout = self._books.checkouts.get(payment.checkout_id or "")
        expired = checkout is not None and checkout.status == "expired"
        status = {"succeeded": "succeeded", "pending": "processing"}.get(
            payment.status, "canceled" if expired else "requires_payment_method"
        )
        failed = payment.status == "failed"
        return {
            "id": payment.id,
            "object": "payment_intent",
            "amount": payment.amount_minor,
            "amount_received": payment.amount_minor if payment.status == "succeeded" else 0,
            "cancellation_reason": "expired" if status == "canceled" else None,
            "capture_method": "automatic_async",
            "created": payment.created_s,
            "currency": payment.currency.lower(),
            "customer": payment.customer_id,
            "last_payment_error": card_error(payment) if failed else None,
            "latest_charge": charge_id(payment),
            "livemode": False,
            "metadata": payment.metadata,
            "payment_method": None if failed else payment.method_id,
            "payment_method_types": ["card"],
            "receipt_email": payment.email,
            "setup_future_usage": None if checkout is None else checkout.given["setup_future_usage"],
            "status": status,
        }

    def charge(self, payment: Payment) -> dict[str, Any]:
        """Return the charge of a payment as the API shows it."""
        refunded, paid = self._books.refunded_minor(payment), payment.status == "succeeded"
        disputes = [
            item for item in self._books.disputes_of(payment) if item.status not in ("inquiry", "dropped")
        ]
        error = card_error(payment) if payment.status == "failed" else {}
        return {
            "id": charge_id(payment),
            "object": "charge",
            "amount": payment.amount_minor,
            "amount_captured": payment.amount_minor if paid else 0,
            "amount_refunded": refunded,
            "balance_transaction": transaction_id(payment) if paid and not self.balances_wait else None,
            "captured": paid,
            "created": payment.created_s,
            "currency": payment.currency.lower(),
            "customer": payment.customer_id,
            "disputed": bool(disputes),
            "failure_code": error.get("code"),
            "failure_message": error.get("message"),
            "livemode": False,
            "metadata": payment.metadata,
            "paid": payment.status != "failed",
            "payment_intent": payment.id,
            "payment_method": payment.method_id,
            "payment_method_details": {"type": "card", "card": dict(_CARD)},
            "refunded": refunded == payment.amount_minor,
            "status": _CHARGE[payment.status],
        }

    def balance_transaction(self, payment: Payment) -> dict[str, Any]:
        """Return what a payment did to the account's balance, in the currency that it is settled in."""
        amount, fee, currency, rate = payment.amount_minor, payment.fee_minor, payment.currency, None
        if self.settlement is not None and self.settlement.currency != currency:
            rate, shift = self.settlement.rate, digits("stripe", self.settlement.currency)
            major = Decimal(amount).scaleb(-digits("stripe", currency)) * rate
            amount = int(major.scaleb(shift).to_integral_value(ROUND_HALF_UP))
            currency = self.settlement.currency
            fee = fee_minor("stripe", amount, currency)
        created_s = payment.created_s if payment.paid_s is None else payment.paid_s
        return {
            "id": transaction_id(payment),
            "object": "balance_transaction",
            "amount": amount,
            "available_on": created_s + _AVAILABLE_AFTER_S,
            "created": created_s,
            "currency": currency.lower(),
            "exchange_rate": rate,
            "fee": fee,
            "fee_details": [{"amount": fee, "currency": currency.lower(), "type": "stripe_fee"}],
            "net": amount - fee,
            "source": charge_id(payment),
            "status": "pending",
            "type": "charge",
        }

    def refund(self, refund: Refund, payment: Payment) -> dict[str, Any]:
        """Return a refund as the API shows it."""
        return {
            "id": refund.id,
            "object": "refund",
            "amount": refund.amount_minor,
            "charge": charge_id(payment),
            "created": refund.created_s,
            "currency": payment.currency.lower(),
            "failure_reason": "expired_or_canceled_card" if refund.status == "failed" else None,
            "metadata": refund.metadata,
            "payment_intent": payment.id,
            "reason": refund.reason,
            "status": refund.status,
        }

    def dispute(self, dispute: Dispute, payment: Payment) -> dict[str, Any]:
        """Return a dispute as the API shows it; money moved unless it is an inquiry."""
        states = {"won": "won", "lost": "lost", "dropped": "warning_closed"}
        waiting = "under_review" if dispute.reminders else "needs_response"
        prefix = "warning_" if dispute.status == "inquiry" else ""
        signs = {"open": (-1,), "lost": (-1,), "won": (-1, 1)}.get(dispute.status, ())
        moved = [
            {
                "id": f"txn_{number}_{dispute.id}",
                "object": "balance_transaction",
                "amount": sign * dispute.amount_minor,
                "currency": payment.currency.lower(),
                "fee": 0,
                "net": sign * dispute.amount_minor,
                "source": dispute.id,
                "type": "adjustment",
            }
            for number, sign in enumerate(signs)
        ]
        return {
            "id": dispute.id,
            "object": "dispute",
            "amount": dispute.amount_minor,
            "balance_transactions": moved,
            "charge": charge_id(payment),
            "created": dispute.created_s,
            "currency": payment.currency.lower(),
            "is_charge_refundable": dispute.status == "inquiry",
            "livemode": False,
            "metadata": {},
            "payment_intent": payment.id,
            "reason": "fraudulent",
            "status": states.get(dispute.status, f"{prefix}{waiting}"),
        }

    def method(self, payment: Payment) -> dict[str, Any]:
        """Return what a payment was paid with; it has a customer if it may be charged again."""
        saved = is_saved(payment, self._books)
        return {
            "id": payment.method_id,
            "object": "payment_method",
            "card": dict(_CARD),
            "created": payment.created_s,
            "customer": payment.customer_id if saved else None,
            "livemode": False,
            "metadata": {},
            "type": "card",
        }


def is_saved(payment: Payment, books: Books) -> bool:
    """Return whether a payment left its card to be charged again."""
    checkout = books.checkouts.get(payment.checkout_id or "")
    asked = checkout is not None and checkout.given["setup_future_usage"] == "off_session"
    return asked and payment.status == "succeeded" and payment.customer_id is not None


def charge_id(payment: Payment) -> str:
    """Return the id of a payment's charge."""
    return f"ch_{payment.id.removeprefix('pi_')}"


def transaction_id(payment: Payment) -> str:
    """Return the id of what a payment did to the balance."""
    return f"txn_{payment.id.removeprefix('pi_')}"


def card_error(payment: Payment) -> dict[str, Any]:
    """Return why a payment failed, as the API shows it."""
    decline = payment.failure or "generic_decline"
    if decline == "authentication_required":
        code, message = decline, "Your card was declined. This transaction requires authentication."
    elif decline == "insufficient_funds":
        code, message = "card_declined", "Your card has insufficient funds."
    else:
        code, message = "card_declined", "Your card was declined."
        decline = "generic_decline" if decline == "card_declined" else decline
    return {
        "type": "card_error",
        "charge": charge_id(payment),
        "code": code,
        "decline_code": decline,
        "message": message,
    }
