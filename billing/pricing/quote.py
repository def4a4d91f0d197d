"""The quote: what a call may cost at most, within its bounds. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from billing.fx.quote import FxQuote
from billing.money import nanousd_from_attousd
from billing.pricing.cost import Price
from billing.pricing.extras import NO_EXTRAS, hold_with_extras
from billing.pricing.tokens import PromptCount


@dataclass(frozen=True, slots=True)
class Output:
    """How much output a request asks for.

    Args:
        tokens: its own bound per choice; None where it names none.
        choices: how many answers are made.
    """

    tokens: int | None
    choices: int = 1

    def per_choice(self, *, unknown_max: int, model_max: int | None) -> int:
        """Return how many tokens one answer may have.

        Args:
            unknown_max: of a model of which nobody says what it can give, where the request names no bound.
            model_max: what the model can give, if known.
        """
        if model_max is not None and model_max > 0:
            return model_max if self.tokens is None else min(self.tokens, model_max)
        return unknown_max if self.tokens is None else self.tokens

    def bound(self, *, unknown_max: int, model_max: int | None) -> int:
        """Return how many tokens all choices together may have; arguments as for ``per_choice``."""
        return self.per_choice(unknown_max=unknown_max, model_max=model_max) * self.choices


@dataclass(frozen=True, slots=True)
class Quote:
    """An upward estimate with price and exchange rate pinned; hold amounts in USD and in the wallet's currency.

    ``completion_tokens`` is the bound over all choices, with what is beside them (a prediction). ``others`` are the prices of
    further models that may answer.

    Args:
        told_tokens: the bound per choice that the provider is told, and that the hold covers; 0 where there is no output.
        open_ended: the request named no bound, so that a smaller one may be told to what the wallet can pay.
        window_tokens: what counts in windows of tokens per minute until the call has ended.
    """

    price: Price
    fx: FxQuote
    prompt: PromptCount
    completion_tokens: int
    hold_attousd: int
    hold_nanousd: int
    hold_nano: int
    others: tuple[Price, ...] = ()
    told_tokens: int = 0
    choices: int = 0
    open_ended: bool = False
    window_tokens: int = 0
    beside_tokens: int = 0
    extras: Mapping[str, int] = field(default_factory=dict)

    def told(self, tokens: int) -> "Quote":
        """Quote the same call with another bound told to the provider, per choice."""
        quote = self.grown_to(tokens * self.choices + self.beside_tokens)
        return replace(quote, told_tokens=tokens)

    def within(self, amount_nano: int, amount_nanousd: int | None, *, least_tokens: int) -> "Quote | None":
        """Quote the same call at the largest bound that these amounts can pay; None if they cannot pay ``least_tokens``.

        Args:
            amount_nano: in the wallet's currency.
            amount_nanousd: in USD; None where nothing bounds it.
            least_tokens: per choice; less is no answer.
        """

        def fits(tokens: int) -> bool:
            quote = self.told(tokens)
            return quote.hold_nano <= amount_nano and (
                amount_nanousd is None or quote.hold_nanousd <= amount_nanousd
            )

        least, most = min(least_tokens, self.told_tokens), self.told_tokens
        if not fits(least):
            return None
        while least < most:  # by halves: the charge for a cost has a rounding and a spread of its own
            middle = (least + most + 1) // 2
            least, most = (middle, most) if fits(middle) else (least, middle - 1)
        return self.told(least)

    def grown_to(self, completion_tokens: int) -> "Quote":
        """Quote the same call at another output bound: at the dearest of the models that may answer."""
        dearest = max(
            (
                quote_call(
                    price,
                    self.fx,
                    prompt=self.prompt,
                    completion_tokens=completion_tokens,
                    extras=self.extras,
                )
                for price in (self.price, *self.others)
            ),
            key=lambda quote: quote.hold_attousd,
        )
        return replace(
            self,
            completion_tokens=completion_tokens,
            hold_attousd=dearest.hold_attousd,
            hold_nanousd=dearest.hold_nanousd,
            hold_nano=dearest.hold_nano,
        )


def quote_call(
    price: Price,
    fx: FxQuote,
    *,
    prompt: PromptCount,
    completion_tokens: int,
    extras: Mapping[str, int] = NO_EXTRAS,
) -> Quote:
    """Quote a call: every token at the dearest it can be, so that no usage within the bounds costs more.

    Args:
        price: of the model.
        fx: of the wallet's currency.
        prompt: tokens and images counted.
        completion_tokens: the output bound, over all choices.
        extras: what is billed apart, by unit.

    Raises:
        PriceMissingError: one of the extras has no price.
    """
    rates = price.rates
    hold_attousd = (
        prompt.held_tokens * rates.prompt_max
        + prompt.images * rates.image
        + completion_tokens * rates.completion_max
        + rates.request
    )
    if extras:
        hold_attousd = hold_with_extras(
            price, extras, hold_attousd, prompt_tokens=prompt.held_tokens, completion_tokens=completion_tokens
        )
    charge = fx.charge(hold_attousd)
    return Quote(
        price=price,
        fx=fx,
        prompt=prompt,
        completion_tokens=completion_tokens,
        hold_attousd=hold_attousd,
        hold_nanousd=nanousd_from_attousd(hold_attousd),
        hold_nano=max(charge.charge_nano, 1),  # a free model's call is a call all the same
    )
