"""When a prompt need not be counted before its call: where the wallet covers as many tokens as it can have. Pure.

A prompt of which only a bound is known has more held for it than it can cost, about four times as much. So that no other
call of the same wallet is refused for it, this is done only where enough is left for many calls more; else the
prompt is counted.
"""

from billing.money import nanousd_from_attousd
from billing.pricing.quote import Quote

# Prompts as large as this one's bound that must find room beside it, so those of four times as many calls as are
# usually in flight.
_SPARE = 32


def is_covered(quote: Quote, *, nano: int, nanousd: int | None, tokens: int) -> bool:
    """Tell whether a quote with a bound for its prompt leaves enough for others.

    Args:
        quote: of a prompt that was not counted.
        nano: what wallet and caps have left, in nano units of the wallet's currency.
        nanousd: what the user's caps have left; None where there are none.
        tokens: what is left of this minute's.
    """
    prices = (quote.price, *quote.others)
    prompt_attousd = quote.prompt.tokens * max(price.rates.prompt_max for price in prices)
    spare_nano = _SPARE * quote.fx.charge(prompt_attousd).charge_nano
    spare_nanousd = _SPARE * nanousd_from_attousd(prompt_attousd)
    return (
        nano >= quote.hold_nano + spare_nano
        and (nanousd is None or nanousd >= quote.hold_nanousd + spare_nanousd)
        and tokens >= quote.completion_tokens + (1 + _SPARE) * quote.prompt.tokens
    )
