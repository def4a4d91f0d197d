"""What handlers of the operator's API share: reading, answering, and the rows of its table of endpoints."""

from typing import Any, TypeVar
from uuid import UUID

from aiohttp import web

from billing.ids import parse_id
from proxy.http.forms import Form, read_form, read_limit, read_query
from proxy.openapi.answer_types import Handler
from proxy.openapi.endpoint import Endpoint
from proxy.operator.answers import Identified, PageOf
from proxy.services.operator import OPERATOR, OperatorServices

PAGE = 100
PAGE_MAX = 1_000
_Form = TypeVar("_Form", bound=Form)
_Item = TypeVar("_Item", bound=Identified)


def services_of(request: web.Request) -> OperatorServices:
    """Return what the operator's API uses."""
    return request.app[OPERATOR]


async def read_as(request: web.Request, form: type[_Form]) -> _Form:
    """Read the body into a form; see ``read_form``."""
    return await read_form(request, form, services_of(request).settings.limits)


def read_id(request: web.Request, what: str) -> UUID:
    """Return the id of the path; NotFoundError where it is none."""
    return parse_id(request.match_info[what], what)


def read_page(request: web.Request, what: str) -> tuple[int, UUID | None]:
    """Return ``limit`` and ``after`` of the query."""
    after = read_query(request, "after")
    limit = read_limit(request, most=PAGE_MAX, usual=PAGE)
    return limit, None if after is None else parse_id(after, what)


def page_of(found: list[_Item], limit: int) -> PageOf[_Item]:
    """Return a page of what was read with one row more than fits on it."""
    page = found[:limit]
    last = page[-1]["id"] if page else None
    return {"object": "list", "data": page, "has_more": len(found) > limit, "last_id": last}


def idempotency_key(request: web.Request) -> str | None:
    """Return the header's key, apart from those of commands."""
    key = request.headers.get("Idempotency-Key")
    return None if key is None else f"admin:{key[:200]}"


def endpoint(
    method: str,
    path: str,
    handler: Handler,
    *,
    form: type[Form] | None = None,
    status: int = 200,
    query: tuple[tuple[str, dict[str, Any]], ...] = (),
) -> Endpoint:
    """Return a row of the operator's table."""
    return Endpoint(
        method,
        path,
        handler,
        "operator",
        status=status,
        form=form,
        query=query,
        operator=True,
        errors=(415,),
    )


def query(*names: str) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Return the schemas of query parameters."""
    kinds: dict[str, dict[str, Any]] = {
        "limit": {"type": "integer", "minimum": 1, "maximum": PAGE_MAX, "default": PAGE},
        "after": {"type": "string", "format": "uuid"},
        "since": {"type": "string", "format": "date-time"},
        "until": {"type": "string", "format": "date-time"},
        "revoked": {"type": "boolean"},
    }
    return tuple((name, kinds.get(name, {"type": "string"})) for name in names)
