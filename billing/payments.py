"""Money from people, in the books: intents, what a payment provider says was paid, and what it took back.

A ``Payment`` is the whole standing of one transaction as the provider's API tells it. ``apply`` moves our books to it, and may
be repeated, run twice at once, or come late: what is final is not undone by an older answer, and a crash in between leaves
what the next ``apply`` completes. So the order and number of webhooks do not matter.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal
from uuid import UUID

import asyncpg

from billing.acting import acting
from billing.db import Database
from billing.errors import (
    BrokenInvariantError,
    InputError,
    NotFoundError,
    RateLimitError,
)
from billing.ids import new_id
from billing.meters import Meters
from billing.money import get_currency
from billing.payunits import PaymentProvider, get_payment_unit, minor_units

IntentState = Literal["creating", "pending", "failed", "expired", "paid", "review"]
PaymentState = Literal["pending", "failed", "expired", "succeeded"]
ReversalState = Literal["open", "final", "undone"]
_REFERENCE = re.compile(r"tuma_([0-9a-f]{32})(?:_[0-9]{1,9})?")
TAKEN = 50  # pieces of one kind of work at a time
_LEASE = timedelta(seconds=60)
_LIVE_PAUSE_MS = 60_000
WORK_MAX_S = 45.0  # who took a refund to send it stops before another may take it
_INTENT = (
    "id, wallet_id, user_id, kind, provider, currency, amount_nano, state, attempt, url, note, created_at, expires_at,"
    " ended_at, method_due"
)
WHOLE_INTENT = f"{_INTENT}, provider_id, method_id"  # what a person does not see


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
    kind: str
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
    state: str


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


class Intents:
    """A person's own intents.

    Args:
        database: by the role that acts for people.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(
        self,
        owner: UUID,
        wallet_id: UUID,
        provider: PaymentProvider,
        *,
        amount_nano: int,
        currency: str,
        key: str | None = None,
        saves_method: bool = False,
        expires_after_s: float,
        poll_after_s: float,
        live_max: int,
    ) -> Intent:
        """Note a wish to pay, before any provider is asked.

        Args:
            owner: who wishes it.
            wallet_id: theirs.
            provider: who shall take the money.
            amount_nano: in nano units of ``currency``.
            currency: the wallet's.
            key: idempotency key; a repeat with the same input returns the first intent.
            saves_method: the payer lets us keep what they pay with.
            expires_after_s: when it is no longer waited for; money that comes later is credited all the same.
            poll_after_s: when the provider is asked about it first, in seconds.
            live_max: how many of the wallet's may wait to be paid at once.

        Raises:
            RateLimitError: as many wait already.
            InputError: another currency than the wallet's, an amount that the provider cannot take, or the key was used
                with another input.
            NotFoundError: the wallet is not theirs.
        """
        get_currency(currency)
        get_payment_unit(currency, provider)
        minor_units(amount_nano, currency, provider)
        if amount_nano <= 0:
            raise InputError("the amount to pay must be positive")
        try:
            async with self._database.as_person(owner) as connection:
                row = await connection.fetchrow(
                    f"SELECT {_INTENT} FROM own_create_intent($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",  # noqa: S608 - column names of this module
                    new_id(),
                    wallet_id,
                    provider,
                    currency,
                    amount_nano,
                    key,
                    timedelta(seconds=expires_after_s),
                    timedelta(seconds=poll_after_s),
                    saves_method,
                    live_max,
                )
        except asyncpg.ProgramLimitExceededError as error:
            raise RateLimitError(str(error), retry_after_ms=_LIVE_PAUSE_MS) from None
        except asyncpg.NoDataFoundError:
            raise NotFoundError(f"there is no wallet {wallet_id}") from None
        except (asyncpg.UniqueViolationError, asyncpg.InvalidParameterValueError) as error:
            raise InputError(str(error)) from None
        return Intent(**row)

    async def get(self, owner: UUID, intent_id: UUID, *, wallet_id: UUID | None = None) -> Intent:
        """Return a person's intent, of the wallet named.

        Raises:
            NotFoundError: there is none of theirs.
        """
        async with self._database.as_person(owner, readonly=True) as connection:
            row = await connection.fetchrow(f"SELECT {_INTENT} FROM payment_intents WHERE id = $1", intent_id)  # noqa: S608 - column names of this module
        if row is None or wallet_id not in (None, row["wallet_id"]):
            raise NotFoundError(f"there is no top-up {intent_id}")
        return Intent(**row)


class Payments:
    """Keeps webhooks, and applies what providers say.

    Args:
        database: by the role that may do that and nothing else.
        meters: where webhooks are counted.
    """

    def __init__(self, database: Database, meters: Meters | None = None) -> None:
        self._database = database
        self._meters = meters or Meters()

    async def receive(self, provider: PaymentProvider, key: str, body: str) -> bool:
        """Keep a webhook whose signature was checked; False where it is there already.

        Args:
            provider: whose.
            key: the provider's id of the event, or its body's digest.
            body: as it came.
        """
        async with self._database.transaction() as connection:
            new: bool = await connection.fetchval(
                "SELECT receive_webhook($1, $2, $3, $4)", new_id(), provider, key, body
            )
        self._meters.webhooks.add(1, provider, "received" if new else "repeated")
        return new

    async def take_events(self, limit: int = TAKEN) -> list[WebhookEvent]:
        """Take events that nobody else works on; one that is not ended comes again, after ever longer pauses."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                "SELECT id, provider, body, tries, received_at FROM take_webhooks($1, $2)", limit, _LEASE
            )
        return [WebhookEvent(**row) for row in rows]

    async def end_event(
        self, event_id: UUID, state: Literal["done", "ignored", "review"], note: str = ""
    ) -> None:
        """Note what became of an event."""
        async with self._database.transaction() as connection:
            await connection.execute("SELECT end_webhook($1, $2, $3)", event_id, state, note)
        self._meters.webhook_ends.add(1, state)

    async def find(self, intent_id: UUID) -> Intent | None:
        """Return anybody's intent."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow(f"SELECT {WHOLE_INTENT} FROM find_intent($1)", intent_id)  # noqa: S608 - column names of this module
        return None if row is None else Intent(**row)

    async def take_intents(self, *, pause_s: float, late_s: float, limit: int = TAKEN) -> list[Intent]:
        """Take intents that the provider is to be asked about.

        Args:
            pause_s: before the second question; then it doubles, up to an hour.
            late_s: how long after its expiry an intent is still asked about.
            limit: how many at once.
        """
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                f"SELECT {WHOLE_INTENT} FROM take_intents($1, $2, $3, $4)",  # noqa: S608 - column names of this module
                limit,
                _LEASE,
                timedelta(seconds=pause_s),
                timedelta(seconds=late_s),
            )
        return [Intent(**row) for row in rows]

    async def note_page(self, intent_id: UUID, *, provider_id: str, url: str | None) -> None:
        """Note what the provider calls it, and the page on which it is paid, if there is one."""
        async with self._database.transaction() as connection:
            await connection.execute("SELECT note_page($1, $2, $3)", intent_id, provider_id, url)

    async def try_page_again(self, intent: Intent) -> int:
        """Count another attempt to get a page, under another reference; returns its number."""
        async with self._database.transaction() as connection:
            number: int = await connection.fetchval(
                "SELECT try_page_again($1, $2)", intent.id, intent.attempt
            )
        return number

    async def end_intent(self, intent_id: UUID, state: Literal["failed", "expired"], note: str) -> None:
        """Note that no money is expected any more; what comes all the same is credited."""
        async with self._database.transaction() as connection:
            await connection.execute("SELECT end_intent($1, $2, $3)", intent_id, state, note)

    async def note_method(self, intent_id: UUID, method: SavedMethod | None) -> bool:
        """Note with what an intent was paid, for its wallet to pay with again; None: nothing was kept."""
        kept = (None, None, None) if method is None else (method.customer_id, method.method_id, method.label)
        async with self._database.transaction() as connection:
            noted: bool = await connection.fetchval("SELECT note_method($1, $2, $3, $4)", intent_id, *kept)
        return noted

    async def begin_auto_topups(self, *, expires_after_s: float, limit: int = TAKEN) -> list[Intent]:
        """Begin a top-up for each wallet whose owner wants it now, from what is kept to pay with; each once, whoever asks."""
        async with self._database.connection() as connection:
            found = await connection.fetch("SELECT * FROM find_auto_topups($1)", limit)
        begun = []
        for row in found:
            async with self._database.transaction() as connection:
                made = await connection.fetchrow(
                    f"SELECT {WHOLE_INTENT} FROM begin_auto_topup($1, $2, $3)",  # noqa: S608 - column names of this module
                    new_id(),
                    row[0],
                    timedelta(seconds=expires_after_s),
                )
            if made is not None:
                begun.append(Intent(**made))
        return begun

    async def take_reversals(self, *, pause_s: float, limit: int = TAKEN) -> list[OpenReversal]:
        """Take reversals that the provider is to be asked about, as intents are taken."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                "SELECT id, provider, provider_txn_id, kind, amount_nano, state FROM take_reversals($1, $2, $3)",
                limit,
                _LEASE,
                timedelta(seconds=pause_s),
            )
        return [OpenReversal(**row) for row in rows]

    async def take_reversal(self, reversal_id: UUID) -> OpenReversal | None:
        """Take one reversal that the provider is to be asked about now; None where another process has it, or it has ended."""
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(
                "SELECT id, provider, provider_txn_id, kind, amount_nano, state FROM take_reversal($1, $2)",
                reversal_id,
                _LEASE,
            )
        return None if row is None else OpenReversal(**row)

    async def is_refund_requested(self, refund_id: UUID) -> bool:
        """Return whether a refund of ours is still one that the provider has not told of."""
        async with self._database.connection() as connection:
            requested: bool = await connection.fetchval("SELECT is_refund_requested($1)", refund_id)
        return requested

    async def undo_refund(self, item: OpenReversal) -> None:
        """Give back what was set aside for a refund of ours that the provider refuses."""
        with acting(f"payment:{item.provider}"):
            await self._reverse_one(
                item.provider,
                item.provider_txn_id,
                Reversal(f"refused {item.id}", "refund", item.amount_nano, "undone", item.id),
            )

    async def apply(self, payment: Payment, *, takes_more: bool = False) -> Applied:
        """Move the books to what a provider's API says of a payment.

        Each posting is one transaction: credit, fee, each reversal. A crash between them is completed by the next ``apply``.

        Args:
            payment: its whole standing.
            takes_more: the provider may take more than was asked; what was asked is credited then.

        Raises:
            BrokenInvariantError: it contradicts what was posted; nothing is changed.
        """
        with acting(f"payment:{payment.provider}"):
            if payment.state != "succeeded":
                return Applied("none")
            credit = await self._credit(payment, takes_more=takes_more)
            if payment.fee_nano is not None and payment.fee_currency is not None:
                await self._note_fee(payment.provider, payment.id, payment.fee_nano, payment.fee_currency)
            return Applied(
                credit,
                [await self._reverse_one(payment.provider, payment.id, item) for item in payment.reversals],
            )

    async def _credit(
        self, payment: Payment, *, takes_more: bool
    ) -> Literal["credited", "review", "known", "none"]:
        async with self._database.transaction() as connection:
            verdict: Literal["credited", "review", "known"] = await connection.fetchval(
                "SELECT credit_payment($1, $2, $3, $4, $5, $6, $7)",
                new_id(),
                payment.provider,
                payment.id,
                parse_reference(payment.reference),
                payment.currency,
                payment.amount_nano,
                takes_more,
            )
        return verdict

    async def _note_fee(self, provider: str, txn_id: str, fee_nano: int, currency: str) -> None:
        async with self._database.transaction() as connection:
            await connection.execute(
                "SELECT note_payment_fee($1, $2, $3, $4, $5)", new_id(), provider, txn_id, fee_nano, currency
            )

    async def _reverse_one(self, provider: PaymentProvider, txn_id: str, item: Reversal) -> str:
        try:
            async with self._database.transaction() as connection:
                verdict: str = await connection.fetchval(
                    "SELECT reverse_payment($1, $2, $3, $4, $5, $6, $7, $8, $9)",
                    new_id(),
                    new_id(),
                    provider,
                    txn_id,
                    item.kind,
                    item.id,
                    item.ours,
                    item.state,
                    item.amount_nano,
                )
        except asyncpg.IntegrityConstraintViolationError as error:
            raise BrokenInvariantError(str(error)) from None
        return verdict
