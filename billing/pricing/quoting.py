"""From an ask to a quote: the price book, the exchange rate and the count of its prompt together."""

from collections.abc import Awaitable, Callable, Sequence

from billing.fx.book import FxBook
from billing.pricing.price_book import PriceBook
from billing.pricing.quote import Output, Quote, quote_call
from billing.pricing.tokens import PromptCount
from config.settings import HoldSettings


async def quote_ask(
    output: Output,
    *,
    count: Callable[[], Awaitable[PromptCount]],
    models: Sequence[str],
    currency: str,
    stream: bool,
    prices: PriceBook,
    fx: FxBook,
    settings: HoldSettings,
) -> Quote:
    """Estimate what a call will cost, upward, with price and exchange rate pinned for it.

    Args:
        output: how much it asks for.
        count: counts its prompt; asked once nothing else stands in the way.
        models: every model that may answer; the dearest is quoted, the first one's price is pinned.
        currency: the wallet's.
        stream: whether the hold can grow while the answer comes.
        prices: the price book.
        fx: exchange rates.
        settings: default output bounds.

    Raises:
        ModelNotFoundError: one of the models has no price.
        FxUnavailableError: there is no rate for the currency.
        FxStaleError: the rate was not confirmed for too long.
    """
    found = [prices.get_model(name) for name in models]
    rate = fx.get_quote(currency)
    prompt = await count()
    default = settings.stream_default_tokens if stream else settings.plain_default_tokens
    quotes = [
        quote_call(
            model.price,
            rate,
            prompt=prompt,
            completion_tokens=output.bound(
                default_tokens=default, model_max=model.price.completion_tokens_max
            ),
        )
        for model in found
    ]
    if len(quotes) == 1:
        return quotes[0]
    dearest = max(quotes, key=lambda quote: quote.hold_attousd)
    return Quote(
        price=found[0].price,
        fx=rate,
        prompt=prompt,
        completion_tokens=dearest.completion_tokens,
        hold_attousd=dearest.hold_attousd,
        hold_nanousd=dearest.hold_nanousd,
        hold_nano=dearest.hold_nano,
        others=tuple(model.price for model in found[1:]),
    )
