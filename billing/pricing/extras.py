"""Units of the price book beside tokens: what a request may ask for that is billed apart. Pure, in integers."""

from collections.abc import Mapping
from types import MappingProxyType

from billing.errors import PriceMissingError
from billing.money import ATTO_DECIMALS, scaled_integer
from billing.pricing.cost import Price

WEB_SEARCH = "web_search"  # USD per search of the provider's own
WEB_SEARCH_RESULT = "web_search_result"  # USD per result that a search may put into the prompt
AUDIO_OUTPUT = "audio_output"  # USD per token of spoken output
IMAGE_OUTPUT = "image_output"  # USD per token of drawn output
_PER_PIECE = (WEB_SEARCH, WEB_SEARCH_RESULT)
_PER_OUTPUT_TOKEN = (AUDIO_OUTPUT, IMAGE_OUTPUT)
ROUTING = (
    "routing"  # by what factor the endpoints are dearer that a request may name (OpenRouter's provider.order)
)
CACHED_WRITE_1H = "cached_write_1h"  # USD per token that is kept in the cache of the provider for an hour
_TIER = "tier_"  # and a tier's name: by what factor it is dearer or cheaper
PER_TOKEN = (*_PER_OUTPUT_TOKEN, CACHED_WRITE_1H)
NO_EXTRAS: Mapping[str, int] = MappingProxyType({})


def tier_unit(tier: str) -> str:
    """Return the unit that holds a service tier's factor: ``tier_priority``."""
    return f"{_TIER}{tier}"


def is_unit(name: str) -> bool:
    """Whether the price book knows such a unit."""
    return name in (*_PER_PIECE, *_PER_OUTPUT_TOKEN, ROUTING, CACHED_WRITE_1H) or (
        name.startswith(_TIER) and name != _TIER
    )


def hold_with_extras(
    price: Price, extras: Mapping[str, int], hold_attousd: int, *, prompt_tokens: int, completion_tokens: int
) -> int:
    """Return what must be held in all, in atto-dollars: upward, so that no bill within the bounds is larger.

    Args:
        price: of the model.
        extras: how many of each unit at most.
        hold_attousd: of the tokens, in a usual tier.
        prompt_tokens: of the prompt.
        completion_tokens: the output bound, over all choices.

    Raises:
        PriceMissingError: the price book has no such unit for this model.
    """
    one = 10**ATTO_DECIMALS
    factors: list[int] = []
    for unit, count in extras.items():
        if unit == CACHED_WRITE_1H:
            # Anthropic's: twice the price of the prompt (https://docs.anthropic.com/en/docs/build-with-claude/prompt-caching).
            rate = _atto(price, unit) if unit in price.extras else 2 * price.rates.prompt
            hold_attousd += prompt_tokens * max(rate - price.rates.prompt_max, 0)
            continue
        rate = _atto(price, unit)
        if unit in _PER_PIECE:
            hold_attousd += count * rate
        elif unit in _PER_OUTPUT_TOKEN:
            hold_attousd += completion_tokens * max(rate - price.rates.completion_max, 0)
        else:
            factors.append(max(rate, one))  # a tier that is not to be had is served, and billed, as usual
    for factor in factors:
        hold_attousd = -(-hold_attousd * factor // one)
    return hold_attousd


def _atto(price: Price, unit: str) -> int:
    value = price.extras.get(unit)
    if value is None:
        raise PriceMissingError(
            f"{price.model!r} has no price for {unit!r}, which this request asks for: an operator sets it with "
            f"'tuma models price'."
        )
    return scaled_integer(value, decimals=ATTO_DECIMALS)
