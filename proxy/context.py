"""What belongs to one request, and the headers that every response carries."""

from collections import OrderedDict
from datetime import datetime
from uuid import UUID

from aiohttp import web

from billing.callers import Caller
from billing.calls import LiveCall
from billing.holds import RateState
from billing.ids import new_id
from billing.stages import Stages

CALL_ID = web.RequestKey("call_id", UUID)
CALLER = web.RequestKey("caller", Caller)
CALL = web.RequestKey("call", LiveCall)
STAGES = web.RequestKey("stages", Stages)


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


def call_id_of(request: web.Request) -> UUID:
    """Return the request's id, minted on arrival."""
    call_id = request.get(CALL_ID)
    if call_id is None:
        call_id = request[CALL_ID] = new_id()
    return call_id


def stages_of(request: web.Request) -> Stages:
    """Return the stages of the request, which began when it was first asked for them."""
    stages = request.get(STAGES)
    if stages is None:
        stages = request[STAGES] = Stages()
    return stages


def attach_call(request: web.Request, call: LiveCall) -> None:
    """Let a call be told of, and timed, as what the request was about."""
    request[CALL] = call
    call.stages = stages_of(request)


def late_headers(request: web.Request, as_of: datetime | None) -> dict[str, str]:
    """Return the headers of every response, and ``x-tuma-as-of`` where a replica answered, which knows everything up to then."""
    headers = standard_headers(request)
    if as_of is not None:
        headers["x-tuma-as-of"] = as_of.isoformat()
    return headers


def standard_headers(request: web.Request) -> dict[str, str]:
    """Return ``x-request-id`` and, once the caller is known, OpenAI's ``x-ratelimit-*`` headers."""
    headers = {"x-request-id": str(call_id_of(request))}
    caller = request.get(CALLER)
    if caller is not None:
        state = request.app[RATES].recall(caller)
        headers["x-ratelimit-limit-requests"] = str(state.limits.requests_per_min)
        headers["x-ratelimit-remaining-requests"] = str(state.remaining_requests)
        headers["x-ratelimit-reset-requests"] = format_duration(state.reset_requests_ms)
        headers["x-ratelimit-limit-tokens"] = str(state.limits.tokens_per_min)
        headers["x-ratelimit-remaining-tokens"] = str(state.remaining_tokens)
        headers["x-ratelimit-reset-tokens"] = format_duration(state.reset_tokens_ms)
    return headers


def format_duration(milliseconds: int) -> str:
    """Write a duration as OpenAI's headers do: ``12ms``, ``1.5s``, ``6m0s``."""
    if milliseconds < 1000:  # noqa: PLR2004 - milliseconds in a second
        return f"{milliseconds}ms"
    minutes, rest_ms = divmod(milliseconds, 60_000)
    seconds = f"{rest_ms / 1000:.3f}".rstrip("0").rstrip(".")
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"
