"""Money from people, in the books: intents, what a payment provider says was paid, and what it took back."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from uuid import UUID

from billing.payments.units import PaymentProvider

IntentKind = Literal["topup", "auto"]


IntentState = Literal["creating", "pending", "failed", "expired", "paid", "review"]


PaymentState = Literal["pending", "failed", "expired", "succeeded"]


ReversalState = Literal["open", "final", "undone"]
RefundState = Literal["requested", ReversalState]


_REFERENCE = re.compile(r"tuma_([0-9a-f]{32})(?:_[0-9]{1,9})?")


@dataclass(frozen=True, slots=True)
class Intent:
    """A wish to pay so much into a wallet, in nano units of its currency.

    Args:
        kind: ``topup``: on a page that its payer opens; ``auto``: from the means of payment ``method_id`` of the customer
            ``provider_id``.
        method_due: the payer lets us keep what they pay with, and it is not noted yet.
    """

    id: UUID
    wallet_id: UUID
    user_id: UUID
    kind: IntentKind
    provider: PaymentProvider
    currency: str
    amount_nano: int
    state: IntentState
    attempt: int
    url: str | None
    note: str
    created_at: datetime
    expires_at: datetime
    ended_at: datetime | None
    method_due: bool
    provider_id: str | None = None
    method_id: str | None = None

    @property
    def reference(self) -> str:
        """What the provider is given to name it by."""
        return f"tuma_{self.id.hex}" + (f"_{self.attempt}" if self.attempt > 1 else "")


@dataclass(frozen=True, slots=True)
class Reversal:
    """A refund or a dispute as the provider tells it.

    Args:
        id: the provider's.
        amount_nano: in nano units of the payment's currency.
        state: ``open``: on its way, or undecided; ``final``: it stays so; ``undone``: the money is ours again.
        ours: our own refund's id, where the provider hands it back.
    """

    id: str
    kind: Literal["refund", "dispute"]
    amount_nano: int
    state: ReversalState
    ours: UUID | None = None


@dataclass(frozen=True, slots=True)
class Payment:
    """One transaction of a payment provider, as its API tells it.

    Args:
        id: the provider's.
        reference: what we gave it; somebody else's payments have others.
        state: whether the money came; ``expired``: nobody paid, and the page is closed (``id`` is the page's then).
        amount_nano: what was paid, in nano units of ``currency``.
        fee_nano: what the provider keeps of it, if it says so; in ``fee_currency``.
        unread: what of its refunds and disputes could not be read, in words: ``reversals`` are not all then.
    """

    provider: PaymentProvider
    id: str
    reference: str
    state: PaymentState
    amount_nano: int
    currency: str
    fee_nano: int | None = None
    fee_currency: str | None = None
    reversals: Sequence[Reversal] = ()
    unread: str = ""


@dataclass(frozen=True, slots=True)
class WebhookEvent:
    """What a provider sent, as it was kept."""

    id: UUID
    provider: PaymentProvider
    body: str
    tries: int
    received_at: datetime


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of a payment: ``credited``, ``review``, ``known``, or ``none`` where no money came; and of its reversals."""

    credit: Literal["credited", "review", "known", "none"]
    reversals: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Refund:
    """A refund of ours for which money is set aside; nano units. The provider is given ``id`` to name it by."""

    id: UUID
    provider: PaymentProvider
    provider_txn_id: str
    amount_nano: int
    state: RefundState


@dataclass(frozen=True, slots=True)
class OpenReversal:
    """A reversal that has not ended: ``requested`` by us, or ``open`` at the provider."""

    id: UUID
    provider: PaymentProvider
    provider_txn_id: str
    kind: Literal["refund", "dispute"]
    amount_nano: int
    state: Literal["requested", "open"]


@dataclass(frozen=True, slots=True)
class SavedMethod:
    """A means of payment that its owner let us charge again. ``label`` is for people: "visa …4242"."""

    customer_id: str
    method_id: str
    label: str


def parse_reference(reference: str) -> UUID | None:
    """Return the intent that a reference names; None where it is not one of ours."""
    found = _REFERENCE.fullmatch(reference)
    return None if found is None else UUID(found[1])
