"""How much work it is to read a JSON text, told from its bytes before it is read.

Python reads about ten million numbers a second, but only one million objects or members, and nothing else happens meanwhile: 16 MiB of
``[],[],`` stop a worker for two seconds. So values are weighed by what they cost, and a text that weighs too much is
refused for the price of looking at its bytes. Pure.

What is no JSON is weighed somehow; reading it says what is wrong.
"""

from array import array
from dataclasses import dataclass
from itertools import accumulate

from billing.threads import Work, finish

# What reading costs, in numbers or texts of an array; measured in docs/benchmarks.md.
_CONTAINER = 8
_MEMBER = 5
_FRACTION = 2
_USUAL_DIGITS = 20  # of a number; what has thousands takes as long as hundreds of numbers
_DIGITS_OF_A_NODE = 4
_PIECE_BYTES = 128 * 1024
_DIGITS = b"0123456789"
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
    return finish(weighing(text, bounds))


def weighing(text: bytes, bounds: JsonBounds) -> Work[int]:
    """Do the same in steps of a millisecond or two, no more of them than it takes to know that it weighs too much."""
    if len(text) <= _PIECE_BYTES:
        # First as if there were no texts in it: most requests are within the bounds even so.
        signs = text.translate(None, _OTHERS)
        openings = signs.count(b"[") + signs.count(b"{")
        nodes = 1 + _weight(signs, openings) + _FRACTION * signs.count(b",")
        if nodes <= bounds.nodes and openings <= bounds.depth:
            return nodes
    return (yield from _weighing_outside_texts(text, bounds))


def _weighing_outside_texts(text: bytes, bounds: JsonBounds) -> Work[int]:
    nodes, depth, quotes, at = 1, 0, 0, 0
    while at < len(text):
        end = _end_of_piece(text, at)
        piece, at = text[at:end], end
        if b"\\" in piece:
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        outside = b"".join(piece.split(b'"')[quotes % 2 :: 2])
        quotes += piece.count(b'"')
        signs = outside.translate(None, _OTHERS)
        openings = signs.count(b"[") + signs.count(b"{")
        nodes += _weight(signs, openings) + _FRACTION * sum(
            outside.count(sign) for sign in (b".", b"e", b"E")
        )
        digits = len(outside) - len(outside.translate(None, _DIGITS))
        nodes += max(digits - _USUAL_DIGITS * (len(signs) + 1), 0) // _DIGITS_OF_A_NODE
        if nodes > bounds.nodes:
            raise TooMuchJsonError(f"it has more values than {bounds.nodes} numbers take to read")
        steps = array("b", signs.translate(_STEPS, _NO_BRACKETS))
        if depth + openings > bounds.depth and max(accumulate(steps, initial=depth)) > bounds.depth:
            raise TooMuchJsonError(f"it is nested more than {bounds.depth} deep")
        depth += sum(steps)
        yield
    return nodes


def _end_of_piece(text: bytes, at: int) -> int:
    """Return where a piece ends that begins at a character of its own, and not between a backslash and what it escapes."""
    end = min(at + _PIECE_BYTES, len(text))
    slashes = end - at - len(text[at:end].rstrip(b"\\"))
    return end + slashes % 2


def _weight(signs: bytes, openings: int) -> int:
    return _CONTAINER * openings + signs.count(b",") + _MEMBER * signs.count(b":")
