"""From an ask to a quote: the price book, the exchange rate and the count of its prompt together."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

from billing.errors import PriceMissingError
from billing.fx.book import FxBook
from billing.pricing.cost import Price
from billing.pricing.extras import NO_EXTRAS, WEB_SEARCH
from billing.pricing.price_book import PriceBook
from billing.pricing.quote import Output, Quote
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
    extras: Mapping[str, int] = NO_EXTRAS,
    beside_tokens: int = 0,
) -> Quote:
    """Estimate what a call will cost, upward, with price and exchange rate pinned for it.

    Args:
        output: how much it asks for.
        count: counts its prompt; asked once nothing else stands in the way.
        models: every model that may answer; the dearest is quoted, the first one's price is pinned.
        currency: the wallet's.
        stream: of a stream that names no bound less output counts in windows of tokens.
        prices: the price book.
        fx: exchange rates.
        settings: default output bounds.
        extras: what is billed apart from tokens, by unit.
        beside_tokens: output that may be billed beside what the bound allows.

    Raises:
        PriceMissingError: what is asked for is billed apart, and the price book does not say at what price.
        ModelNotFoundError: one of the models has no price.
        FxUnavailableError: there is no rate for the currency.
        FxStaleError: the rate was not confirmed for too long.
    """
    found = [prices.get_model(name) for name in models]
    rate = fx.get_quote(currency)
    prompt = await count()
    if prompt.open_ended or WEB_SEARCH in extras:
        prompt = _filling_context(prompt, [model.price for model in found])
    window = settings.stream_default_tokens if stream else settings.plain_default_tokens
    quote = Quote(
        price=found[0].price,
        fx=rate,
        prompt=prompt,
        completion_tokens=0,
        hold_attousd=0,
        hold_nanousd=0,
        hold_nano=0,
        others=tuple(model.price for model in found[1:]),
        choices=output.choices,
        open_ended=output.tokens is None and output.choices > 0,
        beside_tokens=beside_tokens,
        extras=extras,
    )
    quote = quote.told(max(_bound(output, model.price, settings) for model in found))
    counted = min(quote.told_tokens, window) if quote.open_ended else quote.told_tokens
    return replace(quote, window_tokens=prompt.held_tokens + counted * output.choices + beside_tokens)


def _bound(output: Output, price: Price, settings: HoldSettings) -> int:
    return output.per_choice(
        unknown_max=price.context_tokens or settings.plain_default_tokens,
        model_max=price.completion_tokens_max,
    )


def _filling_context(prompt: PromptCount, prices: Sequence[Price]) -> PromptCount:
    """Return the prompt with what is held for it where something in it cannot be measured, or a search adds what it finds.

    Raises:
        PriceMissingError: the price book does not say how much a model takes in.
    """
    for price in prices:
        if price.context_tokens is None:
            raise PriceMissingError(
                f"{price.model!r} has no 'context_tokens' in the price book, so what cannot be measured in this request "
                "(a file, a video, an image, a search) has no bound."
            )
    return replace(prompt, most_tokens=max(price.context_tokens or 0 for price in prices))
