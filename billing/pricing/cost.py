"""What usage costs at the price book. Pure, in integers.

Token classes are parts of each other, as providers report them: cached tokens are part of the prompt's, reasoning tokens
part of the completion's. A class with a price of its own takes its tokens out of the class that contains it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from uuid import UUID

from billing.errors import InputError
from billing.money import ATTO_DECIMALS, has_more_decimals, scaled_integer

TOKENS_MAX = 2**40  # a provider that reports more is not believed


@dataclass(frozen=True, slots=True)
class Rates:
    """A price as integers: atto-dollars per token, image or request."""

    prompt: int
    completion: int
    cached_read: int
    cached_write: int
    reasoning: int
    image: int
    audio: int
    request: int

    @property
    def prompt_max(self) -> int:
        """The dearest that a prompt token can be."""
        return max(self.prompt, self.cached_read, self.cached_write, self.audio)

    @property
    def prompt_min(self) -> int:
        """The cheapest that a prompt token can be."""
        return min(self.prompt, self.cached_read, self.cached_write, self.audio)

    @property
    def completion_min(self) -> int:
        """The cheapest that a completion token can be."""
        return min(self.completion, self.reasoning)

    @property
    def completion_max(self) -> int:
        """The dearest that a completion token can be."""
        return max(self.completion, self.reasoning)


@dataclass(frozen=True, slots=True)
class Price:
    """A model's price, in USD per single token, image or request.

    ``None`` means: cached tokens and audio as the prompt, reasoning as the completion. A reasoning price of zero means
    the same, as OpenRouter lists it for models that do not price reasoning apart. ``extras`` are prices of what is billed
    beside tokens, by unit (``billing/pricing/extras.py``).

    Raises:
        InputError: a price is negative, not finite, or finer than 18 decimals.
    """

    id: UUID
    model: str
    prompt_usd: Decimal
    completion_usd: Decimal
    cached_read_usd: Decimal | None = None
    cached_write_usd: Decimal | None = None
    reasoning_usd: Decimal | None = None
    image_usd: Decimal = Decimal(0)
    audio_usd: Decimal | None = None
    request_usd: Decimal = Decimal(0)
    completion_tokens_max: int | None = None
    context_tokens: int | None = None
    extras: Mapping[str, Decimal] = field(default_factory=dict)
    rates: Rates = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        prompt, completion = _atto(self.prompt_usd), _atto(self.completion_usd)
        rates = Rates(
            prompt=prompt,
            completion=completion,
            cached_read=_atto(self.cached_read_usd, prompt),
            cached_write=_atto(self.cached_write_usd, prompt),
            reasoning=_atto(self.reasoning_usd, completion) or completion,
            image=_atto(self.image_usd),
            audio=_atto(self.audio_usd, prompt),
            request=_atto(self.request_usd),
        )
        object.__setattr__(self, "rates", rates)


def _atto(price_usd: Decimal | None, default: int = 0) -> int:
    if price_usd is None:
        return default
    if not price_usd.is_finite() or price_usd < 0 or has_more_decimals(price_usd, ATTO_DECIMALS):
        raise InputError(
            f"{price_usd} is not a price: it must be finite, not negative, with at most 18 decimals"
        )
    return scaled_integer(price_usd, decimals=ATTO_DECIMALS)


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of one answer: tokens, and images in the prompt.

    Cached and audio tokens are part of ``prompt_tokens``, reasoning tokens of ``completion_tokens``.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_read_tokens: int = 0
    cached_write_tokens: int = 0
    reasoning_tokens: int = 0
    images: int = 0
    audio_tokens: int = 0


def cost_attousd(price: Price, usage: Usage) -> int:
    """Return what usage costs at a price, in atto-dollars, exactly."""
    rates = price.rates
    plain_prompt = (
        usage.prompt_tokens - usage.cached_read_tokens - usage.cached_write_tokens - usage.audio_tokens
    )
    return (
        plain_prompt * rates.prompt
        + usage.cached_read_tokens * rates.cached_read
        + usage.cached_write_tokens * rates.cached_write
        + usage.audio_tokens * rates.audio
        + (usage.completion_tokens - usage.reasoning_tokens) * rates.completion
        + usage.reasoning_tokens * rates.reasoning
        + usage.images * rates.image
        + rates.request
    )
