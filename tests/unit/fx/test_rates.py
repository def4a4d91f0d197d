"""Exchange rates before they are quoted: exact, rounded once, and believed only within bounds."""

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.errors import FxSourceError, InputError
from billing.fx.quote import RATE_MAX
from billing.fx.rates import clean_rates, cross_rate, inverse_rate, judge, round_rate, within
from config.settings import FxSettings
from proxy.outbound.fx_sources import locate, make_sources, read_document

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
DAY = timedelta(days=1)
rates = st.decimals("0.000001", "1000000000", places=18).filter(lambda rate: rate > 0)
bands = st.integers(0, 100_000)
ER_API: dict[str, Any] = {
    "result": "success",
    "provider": "https://www.exchangerate-api.com",
    "documentation": "https://www.exchangerate-api.com/docs/free",
    "terms_of_use": "https://www.exchangerate-api.com/terms",
    "time_last_update_unix": int(NOW.timestamp()) - 3600,
    "time_last_update_utc": "Tue, 24 Nov 2026 11:00:00 +0000",
    "time_next_update_unix": int(NOW.timestamp()) + 82_800,
    "time_next_update_utc": "Wed, 25 Nov 2026 11:00:00 +0000",
    "time_eol_unix": 0,
    "base_code": "USD",
    "rates": {"USD": 1, "NGN": 1583.25, "JPY": 155, "XDR": 0.75},
}
OXR: dict[str, Any] = {
    "disclaimer": "Usage subject to terms: https://openexchangerates.org/terms",
    "license": "https://openexchangerates.org/license",
    "timestamp": int(NOW.timestamp()) - 600,
    "base": "USD",
    "rates": {"USD": 1, "NGN": 1583.25, "JPY": 155, "XDR": 0.75},
}


def read(document: Any) -> Any:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return read_document(body, now=NOW, age_max_s=DAY.total_seconds())


@given(rates, rates)
def test_inverse_and_cross_are_rounded_once(one: Decimal, other: Decimal) -> None:
    half_unit = Fraction(1, 2 * 10**18)
    assert abs(Fraction(inverse_rate(one)) - 1 / Fraction(one)) <= half_unit
    cross = cross_rate(one, other)
    assert abs(Fraction(cross) - Fraction(other) / Fraction(one)) <= half_unit
    with localcontext() as context:
        context.prec = 3
        assert cross_rate(one, other) == cross, "whatever precision the caller works with"
    assert cross_rate(one, one) == 1


def test_a_cross_rate_does_not_go_over_an_inverse() -> None:
    """1 ÷ 3 × 3 by way of a rounded inverse would be 0.999…."""
    assert cross_rate(Decimal(3), Decimal(3)) == 1
    assert inverse_rate(Decimal(3)) * 3 != 1
    assert inverse_rate(Decimal(1600)) == Decimal("0.000625")
    for bad in (Decimal(0), Decimal(-1), Decimal("NaN")):
        with pytest.raises(InputError):
            inverse_rate(bad)


@given(st.fractions(0, 10**9))
def test_rounding_is_half_to_even(exact: Fraction) -> None:
    assert Fraction(round_rate(exact)) == Fraction(round(exact * 10**18), 10**18)


@given(rates, rates, bands)
def test_a_band_is_the_same_both_ways(one: Decimal, other: Decimal, bps: int) -> None:
    apart = abs(Fraction(one) - Fraction(other)) / min(Fraction(one), Fraction(other))
    assert within(one, other, bps=bps) is within(other, one, bps=bps) is (apart <= Fraction(bps, 10_000))
    assert within(one, one, bps=0)


@pytest.mark.parametrize(
    ("rate", "witness", "two", "current", "state"),
    [
        ("1600", None, False, None, "accepted"),
        ("1600", None, True, None, "alone"),
        ("1600", "1616", True, None, "accepted"),
        ("1600", "1616.01", True, None, "disputed"),
        ("1600", None, False, "1500", "accepted"),
        ("1650", None, False, "1500", "accepted"),
        ("1650.01", None, False, "1500", "held"),
        ("1500", None, False, "1650.01", "held"),
        ("1800", "1800", True, "1500", "held"),
        ("16000", "1600", True, "1600", "disputed"),
    ],
)
def test_what_is_believed(rate: str, witness: str | None, two: bool, current: str | None, state: str) -> None:
    assert (
        judge(
            Decimal(rate),
            witness=None if witness is None else Decimal(witness),
            two_sources=two,
            current=None if current is None else Decimal(current),
            band_bps=100,
            jump_bps=1000,
        )
        == state
    )


@given(rates, rates, bands, bands)
def test_nothing_is_accepted_that_jumps_or_is_disputed(
    rate: Decimal, other: Decimal, band: int, jump: int
) -> None:
    state = judge(rate, witness=other, two_sources=True, current=other, band_bps=band, jump_bps=jump)
    assert (state == "accepted") is (within(rate, other, bps=band) and within(rate, other, bps=jump))


@pytest.mark.parametrize("document", [ER_API, OXR])
def test_both_shapes(document: dict[str, Any]) -> None:
    found = read(document)
    assert found.rates == {"NGN": Decimal("1583.25"), "JPY": Decimal(155)}
    assert found.unusable == ()
    assert NOW - DAY < found.as_of < NOW


def test_numbers_are_read_as_they_are_written() -> None:
    text = b'{"base": "USD", "rates": {"NGN": 1583.2500000000000000012, "KES": 1.29e2, "UGX": 0.1}}'
    found = read(text)
    assert found.rates == {
        "NGN": Decimal("1583.250000000000000001"),
        "KES": Decimal(129),
        "UGX": Decimal("0.1"),
    }
    assert found.as_of is None


@pytest.mark.parametrize(
    "number",
    [
        *(
            "0",
            "-1",
            "0.0",
            "1e400",
            "-1e400",
            "1e-400",
            "NaN",
            "Infinity",
            "-Infinity",
            "true",
            "null",
            '"1600"',
        ),
        *("[1]", "1000000001", "1e-19", "1e99999", "9" * 400),
    ],
)
def test_a_number_that_is_no_rate_is_left_out_alone(number: str) -> None:
    found = read(f'{{"base": "USD", "rates": {{"NGN": {number}, "KES": 129}}}}'.encode())
    assert (found.rates, found.unusable) == ({"KES": Decimal(129)}, ("NGN",))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html><body>Too many requests</body></html>",
        b"null",
        b"[]",
        b'"USD"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"base": "USD", "rates": {"NGN": ' + b"9" * 5000 + b"}}",
        b'{"base": "USD", "rates": {"NGN": 1e99999999999999999999999}}',
        {"base": "USD"},
        {"base": "USD", "rates": []},
        {"base": "USD", "rates": {}},
        {"base": "USD", "rates": {"XDR": 0.75, "NGN": 0}},
        {"rates": {"NGN": 1600}},
        {**OXR, "base": "EUR"},
        {**ER_API, "base_code": "EUR"},
        {**ER_API, "base_code": None},
        {**OXR, "timestamp": "yesterday"},
        {**OXR, "timestamp": True},
        {**OXR, "timestamp": 10**30},
        {**OXR, "timestamp": int((NOW + 2 * DAY).timestamp())},
        {**OXR, "timestamp": int((NOW - 2 * DAY).timestamp())},
        {**ER_API, "time_last_update_unix": int((NOW - 2 * DAY).timestamp())},
        {"result": "error", "error-type": "unsupported-code"},
        {**ER_API, "result": "error"},
        {"error": True, "status": 401, "message": "invalid_app_id", "description": "Invalid App ID provided"},
    ],
    ids=lambda body: str(body)[:40],
)
def test_a_document_that_is_none_is_refused(body: Any) -> None:
    with pytest.raises(FxSourceError):
        read(body)


@given(st.binary(max_size=200) | st.text().map(str.encode))
def test_no_bytes_break_the_reader(body: bytes) -> None:
    with pytest.raises(FxSourceError):
        read(body)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*ER_API, *OXR, "error"]), json_values))
def test_no_document_breaks_the_reader(document: dict[str, Any]) -> None:
    for whole in (document, {**ER_API, **document}, {**OXR, **document}):
        try:
            found = read(whole)
        except FxSourceError:
            continue
        assert all(0 < rate <= RATE_MAX for rate in found.rates.values())


@given(
    st.dictionaries(
        st.sampled_from(["NGN", "USD", "XXX", "JPY"]), st.decimals() | st.floats() | st.integers()
    )
)
def test_only_rates_of_ours_come_through(numbers: dict[str, object]) -> None:
    found, unusable = clean_rates(numbers)
    assert found.keys() | set(unusable) == numbers.keys() & {"NGN", "JPY"}
    assert all(0 < rate <= RATE_MAX for rate in found.values())


@pytest.mark.parametrize(
    ("url", "app_id", "address"),
    [
        ("https://open.er-api.com", "", "https://open.er-api.com/v6/latest/USD"),
        ("https://open.er-api.com/v6/", "", "https://open.er-api.com/v6/latest/USD"),
        ("https://open.er-api.com/v6/latest/USD", "", "https://open.er-api.com/v6/latest/USD"),
        ("https://openexchangerates.org", "id", "https://openexchangerates.org/api/latest.json"),
        ("https://openexchangerates.org/api", "id", "https://openexchangerates.org/api/latest.json"),
        ("http://127.0.0.1:9/rates", "", "http://127.0.0.1:9/rates"),
        ("http://[::1]:9/api", "id", "http://[::1]:9/api/latest.json"),
        ("http://localhost/v6", "", "http://localhost/v6/latest/USD"),
    ],
)
def test_addresses(url: str, app_id: str, address: str) -> None:
    assert str(locate(url, keyed=bool(app_id), name="TUMA_FX__URL")) == address


@pytest.mark.parametrize(
    "url", ["http://open.er-api.com", "ftp://x", "https://", "open.er-api.com", "http://10.0.0.1/x"]
)
def test_addresses_that_somebody_on_the_way_could_answer_for(url: str) -> None:
    with pytest.raises(InputError, match="TUMA_FX__URL"):
        locate(url, keyed=False, name="TUMA_FX__URL")


def test_sources_of_the_settings() -> None:
    assert make_sources(FxSettings()) == []
    with pytest.raises(InputError, match="SECOND_URL"):
        make_sources(FxSettings(second_url="https://open.er-api.com"))
    same = "https://open.er-api.com"
    with pytest.raises(InputError, match="two sources"):
        make_sources(FxSettings(url=same, second_url=same))
    names = [
        source.name
        for source in make_sources(FxSettings(url=same, second_url="https://openexchangerates.org/api"))
    ]
    assert names == ["open.er-api.com", "openexchangerates.org"]
