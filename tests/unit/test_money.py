"""Money, prices and exchange: exact against fractions, rounded once, upward."""

from decimal import Decimal
from fractions import Fraction
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.errors import InputError
from billing.fx.quote import FxQuote, usd_quote
from billing.money import (
    AMOUNT_MAX_NANO,
    NANO,
    AmountError,
    UnknownCurrencyError,
    attousd_from_decimal,
    ceil_div,
    find_currency,
    format_amount,
    get_currency,
    has_more_decimals,
    nanousd_from_attousd,
    parse_amount,
)
from billing.pricing.cost import Price, Usage, cost_attousd
from billing.pricing.quote import Output, quote_call
from billing.pricing.tokens import PromptCount

amounts = st.integers(-AMOUNT_MAX_NANO, AMOUNT_MAX_NANO)
costs = st.integers(0, 10**24)
rates = st.decimals("0.000000000000000001", "1000000000", places=9).filter(lambda rate: rate > 0)
markups = st.integers(0, 100_000)
unit_prices = st.decimals(0, "0.01", places=18, allow_nan=False)
counts = st.integers(0, 10**7)


def price_of(
    prompt: Decimal,
    completion: Decimal,
    *,
    cached: Decimal | None = None,
    written: Decimal | None = None,
    reasoning: Decimal | None = None,
    request: Decimal = Decimal(0),
    image: Decimal = Decimal(0),
) -> Price:
    return Price(
        UUID(int=1),
        "m",
        prompt,
        completion,
        cached_read_usd=cached,
        cached_write_usd=written,
        reasoning_usd=reasoning,
        request_usd=request,
        image_usd=image,
    )


prices = st.builds(
    price_of,
    unit_prices,
    unit_prices,
    cached=st.none() | unit_prices,
    written=st.none() | unit_prices,
    reasoning=st.none() | unit_prices,
    request=unit_prices,
    image=unit_prices,
)


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    prompt, completion = draw(counts), draw(counts)
    cached = draw(st.integers(0, prompt))
    written = draw(st.integers(0, prompt - cached))
    return Usage(
        prompt, completion, cached, written, draw(st.integers(0, completion)), draw(st.integers(0, 20))
    )


@given(amounts)
def test_amounts_survive_text(amount: int) -> None:
    text = format_amount(amount)
    assert parse_amount(text, allow_negative=True) == amount
    assert Fraction(text) == Fraction(amount, NANO)
    assert "E" not in text
    assert not text.endswith(".")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "1 ",
        "+1",
        "-1",
        "1e3",
        "1_000",
        "1,5",
        "0x1",
        "NaN",
        "inf",
        ".5",
        "1.",
        "1.0000000001",
        "٣",
        "9" * 21,
        "1.5\n",
    ],
)
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(AmountError):
        parse_amount(text)


def test_amounts_by_example() -> None:
    assert parse_amount("5000") == 5000 * NANO
    assert parse_amount("0.05", decimals=2) == 50_000_000
    with pytest.raises(AmountError):
        parse_amount("0.055", decimals=2)
    assert [format_amount(value) for value in (0, 1, -NANO, 1_200_000_000, 50_000_000)] == [
        "0",
        "0.000000001",
        "-1",
        "1.2",
        "0.05",
    ]


def test_currencies() -> None:
    for code, exponent in {
        "USD": 2,
        "NGN": 2,
        "KES": 2,
        "GHS": 2,
        "ZAR": 2,
        "UGX": 0,
        "XOF": 0,
        "JPY": 0,
    }.items():
        assert get_currency(code).exponent == exponent
    for code in ("TZS", "RWF", "XAF", "EGP", "INR", "BRL", "EUR", "GBP"):
        assert find_currency(code) is not None
    for code in ("usd", "", "XXX", "US", "USDT"):
        with pytest.raises(UnknownCurrencyError):
            get_currency(code)


@given(st.decimals(0, 10**6, allow_nan=False, allow_infinity=False))
def test_a_providers_figure_is_kept_or_rounded_up(cost: Decimal) -> None:
    atto = attousd_from_decimal(cost)
    assert 0 <= atto - Fraction(cost) * 10**18 < 1
    if not has_more_decimals(cost, 18):
        assert Fraction(atto, 10**18) == Fraction(cost)


@pytest.mark.parametrize("bad", ["NaN", "Infinity", "-1", "-0.0000000001"])
def test_a_figure_that_is_none_is_refused(bad: str) -> None:
    with pytest.raises(AmountError):
        attousd_from_decimal(Decimal(bad))


def test_tiny_and_huge_exponents_cost_no_time() -> None:
    assert attousd_from_decimal(Decimal("1E-999999")) == 1
    assert attousd_from_decimal(Decimal("0E+999999")) == 0
    with pytest.raises(AmountError):
        attousd_from_decimal(Decimal("1E+999999"))


@given(prices, usages())
def test_cost_is_exact(price: Price, usage: Usage) -> None:
    def of(value: Decimal | None, default: Decimal) -> Fraction:
        return Fraction(default if value is None else value)

    reasoning = Fraction(price.reasoning_usd) if price.reasoning_usd else Fraction(price.completion_usd)
    plain = usage.prompt_tokens - usage.cached_read_tokens - usage.cached_write_tokens
    expected = (
        plain * Fraction(price.prompt_usd)
        + usage.cached_read_tokens * of(price.cached_read_usd, price.prompt_usd)
        + usage.cached_write_tokens * of(price.cached_write_usd, price.prompt_usd)
        + (usage.completion_tokens - usage.reasoning_tokens) * Fraction(price.completion_usd)
        + usage.reasoning_tokens * reasoning
        + usage.images * Fraction(price.image_usd)
        + Fraction(price.request_usd)
    )
    cost = cost_attousd(price, usage)
    assert Fraction(cost, 10**18) == expected >= 0
    assert nanousd_from_attousd(cost) == ceil_div(cost, NANO)


@given(prices, usages(), st.integers(0, 1000))
def test_cost_grows_with_tokens(price: Price, usage: Usage, more: int) -> None:
    base = cost_attousd(price, usage)
    fields = {name: getattr(usage, name) for name in Usage.__slots__}
    for name in ("prompt_tokens", "completion_tokens", "images"):
        assert cost_attousd(price, Usage(**{**fields, name: fields[name] + more})) >= base


@pytest.mark.parametrize("bad", [Decimal(-1), Decimal("NaN"), Decimal("Infinity"), Decimal("1E-19")])
def test_bad_prices_are_refused(bad: Decimal) -> None:
    with pytest.raises(InputError):
        price_of(bad, Decimal(0))


@given(costs, rates, markups)
def test_a_charge_is_rounded_once_upward(cost: int, rate: Decimal, markup: int) -> None:
    charge = FxQuote(UUID(int=2), "NGN", rate, markup).charge(cost)
    exact = Fraction(cost, 10**9) * Fraction(rate) * Fraction(10_000 + markup, 10_000)
    assert 0 <= charge.charge_nano - exact < 1
    base = Fraction(cost, 10**9) * Fraction(rate)
    assert 0 <= (charge.charge_nano - charge.spread_nano) - base < 1
    assert 0 <= charge.spread_nano <= charge.charge_nano


@given(costs, st.integers(0, 10**20), rates, markups, st.integers(0, 1000))
def test_a_charge_grows_with_everything(cost: int, more: int, rate: Decimal, markup: int, bps: int) -> None:
    quote = FxQuote(UUID(int=2), "NGN", rate, markup)
    charge = quote.charge(cost).charge_nano
    assert quote.charge(cost + more).charge_nano >= charge
    assert FxQuote(UUID(int=2), "NGN", rate, min(markup + bps, 100_000)).charge(cost).charge_nano >= charge
    higher = min(rate * 2, Decimal(10) ** 9)
    assert FxQuote(UUID(int=2), "NGN", higher, markup).charge(cost).charge_nano >= charge


@given(costs)
def test_a_dollar_is_a_dollar(cost: int) -> None:
    charge = usd_quote().charge(cost)
    assert (charge.charge_nano, charge.spread_nano) == (nanousd_from_attousd(cost), 0)


@pytest.mark.parametrize(
    ("rate", "markup"),
    [("0", 0), ("-1", 0), ("NaN", 0), ("1E+10", 0), ("1E-19", 0), ("1", -1), ("1", 100_001)],
)
def test_bad_quotes_are_refused(rate: str, markup: int) -> None:
    with pytest.raises(InputError):
        FxQuote(UUID(int=2), "NGN", Decimal(rate), markup)


@given(prices, usages(), rates, markups)
def test_a_hold_covers_any_usage_within_its_bounds(
    price: Price, usage: Usage, rate: Decimal, markup: int
) -> None:
    fx = FxQuote(UUID(int=2), "NGN", rate, markup)
    prompt = PromptCount(usage.prompt_tokens, usage.images)
    quote = quote_call(price, fx, prompt=prompt, completion_tokens=usage.completion_tokens)
    cost = cost_attousd(price, usage)
    assert quote.hold_attousd >= cost
    assert quote.hold_nano >= fx.charge(cost).charge_nano
    assert quote.hold_nanousd >= nanousd_from_attousd(cost)
    assert quote.hold_nano >= 1


def test_output_bounds() -> None:
    assert Output(None).bound(unknown_max=100, model_max=None) == 100
    assert Output(5).bound(unknown_max=100, model_max=None) == 5
    assert Output(7, choices=3).bound(unknown_max=100, model_max=None) == 21
    assert Output(500).bound(unknown_max=100, model_max=50) == 50
    assert Output(None).bound(unknown_max=100, model_max=0) == 100
    assert Output(0, choices=0).bound(unknown_max=100, model_max=50) == 0
