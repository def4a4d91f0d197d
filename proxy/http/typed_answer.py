"""Answers that say their shape in their type, so that mypy sees a wrong one, and the document knows it.

A handler's annotation is one of these, or ``Annotated[web.StreamResponse, Shape]`` for what is written in pieces: the shape of
each event, or of what the provider answers. ``proxy/openapi/answer_types.py`` reads it.
"""

import json
from collections.abc import Mapping
from typing import Generic, TypeVar

from aiohttp import web

from proxy.http.request_facts import standard_headers

_Body = TypeVar("_Body")


class JsonAnswer(web.Response, Generic[_Body]):
    """A whole answer, JSON.

    Args:
        body: its shape is the type's argument.
        status: HTTP's.
        headers: all but the usual ones of JSON.
    """

    def __init__(self, body: _Body, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(
            text=json.dumps(body), status=status, headers=headers, content_type="application/json"
        )


class TextAnswer(web.Response):
    """A whole answer that is no JSON: a page, or numbers for a scraper."""


class CsvAnswer(web.StreamResponse):
    """A table for a spreadsheet, written in pieces."""


def answer(request: web.Request, body: _Body, status: int = 200) -> JsonAnswer[_Body]:
    """Answer with JSON."""
    return JsonAnswer(body, status=status, headers=standard_headers(request))
