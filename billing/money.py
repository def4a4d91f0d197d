"""Money: integers of nano units (10⁻⁹ of a currency), exact in and out. Pure.

Inside calculations a cost is an integer of atto-dollars (10⁻¹⁸ USD), so that token prices lose nothing before the one
rounding of a charge.
"""

import json
import re
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from importlib.resources import files

from billing.errors import InputError

NANO = 10**9
ATTO = 10**18
ATTO_PER_NANO = 10**9
NANO_DECIMALS = 9
ATTO_DECIMALS = 18
AMOUNT_MAX_NANO = 2**62  # a bound on every single amount; bigint holds twice that
SUM_MAX_NANO = 2**63 - 1  # a bound on what a wallet may hold and owe together: bigint's own

_AMOUNT = re.compile(r"(-?)([0-9]{1,20})(?:\.([0-9]{1,20}))?", re.ASCII)


class AmountError(InputError):
    """The text or number is no amount of money that can be kept exactly."""


class UnknownCurrencyError(InputError):
    """The code is not an ISO 4217 currency that Tuma knows."""


@dataclass(frozen=True, slots=True)
class Currency:
    """A currency; ``exponent`` is the number of decimals of its minor unit (ISO 4217)."""

    code: str
    exponent: int
    name: str
    symbol: str


@cache
def _currencies() -> dict[str, Currency]:
    text = files("config").joinpath("data", "currencies.json").read_text(encoding="utf-8")
    return {
        code: Currency(code, item["exponent"], item["name"], item["symbol"])
        for code, item in json.loads(text).items()
    }


def find_currency(code: str) -> Currency | None:
    """Return the currency with this ISO 4217 code, upper case."""
    return _currencies().get(code)


def get_currency(code: str) -> Currency:
    """Return the currency with this ISO 4217 code.

    Raises:
        UnknownCurrencyError: there is none; codes are upper case.
    """
    found = find_currency(code)
    if found is None:
        raise UnknownCurrencyError(
            f"{code[:20]!r} is not a currency code (three capital letters, as USD or NGN)"
        )
    return found


def parse_amount(text: str, *, decimals: int = NANO_DECIMALS, allow_negative: bool = False) -> int:
    """Parse a decimal string in major units into nano units, exactly.

    Args:
        text: digits with at most one point; no exponent, sign ``+``, spaces or separators.
        decimals: how many decimals are allowed, at most nine.
        allow_negative: whether a leading minus is.

    Raises:
        AmountError: it is none, is finer than allowed, or out of bounds.
    """
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise AmountError(f"{text[:40]!r} is not an amount: write it as 1234.56")
    sign, whole, fraction = match[1], match[2], match[3] or ""
    if sign and not allow_negative:
        raise AmountError(f"{text!r} is negative")
    if len(fraction) > min(decimals, NANO_DECIMALS):
        raise AmountError(f"{text!r} has more than {decimals} decimals")
    amount_nano = int(whole) * NANO + int(fraction.ljust(NANO_DECIMALS, "0"))
    if amount_nano > AMOUNT_MAX_NANO:
        raise AmountError(f"{text!r} is too large")
    return -amount_nano if sign else amount_nano


def format_amount(amount_nano: int) -> str:
    """Write nano units as an exact decimal string in major units: ``5000``, ``0.05``, ``-1.2``."""
    whole, fraction = divmod(abs(amount_nano), NANO)
    sign = "-" if amount_nano < 0 else ""
    if not fraction:
        return f"{sign}{whole}"
    return f"{sign}{whole}.{fraction:09d}".rstrip("0")


def format_usd(amount_nanousd: int) -> str:
    """Write nano-dollars as an exact decimal string in dollars."""
    return format_amount(amount_nanousd)


def ceil_div(numerator: int, denominator: int) -> int:
    """Divide integers, rounding up."""
    return -(-numerator // denominator)


def nanousd_from_attousd(cost_attousd: int) -> int:
    """Round a cost up to nano-dollars."""
    return ceil_div(cost_attousd, ATTO_PER_NANO)


def scaled_integer(value: Decimal, *, decimals: int) -> int:
    """Return ``value`` × 10^decimals as an integer, rounded up where it is finer; free of the decimal context.

    Raises:
        AmountError: negative or not finite.
    """
    sign, digits, exponent = value.as_tuple()
    if not isinstance(exponent, int) or (sign and any(digits)):
        raise AmountError("an amount must be finite and not negative")
    number = int("".join(map(str, digits)) or "0")
    shift = exponent + decimals
    if shift > 4 * ATTO_DECIMALS:
        if number == 0:
            return 0
        raise AmountError("an amount is too large")
    return number * 10**shift if shift >= 0 else _ceil_shift(number, -shift)


def _ceil_shift(number: int, places: int) -> int:
    if places > len(str(number)) + 1:
        return 1 if number else 0
    return ceil_div(number, 10**places)


def attousd_from_decimal(cost_usd: Decimal) -> int:
    """Turn a provider's figure in USD into atto-dollars, up where it is finer than that.

    Raises:
        AmountError: negative or not finite.
    """
    return scaled_integer(cost_usd, decimals=ATTO_DECIMALS)


def has_more_decimals(value: Decimal, decimals: int) -> bool:
    """Tell whether a finite number has nonzero digits beyond ``decimals`` places."""
    _, digits, exponent = value.as_tuple()
    if not isinstance(exponent, int):
        return True
    beyond = -exponent - decimals
    return beyond > 0 and any(digits[-beyond:])
