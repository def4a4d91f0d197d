"""``tuma models``: the price book, synchronised or set by hand."""

from decimal import Decimal, InvalidOperation
from typing import Any

import click

from billing.errors import InputError
from billing.money import NANO_DECIMALS, parse_amount
from billing.pricing.extras import PER_TOKEN
from billing.pricing.price_book import ModelPrice, PriceBook
from proxy.upstream.price_listing import read_listing
from scripts.command import office_command
from scripts.office import Office


@click.group()
def models() -> None:
    """Models and their prices."""


@office_command(models, "sync")
async def models_sync(office: Office) -> dict[str, Any]:
    """Take over the provider's models and prices."""
    priced, unpriced = read_listing(await office.upstream.list_models())
    changed = await PriceBook(office.database).set_prices(priced, source=office.settings.upstream.kind)
    return {"models": len(priced), "prices_changed": changed, "without_price": unpriced}


@office_command(models, "price")
@click.argument("model")
@click.option("--prompt", required=True, help="USD per million tokens.")
@click.option("--completion", required=True, help="USD per million tokens.")
@click.option("--cached-read", default=None, help="USD per million tokens read from the provider's cache.")
@click.option("--cached-write", default=None, help="USD per million tokens written to it.")
@click.option("--reasoning", default=None, help="USD per million reasoning tokens.")
@click.option("--request", "request_price", default="0", help="USD per request.")
@click.option("--context", type=click.IntRange(min=1), default=None, help="Tokens that the model takes in.")
@click.option("--output", type=click.IntRange(min=1), default=None, help="Tokens that it gives at most.")
@click.option(
    "--extra",
    multiple=True,
    metavar="UNIT=PRICE",
    help="What is billed beside tokens: web_search, web_search_result (USD each), audio_output, image_output, "
    "cached_write_1h (USD per million tokens), tier_NAME, routing (factors). Repeat for more.",
)
async def models_price(
    office: Office,
    *,
    model: str,
    prompt: str,
    completion: str,
    cached_read: str | None,
    cached_write: str | None,
    reasoning: str | None,
    request_price: str,
    context: int | None,
    output: int | None,
    extra: tuple[str, ...],
) -> dict[str, Any]:
    """Set a model's prices by hand."""
    prices = {
        "prompt_usd": _per_token(prompt),
        "completion_usd": _per_token(completion),
        "cached_read_usd": None if cached_read is None else _per_token(cached_read),
        "cached_write_usd": None if cached_write is None else _per_token(cached_write),
        "reasoning_usd": None if reasoning is None else _per_token(reasoning),
        "image_usd": Decimal(0),
        "audio_usd": None,
        "request_usd": _decimal(request_price),
    }
    book = PriceBook(office.database)
    changed = await book.set_prices(
        [ModelPrice(model, model, context, output, prices, _extras(extra))], source="manual"
    )
    return {"model": model, "prompt": prompt, "completion": completion, "changed": bool(changed)}


def _extras(given: tuple[str, ...]) -> dict[str, Decimal]:
    extras = {}
    for text in given:
        unit, separator, price = text.partition("=")
        if not separator:
            raise InputError(f"{text!r} is not of the form UNIT=PRICE")
        extras[unit] = _per_token(price) if unit in PER_TOKEN else _decimal(price)
    return extras


def _per_token(usd_per_million: str) -> Decimal:
    return _decimal(usd_per_million).scaleb(-6)


def _decimal(text: str) -> Decimal:
    parse_amount(text, decimals=NANO_DECIMALS)  # the same strictness as for amounts
    try:
        return Decimal(text)
    except InvalidOperation:
        raise InputError(f"{text!r} is not a number") from None
