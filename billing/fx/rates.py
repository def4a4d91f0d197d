"""Exchange rates before they are quoted: which are believed, and what follows from them. Pure.

A rate is units of a currency for one USD. Everything is computed in fractions and rounded once, half to even, at 18
decimals, as the database keeps it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from fractions import Fraction
from typing import Literal

from billing.errors import InputError
from billing.fx.quote import RATE_MAX
from billing.money import ATTO, ATTO_DECIMALS, find_currency

# accepted: may be quoted. held: it jumps, and needs an operator's word. disputed: the other source says otherwise.
# alone: the other source says nothing of it. witness: of the second source, which is only compared with.
State = Literal["accepted", "held", "disputed", "alone", "witness"]

_BPS = 10_000
_EXPONENT_MAX = 40  # of a number that is looked at at all: beyond it, arithmetic would take its time


@dataclass(frozen=True, slots=True)
class SourceRates:
    """What a source said: units for one USD by currency, those of ours that are usable.

    Args:
        as_of: when the source says that they were made; None where it does not say.
        rates: by ISO 4217 code, without USD.
        unusable: codes of ours whose number was none: zero, negative, no number, beyond all sense.
    """

    as_of: datetime | None
    rates: Mapping[str, Decimal]
    unusable: tuple[str, ...]


def clean_rates(numbers: Mapping[str, object]) -> tuple[dict[str, Decimal], tuple[str, ...]]:
    """Split what a source names into the usable rates of our currencies and the codes of the unusable."""
    rates: dict[str, Decimal] = {}
    unusable = []
    for code, number in numbers.items():
        if code == "USD" or find_currency(code) is None:
            continue
        rate = _clean(number)
        if rate is None:
            unusable.append(code)
        else:
            rates[code] = rate
    return rates, tuple(unusable)


def _clean(number: object) -> Decimal | None:
    if type(number) is int:
        number = Decimal(number)
    if not isinstance(number, Decimal) or not number.is_finite() or abs(number.adjusted()) > _EXPONENT_MAX:
        return None
    if not 0 < number <= RATE_MAX:
        return None
    return round_rate(Fraction(number)) or None


def round_rate(exact: Fraction) -> Decimal:
    """Round a rate once, half to even, at 18 decimals; free of the decimal context."""
    scaled = round(exact * ATTO)
    return Decimal((int(scaled < 0), tuple(map(int, str(abs(scaled)))), -ATTO_DECIMALS))


def inverse_rate(rate: Decimal) -> Decimal:
    """Return USD for one unit of the currency.

    Raises:
        InputError: the rate is not positive.
    """
    return cross_rate(rate, Decimal(1))


def cross_rate(base: Decimal, quote: Decimal) -> Decimal:
    """Return units of one currency for one unit of another, rounded once.

    Args:
        base: units for one USD of the currency that there is one unit of.
        quote: units for one USD of the other.

    Raises:
        InputError: a rate is not positive.
    """
    if not (base.is_finite() and quote.is_finite() and base > 0 and quote > 0):
        raise InputError("a rate must be positive")
    return round_rate(Fraction(quote) / Fraction(base))


def within(first: Decimal, second: Decimal, *, bps: int) -> bool:
    """Tell whether two positive rates differ by at most ``bps`` hundredths of a percent of the smaller.

    Of the smaller: so that a rise and the fall back from it are the same distance.
    """
    low, high = sorted((Fraction(first), Fraction(second)))
    return (high - low) * _BPS <= low * bps


def judge(
    rate: Decimal,
    *,
    witness: Decimal | None,
    two_sources: bool,
    current: Decimal | None,
    band_bps: int,
    jump_bps: int,
) -> State:
    """Decide whether the first source's rate may be quoted.

    Args:
        rate: the first source's.
        witness: the second source's, if it names one.
        two_sources: whether there is a second source at all, that must agree.
        current: what is quoted now; None when nothing is, and then nothing is a jump.
        band_bps: how far two sources may be apart.
        jump_bps: how far a rate may move without an operator's word.
    """
    if two_sources and witness is None:
        return "alone"
    if witness is not None and not within(rate, witness, bps=band_bps):
        return "disputed"
    if current is not None and not within(rate, current, bps=jump_bps):
        return "held"
    return "accepted"
