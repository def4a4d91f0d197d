"""What a simulated provider keeps of a payment. Simple formulas of our own in the shape of the public ones; rounded up."""

from scripts.sim.payments.currencies import Provider

_BASIS = 10_000
_STRIPE_BPS, _STRIPE_FIXED = 290, 30
_PAYSTACK_NGN_BPS, _PAYSTACK_BPS = 150, 290
_PAYSTACK_NGN_FIXED, _PAYSTACK_NGN_FIXED_FROM, _PAYSTACK_NGN_MAX = 100_00, 2_500_00, 2_000_00
_FLUTTERWAVE_NGN_BPS, _FLUTTERWAVE_BPS = 140, 380


def fee_minor(provider: Provider, amount_minor: int, currency: str) -> int:
    """Return the fee of a payment, in the payment's minor units and never above it.

    Stripe: 2.9 % and 30 minor units. Paystack: 2.9 %; for NGN 1.5 %, and ₦100 from ₦2,500 on, at most ₦2,000. Flutterwave:
    3.8 %; for NGN 1.4 %.
    """
    if provider == "stripe":
        fee = _share(amount_minor, _STRIPE_BPS) + _STRIPE_FIXED
    elif provider == "flutterwave":
        fee = _share(amount_minor, _FLUTTERWAVE_NGN_BPS if currency == "NGN" else _FLUTTERWAVE_BPS)
    elif currency == "NGN":
        fixed = _PAYSTACK_NGN_FIXED if amount_minor >= _PAYSTACK_NGN_FIXED_FROM else 0
        fee = min(_share(amount_minor, _PAYSTACK_NGN_BPS) + fixed, _PAYSTACK_NGN_MAX)
    else:
        fee = _share(amount_minor, _PAYSTACK_BPS)
    return min(fee, amount_minor)


def _share(amount_minor: int, bps: int) -> int:
    return -(-amount_minor * bps // _BASIS)
