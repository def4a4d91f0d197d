"""Reading a JSON object together with where its members stand, so that one can be changed and all else kept.

A body that is parsed and written anew is a different body: numbers lose digits, unknown escapes and the order of
members change. Here the text stays as it came, and only the members that must change are cut and set.

The grammar is RFC 8259's, strictly: no NaN, no Infinity, nothing after the object. What a provider answers is read leniently: it has
been paid for, and goes on as it came.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple, NoReturn

_SPACE = re.compile(r"[ \t\n\r]*+")
_EXPONENT_MAX = 400  # beyond what a double holds; an int made of such a number would fill the memory


class JsonSpanError(ValueError):
    """The text is not one strict JSON object."""


class DuplicateKeyError(JsonSpanError):
    """Two members of the object have the same key; readers disagree about which counts.

    Args:
        key: the key that occurs twice.
    """

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key!r} occurs twice")
        self.key = key


class Member(NamedTuple):
    """One member of an object; offsets are characters in the text, and ``start`` to ``end`` is key through value."""

    key: str
    value: Any
    start: int
    end: int
    value_start: int
    value_end: int


def _refuse_constant(name: str) -> NoReturn:
    raise JsonSpanError(f"{name} is not JSON")


def _exact(literal: str) -> Decimal | float:
    """Return a number with all its digits; as a float, where it is beyond what anything could count: infinite, or zero."""
    try:
        number = Decimal(literal)
    except ArithmeticError:
        return float(literal)
    return number if abs(number.adjusted()) <= _EXPONENT_MAX else float(literal)


class _Ambiguous(dict[str, Any]):
    """An object that names a key twice."""

    twice: str


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    ambiguous, seen = _Ambiguous(fields), set[str]()
    ambiguous.twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return ambiguous


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_READER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object_of)
_LENIENT_READER = json.JSONDecoder(object_pairs_hook=_object_of, parse_float=_exact)
_LENIENT_DECODER = json.JSONDecoder(parse_float=_exact)
_LENIENT_INEXACT_DECODER = json.JSONDecoder()


def read_object(text: str, *, lenient: bool = False) -> dict[str, Any]:
    """Parse a JSON object in one pass, without the places of its members.

    Args:
        text: as for ``scan_object``, which accepts and refuses the same.
        lenient: as there.

    Raises:
        DuplicateKeyError, JsonSpanError: as there.
    """
    try:
        fields = (_LENIENT_READER if lenient else _READER).decode(text)
    except (ValueError, RecursionError) as error:
        raise _span_error(error) from None
    if not isinstance(fields, dict):
        raise JsonSpanError("it is no object")
    if isinstance(fields, _Ambiguous):
        raise DuplicateKeyError(fields.twice)
    return fields


def _span_error(error: Exception) -> JsonSpanError:
    """Say what cannot be read, and why."""
    if isinstance(error, JsonSpanError):
        return error
    if isinstance(error, json.JSONDecodeError):
        return JsonSpanError(f"{error.msg} at character {error.pos}")
    if isinstance(error, RecursionError):
        return JsonSpanError("nested too deep")
    return JsonSpanError("a number is out of range")  # int() refuses literals of thousands of digits


def scan_object(
    text: str,
    *,
    lenient: bool = False,
    unique_keys: bool = True,
    inexact: frozenset[str] = frozenset(),
) -> list[Member]:
    """Parse a JSON object once, and return its members in order with their values and places.

    Args:
        text: one object, white space around it allowed.
        lenient: numbers with a fraction or an exponent become ``Decimal``, and ``NaN``, ``Infinity`` and ``1e500`` floats.
        unique_keys: refuse an object that names a key twice.
        inexact: members of which the numbers need not be exact, as reading them so takes almost twice as long; for lenient reading.

    Raises:
        DuplicateKeyError: a key of the object itself (not of one inside it) occurs twice.
        JsonSpanError: malformed, not an object, nested too deep, or a number that is out of range.
    """
    decoder = _LENIENT_DECODER if lenient else _DECODER
    try:
        return _scan(text, decoder.raw_decode, unique_keys=unique_keys, inexact=inexact)
    except (ValueError, RecursionError) as error:
        raise _span_error(error) from None


def _scan(text: str, decode: Any, *, unique_keys: bool, inexact: frozenset[str]) -> list[Member]:
    members: list[Member] = []
    keys: set[str] = set()
    at = _after_space(text, 0)
    _expect(text, at, "{")
    at = _after_space(text, at + 1)
    if text[at : at + 1] != "}":
        while True:
            start = at
            _expect(text, at, '"')
            key, at = decode(text, at)
            if unique_keys and key in keys:
                raise DuplicateKeyError(key)
            keys.add(key)
            at = _after_space(text, at)
            _expect(text, at, ":")
            value_start = _after_space(text, at + 1)
            value, at = (_LENIENT_INEXACT_DECODER.raw_decode if key in inexact else decode)(text, value_start)
            members.append(Member(key, value, start, at, value_start, at))
            at = _after_space(text, at)
            if text[at : at + 1] != ",":
                break
            at = _after_space(text, at + 1)
        _expect(text, at, "}")
    if _after_space(text, at + 1) != len(text):
        raise JsonSpanError(f"more text after the object at character {at + 1}")
    return members


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None  # it matches nothing at all, too
    return found.end()


def _expect(text: str, at: int, character: str) -> None:
    if text[at : at + 1] != character:
        raise JsonSpanError(f"{character!r} expected at character {at}")


def set_members(text: str, members: Sequence[Member], changes: Mapping[str, str | None]) -> str:
    """Return the object's text with some members set or removed, every other character as it was.

    Args:
        text: what ``scan_object`` was given.
        members: what it returned.
        changes: JSON text of the new value per key, None to remove the member. Keys that the object does not have
            are put at its front.
    """
    opening = text.index("{") + 1
    kept = [member for member in members if changes.get(member.key, "") is not None]
    known = {member.key for member in members}
    added = [
        f"{json.dumps(key)}:{value}"
        for key, value in changes.items()
        if value is not None and key not in known
    ]
    pieces = [text[:opening], ",".join(added), "," if added and kept else ""]
    at = opening
    for start, end, new in _edits(members, kept, changes):
        pieces += (text[at:start], new)
        at = end
    pieces.append(text[at:])
    return "".join(pieces)


def add_members(text: str, changes: Mapping[str, str]) -> str:
    """Return the object's text with members put at its front that it does not have; cheaper than ``set_members``.

    Args:
        text: an object with at least one member.
        changes: JSON text of the value per key.
    """
    opening = text.index("{") + 1
    added = ",".join([f"{json.dumps(key)}:{value}" for key, value in changes.items()])
    return f"{text[:opening]}{added},{text[opening:]}"


def _edits(
    members: Sequence[Member], kept: Sequence[Member], changes: Mapping[str, str | None]
) -> Iterator[tuple[int, int, str]]:
    """Yield in order what to replace: from, to, by what."""
    if not kept:
        if members:
            yield members[0].start, members[-1].end, ""
        return
    for index, member in enumerate(members):
        if member.key not in changes:
            continue
        value = changes[member.key]
        if value is not None:
            yield member.value_start, member.value_end, value
        elif member.start < kept[-1].start:
            yield member.start, members[index + 1].start, ""
    # Those after the last kept member go together with the comma before them.
    yield kept[-1].end, members[-1].end, ""
