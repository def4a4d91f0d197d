"""Stripe's way with HTTP: forms in bracket notation, errors, idempotency keys, pages of lists, ``expand``.

Source: https://docs.stripe.com/api (errors, idempotent requests, pagination, expanding responses).
"""

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl

from aiohttp import web

from scripts.sim.exact_json import dumps

_PAGE_DEFAULT, _PAGE_MAX = 10, 100
_DEPTH_MAX = 6
_KEYS_MAX = 100_000
_KEY_LENGTH_MAX = 255
# The answer to a request that was begun is kept under its key; one that was not understood may be asked again.
_KEPT = (200, 402)


class StripeRefusal(Exception):  # noqa: N818 - not an error of ours
    """What Stripe answers instead of an object."""

    def __init__(self, status: int, message: str, **more: Any) -> None:
        super().__init__(message)
        self.status = status
        self.error = {"type": "invalid_request_error", "message": message, **more}


def answer(shown: Mapping[str, Any], status: int = 200, **headers: str) -> web.Response:
    """Return an object as an answer."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return web.Response(status=status, text=dumps(shown), content_type="application/json", headers=named)


def refusal(error: StripeRefusal) -> web.Response:
    """Return an error as an answer."""
    return answer({"error": error.error}, error.status)


def missing(kind: str, object_id: str, param: str | None = None) -> StripeRefusal:
    """Return the refusal of an id that there is not: 404 in a path, 400 in a parameter."""
    return StripeRefusal(
        404 if param is None else 400,
        f"No such {kind}: '{object_id}'",
        code="resource_missing",
        param=param or "id",
    )


def read_form(text: str) -> dict[str, Any]:
    """Read ``a[b][0][c]=d`` into dictionaries; lists become dictionaries by index.

    Raises:
        StripeRefusal: brackets that do not fit.
    """
    read: dict[str, Any] = {}
    for index, (name, value) in enumerate(parse_qsl(text, keep_blank_values=True)):
        first, *rest = name.split("[")
        if len(rest) > _DEPTH_MAX or not all(part.endswith("]") for part in rest):
            raise StripeRefusal(400, f"Invalid parameter name: {name}")
        path = [first, *(part[:-1] or str(index) for part in rest)]
        inner = read
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise StripeRefusal(400, f"Invalid parameter name: {name}")
        inner[path[-1]] = value
    return read


def list_of(value: object) -> list[Any]:
    """Return the items of what ``read_form`` read of a list."""
    return list(value.values()) if isinstance(value, dict) else []


def whole(form: Mapping[str, Any], name: str) -> int:
    """Return a parameter that is a whole number.

    Raises:
        StripeRefusal: it is missing, or none.
    """
    value = form.get(name)
    if not isinstance(value, str):
        raise StripeRefusal(400, f"Missing required param: {name}.", param=name, code="parameter_missing")
    if not (value.isascii() and value.removeprefix("-").isdigit()):
        raise StripeRefusal(400, f"Invalid integer: {value}", param=name, code="parameter_invalid_integer")
    return int(value)


class Once:
    """Answers that were given under an idempotency key."""

    def __init__(self) -> None:
        self._given: dict[str, tuple[tuple[str, str], int, str]] = {}

    def find(self, request: web.Request, text: str) -> web.Response | None:
        """Return the answer that was given to the same request before.

        Raises:
            StripeRefusal: another request had this key.
        """
        given = self._given.get(_key_of(request))
        if given is None:
            return None
        asked, status, body = given
        if asked != (request.path, text):
            raise StripeRefusal(
                400,
                "Keys for idempotent requests can only be used with the same parameters they were first used with.",
                type="idempotency_error",
            )
        return web.Response(
            status=status, text=body, content_type="application/json", headers={"Idempotent-Replayed": "true"}
        )

    def keep(self, request: web.Request, text: str, given: web.Response) -> None:
        """Keep the answer to a request, should its key come again."""
        key = _key_of(request)
        if key and given.status in _KEPT and len(self._given) < _KEYS_MAX:
            self._given[key] = ((request.path, text), given.status, given.text or "")


def _key_of(request: web.Request) -> str:
    key = request.headers.get("Idempotency-Key", "")
    if len(key) > _KEY_LENGTH_MAX:
        raise StripeRefusal(400, f"Idempotency keys are at most {_KEY_LENGTH_MAX} characters.")
    return key


def page_of(rows: list[dict[str, Any]], query: Mapping[str, Any], url: str) -> dict[str, Any]:
    """Return a page of a list, newest first, of what ``created`` leaves.

    Args:
        rows: oldest first.
        query: as ``read_form`` reads it.
        url: of the list.

    Raises:
        StripeRefusal: a limit out of bounds, or an unknown ``starting_after``.
    """
    left = list(reversed(rows))
    bounds = query.get("created")
    if isinstance(bounds, dict):
        least = whole(bounds, "gte") if "gte" in bounds else 0
        left = [row for row in left if row["created"] >= least]
    limit = whole(query, "limit") if "limit" in query else _PAGE_DEFAULT
    if not 1 <= limit <= _PAGE_MAX:
        raise StripeRefusal(400, f"This value must be between 1 and {_PAGE_MAX}.", param="limit")
    start = 0
    if "starting_after" in query:
        ids = [row["id"] for row in left]
        if query["starting_after"] not in ids:
            raise missing("object", str(query["starting_after"]), "starting_after")
        start = ids.index(query["starting_after"]) + 1
    return {
        "object": "list",
        "url": url,
        "has_more": len(left) > start + limit,
        "data": left[start : start + limit],
    }


def expand(shown: dict[str, Any], paths: list[Any], find: Callable[[str], dict[str, Any] | None]) -> None:
    """Put objects in the place of their ids.

    Args:
        shown: an object, or a list of them, changed in place.
        paths: such as ``latest_charge.balance_transaction``, of a list ``data.…``.
        find: returns the object that an id names.

    Raises:
        StripeRefusal: a path that leads nowhere.
    """
    for path in paths:
        _expand_one(shown, str(path).split("."), find, str(path))


def _expand_one(
    shown: dict[str, Any], parts: list[str], find: Callable[[str], dict[str, Any] | None], path: str
) -> None:
    first, *rest = parts
    if first not in shown:
        raise StripeRefusal(400, f"This property cannot be expanded ({path}).", param="expand")
    value = shown[first]
    if isinstance(value, str):
        value = shown[first] = find(value)
        if value is None:
            raise StripeRefusal(400, f"This property cannot be expanded ({path}).", param="expand")
    for item in value if isinstance(value, list) else [value]:
        if rest and isinstance(item, dict):
            _expand_one(item, rest, find, path)
