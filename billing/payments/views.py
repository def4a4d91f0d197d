"""Payments as an operator sees them: lists, everything about one, and the webhooks; amounts are decimal strings in major units."""

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any, get_args
from uuid import UUID

from billing.errors import InputError, NotFoundError
from billing.money import format_amount
from billing.payments.answers import (
    ConsequencesFields,
    IntentJson,
    PaymentFileJson,
    PaymentJson,
    PaymentViewState,
    ReviewJson,
    WebhookEventJson,
    WebhookState,
    WholePaymentJson,
)
from billing.payments.payment import Intent, parse_reference
from billing.payments.payments import WHOLE_INTENT
from billing.payments.reviews import Reviews
from billing.payments.units import PaymentProvider
from billing.postgres.database import Database

PAGE_MAX = 1_000
STATES = get_args(PaymentViewState)
EVENT_STATES = get_args(WebhookState)
_ABOUT_MAX = 50  # webhooks that are shown with a payment
# A payment's state is what an operator has to know of it. returned: it was in review, and all that no wallet got went back.
_STATE = """
    CASE WHEN c.state <> 'credited' AND c.paid_nano - c.credited_nano > coalesce(r.suspense_nano, 0) THEN 'review'
         WHEN c.state = 'review' THEN 'returned'
         WHEN c.state = 'resolved' THEN 'resolved'
         ELSE coalesce(i.state, 'paid') END
"""
_LIST = f"""
SELECT * FROM (
    SELECT coalesce(c.provider, i.provider) AS provider, c.provider_txn_id, i.id AS intent_id, i.kind,
           coalesce(c.wallet_id, i.wallet_id) AS wallet_id, i.amount_nano, i.currency AS asked_currency, c.paid_nano,
           c.currency AS paid_currency, c.credited_nano, c.fee_nano, c.fee_currency, coalesce(r.amount_nano, 0) AS reversed_nano,
           coalesce(r.suspense_nano, 0) AS suspense_reversed_nano, {_STATE} AS state,
           coalesce(nullif(c.note, ''), i.note, '') AS note, coalesce(i.created_at, c.created_at) AS created_at
    FROM payment_intents i FULL JOIN payment_credits c ON c.intent_id = i.id
    LEFT JOIN LATERAL (SELECT sum(t.amount_nano)::bigint AS amount_nano, sum(t.suspense_nano)::bigint AS suspense_nano
                       FROM payment_reversals t WHERE t.state <> 'undone'
                         AND (t.provider, t.provider_txn_id) = (c.provider, c.provider_txn_id)) r ON true
) p
WHERE ($1::text IS NULL OR p.provider = $1) AND ($2::uuid IS NULL OR p.wallet_id = $2)
  AND ($3::uuid IS NULL OR p.wallet_id IN (SELECT w.id FROM wallets w WHERE w.user_id = $3))
  AND ($4::text IS NULL OR p.state = $4) AND ($5::timestamptz IS NULL OR p.created_at >= $5)
  AND ($7::uuid IS NULL OR p.intent_id = $7)
  AND ($8::text IS NULL OR p.provider_txn_id = $8)
ORDER BY p.created_at DESC, p.provider_txn_id LIMIT $6
"""  # noqa: S608 - a text of this module
_POSTINGS = """
SELECT t.id, t.kind, t.memo, t.created_at, e.account, e.currency, e.amount_nano FROM journal_tx t
JOIN journal_entry e ON e.tx_id = t.id
WHERE t.id = ANY ($1) OR (t.kind = 'payment_fee' AND t.memo = $2) ORDER BY t.id, e.seq
"""
_EVENT = "id, provider, event_key, state, note, deliveries, tries, received_at, next_at, ended_at"


@dataclass(frozen=True, slots=True)
class PaymentFilter:
    """Which payments are listed; None is any."""

    provider: str | None = None
    wallet_id: UUID | None = None
    user_id: UUID | None = None
    state: str | None = None
    since: datetime | None = None

    def __post_init__(self) -> None:
        if self.state not in (None, *STATES):
            raise InputError(f"a payment's state is one of {', '.join(STATES)}")
        if self.provider is not None:
            parse_provider(self.provider)


def parse_provider(name: str) -> PaymentProvider:
    """Return a payment provider by its name.

    Raises:
        NotFoundError: there is no such provider.
    """
    for provider in get_args(PaymentProvider):
        if name == provider:
            return provider  # type: ignore[no-any-return]
    raise NotFoundError(f"there is no payment provider {name[:40]!r}: {', '.join(get_args(PaymentProvider))}")


class PaymentViews:
    """Reads payments.

    Args:
        database: by a role that reads them all.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def list_payments(self, wanted: PaymentFilter, *, limit: int) -> list[PaymentJson]:
        """Return wishes to pay with what was paid, the newest first: a row for each payment, one for each that has none."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                _LIST,
                wanted.provider,
                wanted.wallet_id,
                wanted.user_id,
                wanted.state,
                wanted.since,
                min(limit, PAGE_MAX),
                None,
                None,
            )
        return [_payment_json(row) for row in rows]

    async def list_reviews(self) -> list[ReviewJson]:
        """Return the payments that wait for a decision, oldest first."""
        return [
            {
                "provider": row["provider"],
                "provider_txn_id": row["provider_txn_id"],
                "intent_id": _text(row["intent_id"]),
                "wallet_id": _text(row["wallet_id"]),
                "currency": row["currency"],
                "paid": format_amount(row["paid_nano"]),
                "suspense": format_amount(row["suspense_nano"]),
                "note": row["note"],
                "created_at": row["created_at"].isoformat(),
            }
            for row in await Reviews(self._database).list_waiting()
        ]

    async def describe(self, provider: PaymentProvider, txn_id: str) -> PaymentFileJson:
        """Return everything about a payment.

        Raises:
            NotFoundError: the provider told of no such payment.
        """
        return await self._describe(None, provider, txn_id)

    async def describe_intent(self, named: str) -> PaymentFileJson:
        """Return everything about a wish to pay, named by its id or its reference.

        Raises:
            NotFoundError: there is none.
        """
        intent_id = parse_reference(named)
        if intent_id is None:
            try:
                intent_id = UUID(named)
            except ValueError:
                raise NotFoundError(f"there is no top-up {named[:80]!r}") from None
        return await self._describe(intent_id, None, None)

    async def _describe(
        self, intent_id: UUID | None, provider: str | None, txn_id: str | None
    ) -> PaymentFileJson:
        async with self._database.transaction(isolation="repeatable_read", readonly=True) as connection:
            rows = await connection.fetch(
                _LIST, provider, None, None, None, None, PAGE_MAX, intent_id, txn_id
            )
            if not rows:
                raise NotFoundError(
                    f"there is no top-up {intent_id}"
                    if txn_id is None
                    else f"there is no payment {txn_id[:80]} of {provider}"
                )
            intent = None
            if rows[0]["intent_id"] is not None:
                found = await connection.fetchrow(
                    f"SELECT {WHOLE_INTENT} FROM payment_intents WHERE id = $1",  # noqa: S608 - column names
                    rows[0]["intent_id"],
                )
                intent = Intent(**found)
            payments: list[WholePaymentJson] = [
                {**_payment_json(row), **await _follow(connection, row)}
                for row in rows
                if row["provider_txn_id"] is not None
            ]
            events = await _events_about(connection, intent, rows)
        return {
            "intent": None if intent is None else _intent_json(intent),
            "payments": payments,
            "webhooks": events,
        }

    async def list_events(self, *, state: str | None = None, limit: int) -> list[WebhookEventJson]:
        """Return webhooks, the newest first: those that wait or are in review, or those in a state.

        Raises:
            InputError: there is no such state.
        """
        if state not in (None, *EVENT_STATES):
            raise InputError(f"a webhook's state is one of {', '.join(EVENT_STATES)}")
        states = ["new", "review"] if state is None else [state]
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                f"SELECT {_EVENT} FROM webhook_events WHERE state = ANY ($1) ORDER BY id DESC LIMIT $2",  # noqa: S608 - column names of this module
                states,
                min(limit, PAGE_MAX),
            )
        return [_event_json(row) for row in rows]


async def _follow(connection: Any, row: Any) -> ConsequencesFields:
    """What became of a payment: its reversals, and everything that was posted for it."""
    named = (row["provider"], row["provider_txn_id"])
    credit = await connection.fetchrow(
        "SELECT tx_id, accepted_tx_ids FROM payment_credits WHERE provider = $1 AND provider_txn_id = $2",
        *named,
    )
    reversals = await connection.fetch(
        "SELECT * FROM payment_reversals WHERE provider = $1 AND provider_txn_id = $2 ORDER BY id", *named
    )
    posted = [credit["tx_id"], *credit["accepted_tx_ids"]]
    posted += [tx for item in reversals for tx in (item["tx_id"], item["undo_tx_id"]) if tx is not None]
    entries = await connection.fetch(_POSTINGS, posted, " ".join(named))
    return {
        "reversals": [
            {
                "id": str(item["id"]),
                "kind": item["kind"],
                "provider_reversal_id": item["provider_reversal_id"],
                "state": item["state"],
                "amount": format_amount(item["amount_nano"]),
                "of_suspense": format_amount(item["suspense_nano"]),
                "reason": item["reason"],
                "created_at": item["created_at"].isoformat(),
                "ended_at": _moment(item["ended_at"]),
            }
            for item in reversals
        ],
        "postings": [
            {
                "transaction_id": str(entry["id"]),
                "kind": entry["kind"],
                "account": entry["account"],
                "currency": entry["currency"],
                "amount": format_amount(entry["amount_nano"]),
                "memo": entry["memo"],
                "at": entry["created_at"].isoformat(),
            }
            for entry in entries
        ],
    }


async def _events_about(connection: Any, intent: Intent | None, rows: list[Any]) -> list[WebhookEventJson]:
    """Webhooks that name the intent's reference or one of the payments, since shortly before the first of them."""
    names = [] if intent is None else [f"tuma_{intent.id.hex}"]
    names += [re.escape(row["provider_txn_id"]) for row in rows if row["provider_txn_id"] is not None]
    began = min(row["created_at"] for row in rows)
    found = await connection.fetch(
        f"SELECT {_EVENT} FROM webhook_events WHERE id >= uuid_floor($1::timestamptz - interval '1 hour') AND provider = ANY ($2)"  # noqa: S608 - column names of this module
        " AND body ~ $3 ORDER BY id LIMIT $4",
        began,
        sorted({row["provider"] for row in rows} | (set() if intent is None else {intent.provider})),
        rf"\m({'|'.join(names)})(\M|_)",
        _ABOUT_MAX,
    )
    return [_event_json(row) for row in found]


def _payment_json(row: Any) -> PaymentJson:
    asked, paid, fee = row["amount_nano"], row["paid_nano"], row["fee_nano"]
    suspense = 0 if paid is None else paid - row["credited_nano"] - row["suspense_reversed_nano"]
    return {
        "provider": row["provider"],
        "provider_txn_id": row["provider_txn_id"],
        "intent_id": _text(row["intent_id"]),
        "kind": row["kind"],
        "wallet_id": _text(row["wallet_id"]),
        "state": row["state"],
        "currency": row["paid_currency"] or row["asked_currency"],
        "asked": None if asked is None else format_amount(asked),
        "asked_currency": row["asked_currency"],
        "paid": None if paid is None else format_amount(paid),
        "credited": None if paid is None else format_amount(row["credited_nano"]),
        "suspense": format_amount(suspense),
        "reversed": format_amount(row["reversed_nano"]),
        "fee": None if fee is None else format_amount(fee),
        "fee_currency": row["fee_currency"],
        "note": row["note"],
        "created_at": row["created_at"].isoformat(),
    }


def _intent_json(intent: Intent) -> IntentJson:
    return {
        "id": str(intent.id),
        "reference": intent.reference,
        "kind": intent.kind,
        "user_id": str(intent.user_id),
        "wallet_id": str(intent.wallet_id),
        "provider": intent.provider,
        "provider_id": intent.provider_id,
        "amount": format_amount(intent.amount_nano),
        "currency": intent.currency,
        "state": intent.state,
        "attempt": intent.attempt,
        "url": intent.url,
        "note": intent.note,
        "created_at": intent.created_at.isoformat(),
        "expires_at": intent.expires_at.isoformat(),
        "ended_at": _moment(intent.ended_at),
    }


def _event_json(row: Any) -> WebhookEventJson:
    return {
        "id": str(row["id"]),
        "provider": row["provider"],
        "event": row["event_key"],
        "state": row["state"],
        "note": row["note"],
        "deliveries": row["deliveries"],
        "tries": row["tries"],
        "received_at": row["received_at"].isoformat(),
        "next_at": row["next_at"].isoformat() if row["state"] == "new" else None,
        "ended_at": _moment(row["ended_at"]),
    }


def _text(value: UUID | None) -> str | None:
    return None if value is None else str(value)


def _moment(value: datetime | None) -> str | None:
    return None if value is None else value.isoformat()
