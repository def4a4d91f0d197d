"""How each provider signs a webhook, header by header.

Sources: https://docs.stripe.com/webhooks#verify-manually, https://paystack.com/docs/payments/webhooks/#verify-event-origin,
https://developer.flutterwave.com/docs/webhooks (v3: the secret hash itself; v4: HMAC-SHA256 in base64).
"""

import base64
import hmac
from dataclasses import dataclass
from hashlib import sha256, sha512
from typing import Literal

from scripts.sim.payments.currencies import Provider

FlutterwaveSigns = Literal["v3", "v4", "both"]


@dataclass(frozen=True, slots=True)
class Secrets:
    """The keys that callers show, and those that webhooks are signed with; Paystack has one for both."""

    stripe_key: str = "sk_test_sim"
    stripe_webhook: str = "whsec_simulated_secret"
    paystack_key: str = "sk_test_paystack_sim"
    flutterwave_key: str = "FLWSECK_TEST-sim-X"
    flutterwave_webhook: str = "flw-secret-hash-sim"

    def key_of(self, provider: Provider) -> str:
        """Return what a caller of the provider's API must show."""
        return {
            "stripe": self.stripe_key,
            "paystack": self.paystack_key,
            "flutterwave": self.flutterwave_key,
        }[provider]

    def webhook_of(self, provider: Provider) -> str:
        """Return what the provider's webhooks are signed with."""
        return {
            "stripe": self.stripe_webhook,
            "paystack": self.paystack_key,
            "flutterwave": self.flutterwave_webhook,
        }[provider]


def sign_stripe(body: bytes, secret: str, *, at_s: int) -> dict[str, str]:
    """Return ``Stripe-Signature`` of a raw body, sent at ``at_s`` in Unix seconds."""
    signed = hmac.new(secret.encode(), f"{at_s}.".encode() + body, sha256).hexdigest()
    return {"Stripe-Signature": f"t={at_s},v1={signed}"}


def sign_paystack(body: bytes, secret: str) -> dict[str, str]:
    """Return ``x-paystack-signature`` of a raw body."""
    return {"x-paystack-signature": hmac.new(secret.encode(), body, sha512).hexdigest()}


def sign_flutterwave(body: bytes, secret: str, *, signs: FlutterwaveSigns) -> dict[str, str]:
    """Return ``verif-hash`` (v3), ``flutterwave-signature`` (v4) of a raw body, or both."""
    v4 = base64.b64encode(hmac.new(secret.encode(), body, sha256).digest()).decode()
    headers = {"verif-hash": secret, "flutterwave-signature": v4}
    if signs == "v3":
        del headers["flutterwave-signature"]
    elif signs == "v4":
        del headers["verif-hash"]
    return headers


def sign(
    provider: Provider, body: bytes, secret: str, *, at_s: int, signs: FlutterwaveSigns = "v3"
) -> dict[str, str]:
    """Return the headers that a provider adds to a webhook with this raw body."""
    if provider == "stripe":
        return sign_stripe(body, secret, at_s=at_s)
    if provider == "paystack":
        return sign_paystack(body, secret)
    return sign_flutterwave(body, secret, signs=signs)
