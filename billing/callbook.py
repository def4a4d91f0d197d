"""Everything known about one call, in one view."""

from decimal import Decimal
from typing import Any
from uuid import UUID

from billing.db import Database
from billing.errors import NotFoundError
from billing.money import format_amount, format_usd

_PRICES = ("prompt", "completion", "cached_read", "cached_write", "reasoning", "image", "audio", "request")


async def describe_call(database: Database, call_id: UUID) -> dict[str, Any]:
    """Return a call with its quote, prices, provider id, usage and postings; amounts are decimal strings.

    Raises:
        NotFoundError: there is no such call.
        PostgresUnavailableError: Postgres is away.
    """
    async with database.transaction(isolation="repeatable_read", readonly=True) as connection:
        call = await connection.fetchrow(
            """
            SELECT c.*, u.source, u.prompt_tokens, u.completion_tokens, u.cached_read_tokens, u.cached_write_tokens,
                   u.reasoning_tokens, u.first_byte_ms, u.duration_ms, f.rate, f.markup_bps, p.prompt_usd, p.completion_usd, p.cached_read_usd,
                   p.cached_write_usd, p.reasoning_usd, p.image_usd, p.audio_usd, p.request_usd, p.valid_from AS priced_at
            FROM calls c LEFT JOIN usage u ON u.call_id = c.id
            LEFT JOIN fx_quotes f ON f.id = c.fx_quote_id LEFT JOIN model_prices p ON p.id = c.price_id
            WHERE c.id = $1
            """,
            call_id,
        )
        if call is None:
            raise NotFoundError(f"there is no call {call_id}")
        entries = await connection.fetch(
            "SELECT t.kind, t.memo, t.created_at, e.account, e.currency, e.amount_nano FROM journal_tx t"
            " JOIN journal_entry e ON e.tx_id = t.id WHERE t.id = $1 OR (t.call_id = $1 AND t.kind <> 'settlement')"
            " ORDER BY t.id, e.seq",
            call_id,
        )
    return {
        "id": str(call["id"]),
        "state": call["state"],
        "outcome": call["outcome"],
        "model": call["model"],
        "stream": call["stream"],
        "wallet_id": str(call["wallet_id"]),
        "user_id": str(call["user_id"]),
        "key_id": None if call["key_id"] is None else str(call["key_id"]),
        "generation_id": call["generation_id"],
        "currency": call["currency"],
        "cost_usd": _usd(call["cost_nanousd"]),
        "provider_cost_usd": _usd(call["provider_cost_nanousd"]),
        "charge": _amount(call["charge_nano"]),
        "spread": _amount(call["spread_nano"]),
        "accuracy": call["accuracy"],
        "source": call["source"],
        "tokens_prompt": call["prompt_tokens"],
        "tokens_completion": call["completion_tokens"],
        "tokens_cached": call["cached_read_tokens"],
        "tokens_reasoning": call["reasoning_tokens"],
        "hold": _amount(call["hold_nano"]),
        "hold_usd": _usd(call["hold_nanousd"]),
        "fx_rate": None if call["rate"] is None else f"{call['rate'].normalize():f}",
        "fx_markup_bps": call["markup_bps"],
        **{f"price_{name}_usd": _price(call[f"{name}_usd"]) for name in _PRICES},
        "priced_at": call["priced_at"].isoformat() if call["priced_at"] else None,
        "opened_at": call["opened_at"].isoformat(),
        "ended_at": call["ended_at"].isoformat() if call["ended_at"] else None,
        "first_byte_ms": call["first_byte_ms"],
        "duration_ms": call["duration_ms"],
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


def _price(usd_each: Decimal | None) -> str | None:
    return None if usd_each is None else f"{usd_each.normalize():f}"


def _usd(nanousd: int | None) -> str | None:
    return None if nanousd is None else format_usd(nanousd)


def _amount(nano: int | None) -> str | None:
    return None if nano is None else format_amount(nano)
