"""CORS: which web pages may call the API with a key of their user's. Without configured origins there is no such header.

Source: https://fetch.spec.whatwg.org/#http-cors-protocol. Credentials (cookies) are never allowed: Tuma has none.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

from aiohttp import hdrs, web

from config.settings import CorsSettings

_OPEN_PATHS = ("/v1/", "/api/")  # never /admin nor /webhooks: no page calls those
_HEADER_NAMES = re.compile(r"[A-Za-z0-9_-]{1,64}(?:[ \t]*,[ \t]*[A-Za-z0-9_-]{1,64}){0,63}")
_EXPOSED = ", ".join(
    (
        "x-request-id",
        "retry-after",
        "retry-after-ms",
        *(
            f"x-ratelimit-{what}-{of}"
            for what in ("limit", "remaining", "reset")
            for of in ("requests", "tokens")
        ),
        *(f"x-tuma-{what}" for what in ("cost-usd", "charge", "balance", "as-of")),
    )
)
_NONE: Mapping[str, str] = MappingProxyType({})


class Cors:
    """Answers browsers that ask whether a page may call.

    Args:
        settings: the origins.
    """

    def __init__(self, settings: CorsSettings) -> None:
        self._origins = frozenset(settings.origins)
        self._any = "*" in self._origins
        self._max_age = str(settings.max_age_s)

    def _find_origin(self, request: web.Request) -> str | None:
        """Return what to allow: the caller's own origin, ``*`` if that is configured, None if it is not to be."""
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is None:
            return None
        if self._any:
            return "*"
        return origin if origin in self._origins else None

    def fields(self, request: web.Request) -> Mapping[str, str]:
        """Return what lets the page read a response, if its origin may; and tells caches that this depends on the origin."""
        if not self._origins or not request.path.startswith(_OPEN_PATHS):
            return _NONE
        fields: dict[str, str] = {} if self._any else {hdrs.VARY: "Origin"}
        origin = self._find_origin(request)
        if origin is not None:
            fields[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
            fields[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = _EXPOSED
        return fields

    def add_to(self, request: web.Request, response: web.StreamResponse) -> None:
        """Add the fields to a response."""
        for name, value in self.fields(request).items():
            if name == hdrs.VARY:
                response.headers.add(name, value)
            else:
                response.headers[name] = value

    def answer_preflight(self, request: web.Request, methods: set[str]) -> web.Response | None:
        """Return the answer to a browser's question before a call; None if the request is no such question.

        Args:
            request: for a path that exists.
            methods: that the path has.
        """
        if (
            request.method != hdrs.METH_OPTIONS
            or hdrs.ACCESS_CONTROL_REQUEST_METHOD not in request.headers
            or not request.path.startswith(_OPEN_PATHS)
            or self._find_origin(request) is None
        ):
            return None
        headers = {
            hdrs.ACCESS_CONTROL_ALLOW_METHODS: ", ".join(sorted(methods)),
            hdrs.ACCESS_CONTROL_MAX_AGE: self._max_age,
        }
        # SDKs send many headers of their own (x-stainless-…): any name may come, as those that we do not know do nothing.
        wanted = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "")
        if _HEADER_NAMES.fullmatch(wanted) is not None:
            headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = wanted
        return web.Response(status=204, headers=headers)
