"""A provider's JSON object together with its text, so that one member can be set and every other byte kept."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from proxy.protocol.json_spans import (
    DuplicateKeyError,
    JsonSpanError,
    Member,
    read_object,
    scan_object,
    set_members,
)

_BOM = "\ufeff"


@dataclass(frozen=True, slots=True)
class JsonDocument:
    """A JSON object read, with its text.

    Args:
        ambiguous: it names a key twice, and so cannot be changed safely.
    """

    text: str
    fields: Mapping[str, Any]
    ambiguous: bool = False

    def scan(self) -> list[Member]:
        """Return the members with their places; none of an ambiguous one."""
        return [] if self.ambiguous else scan_object(self.text, lenient=True)


def read_document(data: bytes, *, inexact: frozenset[str] = frozenset()) -> JsonDocument | None:
    """Read one JSON object, amounts exactly; None if it is none.

    Args:
        data: UTF-8; a byte order mark before it is no part of the text.
        inexact: members of which the numbers need not be exact.
    """
    try:
        text = data.decode().removeprefix(_BOM)
        if any(f'"{name}"' in text for name in inexact):
            members = scan_object(text, lenient=True, inexact=inexact)
            return JsonDocument(text, {member.key: member.value for member in members})
        return JsonDocument(text, read_object(text, lenient=True))
    except DuplicateKeyError:
        return _read_ambiguous(text)
    except (UnicodeDecodeError, JsonSpanError):
        return None


def _read_ambiguous(text: str) -> JsonDocument | None:
    try:
        members = scan_object(text, lenient=True, unique_keys=False)
    except JsonSpanError:
        return None
    return JsonDocument(text, {member.key: member.value for member in members}, ambiguous=True)


def with_cost(
    found: JsonDocument, price_usage: Callable[[Mapping[str, Any]], str | None] | None
) -> str | None:
    """Return the object's text with ``usage.cost`` in it; None if there is nothing to set.

    Args:
        found: has ``usage``, or not.
        price_usage: makes the cost, as a JSON number in USD; None where what is there stays.
    """
    usage = found.fields.get("usage")
    if price_usage is None or found.ambiguous or not isinstance(usage, dict):
        return None
    cost = price_usage(usage)
    if cost is None:
        return None
    members = found.scan()
    place = next(member for member in members if member.key == "usage")
    usage_text = found.text[place.value_start : place.value_end]
    try:
        priced = set_members(usage_text, scan_object(usage_text, lenient=True), {"cost": cost})
    except DuplicateKeyError:
        return None
    return set_members(found.text, members, {"usage": priced})


def with_member(body: bytes, name: str, value: str) -> bytes:
    """Return a JSON object with one member set, every other byte as it was.

    Args:
        body: one object.
        name: of the member.
        value: JSON text.
    """
    text = body.decode()
    return set_members(text, scan_object(text, lenient=True, unique_keys=False), {name: value}).encode()
