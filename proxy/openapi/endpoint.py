"""The document at ``/openapi.json`` (OpenAPI 3.1), made from the same table as the routes."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web
from pydantic import BaseModel

from proxy.http.body import expect_later
from proxy.openapi.schemas import Schema

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One way of asking: the route, and what the document says of it. The handler's docstring describes it.

    Args:
        answer: the shape of a good answer.
        status: of a good answer.
        also_status: of a good answer, too.
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
    handler: _Handler
    answer: str
    tag: str
    status: int = 200
    also_status: int | None = None
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
    def route(self) -> web.RouteDef:
        """The route of the application. What is written in pieces is not there for HEAD: aiohttp would send its body, too."""
        if self.method == "GET" and (self.streams or "text/csv" in self.also):
            return web.get(self.path, self.handler, allow_head=False)
        return web.route(self.method, self.path, self.handler, expect_handler=expect_later)
