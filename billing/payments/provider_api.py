"""What Tuma asks of a payment provider, whichever it is."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, runtime_checkable

from billing.errors import InputError, PaymentsUnavailableError
from billing.payments.payment import Intent, Payment, Refund, Reversal, SavedMethod
from billing.payments.units import PaymentProvider


class PaymentRefusedError(InputError):
    """The payment provider refuses what it was asked; its own words, as far as they are fit to be shown."""


class NotSentError(PaymentsUnavailableError):
    """What was asked did certainly not reach the provider, or was turned away at its door."""


class ReferenceUsedError(PaymentRefusedError):
    """The provider has a page for this reference already: an answer of its was lost."""


@dataclass(frozen=True, slots=True)
class Page:
    """Where a payer pays. ``id``: the provider's, of the page."""

    id: str
    url: str


@dataclass(frozen=True, slots=True)
class Hint:
    """What a webhook is about: nothing in it is believed, it says where to look.

    Args:
        key: the provider's id of the event; empty where it has none.
        payments: ids of transactions.
        references: ours.
    """

    key: str = ""
    payments: Sequence[str] = ()
    references: Sequence[str] = ()


class PaymentApi(Protocol):
    """One payment provider."""

    @property
    def provider(self) -> PaymentProvider:
        """Which."""

    @property
    def takes_more(self) -> bool:
        """Whether it may take more of the payer than was asked: its fee."""

    async def create_page(self, intent: Intent, *, email: str, return_url: str | None) -> Page:
        """Have a page made on which an intent is paid; the same again for the same reference, where the provider can.

        Where ``intent.method_due``, what is paid with is saved, and the payer is told so; that takes a ``SavedMethodApi``.

        Raises:
            PaymentRefusedError: it does not take this.
            ReferenceUsedError: its answer was lost before; another reference will do.
            PaymentsUnavailableError: nothing is known.
        """

    async def find(self, intent: Intent) -> list[Payment]:
        """Return the payments of an intent, each with its whole standing.

        Raises:
            PaymentsUnavailableError: nothing is known.
        """

    async def look(self, txn_id: str) -> Payment | None:
        """Return the whole standing of a transaction; None where there is none.

        Raises:
            PaymentsUnavailableError: nothing is known.
        """

    def read_webhook(self, body: bytes) -> Hint:
        """Return what a webhook is about.

        Raises:
            InputError: it is none of the provider's.
        """

    def list_recent(self, since: datetime) -> AsyncIterator[str]:
        """Return the ids of the transactions that were paid or taken back since a moment."""

    @property
    def sends_once(self) -> bool:
        """Whether the same refund may be sent again, as the provider knows it by a key of ours."""

    async def refund(self, refund: Refund, currency: str) -> Reversal | None:
        """Have money sent back; return it as the provider's own answer tells it, None where that names nothing.

        Raises:
            PaymentRefusedError: it will not.
            NotSentError: it was not asked.
            PaymentsUnavailableError: nothing is known: it may have been sent.
        """

    async def close(self) -> None:
        """Close its connections."""


@runtime_checkable
class SavedMethodApi(PaymentApi, Protocol):
    """A provider that can charge a means of payment that was saved."""

    async def find_method(self, txn_id: str) -> SavedMethod | None:
        """Return what was saved when this payment was made; None if nothing was.

        Raises:
            PaymentsUnavailableError: nothing is known.
        """

    async def charge(self, intent: Intent, method: SavedMethod) -> None:
        """Charge it, once per reference of an intent: whoever is not sure whether it was asks ``find`` first.

        ``intent.provider_id`` is ``method.customer_id``: ``find`` goes through what that customer was charged, and so finds a
        charge whose answer was lost.

        Raises:
            PaymentRefusedError: declined; the provider's code stands in brackets at the end.
            PaymentsUnavailableError: nothing is known; ask again.
        """
