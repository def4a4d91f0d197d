"""What a call may cost, before it is made: the least, what is to be expected, and the most. Pure.

How far the provider's count of a prompt may lie from ours is documented, and tested over a corpus, in
``docs/metering.md`` and ``tests/proxy/test_estimate.py``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from billing.pricing.cost import Price
from billing.pricing.quote import Output
from billing.pricing.tokens import PromptCount

# The provider's count of a text prompt over ours lies within these; see docs/metering.md.
PROMPT_LEAST = Fraction(2, 5)
PROMPT_MOST = Fraction(3, 2)


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure as it may come out."""

    least: int
    expected: int
    most: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a call may take; costs in atto-dollars."""

    prompt_tokens: Spread
    completion_tokens: Spread
    cost_attousd: Spread


def estimate_call(
    prices: Sequence[Price],
    *,
    prompt: PromptCount,
    output: Output,
    default_tokens: int,
    expected_tokens: int,
) -> Estimate:
    """Estimate a call.

    The least is one token of output and a prompt at the low end of the band, all of it cached; the most a prompt at its
    high end and output up to the request's bound: without one, up to what the model can give.

    Args:
        prices: of every model that may answer, the first choice first.
        prompt: counted.
        output: asked for.
        default_tokens: the output bound of a model that names none, for a request that names none.
        expected_tokens: a usual answer, per choice.
    """
    prompt_tokens = Spread(
        math.floor(prompt.tokens * PROMPT_LEAST),
        prompt.tokens,
        max(math.ceil(prompt.tokens * PROMPT_MOST), prompt.most_tokens),
    )
    bounds = [
        output.bound(
            unknown_max=price.context_tokens or default_tokens,
            model_max=price.completion_tokens_max,
        )
        for price in prices
    ]
    completion_tokens = Spread(
        min(1, bounds[0]), min(expected_tokens * output.choices, bounds[0]), max(bounds)
    )
    return Estimate(
        prompt_tokens,
        completion_tokens,
        Spread(
            min(
                prompt_tokens.least * price.rates.prompt_min
                + completion_tokens.least * price.rates.completion_min
                + price.rates.request
                for price in prices
            ),
            _expected(prices[0], prompt, completion_tokens.expected),
            max(
                prompt_tokens.most * price.rates.prompt_max
                + prompt.images * price.rates.image
                + bound * price.rates.completion_max
                + price.rates.request
                for price, bound in zip(prices, bounds, strict=True)
            ),
        ),
    )


def _expected(price: Price, prompt: PromptCount, completion_tokens: int) -> int:
    rates = price.rates
    return (
        prompt.tokens * rates.prompt
        + prompt.images * rates.image
        + completion_tokens * rates.completion
        + rates.request
    )
