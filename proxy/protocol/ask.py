"""Reading what the caller asks: a bounded body, parsed once, checked where money depends on it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from billing.identity.caller import Caller
from billing.pricing.extras import CACHED_WRITE_1H
from billing.pricing.quote import Output
from billing.threads import FairThreads, Work, finish
from config.settings import LimitSettings
from proxy.http.body import read_body
from proxy.http.body_budget import BODIES
from proxy.http.errors import BadRequestError
from proxy.http.request_facts import facts_of, still_there
from proxy.protocol.content import find_extras
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
from proxy.protocol.members import Policy

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

    def body_with(self, changes: Mapping[str, str | None]) -> bytes:
        """Return the body with these members set to JSON text, or left out where that is None, everything else untouched."""
        if not changes:
            return self.body
        if not self.fields.keys().isdisjoint(changes):
            return set_members(self.text, scan_object(self.text), changes).encode()
        added = {name: value for name, value in changes.items() if value is not None}
        return add_members(self.text, added).encode() if added else self.body

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
        return list(dict.fromkeys((self.model, *fallbacks))) if fallbacks else [self.model]

    @property
    def extras(self) -> Mapping[str, int]:
        """What is asked for that is billed apart from tokens, by unit of the price book."""
        extras = find_extras(self.fields)
        return {**extras, CACHED_WRITE_1H: 1} if '"ttl"' in self.text else extras

    @property
    def predicted(self) -> Any:
        """The content of a predicted output, None where there is none: what of it is rejected is billed as output (OpenAI)."""
        prediction = self.fields.get("prediction")
        return prediction.get("content") if isinstance(prediction, dict) else None

    @property
    def bound_names(self) -> list[str]:
        """The members that bound the output and are in the request."""
        return [name for name in self.dialect.bounds if self.fields.get(name) is not None]


async def read_ask(
    request: web.Request,
    limits: LimitSettings,
    dialect: Dialect,
    policy: Policy,
    *,
    caller: Caller,
    threads: FairThreads,
) -> Ask:
    """Read and check the body of a call.

    Args:
        request: whose body it is.
        limits: of size and time, and of what it may cost to read it.
        dialect: of the endpoint.
        policy: of members that no table has.
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
        reading = _reading(body, dialect, policy, bounds)
        if len(body) <= _AT_ONCE_BYTES:
            ask = finish(reading)
        else:
            ask = await threads.run(caller.user_id, reading, wanted=lambda: still_there(request))
    facts.stages.mark("read")
    return ask


def _reading(body: bytes, dialect: Dialect, policy: Policy, bounds: JsonBounds) -> Work[Ask]:
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
    dialect.check(fields, policy)
    options = fields.get("stream_options")
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
        nodes=nodes,
    )


def _includes_usage(usage: Any) -> bool:
    """Tell whether OpenRouter's own way of asking for usage is used: https://openrouter.ai/docs/use-cases/usage-accounting."""
    return isinstance(usage, dict) and usage.get("include") is True
