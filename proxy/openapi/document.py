"""The document at ``/openapi.json`` (OpenAPI 3.1), made from the same table as the routes."""

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Annotated, Any

from aiohttp import web
from pydantic import Field
from pydantic.json_schema import models_json_schema
from typing_extensions import TypeAliasType

from proxy.http.errors import ErrorJson
from proxy.http.request_facts import standard_headers
from proxy.http.typed_answer import JsonAnswer
from proxy.openapi.answer_schemas import REFERENCE, write_answers
from proxy.openapi.endpoint import Endpoint
from proxy.openapi.schemas import EXAMPLE_MODEL, REQUESTS, Schema

DocumentJson = TypeAliasType("DocumentJson", Annotated[dict[str, Any], Field(description="OpenAPI 3.1.")])
DOCUMENT = web.AppKey("document", dict)
_PARAMETER = re.compile(r"{(\w+)(?::[^}]*)?}")
_TEXT: Schema = {"type": "string", "minLength": 1}
_NAMED: dict[str, Schema] = {
    "model": {**_TEXT, "examples": [EXAMPLE_MODEL]},
    "month": {"type": "string", "pattern": "^20[2-9][0-9]-(0[1-9]|1[0-2])$", "examples": ["2026-11"]},
}
_MEDIA: dict[str, Schema] = {
    "text/event-stream": {"description": "OpenAI's chunks, then `[DONE]`; of a response its typed events."},
    "text/plain": {"type": "string"},
    "text/csv": {"type": "string"},
    "text/html": {"type": "string"},
}
_WHY = {
    400: "The request cannot be understood, or a value in it is out of bounds.",
    401: "No key or token, or one that is not valid.",
    402: "The wallet or a cap does not cover the call; or there is no wallet.",
    403: "The wallet is frozen, or this key may not do that.",
    404: "There is no such thing, or it is another's.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body has a coding that is not understood.",
    429: "A limit is reached: see `Retry-After` and `retry-after-ms`.",
    502: "The provider failed.",
    503: "Something that money depends on is away: see `Retry-After`.",
    504: "The provider did not answer in time.",
}
_LATER = (429, 503)
_ALWAYS = (400, 401, 402, 403, 404, 408, 413, 429, 503)


async def show_document(request: web.Request) -> JsonAnswer[DocumentJson]:
    """This document."""
    headers = {**standard_headers(request), "Cache-Control": "public, max-age=300"}
    return JsonAnswer(request.app[DOCUMENT], headers=headers)


def make_document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """Return the document of these endpoints."""
    forms = sorted({item.form for item in endpoints if item.form is not None}, key=lambda form: form.__name__)
    _, written = models_json_schema([(form, "validation") for form in forms], ref_template=REFERENCE)
    shapes = dict.fromkeys(item.answer for item in endpoints if item.answer is not None)
    references, answers = write_answers((*shapes, ErrorJson))
    paths: dict[str, dict[str, Any]] = {}
    for item in endpoints:
        paths.setdefault(_PARAMETER.sub(r"{\1}", item.path), {})[item.method.lower()] = _operation(
            item, references
        )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tuma",
            "version": version("tuma"),
            "description": "An OpenAI-compatible reverse proxy that meters money. Amounts are decimal strings in major units.",
        },
        "paths": paths,
        "components": {
            "schemas": {**written.get("$defs", {}), **REQUESTS, **answers},
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key, or the token of somebody who signed in.",
                },
                "operator": {"type": "http", "scheme": "bearer", "description": "The operator's token."},
            },
        },
    }


def _operation(item: Endpoint, references: Mapping[Any, Schema]) -> dict[str, Any]:
    text = (item.handler.__doc__ or "").strip()
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{item.method.lower()}{_PARAMETER.sub(_name_of, item.path)}"),
        "summary": text.partition("\n")[0],
        "tags": [item.tag],
        "parameters": [*_parameters(item)],
        "responses": _responses(item, references),
    }
    if item.secured:
        operation["security"] = [{"operator" if item.operator else "key": []}]
    body = item.form.__name__ if item.form is not None else item.body
    if body is not None:
        operation["requestBody"] = {
            "required": item.form is None
            or any(field.is_required() for field in item.form.model_fields.values()),
            "content": {"application/json": {"schema": _ref(body)}},
        }
    return operation


def _name_of(found: re.Match[str]) -> str:
    return found[1]


def _parameters(item: Endpoint) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": _NAMED.get(name, _TEXT)}
        for name in _PARAMETER.findall(item.path)
    ]
    found += [
        {"name": name, "in": "query", "required": name in item.required, "schema": schema}
        for name, schema in item.query
    ]
    if item.streams:
        found.append(
            {"name": "Last-Event-ID", "in": "header", "required": False, "schema": {"type": "string"}}
        )
    if item.secured and not item.operator:
        found.append(
            {
                "name": "x-tuma-wallet",
                "in": "header",
                "description": "Which wallet pays, for somebody who signed in and has several.",
                "schema": {"type": "string", "format": "uuid"},
            }
        )
    return found


def _responses(item: Endpoint, references: Mapping[Any, Schema]) -> dict[str, Any]:
    good = _good(item, references)
    responses = {
        str(status): {"description": "Done.", "headers": _headers(item), "content": good}
        for status in (item.status, item.also_status)
        if status is not None
    }
    statuses = (*_ALWAYS, *item.errors) if item.secured else (400, *item.errors)
    for status in sorted(set(statuses)):
        responses[str(status)] = {
            "description": _WHY[status],
            "headers": {
                "x-request-id": {"required": True, "schema": {"type": "string"}},
                **({"Retry-After": {"schema": {"type": "string"}}} if status in _LATER else {}),
            },
            "content": {"application/json": {"schema": references[ErrorJson]}},
        }
    if item.bad_status is not None:
        responses[str(item.bad_status)] = {"description": "Not ready.", "content": good}
    return responses


def _good(item: Endpoint, references: Mapping[Any, Schema]) -> dict[str, Any]:
    """Return what a good answer contains, by media type."""
    good: dict[str, Any] = {media: {"schema": _MEDIA[media]} for media in item.also}
    if item.answer is None:
        return good
    kind = "text/event-stream" if item.streams else "application/json"
    return {kind: {"schema": references[item.answer]}, **good}


def _headers(item: Endpoint) -> Mapping[str, Any]:
    headers: dict[str, Any] = {"x-request-id": {"required": True, "schema": {"type": "string"}}}
    if item.secured and not item.operator:
        for what in ("requests", "tokens"):
            for part in ("limit", "remaining", "reset"):
                headers[f"x-ratelimit-{part}-{what}"] = {"schema": {"type": "string"}}
    if item.late:
        headers["x-tuma-as-of"] = {
            "description": "By a replica, which knows everything up to then; left out: as of now.",
            "schema": {"type": "string", "format": "date-time"},
        }
    return headers


def _ref(name: str) -> Schema:
    return {"$ref": REFERENCE.format(model=name)}
