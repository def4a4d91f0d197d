"""Everything known about one call, in one view; for its owner what is theirs to see, for the operator all of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from billing.errors import NotFoundError
from billing.fx.quote import FxQuote
from billing.money import format_amount, format_usd
from billing.postgres.database import Database
from billing.pricing.cost import Price, Usage
from billing.reports.answers import CallJson, ExplainedCallJson, WholeCallJson
from billing.reports.explain import CallFacts, Change, HouseView, explain

_PRICES = ("prompt", "completion", "cached_read", "cached_write", "reasoning", "image", "audio", "request")
_USAGE = (
    *("prompt_tokens", "completion_tokens", "cached_read_tokens", "cached_write_tokens", "reasoning_tokens"),
    *("images", "audio_tokens"),
)
PAGE_MAX = 100
# What people may read of a call (billing/postgres/roles.py), and what is the house's beside it.
_OWN = (
    *("id", "user_id", "wallet_id", "key_id", "model", "stream", "price_id", "fx_quote_id", "currency"),
    *("hold_nano", "state", "opened_at", "ended_at", "outcome", "generation_id", "accuracy"),
    *("cost_nanousd", "charge_nano"),
)
_HOUSE = ("hold_nanousd", "provider_cost_nanousd", "spread_nano", "house_nanousd")


def _select(columns: Sequence[str]) -> str:
    return (
        f"SELECT {', '.join(f'c.{name}' for name in columns)}, u.source, {', '.join(f'u.{name}' for name in _USAGE)},"
        " u.cost_attousd, u.first_byte_ms, u.duration_ms, f.rate, f.markup_bps,"
        f" {', '.join(f'p.{name}_usd' for name in _PRICES)}, p.valid_from AS priced_at"
    )


_JOINS = (
    " LEFT JOIN usage u ON u.call_id = c.id LEFT JOIN fx_quotes f ON f.id = c.fx_quote_id"
    " LEFT JOIN model_prices p ON p.id = c.price_id"
)
_CALL = f"{_select((*_OWN, *_HOUSE))} FROM calls c{_JOINS} WHERE c.id = $1"
_OWN_CALL = f"{_select(_OWN)} FROM calls c{_JOINS} WHERE c.id = $1 AND c.wallet_id = $2"
# A settlement's transaction has its call's id: the wallet's entries lead to the calls that it paid for, without an index of
# their own on the hot table. What is under way has no entry yet.
_LIST = f"""
    WITH found AS (
        (SELECT e.tx_id AS id FROM journal_entry e
         CROSS JOIN LATERAL (SELECT c.model, c.key_id FROM calls c WHERE c.id = e.tx_id OFFSET 0) c -- each by its key
         WHERE e.wallet_id = $1 AND ($2::uuid IS NULL OR e.tx_id < $2)
           AND ($3::timestamptz IS NULL OR e.tx_id >= uuid_floor($3)) AND ($4::timestamptz IS NULL OR e.tx_id < uuid_floor($4))
           AND ($5::text IS NULL OR c.model = $5) AND ($6::uuid IS NULL OR c.key_id = $6)
         ORDER BY e.tx_id DESC LIMIT $7)
        UNION ALL
        (SELECT c.id FROM calls c
         WHERE c.wallet_id = $1 AND c.state IN ('open', 'review') AND ($2::uuid IS NULL OR c.id < $2)
           AND ($3::timestamptz IS NULL OR c.id >= uuid_floor($3)) AND ($4::timestamptz IS NULL OR c.id < uuid_floor($4))
           AND ($5::text IS NULL OR c.model = $5) AND ($6::uuid IS NULL OR c.key_id = $6)
         ORDER BY c.id DESC LIMIT $7)
    )
    {_select(_OWN)} FROM found JOIN calls c ON c.id = found.id{_JOINS} ORDER BY c.id DESC LIMIT $7
"""  # noqa: S608 - the same
_POSTINGS = (
    "SELECT t.id, t.kind, t.memo, t.created_at, e.account, e.currency, e.amount_nano FROM journal_tx t"
    " JOIN journal_entry e ON e.tx_id = t.id WHERE t.id = $1 OR (t.call_id = $1 AND t.kind <> 'settlement')"
    " ORDER BY t.id, e.seq"
)


@dataclass(frozen=True, slots=True)
class CallFilter:
    """Which calls: from one moment on, before another, of a model, by a key; None for all."""

    since: datetime | None = None
    until: datetime | None = None
    model: str | None = None
    key_id: UUID | None = None


async def describe_call(database: Database, call_id: UUID) -> WholeCallJson:
    """Return a call with its quote, prices, provider id, usage, postings, and how its charge came about.

    Amounts are decimal strings.

    Raises:
        NotFoundError: there is no such call.
        PostgresUnavailableError: Postgres is away.
    """
    async with database.transaction(isolation="repeatable_read", readonly=True) as connection:
        call = await connection.fetchrow(_CALL, call_id)
        if call is None:
            raise NotFoundError(f"there is no call {call_id}")
        entries = await connection.fetch(_POSTINGS, call_id)
    house = HouseView(call["provider_cost_nanousd"], call["house_nanousd"], call["spread_nano"] or 0)
    return {
        **_describe(call),
        "user_id": str(call["user_id"]),
        "provider_cost_usd": _usd(call["provider_cost_nanousd"]),
        "house_usd": format_usd(call["house_nanousd"]),
        "spread": _amount(call["spread_nano"]),
        "hold_usd": format_usd(call["hold_nanousd"]),
        "explanation": explain(_facts(call, entries, house)),
        "postings": [
            {
                "kind": row["kind"],
                "account": row["account"],
                "currency": row["currency"],
                "amount": format_amount(row["amount_nano"]),
                "memo": row["memo"],
                "at": row["created_at"].isoformat(),
            }
            for row in entries
        ],
    }


class OwnCalls:
    """Reads a person's own calls.

    Args:
        database: by the role that reads as a person.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def describe(self, owner: UUID, call_id: UUID, *, wallet_id: UUID) -> ExplainedCallJson:
        """Return a call of a person's wallet as they may see it, with how its charge came about.

        Raises:
            NotFoundError: there is no such call, or it is another's.
            PostgresUnavailableError: Postgres is away.
        """
        async with self._database.as_person(owner, readonly=True) as connection:
            call = await connection.fetchrow(_OWN_CALL, call_id, wallet_id)
            if call is None:
                raise NotFoundError(f"there is no call {call_id}")
            entries = await connection.fetch(_POSTINGS, call_id)
        facts = _facts(call, entries, None)
        return {
            **_describe(call),
            "explanation": explain(facts),
            "changes": [
                {
                    "kind": change.kind,
                    "amount": format_amount(change.amount_nano),
                    "description": change.memo,
                    "created_at": change.at.isoformat(),
                }
                for change in facts.changes
            ],
        }

    async def list_page(
        self, owner: UUID, wallet_id: UUID, wanted: CallFilter, *, after: UUID | None = None, limit: int
    ) -> list[CallJson]:
        """Return calls of a person's wallet, newest first: those that it paid for, and those under way.

        Args:
            owner: who asks.
            wallet_id: which of their wallets.
            wanted: which calls.
            after: the last call of the page before.
            limit: at most so many.
        """
        async with self._database.as_person(owner, readonly=True) as connection:
            rows = await connection.fetch(
                _LIST,
                *(wallet_id, after, wanted.since, wanted.until, wanted.model, wanted.key_id),
                min(limit, PAGE_MAX + 1),
            )
        return [_describe(row) for row in rows]


def _describe(call: Any) -> CallJson:
    """Return what a call's owner may see of its rows."""
    return {
        "object": "call",
        "id": str(call["id"]),
        "state": call["state"],
        "outcome": call["outcome"],
        "model": call["model"],
        "stream": call["stream"],
        "wallet_id": str(call["wallet_id"]),
        "key_id": None if call["key_id"] is None else str(call["key_id"]),
        "generation_id": call["generation_id"],
        "currency": call["currency"],
        "cost_usd": _usd(call["cost_nanousd"]),
        "charge": _amount(call["charge_nano"]),
        "accuracy": call["accuracy"],
        "source": call["source"],
        "tokens_prompt": call["prompt_tokens"],
        "tokens_completion": call["completion_tokens"],
        "tokens_cached": call["cached_read_tokens"],
        "tokens_reasoning": call["reasoning_tokens"],
        "hold": format_amount(call["hold_nano"]),
        "fx_rate": None if call["rate"] is None else f"{call['rate'].normalize():f}",
        "fx_markup_bps": call["markup_bps"],
        "price_prompt_usd": _price(call["prompt_usd"]),
        "price_completion_usd": _price(call["completion_usd"]),
        "price_cached_read_usd": _price(call["cached_read_usd"]),
        "price_cached_write_usd": _price(call["cached_write_usd"]),
        "price_reasoning_usd": _price(call["reasoning_usd"]),
        "price_image_usd": _price(call["image_usd"]),
        "price_audio_usd": _price(call["audio_usd"]),
        "price_request_usd": _price(call["request_usd"]),
        "priced_at": _moment(call["priced_at"]),
        "opened_at": call["opened_at"].isoformat(),
        "ended_at": _moment(call["ended_at"]),
        "first_byte_ms": call["first_byte_ms"],
        "duration_ms": call["duration_ms"],
    }


def _facts(call: Any, entries: Sequence[Any], house: HouseView | None) -> CallFacts:
    changes: dict[UUID, Change] = {}
    settled: int | None = 0 if call["source"] is not None else None
    for row in entries:
        moved = row["amount_nano"] if row["account"] == "wallet" else 0
        if row["kind"] == "settlement":
            settled = (settled or 0) - moved
            continue
        before = changes.get(row["id"])
        moved += 0 if before is None else before.amount_nano
        changes[row["id"]] = Change(row["kind"], row["memo"], row["created_at"], moved)
    return CallFacts(
        state=call["state"],
        outcome=call["outcome"],
        currency=call["currency"],
        hold_nano=call["hold_nano"],
        cost_nanousd=call["cost_nanousd"],
        charge_nano=call["charge_nano"],
        accuracy=call["accuracy"],
        generation_id=call["generation_id"],
        ended_at=call["ended_at"],
        source=call["source"],
        usage=None if call["source"] is None else Usage(**{name: call[name] for name in _USAGE}),
        exact_attousd=None if call["cost_attousd"] is None else int(call["cost_attousd"]),
        settled_nano=settled,
        price=_price_of(call),
        fx=None
        if call["rate"] is None
        else FxQuote(call["fx_quote_id"], call["currency"], call["rate"], call["markup_bps"]),
        changes=tuple(changes.values()),
        house=house,
    )


def _price_of(call: Any) -> Price | None:
    if call["prompt_usd"] is None:
        return None
    return Price(
        id=call["price_id"], model=call["model"], **{f"{name}_usd": call[f"{name}_usd"] for name in _PRICES}
    )


def _price(usd_each: Decimal | None) -> str | None:
    return None if usd_each is None else f"{usd_each.normalize():f}"


def _usd(nanousd: int | None) -> str | None:
    return None if nanousd is None else format_usd(nanousd)


def _amount(nano: int | None) -> str | None:
    return None if nano is None else format_amount(nano)


def _moment(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat()
