"""JSON in which every amount is exact: money is written from integers, never through a binary float."""

import json
from collections.abc import Mapping
from decimal import Decimal

_NANO_DIGITS = 9
_FEMTO_DIGITS = 15


def usd(nanousd: int) -> Decimal:
    """Return nano-USD as USD, exactly, without trailing zeros."""
    return shifted(nanousd, _NANO_DIGITS)


def usd_of_femto(femtousd: int) -> Decimal:
    """Return femto-USD (1e-15, the unit of prices per token) as USD, exactly, without trailing zeros."""
    return shifted(femtousd, _FEMTO_DIGITS)


def shifted(units: int, digits: int) -> Decimal:
    """Return ``units`` of 10⁻ᵈⁱᵍⁱᵗˢ as a decimal, exactly, without trailing zeros."""
    whole, fraction = divmod(abs(units), 10**digits)
    text = f"{whole}.{fraction:0{digits}d}".rstrip("0").rstrip(".")
    # Decimal's constructor is exact at any length; its arithmetic would round to the context's precision.
    return Decimal(f"-{text}" if units < 0 else text)


def dumps(value: object) -> str:
    """Write ``value`` as compact JSON; a ``Decimal`` becomes a number in plain notation, digit by digit.

    Args:
        value: what ``json.dumps`` takes, and decimals anywhere in it.
    """
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_text(str(key))}:{dumps(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(dumps(item) for item in value) + "]"
    return _text(value)


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def to_bytes(text: str) -> bytes:
    """Return UTF-8; a lone surrogate, which JSON can smuggle in, becomes a question mark."""
    return text.encode("utf-8", "replace")
