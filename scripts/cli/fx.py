"""``tuma fx``: exchange rates."""

import re
from decimal import Decimal
from typing import Any

import click

from billing.errors import InputError
from billing.fx.book import FxBook
from billing.fx.sync import FxFeed
from proxy.outbound.fx_sources import make_sources
from scripts.command import office_command
from scripts.office import Office


@click.group()
def fx() -> None:
    """Exchange rates."""


@office_command(fx, "set")
@click.argument("base")
@click.argument("quote")
@click.argument("rate")
@click.option("--markup-bps", type=int, default=None, help="On top of the rate, in hundredths of a percent.")
@click.option(
    "--good-for", type=float, default=None, help="Seconds until it prices no new calls; left out: for good."
)
@click.option("--pin", is_flag=True, help="Fetched rates do not replace it.")
async def fx_set(
    office: Office,
    *,
    base: str,
    quote: str,
    rate: str,
    markup_bps: int | None,
    good_for: float | None,
    pin: bool,
) -> dict[str, Any]:
    """Set a rate: units of QUOTE for one BASE, as in `tuma fx set USD NGN 1600`."""
    book = FxBook(office.database, office.settings.fx)
    set_to = await book.set_rate(
        base, quote, _rate(rate), markup_bps=markup_bps, good_for_s=good_for, pinned=pin
    )
    return {"id": str(set_to.id), "base": base, "quote": quote, "rate": rate, "markup_bps": set_to.markup_bps}


@office_command(fx, "sync")
async def fx_sync(office: Office) -> dict[str, Any]:
    """Ask the sources for their rates now; exits 1 if one does not answer."""
    settings = office.settings.fx
    return (await FxFeed(office.database, make_sources(settings), settings).sync()).as_json()


@office_command(fx, "accept")
@click.argument("currency")
@click.option("--rate", default=None, help="Only if it is this one.")
async def fx_accept(office: Office, *, currency: str, rate: str | None) -> dict[str, Any]:
    """Quote the rate that waits for an operator's word, as `tuma fx show` names it."""
    book = FxBook(office.database, office.settings.fx)
    taken = await book.accept_rate(currency, expected=None if rate is None else _rate(rate))
    return {
        "id": str(taken.id),
        "base": "USD",
        "quote": currency,
        "rate": f"{taken.rate.normalize():f}",
        "markup_bps": taken.markup_bps,
    }


@office_command(fx, "show")
@click.argument("currency", required=False)
@click.option("--against", default=None, help="The rate against this currency, too.")
async def fx_show(office: Office, *, currency: str | None, against: str | None) -> dict[str, Any]:
    """Show rates: units for one USD, and the inverse; markup, source, age, and what waits for a word."""
    shown = await FxBook(office.database, office.settings.fx).describe(currency, against=against)
    return shown[0] if currency is not None else {"rates": shown}


def _rate(text: str) -> Decimal:
    """Read a rate as `fx show` writes it, with up to 18 decimals."""
    if re.fullmatch(r"[0-9]{1,10}(\.[0-9]{1,18})?", text, re.ASCII) is None:
        raise InputError(f"{text[:40]!r} is not a rate: write it as 1234.56")
    return Decimal(text)
