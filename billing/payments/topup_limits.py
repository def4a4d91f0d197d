"""How little and how much may be topped up at once, per currency: data of ours, which settings replace."""

import json
from functools import cache
from importlib.resources import files

from billing.errors import InputError
from billing.money import format_amount, get_currency, parse_amount
from config.settings import PaymentSettings


@cache
def default_limits() -> dict[str, tuple[str, str]]:
    """Return the least and the most by currency, in major units, where no setting says otherwise."""
    text = files("config").joinpath("data", "topup_limits.json").read_text(encoding="utf-8")
    return {code: (low, high) for code, (low, high) in json.loads(text).items()}


def check_topup(amount_nano: int, currency: str, settings: PaymentSettings) -> None:
    """Refuse an amount that is too small, too large, or finer than the currency is.

    Raises:
        InputError: it is; the message names the bound.
        UnknownCurrencyError: not an ISO 4217 code.
    """
    exponent = get_currency(currency).exponent
    if amount_nano % 10 ** (9 - exponent):
        raise InputError(f"an amount in {currency} has at most {exponent} decimals")
    low, high = default_limits().get(currency, ("0", None))
    low, high = settings.minimum.get(currency, low), settings.maximum.get(currency, high)
    if amount_nano <= 0 or amount_nano < parse_amount(low):
        raise InputError(f"the least that can be topped up is {low} {currency}")
    if high is not None and amount_nano > parse_amount(high):
        raise InputError(
            f"the most that can be topped up at once is {high} {currency}, not {format_amount(amount_nano)}"
        )
