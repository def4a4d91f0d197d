"""Amounts in the units of payment providers: exact both ways, and nothing rounded on the way."""

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.money import (
    AMOUNT_MAX_NANO,
    NANO,
    AmountError,
    UnknownCurrencyError,
    find_currency,
    parse_amount,
)
from billing.payments.units import (
    PaymentProvider,
    UnsupportedCurrencyError,
    get_payment_unit,
    major_units,
    minor_units,
    nano_from_major_units,
    nano_from_minor_units,
    payment_units,
)

PROVIDERS: tuple[PaymentProvider, ...] = ("stripe", "paystack", "flutterwave")
# docs.stripe.com/currencies: "zero-decimal currencies", less UGX, which its "special cases" take back.
ZERO_DECIMAL = ("BIF", "CLP", "DJF", "GNF", "JPY", "KMF", "KRW", "MGA", "PYG", "RWF", "VND", "XAF", "XOF")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_currency_of_the_data_is_known(provider: PaymentProvider) -> None:
    for code, unit in payment_units(provider).items():
        assert find_currency(code) is not None
        assert unit.decimals in (0, 2, 3)
        assert unit.step in (1, 10, 100)


@given(st.data())
def test_what_is_sent_comes_back(data: st.DataObject) -> None:
    provider = data.draw(st.sampled_from(PROVIDERS))
    code = data.draw(st.sampled_from(sorted(payment_units(provider))))
    unit = get_payment_unit(code, provider)
    amount = data.draw(st.integers(0, AMOUNT_MAX_NANO // unit.step_nano)) * unit.step_nano
    assert nano_from_minor_units(minor_units(amount, code, provider), code, provider) == amount
    text = major_units(amount, code, provider)
    assert nano_from_major_units(text, code, provider) == amount
    assert nano_from_major_units(Decimal(text), code, provider) == amount
    finer = amount + data.draw(st.integers(1, unit.step_nano - 1))
    for convert in (minor_units, major_units):
        with pytest.raises(AmountError):
            convert(finer, code, provider)


@pytest.mark.parametrize(
    ("provider", "currency", "amount", "units"),
    [
        ("stripe", "USD", "10", 1000),
        ("stripe", "JPY", "500", 500),
        ("stripe", "ISK", "5", 500),
        ("stripe", "UGX", "5", 500),
        ("stripe", "MGA", "7", 7),
        ("stripe", "KWD", "5.12", 5120),
        ("stripe", "HUF", "10.45", 1045),
        ("paystack", "NGN", "5000", 500_000),
        ("paystack", "XOF", "100", 10_000),
        ("flutterwave", "NGN", "0.05", 5),
        ("flutterwave", "UGX", "5", 5),
    ],
)
def test_units_by_example(provider: PaymentProvider, currency: str, amount: str, units: int) -> None:
    assert minor_units(parse_amount(amount), currency, provider) == units
    assert nano_from_minor_units(units, currency, provider) == parse_amount(amount)


def test_stripes_zero_decimal_currencies() -> None:
    for code in ZERO_DECIMAL:
        assert get_payment_unit(code, "stripe").decimals == 0
    with_none = {code for code, unit in payment_units("stripe").items() if unit.decimals == 0}
    assert with_none == set(ZERO_DECIMAL)


@pytest.mark.parametrize(
    ("provider", "currency", "amount"),
    [
        ("stripe", "USD", "0.005"),
        ("stripe", "JPY", "0.5"),
        ("stripe", "ISK", "40.1"),
        ("stripe", "UGX", "0.5"),
        ("stripe", "KWD", "5.124"),
        ("stripe", "MGA", "0.2"),
        ("paystack", "XOF", "1.5"),
        ("paystack", "NGN", "0.001"),
        ("flutterwave", "RWF", "0.5"),
    ],
)
def test_what_is_finer_than_a_provider_takes(provider: PaymentProvider, currency: str, amount: str) -> None:
    with pytest.raises(AmountError, match="finer"):
        minor_units(parse_amount(amount), currency, provider)
    with pytest.raises(AmountError):
        major_units(parse_amount(amount), currency, provider)


@pytest.mark.parametrize("bad", [1.0, 10.5, True, None, -1, 2**62])
def test_what_is_no_amount(bad: Any) -> None:
    with pytest.raises(AmountError):
        nano_from_minor_units(bad, "USD", "stripe")
    with pytest.raises(AmountError):
        nano_from_major_units(bad, "NGN", "flutterwave")


@pytest.mark.parametrize(
    "bad", ["-1", "1e3", "", "0.001", Decimal("0.001"), Decimal("NaN"), Decimal("1e400")]
)
def test_what_is_no_amount_in_major_units(bad: Any) -> None:
    with pytest.raises(AmountError):
        nano_from_major_units(bad, "NGN", "flutterwave")


def test_bounds_and_currencies() -> None:
    for amount in (-NANO, AMOUNT_MAX_NANO + NANO):
        with pytest.raises(AmountError):
            minor_units(amount, "USD", "stripe")
    with pytest.raises(UnsupportedCurrencyError):
        minor_units(NANO, "BRL", "paystack")
    with pytest.raises(UnknownCurrencyError):
        minor_units(NANO, "usd", "stripe")
