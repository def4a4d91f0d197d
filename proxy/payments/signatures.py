"""Whether a webhook is the provider's: its signature over the raw body, compared in constant time. Pure.

An empty secret refuses everything. Sources: https://docs.stripe.com/webhooks#verify-manually (``Stripe-Signature``: a time and
HMAC-SHA256 in hex, several while a secret is rolled), https://paystack.com/docs/payments/webhooks (``x-paystack-signature``:
HMAC-SHA512 in hex, by the secret key), https://developer.flutterwave.com/docs/webhooks (v3 ``verif-hash``: the secret itself; v4
``flutterwave-signature``: HMAC-SHA256 in base64).
"""

import base64
import hashlib
import hmac
from collections.abc import Mapping

from billing.payments.units import PaymentProvider

STRIPE_TOLERANCE_S = 300
_SCHEMES_MAX = 20  # of a header that says v1= again and again


def is_signed(
    provider: PaymentProvider, body: bytes, headers: Mapping[str, str], secret: str, *, now_s: float
) -> bool:
    """Return whether a webhook was signed by the provider.

    Args:
        provider: whose it says it is.
        body: as it came.
        headers: the request's; names in any case, as the mapping allows.
        secret: Stripe's signing secret, Paystack's secret key, Flutterwave's secret hash.
        now_s: Unix seconds; Stripe's signatures of more than five minutes ago are refused.
    """
    if not secret:
        return False
    key = secret.encode()
    if provider == "stripe":
        return _is_signed_by_stripe(body, headers.get("Stripe-Signature", ""), key, now_s=now_s)
    if provider == "paystack":
        return _same(hmac.digest(key, body, hashlib.sha512).hex(), headers.get("x-paystack-signature", ""))
    return _is_signed_by_flutterwave(body, headers, key)


def _is_signed_by_stripe(body: bytes, header: str, key: bytes, *, now_s: float) -> bool:
    parts = [part.strip().partition("=") for part in header.split(",")[:_SCHEMES_MAX]]
    times = [value for name, _, value in parts if name == "t"]
    if len(times) != 1 or not (times[0].isascii() and times[0].isdigit() and len(times[0]) <= 12):  # noqa: PLR2004 - digits
        return False
    if abs(now_s - int(times[0])) > STRIPE_TOLERANCE_S:
        return False
    expected = hmac.digest(key, f"{times[0]}.".encode() + body, hashlib.sha256).hex()
    return any([_same(expected, value) for name, _, value in parts if name == "v1"])  # noqa: C419 - all are compared


def _is_signed_by_flutterwave(body: bytes, headers: Mapping[str, str], key: bytes) -> bool:
    """Accept either version's header; where both came, both must hold."""
    v3, v4 = headers.get("verif-hash"), headers.get("flutterwave-signature")
    if v3 is None and v4 is None:
        return False
    signed = base64.b64encode(hmac.digest(key, body, hashlib.sha256)).decode()
    good = v3 is None or _same(key.decode(), v3)
    return (v4 is None or _same(signed, v4)) and good


def _same(expected: str, given: str) -> bool:
    return hmac.compare_digest(expected.encode(), given.encode("utf-8", "surrogateescape"))
