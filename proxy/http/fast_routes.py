"""The direct way to a handler: what aiohttp works out anew for each request is worked out once, where the path is fixed.

For each request aiohttp searches its routes, makes and freezes a match, and lays the middlewares around the handler. Of
a route without variables in its path all of that is the same every time.
"""

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from aiohttp import hdrs, web
from aiohttp.web_urldispatcher import PlainResource, UrlMappingMatchInfo

from proxy.http.request_facts import begin_facts

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# Of a middleware that has nothing to do on most paths: on which it has. It is asked once for each path.
CONCERN = web.AppKey[Mapping[Any, Callable[[str], bool]]]("concern", Mapping)


class _Way(NamedTuple):
    match: UrlMappingMatchInfo
    handler: _Handler


class DirectWays:
    """Handles requests of an application, those of fixed paths directly.

    Args:
        app: frozen; its middlewares are of the new style, and it has no applications inside.
    """

    def __init__(self, app: web.Application) -> None:
        self._app = app
        self._ways: dict[tuple[str, str], _Way] = {}
        for resource in app.router.resources():
            if isinstance(resource, PlainResource):
                for route in resource:
                    match = UrlMappingMatchInfo({}, route)
                    match.add_app(app)
                    match.freeze()
                    way = _Way(match, self._around(route.handler, resource.canonical))
                    self._ways.setdefault((route.method, resource.canonical), way)

    def _around(self, handler: _Handler, path: str) -> _Handler:
        concern = self._app.get(CONCERN, {})
        for middleware in reversed(self._app.middlewares):
            if middleware not in concern or concern[middleware](path):
                handler = partial(middleware, handler=handler)
        return handler

    def handle(self, request: web.Request) -> Awaitable[web.StreamResponse] | None:
        """Return the answer to await; None for what is asked in any other way than plainly, which goes aiohttp's way."""
        message = request._message  # noqa: SLF001 - aiohttp parses a URL for each public way to the path
        way = self._ways.get((message.method, message.path))
        if way is None or hdrs.EXPECT in message.headers:
            return None
        request._match_info = way.match  # noqa: SLF001 - as Application._handle does
        begin_facts(request, self._app, message.path)
        return way.handler(request)
