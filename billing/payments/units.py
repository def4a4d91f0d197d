"""Amounts in the units of a payment provider, exact both ways. Pure.

Stripe and Paystack count whole minor units, Flutterwave writes major units; how many decimals a currency has there, and
which amounts are taken, is data (``config/data/payment_currencies.json``), as some differ from ISO 4217.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from importlib.resources import files
from typing import Literal

from billing.errors import InputError
from billing.money import (
    AMOUNT_MAX_NANO,
    NANO,
    NANO_DECIMALS,
    AmountError,
    format_amount,
    get_currency,
    has_more_decimals,
    parse_amount,
    scaled_integer,
)

PaymentProvider = Literal["stripe", "paystack", "flutterwave"]


class UnsupportedCurrencyError(InputError):
    """The payment provider does not take this currency."""


@dataclass(frozen=True, slots=True)
class PaymentUnit:
    """How a provider counts a currency.

    Args:
        decimals: of its smallest unit.
        step: amounts are whole multiples of so many smallest units.
    """

    decimals: int
    step: int

    @property
    def step_nano(self) -> int:
        """The smallest amount that can be told apart, in nano units."""
        return self.step * self.unit_nano

    @property
    def unit_nano(self) -> int:
        """The smallest unit, in nano units."""
        return int(10 ** (NANO_DECIMALS - self.decimals))


@cache
def payment_units(provider: PaymentProvider) -> Mapping[str, PaymentUnit]:
    """Return the currencies that a provider takes, and how it counts them."""
    text = files("config").joinpath("data", "payment_currencies.json").read_text(encoding="utf-8")
    listed = json.loads(text)[provider]
    return {
        code: PaymentUnit(
            **listed["exceptions"].get(code, {"decimals": get_currency(code).exponent, "step": 1})
        )
        for code in listed["currencies"].split()
    }


def get_payment_unit(currency: str, provider: PaymentProvider) -> PaymentUnit:
    """Return how a provider counts a currency.

    Raises:
        UnknownCurrencyError: not an ISO 4217 code.
        UnsupportedCurrencyError: the provider does not take it.
    """
    get_currency(currency)
    unit = payment_units(provider).get(currency)
    if unit is None:
        raise UnsupportedCurrencyError(f"{provider} takes no payments in {currency}")
    return unit


def minor_units(amount_nano: int, currency: str, provider: PaymentProvider) -> int:
    """Return an amount in the provider's smallest units: 5 USD is 500, 5 JPY is 5, and 5 UGX is 500 at Stripe.

    Raises:
        AmountError: negative, too large, or finer than the provider takes: nothing is rounded.
        UnsupportedCurrencyError, UnknownCurrencyError: no such currency there.
    """
    unit = get_payment_unit(currency, provider)
    _check(amount_nano, unit, currency, provider)
    return amount_nano // unit.unit_nano


def nano_from_minor_units(units: int, currency: str, provider: PaymentProvider) -> int:
    """Return the nano units of an amount that a provider names in its smallest units.

    What it names may be finer than what it takes: a step is asked of what we send alone.

    Raises:
        AmountError: no whole number, negative, or too large.
        UnsupportedCurrencyError, UnknownCurrencyError: no such currency there.
    """
    unit = get_payment_unit(currency, provider)
    if type(units) is not int:  # a float may have lost something, and True is no amount
        raise AmountError(f"{units!r} is not a whole number of minor units")
    return _bounded(units * unit.unit_nano)


def major_units(amount_nano: int, currency: str, provider: PaymentProvider) -> str:
    """Return an amount in major units, as text: ``"100.5"``.

    Raises:
        AmountError: negative, too large, or finer than the provider takes: nothing is rounded.
        UnsupportedCurrencyError, UnknownCurrencyError: no such currency there.
    """
    _check(amount_nano, get_payment_unit(currency, provider), currency, provider)
    return format_amount(amount_nano)


def nano_from_major_units(amount: str | int | Decimal, currency: str, provider: PaymentProvider) -> int:
    """Return the nano units of an amount that a provider names in major units; JSON is read with ``parse_float=Decimal``.

    Raises:
        AmountError: a float, negative, too large, or finer than the currency is there.
        UnsupportedCurrencyError, UnknownCurrencyError: no such currency there.
    """
    unit = get_payment_unit(currency, provider)
    if isinstance(amount, str):
        return parse_amount(amount, decimals=unit.decimals)
    if type(amount) is not int and not isinstance(amount, Decimal):
        raise AmountError(f"{amount!r} is not an exact amount: a number with decimals must not be a float")
    exact = Decimal(amount)
    if has_more_decimals(exact, unit.decimals):
        raise AmountError(f"{amount} {currency} has more than {unit.decimals} decimals")
    return _bounded(scaled_integer(exact, decimals=NANO_DECIMALS))


def _check(amount_nano: int, unit: PaymentUnit, currency: str, provider: PaymentProvider) -> None:
    if _bounded(amount_nano) % unit.step_nano:
        raise AmountError(
            f"{format_amount(amount_nano)} {currency} is finer than {provider} takes:"
            f" whole multiples of {format_amount(unit.step_nano)}"
        )


def _bounded(amount_nano: int) -> int:
    if not 0 <= amount_nano <= AMOUNT_MAX_NANO:
        raise AmountError(f"{amount_nano // NANO} is no amount of a payment")
    return amount_nano
