"""Reading what the caller asks: a bounded body, parsed once, checked where money depends on it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from billing.identity.caller import Caller
from billing.pricing.quote import Output
from billing.threads import FairThreads, Work, finish
from config.settings import LimitSettings
from proxy.http.body import read_body
from proxy.http.body_budget import BODIES
from proxy.http.errors import BadRequestError
from proxy.http.request_facts import facts_of, still_there
from proxy.protocol.dialects import Dialect
from proxy.protocol.json_bounds import JsonBounds, TooMuchJsonError, weighing
from proxy.protocol.json_spans import (
    DuplicateKeyError,
    JsonSpanError,
    add_members,
    read_object,
    scan_object,
    set_members,
)

_AT_ONCE_BYTES = 128 * 1024  # a larger body is read in a thread


@dataclass(frozen=True, slots=True)
class Ask:
    """A call as asked; members that Tuma does not know are kept byte for byte.

    Args:
        include_usage: whether the client is told usage in a stream.
        nodes: how much it weighs, at most (``json_bounds``).
    """

    dialect: Dialect
    body: bytes
    text: str
    fields: Mapping[str, Any]
    model: str
    stream: bool
    stream_options: Mapping[str, Any] | None
    include_usage: bool
    nodes: int

    def body_with(self, changes: Mapping[str, str]) -> bytes:
        """Return the body with these members set to JSON text, everything else untouched."""
        if not changes:
            return self.body
        if not self.fields.keys().isdisjoint(changes):
            return set_members(self.text, scan_object(self.text), changes).encode()
        return add_members(self.text, changes).encode()

    @property
    def work(self) -> int:
        """How much it is to go over it: its bytes, or its nodes where these weigh more."""
        return max(len(self.body), self.nodes)

    @property
    def output(self) -> Output:
        """How much output is asked for."""
        return self.dialect.output(self.fields)

    @property
    def models(self) -> list[str]:
        """Every model that may answer: the one asked for, and OpenRouter's fallbacks."""
        fallbacks = self.fields.get("models")
        return (
            [self.model, *(name for name in fallbacks if name != self.model)] if fallbacks else [self.model]
        )


async def read_ask(
    request: web.Request, limits: LimitSettings, dialect: Dialect, *, caller: Caller, threads: FairThreads
) -> Ask:
    """Read and check the body of a call.

    Args:
        request: whose body it is.
        limits: of size and time, and of what it may cost to read it.
        dialect: of the endpoint.
        caller: who sends it.
        threads: where a large one is read.

    Raises:
        BodyTooLargeError, BodyTimeoutError, BadRequestError: nothing was sent anywhere.
        RateLimitError, OverloadedError: too much is being read just now.
    """
    facts = facts_of(request)
    bounds = JsonBounds(limits.json_nodes, limits.json_depth)
    with facts.app[BODIES].share_of(caller.user_id) as share:
        body = await read_body(request, limits, share)
        reading = _reading(body, dialect, bounds)
        if len(body) <= _AT_ONCE_BYTES:
            ask = finish(reading)
        else:
            ask = await threads.run(caller.user_id, reading, wanted=lambda: still_there(request))
    facts.stages.mark("read")
    return ask


def _reading(body: bytes, dialect: Dialect, bounds: JsonBounds) -> Work[Ask]:
    """Read a body in steps, none of which takes long."""
    try:
        nodes = yield from weighing(body, bounds)
        yield
        text = body.decode("utf-8")
        fields = read_object(text)
    except TooMuchJsonError as error:
        raise BadRequestError(f"The body takes too long to read: {error}.") from None
    except UnicodeDecodeError:
        raise BadRequestError("The body is not valid UTF-8.") from None
    except DuplicateKeyError as error:
        raise BadRequestError(f"The body names {error.key!r} twice.", param=error.key) from None
    except JsonSpanError as error:
        raise BadRequestError(f"The body is not a valid JSON object: {error}") from None
    yield
    dialect.check(fields)
    options = fields.get("stream_options")
    return Ask(
        dialect=dialect,
        body=body,
        text=text,
        fields=fields,
        model=fields["model"],
        stream=bool(fields.get("stream")),
        stream_options=options,
        include_usage=dialect.shows_usage or bool(options and options.get("include_usage")),
        nodes=nodes,
    )
