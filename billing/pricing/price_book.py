"""The price book: models and their prices in Postgres, the current ones cached in the process."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any

from billing.errors import InputError, ModelNotFoundError
from billing.ids import new_id
from billing.money import has_more_decimals
from billing.postgres.database import Database
from billing.pricing.cost import Price
from billing.pricing.extras import is_unit

_PRICES = (
    "prompt_usd",
    "completion_usd",
    "cached_read_usd",
    "cached_write_usd",
    "reasoning_usd",
    "image_usd",
    "audio_usd",
    "request_usd",
)
_NAME_MAX = 200
# https://openrouter.ai/docs/features/provider-routing: sorted otherwise, or with a search (`:online`), the same model.
_VARIANTS = ("nitro", "floor", "exacto", "online")
_PRICE_MAX = Decimal(10) ** 9


@dataclass(frozen=True, slots=True)
class ModelPrice:
    """A model as an operator or the provider lists it; prices in USD per single token, image or request."""

    model: str
    name: str
    context_tokens: int | None
    completion_tokens_max: int | None
    prices: Mapping[str, Decimal | None]
    extras: Mapping[str, Decimal] = field(default_factory=dict)  # by unit: see ``billing/pricing/extras.py``


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be called, with its current price."""

    id: str
    name: str
    created_at: datetime
    price: Price


class PriceBook:
    """Reads and writes prices; ``get_price`` answers from memory.

    Args:
        database: where the book is.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._models: dict[str, Model] = {}

    @property
    def models(self) -> Mapping[str, Model]:
        """Every model with a price, as last loaded."""
        return self._models

    async def load(self, _change: str = "*") -> None:
        """Read the current prices."""
        async with self._database.connection() as connection:
            rows = await connection.fetch("SELECT * FROM list_prices()")
            extras = {
                row["price_id"]: row["extras"]
                for row in await connection.fetch("SELECT * FROM list_price_extras()")
            }
        self._models = {row["id"]: _model(row, extras.get(row["price_id"])) for row in rows}

    def get_model(self, model_id: str) -> Model:
        """Return a model with its price.

        Raises:
            ModelNotFoundError: unknown, or without a price: refused, never free.
        """
        found = self._models.get(model_id) or self._models.get(_without_variant(model_id))
        if found is not None:
            return found
        near = [name for name in self._models if name.rpartition("/")[2] == model_id]
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ModelNotFoundError(f"The model {model_id[:_NAME_MAX]!r} does not exist or has no price.{hint}")

    async def set_prices(self, models: Iterable[ModelPrice], *, source: str) -> int:
        """Write models and their prices in one transaction; a price that did not change stays as it is.

        Returns:
            how many prices are new.

        Raises:
            InputError: a price is negative, not finite, or finer than 18 decimals.
        """
        changed = 0
        async with self._database.transaction() as connection:
            for item in models:
                changed += await _set_price(connection, item, source)
        return changed


async def _set_price(connection: Any, item: ModelPrice, source: str) -> int:
    if not item.model or len(item.model) > _NAME_MAX:
        raise InputError(f"{item.model[:_NAME_MAX]!r} is not a model's name")
    unknown = [unit for unit in item.extras if not is_unit(unit)]
    if unknown:
        raise InputError(f"{unknown[0]!r} is no unit of the price book")
    for label, value in (*item.prices.items(), *item.extras.items()):
        if value is not None and (
            not value.is_finite() or not 0 <= value < _PRICE_MAX or has_more_decimals(value, 18)
        ):
            raise InputError(f"{item.model}: {label} must be a non-negative price with at most 18 decimals")
    await connection.execute(
        "INSERT INTO models (id, name, context_tokens, completion_tokens_max, synced_at) VALUES ($1, $2, $3, $4, now())"
        " ON CONFLICT (id) DO UPDATE SET name = excluded.name, context_tokens = excluded.context_tokens,"
        " completion_tokens_max = excluded.completion_tokens_max, synced_at = now()",
        item.model,
        item.name or item.model,
        item.context_tokens,
        item.completion_tokens_max,
    )
    values = [item.prices.get(column) for column in _PRICES]
    values[5] = values[5] or Decimal(0)
    values[7] = values[7] or Decimal(0)
    extras = json.dumps({unit: str(value) for unit, value in sorted(item.extras.items())})
    current = await connection.fetchrow(
        f"SELECT {', '.join(_PRICES)}, extras FROM model_prices WHERE model_id = $1 AND valid_to IS NULL FOR UPDATE",  # noqa: S608 - column names of this module
        item.model,
    )
    if current is not None and list(current) == [*values, extras]:
        return 0
    await connection.execute(
        "UPDATE model_prices SET valid_to = now() WHERE model_id = $1 AND valid_to IS NULL", item.model
    )
    await connection.execute(
        f"INSERT INTO model_prices (id, model_id, source, {', '.join(_PRICES)}, extras)"  # noqa: S608 - column names of this module
        " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
        new_id(),
        item.model,
        source,
        *values,
        extras,
    )
    return 1


def _without_variant(model_id: str) -> str:
    """Return the model that a variant of OpenRouter's chooses an endpoint of; what it may cost is bounded by ``max_price``."""
    name, _, variant = model_id.rpartition(":")
    return name if variant in _VARIANTS else model_id


def _model(row: Any, extras: str | None) -> Model:
    price = Price(
        id=row["price_id"],
        model=row["id"],
        **{column: row[column] for column in _PRICES},
        completion_tokens_max=row["completion_tokens_max"],
        context_tokens=row["context_tokens"],
        extras={} if extras is None else {unit: Decimal(value) for unit, value in json.loads(extras).items()},
    )
    return Model(row["id"], row["name"], row["created_at"], price)
