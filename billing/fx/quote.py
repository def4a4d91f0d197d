"""From the provider's dollars to the wallet's currency, with one rounding, upward. Pure."""

from dataclasses import dataclass, field
from decimal import Decimal
from uuid import UUID

from billing.errors import InputError
from billing.money import ATTO_DECIMALS, ATTO_PER_NANO, ceil_div, has_more_decimals, scaled_integer

RATE_MAX = Decimal(10) ** 9
MARKUP_MAX_BPS = 100_000
_BPS = 10_000
_RATE_SCALE = 10**ATTO_DECIMALS


@dataclass(frozen=True, slots=True)
class Charge:
    """What a wallet pays, in nano units of its currency; ``spread_nano`` is the part of it that is markup."""

    charge_nano: int
    spread_nano: int


@dataclass(frozen=True, slots=True)
class FxQuote:
    """An exchange rate with its markup, immutable once quoted.

    Args:
        id: of the row in ``fx_quotes``.
        currency: the wallet's.
        rate: units of ``currency`` for one USD.
        markup_bps: on top of the rate, in hundredths of a percent.

    Raises:
        InputError: out of bounds.
    """

    id: UUID
    currency: str
    rate: Decimal
    markup_bps: int
    _rate_scaled: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rate = self.rate
        if not rate.is_finite() or not 0 < rate <= RATE_MAX or has_more_decimals(rate, ATTO_DECIMALS):
            raise InputError("a rate must be positive, at most 10^9, with at most 18 decimals")
        if not 0 <= self.markup_bps <= MARKUP_MAX_BPS:
            raise InputError(f"a markup must be between 0 and {MARKUP_MAX_BPS} basis points")
        object.__setattr__(self, "_rate_scaled", scaled_integer(rate, decimals=ATTO_DECIMALS))

    def charge(self, cost_attousd: int) -> Charge:
        """Convert a cost and add the markup: charge = ⌈cost × rate × (1 + markup)⌉, rounded once.

        The spread is what the charge exceeds the unmarked conversion ⌈cost × rate⌉ by.
        """
        exact = cost_attousd * self._rate_scaled
        charge_nano = ceil_div(exact * (_BPS + self.markup_bps), ATTO_PER_NANO * _RATE_SCALE * _BPS)
        base_nano = ceil_div(exact, ATTO_PER_NANO * _RATE_SCALE)
        return Charge(charge_nano, charge_nano - base_nano)


def usd_quote() -> FxQuote:
    """Return the quote of dollars into dollars: rate 1, no markup."""
    return FxQuote(UUID(int=0), "USD", Decimal(1), 0)
