"""The simulated payment providers' own books: every checkout, payment, fee, refund, dispute and customer, in integer minor units.

What a minor unit is differs per provider and currency, see ``currencies``. Nothing here waits, sends or knows a protocol.
"""

import copy
import itertools
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from scripts.sim.payments.currencies import Provider
from scripts.sim.payments.fees import fee_minor

# Above 2³¹, as the providers' own ids are by now. New books count from the time on (in milliseconds), so that books which
# begin anew beside an old database hand out no number that is credited there already.
_FIRST_NUMBER = 4_099_260_516
_ID_BYTES = 12
_DAY_S = 86_400

Why = Literal["closed", "not_paid", "too_much", "not_pending", "amount"]


class BooksError(ValueError):
    """What the books do not allow; ``why`` is one word for it."""

    def __init__(self, why: Why, message: str) -> None:
        super().__init__(message)
        self.why = why


@dataclass(slots=True)
class Checkout:
    """A payment page that waits for its customer. ``currency`` in capitals, times in Unix seconds.

    ``reference`` is the merchant's own; ``given`` keeps what the provider's protocol needs besides, and under ``payment``
    the fields that its payments get.
    """

    id: str
    provider: Provider
    reference: str
    amount_minor: int
    currency: str
    created_s: int
    expires_s: int
    email: str | None = None
    success_url: str | None = None
    cancel_url: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    status: Literal["open", "complete", "expired"] = "open"
    payment_ids: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Payment:
    """Money that a customer sent, or tried to. ``number`` is its id where a provider counts; ``fee_minor`` is kept by it."""

    id: str
    number: int
    provider: Provider
    checkout_id: str | None
    reference: str
    amount_minor: int
    currency: str
    created_s: int
    status: Literal["pending", "succeeded", "failed"]
    fee_minor: int = 0
    paid_s: int | None = None
    was_pending: bool = False
    failure: str | None = None
    email: str | None = None
    customer_id: str | None = None
    method_id: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Refund:
    """Money sent back. It counts from its begin, and no more once it has failed."""

    id: str
    number: int
    payment_id: str
    amount_minor: int
    created_s: int
    status: Literal["pending", "succeeded", "failed"] = "pending"
    reason: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Dispute:
    """Money that a customer's bank asks back: withdrawn while it is open and when it is lost, ours again when it is won.

    An ``inquiry`` moves no money: it is ``dropped``, or becomes a dispute.
    """

    id: str
    number: int
    payment_id: str
    amount_minor: int
    created_s: int
    status: Literal["inquiry", "dropped", "open", "won", "lost"] = "open"
    was_inquiry: bool = False
    reminders: int = 0
    closed_s: int | None = None


@dataclass(slots=True)
class Customer:
    """Somebody whose card may be kept; only Stripe has such."""

    id: str
    created_s: int
    email: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


Entry = Checkout | Payment | Refund | Dispute | Customer
KINDS: dict[str, type[Entry]] = {
    "checkouts": Checkout,
    "payments": Payment,
    "refunds": Refund,
    "disputes": Dispute,
    "customers": Customer,
}


class Books:
    """All entries, by id.

    Args:
        clock: Unix seconds.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self.checkouts: dict[str, Checkout] = {}
        self.payments: dict[str, Payment] = {}
        self.refunds: dict[str, Refund] = {}
        self.disputes: dict[str, Dispute] = {}
        self.customers: dict[str, Customer] = {}
        self._clock = clock
        self._numbers = itertools.count(max(_FIRST_NUMBER, int(clock() * 1000)))

    def entries(self, kind: str) -> dict[str, Any]:
        """Return the entries of one of ``KINDS``, by id."""
        found: dict[str, Any] = getattr(self, kind)
        return found

    def count_on(self) -> None:
        """Hand out no number that an entry has, as entries of an earlier run were put among them."""
        numbers = [entry.number for entry in self.payments.values()]
        numbers += [entry.number for entry in self.refunds.values()]
        numbers += [entry.number for entry in self.disputes.values()]
        highest = max(numbers, default=0)
        self._numbers = itertools.count(max(next(self._numbers), highest + 1))

    def now_s(self) -> int:
        """Return the time in whole Unix seconds."""
        return int(self._clock())

    def paid_total(self, provider: Provider, currency: str, *, open_disputes_reversed: bool = True) -> int:
        """Return what was paid less what was reversed, in minor units: what the wallets must have been credited.

        Args:
            provider: of which provider.
            currency: in capitals; the one that was paid in.
            open_disputes_reversed: whether an open dispute counts as reversed already, as Stripe withdraws it at once.
        """
        states = ("open", "lost") if open_disputes_reversed else ("lost",)
        paid = {payment.id: payment for payment in self._paid(provider, currency)}
        total = sum(payment.amount_minor for payment in paid.values())
        total -= sum(
            refund.amount_minor
            for refund in self.refunds.values()
            if refund.payment_id in paid and refund.status != "failed"
        )
        return total - sum(
            dispute.amount_minor
            for dispute in self.disputes.values()
            if dispute.payment_id in paid and dispute.status in states
        )

    def fees_total(self, provider: Provider, currency: str) -> int:
        """Return what the provider kept of all payments, in minor units; it keeps it when a payment is refunded too."""
        return sum(payment.fee_minor for payment in self._paid(provider, currency))

    def _paid(self, provider: Provider, currency: str) -> Iterable[Payment]:
        for payment in self.payments.values():
            if (payment.provider, payment.currency, payment.status) == (provider, currency, "succeeded"):
                yield payment

    # Finding

    def payments_of(self, provider: Provider) -> list[Payment]:
        """Return a provider's payments, oldest first."""
        return [payment for payment in self.payments.values() if payment.provider == provider]

    def checkouts_of(self, provider: Provider) -> list[Checkout]:
        """Return a provider's checkouts, oldest first."""
        return [checkout for checkout in self.checkouts.values() if checkout.provider == provider]

    def refunds_of(self, payment: Payment) -> list[Refund]:
        """Return a payment's refunds, oldest first."""
        return [refund for refund in self.refunds.values() if refund.payment_id == payment.id]

    def disputes_of(self, payment: Payment) -> list[Dispute]:
        """Return a payment's disputes, oldest first."""
        return [dispute for dispute in self.disputes.values() if dispute.payment_id == payment.id]

    def refunded_minor(self, payment: Payment) -> int:
        """Return what was sent back of a payment."""
        return sum(item.amount_minor for item in self.refunds_of(payment) if item.status != "failed")

    def reversible_minor(self, payment: Payment) -> int:
        """Return what of a payment can still be refunded or disputed; nothing, unless it succeeded."""
        if payment.status != "succeeded":
            return 0
        states = ("open", "lost")
        disputed = sum(item.amount_minor for item in self.disputes_of(payment) if item.status in states)
        return payment.amount_minor - self.refunded_minor(payment) - disputed

    def find_by_number(self, provider: Provider, number: str) -> Payment | None:
        """Return the payment that a provider counts under this number."""
        found = (payment for payment in self.payments_of(provider) if str(payment.number) == number)
        return next(found, None)

    def settled_of(self, checkout: Checkout) -> Payment | None:
        """Return the payment that says how a checkout went: the first that succeeded, else the last that was tried."""
        tried = [self.payments[payment_id] for payment_id in checkout.payment_ids]
        paid = [payment for payment in tried if payment.status == "succeeded"]
        return paid[0] if paid else (tried[-1] if tried else None)

    # Entries

    def open_checkout(
        self,
        provider: Provider,
        *,
        checkout_id: str,
        reference: str,
        amount_minor: int,
        currency: str,
        expires_s: int | None = None,
        **given: Any,
    ) -> Checkout:
        """Open a checkout; ``given`` are more of its fields.

        Raises:
            BooksError: ``amount``: not above zero.
        """
        _check_positive(amount_minor)
        now_s = self.now_s()
        checkout = Checkout(
            id=checkout_id,
            provider=provider,
            reference=reference,
            amount_minor=amount_minor,
            currency=currency,
            created_s=now_s,
            expires_s=now_s + _DAY_S if expires_s is None else expires_s,
            **given,
        )
        self.checkouts[checkout.id] = checkout
        return checkout

    def pay(
        self,
        checkout: Checkout,
        *,
        amount_minor: int | None = None,
        currency: str | None = None,
        pending: bool = False,
    ) -> Payment:
        """Pay a checkout: as asked, or another amount or currency; a second time too, since customers do.

        Raises:
            BooksError: ``closed``: it expired; ``amount``: not above zero.
        """
        payment = self._try(checkout, amount_minor, currency, "pending")
        payment.was_pending = pending
        checkout.status = "complete"
        return payment if pending else self.settle(payment)

    def decline(self, checkout: Checkout, failure: str) -> Payment:
        """Book a try that failed; the checkout stays open.

        Raises:
            BooksError: ``closed``: it expired.
        """
        payment = self._try(checkout, None, None, "failed")
        payment.failure = failure
        return payment

    def _try(
        self,
        checkout: Checkout,
        amount_minor: int | None,
        currency: str | None,
        status: Literal["pending", "failed"],
    ) -> Payment:
        if checkout.status == "expired":
            raise BooksError("closed", "this checkout has expired")
        tried = self.settled_of(checkout)
        if tried is not None and tried.status == "failed" and checkout.provider == "stripe":
            return self._try_again(tried, amount_minor, currency, status)
        payment = self.enter_payment(
            checkout.provider,
            reference=checkout.reference,
            amount_minor=checkout.amount_minor if amount_minor is None else amount_minor,
            currency=currency or checkout.currency,
            status=status,
            checkout_id=checkout.id,
            email=checkout.email,
            **copy.deepcopy(checkout.given.get("payment", {})),
        )
        checkout.payment_ids.append(payment.id)
        return payment

    @staticmethod
    def _try_again(
        tried: Payment, amount_minor: int | None, currency: str | None, status: Literal["pending", "failed"]
    ) -> Payment:
        """Stripe's session has one payment, whatever the number of its tries."""
        if amount_minor is not None:
            _check_positive(amount_minor)
            tried.amount_minor = amount_minor
        tried.currency = currency or tried.currency
        tried.status, tried.failure = status, None
        return tried

    def enter_payment(
        self,
        provider: Provider,
        *,
        reference: str,
        amount_minor: int,
        currency: str,
        status: Literal["pending", "failed"],
        **given: Any,
    ) -> Payment:
        """Enter a payment, of a checkout or without one; ``given`` are more of its fields.

        Raises:
            BooksError: ``amount``: not above zero.
        """
        _check_positive(amount_minor)
        number = next(self._numbers)
        payment = Payment(
            id=f"pi_{secrets.token_hex(_ID_BYTES)}" if provider == "stripe" else f"{provider}-{number}",
            number=number,
            provider=provider,
            reference=reference,
            amount_minor=amount_minor,
            currency=currency,
            created_s=self.now_s(),
            status=status,
            checkout_id=given.pop("checkout_id", None),
            **given,
        )
        self.payments[payment.id] = payment
        return payment

    def settle(self, payment: Payment) -> Payment:
        """Book that the money came, and the fee.

        Raises:
            BooksError: ``not_pending``: it came already, or never will.
        """
        _check_pending(payment.status)
        payment.status = "succeeded"
        payment.paid_s = self.now_s()
        payment.fee_minor = fee_minor(payment.provider, payment.amount_minor, payment.currency)
        return payment

    def fail(self, payment: Payment, failure: str) -> Payment:
        """Book that the money will not come.

        Raises:
            BooksError: ``not_pending``: it came already, or failed before.
        """
        _check_pending(payment.status)
        payment.status = "failed"
        payment.failure = failure
        return payment

    def expire(self, checkout: Checkout) -> Checkout:
        """Close a checkout that nobody paid.

        Raises:
            BooksError: ``closed``: it was paid, or expired before.
        """
        if checkout.status != "open":
            raise BooksError("closed", f"this checkout is {checkout.status}")
        checkout.status = "expired"
        return checkout

    def begin_refund(self, payment: Payment, amount_minor: int | None = None, **given: Any) -> Refund:
        """Begin to send money back: so much, or all that is left.

        Raises:
            BooksError: ``not_paid``, ``amount``, or ``too_much``: more than what is left.
        """
        amount_minor = self._check_reversal(payment, amount_minor)
        prefix = "re_" if payment.provider == "stripe" else f"{payment.provider}-refund-"
        refund = Refund(
            id=f"{prefix}{secrets.token_hex(_ID_BYTES)}",
            number=next(self._numbers),
            payment_id=payment.id,
            amount_minor=amount_minor,
            created_s=self.now_s(),
            **given,
        )
        self.refunds[refund.id] = refund
        return refund

    def end_refund(self, refund: Refund, *, failed: bool = False) -> Refund:
        """Book that a refund arrived, or that it came back.

        Raises:
            BooksError: ``not_pending``: it failed before, or arrived and did not fail now.
        """
        if refund.status == "failed" or (refund.status == "succeeded" and not failed):
            raise BooksError("not_pending", f"this refund has {refund.status}")
        refund.status = "failed" if failed else "succeeded"
        return refund

    def open_dispute(
        self, payment: Payment, amount_minor: int | None = None, *, inquiry: bool = False
    ) -> Dispute:
        """Open a dispute about so much, or all that is left; or an inquiry, which only Stripe has.

        Raises:
            BooksError: ``not_paid``, ``amount``, or ``too_much``: more than what is left.
        """
        amount_minor = self._check_reversal(payment, amount_minor)
        prefix = "dp_" if payment.provider == "stripe" else f"{payment.provider}-dispute-"
        dispute = Dispute(
            id=f"{prefix}{secrets.token_hex(_ID_BYTES)}",
            number=next(self._numbers),
            payment_id=payment.id,
            amount_minor=amount_minor,
            created_s=self.now_s(),
            status="inquiry" if inquiry else "open",
            was_inquiry=inquiry,
        )
        self.disputes[dispute.id] = dispute
        return dispute

    def end_inquiry(self, dispute: Dispute, *, disputed: bool) -> Dispute:
        """Turn an inquiry into a dispute, or drop it.

        Raises:
            BooksError: ``closed``: it is none, or ended before.
        """
        if dispute.status != "inquiry":
            raise BooksError("closed", f"this dispute is {dispute.status}")
        dispute.status = "open" if disputed else "dropped"
        dispute.reminders = 0
        return dispute

    def close_dispute(self, dispute: Dispute, *, won: bool) -> Dispute:
        """Decide a dispute.

        Raises:
            BooksError: ``closed``: it was decided before.
        """
        if dispute.status != "open":
            raise BooksError("closed", f"this dispute is {dispute.status}")
        dispute.status = "won" if won else "lost"
        dispute.closed_s = self.now_s()
        return dispute

    def as_json(self) -> dict[str, Any]:
        """Return all entries as they are."""
        return {kind: [asdict(entry) for entry in self.entries(kind).values()] for kind in KINDS}

    def _check_reversal(self, payment: Payment, amount_minor: int | None) -> int:
        if payment.status != "succeeded":
            raise BooksError("not_paid", "this payment has not succeeded")
        left_minor = self.reversible_minor(payment)
        amount_minor = left_minor if amount_minor is None else amount_minor
        if amount_minor > left_minor or not left_minor:
            raise BooksError("too_much", f"of this payment {left_minor} is left")
        _check_positive(amount_minor)
        return amount_minor


def _check_positive(amount_minor: int) -> None:
    if amount_minor <= 0:
        raise BooksError("amount", "an amount is above zero")


def _check_pending(status: str) -> None:
    if status != "pending":
        raise BooksError("not_pending", f"this payment has {status}")
