"""What a request may ask for: a table of members per dialect, as data, and who is refused by it.

Each member is one of four. *Free* cannot change the bill. *Counted* is in the quote's tokens, or bounds them. *Priced* is
billed apart, so it needs an entry of the price book. *Refused* costs what nobody here can bound, or reaches what is stored in
the provider's account, which all share. Sources: ``config/data/request_members.json``, its member ``sources``.

A name that equals a known one but for the case of its letters is refused at every level that money depends on: servers that
are written in Go read it as the known one (``encoding/json`` folds case, and ``ſ`` and ``K`` with it).
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from proxy.http.errors import BadRequestError

Fields = Mapping[str, Any]
_SHOWN_MAX = 64  # characters of a name that an error repeats


@dataclass(frozen=True, slots=True)
class Policy:
    """What becomes of a member that no table has.

    Args:
        unknown: ``refuse``, or ``pass`` for servers that bill nothing but tokens.
        extra: names that the operator vouches for: free.
    """

    unknown: Literal["refuse", "pass"] = "refuse"
    extra: frozenset[str] = frozenset()


class Members:
    """The members of one object of a request.

    Args:
        plain: names that are free or counted.
        priced: names that are billed apart.
        refused: reasons, by name.
    """

    __slots__ = ("_folded", "_plain", "_priced", "_refused")

    def __init__(
        self, plain: Iterable[str], priced: Iterable[str] = (), refused: Mapping[str, str] | None = None
    ) -> None:
        self._plain = frozenset(plain)
        self._priced = frozenset(priced)
        self._refused = dict(refused or {})
        self._folded = {name.casefold(): name for name in (*self._plain, *self._priced, *self._refused)}

    @property
    def names(self) -> frozenset[str]:
        """Every name that the table has."""
        return frozenset(self._folded.values())

    def check(self, fields: Fields, policy: Policy, *, within: str = "") -> None:
        """Refuse what the table refuses or does not have.

        Args:
            fields: the object.
            policy: of unknown members.
            within: where the object stands in the request; empty for the request itself.

        Raises:
            BadRequestError: names the member.
        """
        for name in fields.keys() - self._plain:
            if name in self._priced or name in policy.extra:
                continue
            place = _place(name, within)
            reason = self._refused.get(name)
            if reason is not None:
                if fields[name] is None or fields[name] is False:
                    continue  # it is not asked for
                raise BadRequestError(f"'{place}' is not served: {reason}.", param=place)
            self.check_case(name, within)
            if policy.unknown == "refuse":
                raise BadRequestError(
                    f"'{place}' is not served: it is not known here what it costs. "
                    "An operator may let it pass (TUMA_UPSTREAM__EXTRA_MEMBERS).",
                    param=place,
                )

    def check_case(self, name: str, within: str = "") -> None:
        """Refuse a name that is not in the table as it is written, but would be in other letters.

        Raises:
            BadRequestError: names both.
        """
        known = self._folded.get(name.casefold())
        if known is not None and known != name:
            place = _place(name, within)
            raise BadRequestError(f"'{place}' is not served: write '{known}'.", param=place)


class Names:
    """Names that money depends on, in objects whose other members are the caller's own."""

    __slots__ = ("_folded", "_names")

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._folded = {name.casefold(): name for name in self._names}

    def check(self, fields: Fields, within: str) -> None:
        """Refuse a name in other letters.

        Raises:
            BadRequestError: names both.
        """
        for name in fields.keys() - self._names:
            known = self._folded.get(name.casefold())
            if known is not None:
                place = _place(name, within)
                raise BadRequestError(f"'{place}' is not served: write '{known}'.", param=within)


def _place(name: str, within: str) -> str:
    shown = name if len(name) <= _SHOWN_MAX else f"{name[:_SHOWN_MAX]}…"
    return f"{within}.{shown}" if within else shown


@dataclass(frozen=True, slots=True)
class Plugins:
    """Plugins of OpenRouter by ``id``; others are priced, or not known."""

    free: Collection[str]
    refused: Mapping[str, str]


def _members(table: Mapping[str, Any]) -> Members:
    return Members(
        [*table.get("free", ()), *table.get("counted", ())], table.get("priced", ()), table.get("refused")
    )


_TABLE: Mapping[str, Any] = json.loads(
    files("config").joinpath("data", "request_members.json").read_text("utf-8")
)
DIALECTS: Mapping[str, Members] = {name: _members(table) for name, table in _TABLE["dialects"].items()}
INSIDE: Mapping[str, Members] = {name: _members(table) for name, table in _TABLE["inside"].items()}
TYPES: Mapping[str, frozenset[str]] = {name: frozenset(kinds) for name, kinds in _TABLE["types"].items()}
PLUGINS = Plugins(**_TABLE["plugins"])
MESSAGE = Names(_TABLE["names"]["message"])
PART = Names(_TABLE["names"]["part"])
TOOL = Names(_TABLE["names"]["tool"])
