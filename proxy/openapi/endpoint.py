"""The document at ``/openapi.json`` (OpenAPI 3.1), made from the same table as the routes."""

from dataclasses import dataclass
from typing import Any

from aiohttp import web
from pydantic import BaseModel

from proxy.http.body import expect_later
from proxy.openapi.answer_types import Handler, answer_type_of
from proxy.openapi.schemas import Schema


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One way of asking: the route, and what the document says of it.

    The handler's docstring describes it, and its annotation says what shape a good answer has.

    Args:
        status: of a good answer.
        also_status: of a good answer, too.
        bad_status: of one that has the same shape, and says what is wrong.
        form: what the body is read into; None for none.
        body: the body's shape, where it is no form.
        query: names of query parameters, and their schemas.
        required: those of them that must be there.
        also: media types that it may answer with, beside JSON.
        streams: it answers with events of that shape, without an end; with status 101, over a WebSocket.
        late: a replica may answer it, and then says of when it is.
        secured: whether a key or a token is needed.
        operator: whether it needs the operator's token.
        errors: statuses that it may answer beside the usual ones.
    """

    method: str
    path: str
    handler: Handler
    tag: str
    status: int = 200
    also_status: int | None = None
    bad_status: int | None = None
    form: type[BaseModel] | None = None
    body: str | None = None
    query: tuple[tuple[str, Schema], ...] = ()
    required: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    streams: bool = False
    late: bool = False
    secured: bool = True
    operator: bool = False
    errors: tuple[int, ...] = ()

    @property
    def answer(self) -> Any:
        """The shape of a good answer, as the handler's annotation has it; None where it is never JSON."""
        return answer_type_of(self.handler)

    @property
    def route(self) -> web.RouteDef:
        """The route of the application. What is written in pieces is not there for HEAD: aiohttp would send its body, too."""
        if self.method == "GET" and (self.streams or "text/csv" in self.also):
            return web.get(self.path, self.handler, allow_head=False)
        return web.route(self.method, self.path, self.handler, expect_handler=expect_later)
