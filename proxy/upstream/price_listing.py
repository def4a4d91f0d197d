"""Reading a provider's list of models and prices (OpenRouter's ``/models``)."""

import contextlib
from collections.abc import Iterable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from billing.pricing.extras import AUDIO_OUTPUT, CACHED_WRITE_1H, WEB_SEARCH
from billing.pricing.price_book import ModelPrice

_PRICES = {
    "prompt_usd": "prompt",
    "completion_usd": "completion",
    "cached_read_usd": "input_cache_read",
    "cached_write_usd": "input_cache_write",
    "reasoning_usd": "internal_reasoning",
    "image_usd": "image",
    "audio_usd": "audio",
    "request_usd": "request",
}
# The price of an image that is made is not taken over: the list does not say whether it is per image or per token.
_EXTRAS = {WEB_SEARCH: "web_search", AUDIO_OUTPUT: "audio_output", CACHED_WRITE_1H: "input_cache_write_1h"}


def read_listing(models: Iterable[Mapping[str, Any]]) -> tuple[list[ModelPrice], list[str]]:
    """Return the models whose prices can be known beforehand, and the names of those that cannot be.

    A negative price is OpenRouter's word for "depends on where it is routed".
    """
    priced, unpriced = [], []
    for model in models:
        name = model.get("id")
        if not isinstance(name, str) or not name:
            continue
        found = _read_prices(model.get("pricing"))
        if found is None:
            unpriced.append(name)
            continue
        top = model.get("top_provider")
        limit = top.get("max_completion_tokens") if isinstance(top, Mapping) else None
        label = model.get("name")
        priced.append(
            ModelPrice(
                model=name,
                name=label if isinstance(label, str) else name,
                context_tokens=_count(model.get("context_length")),
                completion_tokens_max=_count(limit),
                prices=found,
                extras=_read_extras(model["pricing"]),
            )
        )
    return priced, unpriced


def _read_prices(pricing: object) -> dict[str, Decimal | None] | None:
    if not isinstance(pricing, Mapping) or pricing.get("prompt") is None or pricing.get("completion") is None:
        return None
    prices: dict[str, Decimal | None] = {}
    for ours, theirs in _PRICES.items():
        value = pricing.get(theirs)
        try:
            prices[ours] = None if value is None else Decimal(str(value))
        except InvalidOperation:
            return None
        number = prices[ours]
        if number is not None and (not number.is_finite() or number < 0):
            return None
    return prices


def _read_extras(pricing: Mapping[str, Any]) -> dict[str, Decimal]:
    """Return prices of what is billed beside tokens; one that cannot be read is none, and what it is for is refused."""
    extras = {}
    for ours, theirs in _EXTRAS.items():
        with contextlib.suppress(InvalidOperation):
            number = Decimal(str(pricing[theirs])) if pricing.get(theirs) is not None else None
            if number is not None and number.is_finite() and number > 0:  # zero: it has none of its own
                extras[ours] = number
    return extras


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
