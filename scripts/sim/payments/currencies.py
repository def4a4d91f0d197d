"""How each payment provider writes amounts: in which unit, with how many digits, and what it refuses.

Sources: https://docs.stripe.com/currencies (zero-decimal, three-decimal and special cases),
https://paystack.com/docs/api/#supported-currency (subunits, also for XOF), https://developer.flutterwave.com/v3.0/docs
(major units). For Flutterwave the books count in ISO 4217's minor units.
"""

from decimal import Decimal, InvalidOperation
from typing import Literal, get_args

from scripts.sim.exact_json import shifted

Provider = Literal["stripe", "paystack", "flutterwave"]
PROVIDERS: tuple[Provider, ...] = get_args(Provider)

STRIPE_ZERO_DECIMAL = frozenset(
    "BIF CLP DJF GNF JPY KMF KRW MGA PYG RWF VND VUV XAF XOF XPF".split()  # noqa: SIM905
)
STRIPE_THREE_DECIMAL = frozenset({"BHD", "JOD", "KWD", "OMR", "TND"})
# Two decimals in the API for old integrations' sake, of which both must be zero.
STRIPE_WHOLE_ONLY = frozenset({"ISK", "UGX"})
PAYSTACK = frozenset({"NGN", "GHS", "ZAR", "KES", "USD", "XOF", "RWF", "EGP"})
FLUTTERWAVE_ZERO_DECIMAL = frozenset({"CLP", "JPY", "RWF", "UGX", "XAF", "XOF"})

_CODE_LETTERS = 3
_DIGITS_MAX = 30


class AmountError(ValueError):
    """Not an amount that the provider can take."""


def is_code(currency: str) -> bool:
    """Return whether this looks like an ISO 4217 code in capitals."""
    return len(currency) == _CODE_LETTERS and currency.isascii() and currency.isalpha() and currency.isupper()


def digits(provider: Provider, currency: str) -> int:
    """Return how many decimals one minor unit of the provider's books has."""
    if provider == "paystack":
        return 2
    if provider == "flutterwave":
        return 0 if currency in FLUTTERWAVE_ZERO_DECIMAL else 2
    if currency in STRIPE_ZERO_DECIMAL:
        return 0
    return 3 if currency in STRIPE_THREE_DECIMAL else 2


def check_stripe_amount(amount_minor: int, currency: str) -> None:
    """Refuse what Stripe's special cases refuse.

    Raises:
        AmountError: fractions of ISK or UGX, or a last digit other than 0 in a three-decimal currency.
    """
    if currency in STRIPE_WHOLE_ONLY and amount_minor % 100:
        raise AmountError(
            f"Invalid amount. Currency {currency} has become effectively zero-decimal and charged amounts must be"
            " evenly divisible by 100. See https://stripe.com/docs/currencies#special-cases for more information."
        )
    if currency in STRIPE_THREE_DECIMAL and amount_minor % 10:
        raise AmountError(f"Invalid amount. Amounts in {currency} must have 0 as their last digit.")


def to_major(provider: Provider, amount_minor: int, currency: str) -> Decimal:
    """Return minor units as major ones, exactly."""
    return shifted(amount_minor, digits(provider, currency))


def to_minor(provider: Provider, amount: object, currency: str) -> int:
    """Return an amount in major units, as JSON may carry it, in minor ones, exactly.

    Args:
        provider: whose digits.
        amount: an int, a ``Decimal`` or a string in plain notation.
        currency: in capitals.

    Raises:
        AmountError: not a number, or more decimals than the currency has.
    """
    if isinstance(amount, bool) or not isinstance(amount, int | str | Decimal):
        raise AmountError("amount must be a number")
    try:
        sign, figures, exponent = Decimal(amount).as_tuple()
    except InvalidOperation:
        raise AmountError("amount must be a number") from None
    if not isinstance(exponent, int) or len(figures) > _DIGITS_MAX or abs(exponent) > _DIGITS_MAX:
        raise AmountError("amount must be a number")
    shift = exponent + digits(provider, currency)
    text = "".join(map(str, figures)) + "0" * max(shift, 0)
    kept, dropped = (text, "") if shift >= 0 else (text[:shift], text[shift:])
    if dropped.strip("0"):
        raise AmountError(f"amount has more decimals than {currency} has")
    return (-1 if sign else 1) * int(kept or "0")
