"""The quote: what a call may cost at most, within its bounds. Pure."""

from dataclasses import dataclass

from billing.fx.quote import FxQuote
from billing.money import nanousd_from_attousd
from billing.pricing.cost import Price
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

    def bound(self, *, default_tokens: int, model_max: int | None) -> int:
        """Return how many tokens the answer may have, over all choices.

        Args:
            default_tokens: where the request names no bound.
            model_max: what the model can give per choice, if known.
        """
        bound = default_tokens if self.tokens is None else self.tokens
        if model_max is not None and model_max > 0:
            bound = min(bound, model_max)
        return bound * self.choices


@dataclass(frozen=True, slots=True)
class Quote:
    """An upward estimate with price and exchange rate pinned; hold amounts in USD and in the wallet's currency.

    ``completion_tokens`` is the bound over all choices. ``others`` are the prices of further models that may answer.
    """

    price: Price
    fx: FxQuote
    prompt: PromptCount
    completion_tokens: int
    hold_attousd: int
    hold_nanousd: int
    hold_nano: int
    others: tuple[Price, ...] = ()

    def grown_to(self, completion_tokens: int) -> "Quote":
        """Quote the same call at another output bound: at the dearest of the models that may answer."""
        return max(
            (
                quote_call(price, self.fx, prompt=self.prompt, completion_tokens=completion_tokens)
                for price in (self.price, *self.others)
            ),
            key=lambda quote: quote.hold_attousd,
        )


def quote_call(price: Price, fx: FxQuote, *, prompt: PromptCount, completion_tokens: int) -> Quote:
    """Quote a call: every token at the dearest it can be, so that no usage within the bounds costs more.

    Args:
        price: of the model.
        fx: of the wallet's currency.
        prompt: tokens and images counted.
        completion_tokens: the output bound, over all choices.
    """
    rates = price.rates
    hold_attousd = (
        prompt.tokens * rates.prompt_max
        + prompt.images * rates.image
        + completion_tokens * rates.completion_max
        + rates.request
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
