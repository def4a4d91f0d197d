"""Where money moves at a simulated provider: the books first, then the events that tell of it."""

import itertools
import secrets
from typing import Any, NamedTuple, Protocol

from scripts.sim.payments.books import Books, BooksError, Checkout, Dispute, Payment, Refund
from scripts.sim.payments.currencies import Provider
from scripts.sim.payments.webhooks import Webhooks

_DECLINED = "card_declined"


class Told(NamedTuple):
    """An event to send: its kind and its whole body."""

    kind: str
    payload: dict[str, Any]


class Voice(Protocol):
    """How one provider tells what an entry has become. Pure."""

    def of_expiry(self, checkout: Checkout) -> list[Told]:
        """Return what follows when a checkout expired."""

    def of_payment(self, payment: Payment) -> list[Told]:
        """Return what follows when a payment came, failed, or is on its way."""

    def of_balance(self, payment: Payment) -> list[Told]:
        """Return what follows when it is known what a payment did to the merchant's balance."""

    def of_refund(self, refund: Refund, payment: Payment) -> list[Told]:
        """Return what follows when a refund began, arrived or failed."""

    def of_dispute(self, dispute: Dispute, payment: Payment) -> list[Told]:
        """Return what follows when a dispute was opened, reminded of, won or lost."""


class Till:
    """Pays, refunds and disputes, each once in the books and then aloud.

    Args:
        books: of all providers.
        webhooks: where events go.
        voices: one per provider.
    """

    def __init__(self, books: Books, webhooks: Webhooks, voices: dict[Provider, Voice]) -> None:
        self.books = books
        self.webhooks = webhooks
        # Whether refunds wait for ``end_refund``, as those of bank transfers do.
        self.refunds_wait = False
        self._voices = voices
        self._numbers = itertools.count(1)
        self._declines: list[str] = []

    def decline_next(self, code: str = _DECLINED, *, times: int = 1) -> None:
        """Let the next charges without a customer fail: ``card_declined``, and others of Stripe's codes."""
        self._declines.extend([code] * times)

    def take_decline(self) -> str | None:
        """Return how the next charge without a customer must fail, once."""
        return self._declines.pop(0) if self._declines else None

    def find_checkout(self, checkout_id: str) -> Checkout:
        """Return a checkout by its id or, the last of them, by its reference.

        Raises:
            BooksError: there is none.
        """
        found = self.books.checkouts.get(checkout_id)
        by_reference = [item for item in self.books.checkouts.values() if item.reference == checkout_id]
        if found is None and not by_reference:
            raise BooksError("closed", f"no checkout {checkout_id}")
        return found or by_reference[-1]

    def find_payment(self, payment_id: str) -> Payment:
        """Return a payment by its id, its number or, the first of them, by its reference.

        Raises:
            BooksError: there is none.
        """
        for payment in self.books.payments.values():
            if payment_id in (payment.id, str(payment.number), payment.reference):
                return payment
        raise BooksError("not_paid", f"no payment {payment_id}")

    # What customers do

    def pay(
        self,
        checkout: Checkout,
        *,
        amount_minor: int | None = None,
        currency: str | None = None,
        pending: bool = False,
    ) -> Payment:
        """Pay a checkout, as asked or otherwise; ``pending`` leaves it to ``settle`` or ``fail``.

        Raises:
            BooksError: see ``Books.pay``.
        """
        payment = self.books.pay(checkout, amount_minor=amount_minor, currency=currency, pending=pending)
        self.tell_payment(payment)
        return payment

    def decline(self, checkout: Checkout, failure: str = _DECLINED) -> Payment:
        """Let a try to pay fail; the checkout stays open.

        Raises:
            BooksError: see ``Books.decline``.
        """
        payment = self.books.decline(checkout, failure)
        self.tell_payment(payment)
        return payment

    def expire(self, checkout: Checkout) -> None:
        """Let a checkout expire.

        Raises:
            BooksError: see ``Books.expire``.
        """
        self.books.expire(checkout)
        self._tell(checkout.provider, self._voices[checkout.provider].of_expiry(checkout))

    def expire_due(self, checkout: Checkout) -> None:
        """Let a checkout expire whose time has come."""
        if checkout.status == "open" and self.books.now_s() >= checkout.expires_s:
            self.expire(checkout)

    # What banks do

    def settle(self, payment: Payment) -> None:
        """Let a payment come that was on its way.

        Raises:
            BooksError: see ``Books.settle``.
        """
        self.books.settle(payment)
        self.tell_payment(payment)

    def fail(self, payment: Payment, failure: str = "payment_failed") -> None:
        """Let a payment fail that was on its way.

        Raises:
            BooksError: see ``Books.fail``.
        """
        self.books.fail(payment, failure)
        self.tell_payment(payment)

    def refund(self, payment: Payment, amount_minor: int | None = None) -> Refund:
        """Send so much back, or all that is left, from the provider's side.

        Raises:
            BooksError: see ``Books.begin_refund``.
        """
        refund = self.begin_refund(payment, amount_minor)
        self.finish_refund(refund)
        return refund

    def begin_refund(self, payment: Payment, amount_minor: int | None = None, **given: Any) -> Refund:
        """Begin a refund and tell of it.

        Raises:
            BooksError: see ``Books.begin_refund``.
        """
        refund = self.books.begin_refund(payment, amount_minor, **given)
        self._tell(payment.provider, self._voices[payment.provider].of_refund(refund, payment))
        return refund

    def finish_refund(self, refund: Refund) -> None:
        """Let a refund arrive now, unless refunds wait."""
        if not self.refunds_wait:
            self.end_refund(refund)

    def end_refund(self, refund: Refund, *, failed: bool = False) -> None:
        """Let a refund arrive, or come back.

        Raises:
            BooksError: see ``Books.end_refund``.
        """
        self.books.end_refund(refund, failed=failed)
        payment = self.books.payments[refund.payment_id]
        self._tell(payment.provider, self._voices[payment.provider].of_refund(refund, payment))

    def dispute(self, payment: Payment, amount_minor: int | None = None, *, inquiry: bool = False) -> Dispute:
        """Let a customer's bank ask so much back, or all that is left; or, at Stripe, let it inquire first.

        Raises:
            BooksError: see ``Books.open_dispute``.
        """
        dispute = self.books.open_dispute(payment, amount_minor, inquiry=inquiry)
        self._tell_dispute(dispute)
        return dispute

    def end_inquiry(self, dispute: Dispute, *, disputed: bool) -> None:
        """Turn an inquiry into a dispute, or drop it.

        Raises:
            BooksError: see ``Books.end_inquiry``.
        """
        self.books.end_inquiry(dispute, disputed=disputed)
        self._tell_dispute(dispute)

    def remind(self, dispute: Dispute) -> None:
        """Remind the merchant of a dispute (Paystack), or begin to look at the answer to it (Stripe)."""
        dispute.reminders += 1
        self._tell_dispute(dispute)

    def win(self, dispute: Dispute) -> None:
        """Decide a dispute for the merchant.

        Raises:
            BooksError: see ``Books.close_dispute``.
        """
        self.books.close_dispute(dispute, won=True)
        self._tell_dispute(dispute)

    def lose(self, dispute: Dispute) -> None:
        """Decide a dispute for the customer.

        Raises:
            BooksError: see ``Books.close_dispute``.
        """
        self.books.close_dispute(dispute, won=False)
        self._tell_dispute(dispute)

    def tell_payment(self, payment: Payment) -> None:
        """Tell what a payment has become."""
        self._tell(payment.provider, self._voices[payment.provider].of_payment(payment))

    def tell_balance(self, payment: Payment) -> None:
        """Tell that it is known what a payment did to the balance; only Stripe does."""
        self._tell(payment.provider, self._voices[payment.provider].of_balance(payment))

    def _tell_dispute(self, dispute: Dispute) -> None:
        payment = self.books.payments[dispute.payment_id]
        self._tell(payment.provider, self._voices[payment.provider].of_dispute(dispute, payment))

    def _tell(self, provider: Provider, told: list[Told]) -> None:
        for kind, payload in told:
            # Only Stripe's events have ids of their own.
            event_id = payload["id"] if provider == "stripe" else f"{provider}-{next(self._numbers)}"
            self.webhooks.add(provider, kind, event_id, payload)


def new_id(prefix: str) -> str:
    """Return an id as Stripe makes them."""
    return f"{prefix}_{secrets.token_hex(12)}"
