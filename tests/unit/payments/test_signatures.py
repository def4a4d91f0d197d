"""Signatures of webhooks. The expected ones were computed by OpenSSL, not by our code:

printf '%s' "$BODY" > body
(printf '1763990000.'; cat body) | openssl dgst -sha256 -hmac whsec_test    # Stripe
openssl dgst -sha512 -hmac sk_test_x body                                   # Paystack
openssl dgst -sha256 -hmac flw-hash -binary body | base64                   # Flutterwave v4
"""

from typing import Any

import pytest
from multidict import CIMultiDict

from billing.payments.units import PaymentProvider
from proxy.payments.signatures import STRIPE_TOLERANCE_S, is_signed

BODY = b'{"event":"charge.success","data":{"id":1,"amount":500000}}'
AT_S = 1763990000
STRIPE = "9dad6e63a40a523fd93965007210180211982795a287baf8b7d330c2a42a18b7"
PAYSTACK = (
    "fa8258e8168f06fd3c0c4f3757d1dd7bf0f1b639fdfd3517745504ff4ae8a7df"
    "e0cf48e3d18da831b09518fa3d95058eb0e023e2e688413eca39218cc7819d08"
)
FLUTTERWAVE = "XtWkEywymUgFY92wgounATj/EsmzT6iJDKTf74zc4rw="
GOOD: list[tuple[PaymentProvider, str, dict[str, str]]] = [
    ("stripe", "whsec_test", {"Stripe-Signature": f"t={AT_S},v1={STRIPE}"}),
    ("stripe", "whsec_test", {"stripe-signature": f"t={AT_S},v1={'0' * 64},v1={STRIPE},v0=old"}),
    ("paystack", "sk_test_x", {"X-Paystack-Signature": PAYSTACK}),
    ("flutterwave", "flw-hash", {"flutterwave-signature": FLUTTERWAVE}),
    ("flutterwave", "flw-hash", {"verif-hash": "flw-hash"}),
    ("flutterwave", "flw-hash", {"verif-hash": "flw-hash", "flutterwave-signature": FLUTTERWAVE}),
]


def check(
    provider: PaymentProvider,
    secret: str,
    headers: dict[str, str],
    *,
    body: bytes = BODY,
    now_s: float = AT_S,
) -> bool:
    return is_signed(provider, body, CIMultiDict(headers), secret, now_s=now_s)


@pytest.mark.parametrize(("provider", "secret", "headers"), GOOD)
def test_what_the_provider_signed(provider: PaymentProvider, secret: str, headers: dict[str, str]) -> None:
    assert check(provider, secret, headers)


@pytest.mark.parametrize(("provider", "secret", "headers"), GOOD)
def test_another_secret_another_body_or_none(
    provider: PaymentProvider, secret: str, headers: dict[str, str]
) -> None:
    assert not check(provider, secret + "x", headers)
    assert not check(provider, "", headers)
    assert not check(provider, secret, {})
    assert not check(provider, secret, dict.fromkeys(headers, ""))
    if headers != {"verif-hash": "flw-hash"}:  # v3 signs no body: so nothing in it is believed
        assert not check(provider, secret, headers, body=BODY + b" ")


@pytest.mark.parametrize(
    ("provider", "headers"),
    [
        ("stripe", {"Stripe-Signature": "t=1763990000,v1="}),
        ("paystack", {"x-paystack-signature": ""}),
        ("flutterwave", {"verif-hash": ""}),
        ("flutterwave", {"flutterwave-signature": "0"}),
    ],
)
def test_an_empty_secret_refuses_everything(provider: PaymentProvider, headers: dict[str, str]) -> None:
    assert not check(provider, "", headers)


@pytest.mark.parametrize(
    "header",
    [
        f"v1={STRIPE}",
        f"t=,v1={STRIPE}",
        f"t={AT_S},t={AT_S},v1={STRIPE}",
        f"t={AT_S}.0,v1={STRIPE}",
        f"t=-{AT_S},v1={STRIPE}",
        f"t={AT_S + 1},v1={STRIPE}",
        f"t={'9' * 5000},v1={STRIPE}",
        f"t=１７６３９９００００,v1={STRIPE}",
        f"t={AT_S},v0={STRIPE}",
        f"t={AT_S},v1={STRIPE.upper()}",
        f"t={AT_S}," + "v1=0," * 40 + f"v1={STRIPE}",
        "\udcff",
        ",,,=",
    ],
)
def test_headers_of_stripe_that_say_something_else(header: str) -> None:
    assert not check("stripe", "whsec_test", {"Stripe-Signature": header})


@pytest.mark.parametrize("off_s", [0, STRIPE_TOLERANCE_S, -STRIPE_TOLERANCE_S])
def test_the_time_of_stripes_signature(off_s: int) -> None:
    headers: dict[str, Any] = {"Stripe-Signature": f"t={AT_S},v1={STRIPE}"}
    assert check("stripe", "whsec_test", headers, now_s=AT_S + off_s)
    assert not check("stripe", "whsec_test", headers, now_s=AT_S + STRIPE_TOLERANCE_S + 1)
    assert not check("stripe", "whsec_test", headers, now_s=AT_S - STRIPE_TOLERANCE_S - 1)


def test_both_of_flutterwaves_headers_must_hold() -> None:
    both = {"verif-hash": "flw-hash", "flutterwave-signature": FLUTTERWAVE}
    assert not check("flutterwave", "flw-hash", {**both, "verif-hash": "flw-hash2"})
    assert not check("flutterwave", "flw-hash", {**both, "flutterwave-signature": FLUTTERWAVE[::-1]})
