"""Money from people, in the books: intents, what a payment provider says was paid, and what it took back.

A ``Payment`` is the whole standing of one transaction as the provider's API tells it. ``apply`` moves our books to it, and may
be repeated, run twice at once, or come late: what is final is not undone by an older answer, and a crash in between leaves
what the next ``apply`` completes. So the order and number of webhooks do not matter.
"""

from datetime import timedelta
from typing import Literal
from uuid import UUID

import asyncpg

from billing.actor import acting
from billing.errors import BrokenInvariantError
from billing.ids import new_id
from billing.meters import Meters
from billing.payments.intents import _INTENT
from billing.payments.payment import (
    Applied,
    Intent,
    OpenReversal,
    Payment,
    Reversal,
    SavedMethod,
    WebhookEvent,
    parse_reference,
)
from billing.payments.units import PaymentProvider
from billing.postgres.database import Database

TAKEN = 50  # pieces of one kind of work at a time
_LEASE = timedelta(seconds=60)
WORK_MAX_S = 45.0  # who took a refund to send it stops before another may take it
WHOLE_INTENT = f"{_INTENT}, provider_id, method_id"  # what a person does not see


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

    async def begin_sending(self, refund_id: UUID) -> bool:
        """Note that a refund of ours is given to its provider; False where it was before, or is none any more."""
        async with self._database.transaction() as connection:
            begun: bool = await connection.fetchval("SELECT begin_sending($1)", refund_id)
        return begun

    async def was_not_sent(self, refund_id: UUID) -> None:
        """Note that it certainly did not get there."""
        async with self._database.transaction() as connection:
            await connection.execute("SELECT was_not_sent($1)", refund_id)

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
