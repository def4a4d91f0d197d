"""How much work it is to read a JSON text, told from its bytes before it is read.

Python reads about ten million numbers a second, but only one million objects or members, and nothing else happens meanwhile: 16 MiB of
``[],[],`` stop a worker for two seconds. So values are weighed by what they cost, and a text that weighs too much is
refused for the price of looking at its bytes. Pure.

What is no JSON is weighed somehow; reading it says what is wrong.
"""

from array import array
from dataclasses import dataclass
from itertools import accumulate

# What reading costs, in numbers or texts of an array; measured in docs/benchmarks.md.
_CONTAINER = 8
_MEMBER = 5
_FRACTION = 2
_VALUE_MOST = 1 + _FRACTION
_SIGNS = b"[]{},:"
_OTHERS = bytes(set(range(256)) - set(_SIGNS))
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")


class TooMuchJsonError(ValueError):
    """Reading it would take too long, or it is nested too deep."""


@dataclass(frozen=True, slots=True)
class JsonBounds:
    """What may be read.

    Args:
        nodes: numbers and texts; an array or object counts as eight of them, a member of an object five more.
        depth: of arrays and objects inside each other.
    """

    nodes: int
    depth: int


def weigh(text: bytes, bounds: JsonBounds) -> int:
    """Return at least how much a JSON text weighs.

    Args:
        text: UTF-8.
        bounds: what it may weigh.

    Raises:
        TooMuchJsonError: it weighs more.
    """
    # First as if there were no texts in it: most requests are within the bounds even so.
    signs = text.translate(None, _OTHERS)
    openings = signs.count(b"[") + signs.count(b"{")
    nodes = _weight(signs, openings) + (_VALUE_MOST - 1) * signs.count(b",")
    if nodes <= bounds.nodes and openings <= bounds.depth:
        return nodes
    return _weigh_outside_texts(text, bounds)


def _weigh_outside_texts(text: bytes, bounds: JsonBounds) -> int:
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    if text.count(b'"') > 2 * bounds.nodes + 2:  # each text is a value, or the key of one
        raise _too_many(bounds)
    outside = b"".join(text.split(b'"')[::2])
    signs = outside.translate(None, _OTHERS)
    openings = signs.count(b"[") + signs.count(b"{")
    nodes = _weight(signs, openings) + _FRACTION * sum(outside.count(sign) for sign in (b".", b"e", b"E"))
    if nodes > bounds.nodes:
        raise _too_many(bounds)
    if openings > bounds.depth and _depth(signs) > bounds.depth:
        raise TooMuchJsonError(f"it is nested more than {bounds.depth} deep")
    return nodes


def _weight(signs: bytes, openings: int) -> int:
    return 1 + _CONTAINER * openings + signs.count(b",") + _MEMBER * signs.count(b":")


def _depth(signs: bytes) -> int:
    steps = array("b", signs.translate(_STEPS, _NO_BRACKETS))
    return max(accumulate(steps), default=0)


def _too_many(bounds: JsonBounds) -> TooMuchJsonError:
    return TooMuchJsonError(f"it has more values than {bounds.nodes} numbers take to read")
