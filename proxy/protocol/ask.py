"""Reading what the caller asks: a bounded body, parsed once, checked where money depends on it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from billing.pricing.quote import Output
from config.settings import LimitSettings
from proxy.http.body import read_body
from proxy.http.errors import BadRequestError
from proxy.http.request_facts import stages_of
from proxy.protocol.content import find_extras
from proxy.protocol.dialects import Dialect
from proxy.protocol.json_spans import (
    DuplicateKeyError,
    JsonSpanError,
    add_members,
    read_object,
    scan_object,
    set_members,
)
from proxy.protocol.members import Policy

_STRICT = Policy()


@dataclass(frozen=True, slots=True)
class Ask:
    """A call as asked; members that Tuma does not know are kept byte for byte.

    Args:
        include_usage: whether the client is told usage in a stream.
    """

    dialect: Dialect
    body: bytes
    text: str
    fields: Mapping[str, Any]
    model: str
    stream: bool
    stream_options: Mapping[str, Any] | None
    include_usage: bool
    size: int

    def body_with(self, changes: Mapping[str, str]) -> bytes:
        """Return the body with these members set to JSON text, everything else untouched."""
        if not changes:
            return self.body
        if not self.fields.keys().isdisjoint(changes):
            return set_members(self.text, scan_object(self.text), changes).encode()
        return add_members(self.text, changes).encode()

    @property
    def output(self) -> Output:
        """How much output is asked for."""
        return self.dialect.output(self.fields)

    @property
    def models(self) -> list[str]:
        """Every model that may answer: the one asked for, and OpenRouter's fallbacks."""
        fallbacks = self.fields.get("models")
        return list(dict.fromkeys((self.model, *fallbacks))) if fallbacks else [self.model]

    @property
    def extras(self) -> Mapping[str, int]:
        """What is asked for that is billed apart from tokens, by unit of the price book."""
        return find_extras(self.fields)

    @property
    def bound_names(self) -> list[str]:
        """The members that bound the output and are in the request."""
        return [name for name in self.dialect.bounds if self.fields.get(name) is not None]


async def read_ask(
    request: web.Request, limits: LimitSettings, dialect: Dialect, policy: Policy = _STRICT
) -> Ask:
    """Read and check the body of a call.

    Raises:
        BodyTooLargeError, BodyTimeoutError, BadRequestError: nothing was sent anywhere.
    """
    body = await read_body(request, limits)
    try:
        text = body.decode("utf-8")
        fields = read_object(text)
    except UnicodeDecodeError:
        raise BadRequestError("The body is not valid UTF-8.") from None
    except DuplicateKeyError as error:
        raise BadRequestError(f"The body names {error.key!r} twice.", param=error.key) from None
    except JsonSpanError as error:
        raise BadRequestError(f"The body is not a valid JSON object: {error}") from None
    dialect.check(fields, policy)
    options = fields.get("stream_options")
    stages_of(request).mark("read")
    return Ask(
        dialect=dialect,
        body=body,
        text=text,
        fields=fields,
        model=fields.get("model") or fields["models"][0],
        stream=bool(fields.get("stream")),
        stream_options=options,
        include_usage=dialect.shows_usage
        or bool(options and options.get("include_usage"))
        or _includes_usage(fields.get("usage")),
        size=len(body),
    )


def _includes_usage(usage: Any) -> bool:
    """Tell whether OpenRouter's own way of asking for usage is used: https://openrouter.ai/docs/use-cases/usage-accounting."""
    return isinstance(usage, dict) and usage.get("include") is True
