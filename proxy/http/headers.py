"""The headers that every response carries for the sake of browsers and caches, errors and streams included."""

from collections.abc import Mapping, MutableMapping
from types import MappingProxyType

from config.settings import HttpSettings

_SERVER = "tuma"  # without versions
# What a handler has set itself stays: a page of the console has a policy of its own.
_USUAL: Mapping[str, str] = MappingProxyType(
    {
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
        "Cache-Control": "no-store",
    }
)


class UsualHeaders:
    """Sets the headers of every response.

    Args:
        settings: whether browsers are told to insist on TLS.
    """

    def __init__(self, settings: HttpSettings) -> None:
        self._headers = dict(_USUAL)
        if settings.hsts_s:
            self._headers["Strict-Transport-Security"] = f"max-age={settings.hsts_s}"

    @property
    def fields(self) -> Mapping[str, str]:
        """All of them, for an answer that has none of its own."""
        return {"Server": _SERVER, **self._headers}

    def add_to(self, headers: MutableMapping[str, str]) -> None:
        """Set what is not there yet, and the server's name."""
        headers["Server"] = _SERVER
        for name, value in self._headers.items():
            if name not in headers:
                headers[name] = value
