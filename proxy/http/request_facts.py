"""What belongs to one request, and the headers that every response carries."""

from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from aiohttp import web

from billing.calls.live_call import LiveCall
from billing.identity.caller import Caller
from billing.ids import new_id
from billing.limits import RateState
from billing.stages import Stages


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request was refused."""

    error: str
    code: str
    message: str


class Facts:
    """What is known of one request: one object beside it, as each look into the request itself is several calls.

    Its stages begin when it is made. The request is not in it, which would be a cycle.

    Args:
        app: that serves the request.
        route: the path of its route; None where there is no route.
    """

    __slots__ = (
        "app",
        "call",
        "call_id",
        "call_id_text",
        "caller",
        "head_checked",
        "refusal",
        "route",
        "stages",
    )

    def __init__(self, app: web.Application, route: str | None) -> None:
        self.app = app
        self.route = route
        self.stages = Stages()
        self.call_id = new_id()
        self.call_id_text = str(self.call_id)  # as it is sent and logged
        self.caller: Caller | None = None
        self.call: LiveCall | None = None
        self.refusal: Refusal | None = None
        self.head_checked = False


_FACTS = web.RequestKey("facts", Facts)


class RateMemory:
    """The latest known rate windows of each caller, for answers that ask nothing of Redis; a bounded cache.

    Args:
        entries_max: callers remembered.
    """

    def __init__(self, entries_max: int = 10_000) -> None:
        self._entries_max = entries_max
        self._states: OrderedDict[UUID, RateState] = OrderedDict()

    def remember(self, caller: Caller, state: RateState) -> None:
        """Keep the state that a reserve just returned."""
        name = caller.key_id or caller.user_id
        self._states[name] = state
        self._states.move_to_end(name)
        if len(self._states) > self._entries_max:
            self._states.popitem(last=False)

    def recall(self, caller: Caller) -> RateState:
        """Return what is known; full windows, when nothing is."""
        limits = caller.limits
        found = self._states.get(caller.key_id or caller.user_id)
        return found or RateState(limits, limits.requests_per_min, 0, limits.tokens_per_min, 0)


RATES = web.AppKey("rates", RateMemory)


def facts_of(request: web.Request) -> Facts:
    """Return what is known of a request; it begins when it is first asked for."""
    facts: Facts | None = request._state.get(_FACTS)  # noqa: SLF001 - the public way is three calls
    if facts is None:
        resource = request.match_info.route.resource
        facts = Facts(request.app, None if resource is None else resource.canonical)
        request._state[_FACTS] = facts  # noqa: SLF001 - as above
    return facts


def call_id_of(request: web.Request) -> UUID:
    """Return the request's id, minted on arrival."""
    return facts_of(request).call_id


def stages_of(request: web.Request) -> Stages:
    """Return the stages of the request."""
    return facts_of(request).stages


def still_there(request: web.Request) -> bool:
    """Tell whether the client has not hung up."""
    transport = request.transport
    return transport is not None and not transport.is_closing()


def late_headers(request: web.Request, as_of: datetime | None) -> dict[str, str]:
    """Return the headers of every response, and ``x-tuma-as-of`` where a replica answered, which knows everything up to then."""
    headers = standard_headers(request)
    if as_of is not None:
        headers["x-tuma-as-of"] = as_of.isoformat()
    return headers


def standard_headers(request: web.Request) -> dict[str, str]:
    """Return ``x-request-id`` and, once the caller is known, OpenAI's ``x-ratelimit-*`` headers."""
    facts = facts_of(request)
    caller = facts.caller
    if caller is None:
        return {"x-request-id": facts.call_id_text}
    state = facts.app[RATES].recall(caller)
    return {
        "x-request-id": facts.call_id_text,
        "x-ratelimit-limit-requests": str(state.limits.requests_per_min),
        "x-ratelimit-remaining-requests": str(state.remaining_requests),
        "x-ratelimit-reset-requests": format_duration(state.reset_requests_ms),
        "x-ratelimit-limit-tokens": str(state.limits.tokens_per_min),
        "x-ratelimit-remaining-tokens": str(state.remaining_tokens),
        "x-ratelimit-reset-tokens": format_duration(state.reset_tokens_ms),
    }


def format_duration(milliseconds: int) -> str:
    """Write a duration as OpenAI's headers do: ``12ms``, ``1.5s``, ``6m0s``."""
    if milliseconds < 1000:  # noqa: PLR2004 - milliseconds in a second
        return f"{milliseconds}ms"
    minutes, rest_ms = divmod(milliseconds, 60_000)
    seconds = f"{rest_ms / 1000:.3f}".rstrip("0").rstrip(".")
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"
