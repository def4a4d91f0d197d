"""One line for every request, when all of it is known: ``request.completed``. The meters of requests go with it.

Of a request that was a call the line comes once the call is settled and its hold released, which may be after the
answer's end: what it cost is in it.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import structlog
from aiohttp import web

from billing.calls import LiveCall
from billing.ledger import Ending
from billing.money import format_amount, format_usd
from proxy.context import CALL, CALLER, call_id_of, stages_of
from proxy.services import SERVICES

_log = structlog.get_logger("tuma.requests")
_QUIET = frozenset(("/healthz", "/readyz", "/metrics"))  # asked all the time, by machines
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"))
_NO_ROUTE = "none"
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request was refused."""

    error: str
    code: str
    message: str


REFUSAL = web.RequestKey("refusal", Refusal)


@web.middleware
async def tell_requests(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Tell of every request, however it ends."""
    stages = stages_of(request)
    tracing = request.app[SERVICES].tracing
    if tracing is not None:
        stages.trace = tracing.begin(request.headers, stages)
    response = None
    try:
        response = await handler(request)
        return response
    finally:
        done = _Completed(request, response)
        call = request.get(CALL)
        if call is None or (call.ended is not None and call.ended.done()):
            done.tell()
        else:
            call.on_ended = done.tell


class _Completed:
    """A request that was answered, and its call if it was one."""

    def __init__(self, request: web.Request, response: web.StreamResponse | None) -> None:
        self._request = request
        self._status = 0 if response is None else response.status
        self._bytes = 0 if response is None else _size_of(response)
        self._took_s = time.perf_counter() - stages_of(request).began_s
        transport = request.transport
        self._gone = response is None or transport is None or transport.is_closing()
        resource = request.match_info.route.resource
        self._route = _NO_ROUTE if resource is None else resource.canonical
        self._method = request.method if request.method in _METHODS else "other"

    def tell(self) -> None:
        """Count it, log it, and end its trace."""
        request, services = self._request, self._request.app[SERVICES]
        call, refusal, stages = request.get(CALL), request.get(REFUSAL), stages_of(request)
        meters = services.metrics.meters
        meters.requests.add(1, self._method, self._route, str(self._status))
        if refusal is not None:
            meters.refusals.add(1, refusal.code)
        facts = {
            "request_id": str(call_id_of(request)),
            "method": self._method,
            "route": self._route,
            "status": self._status,
            "outcome": self._outcome(call),
            "duration_ms": round(self._took_s * 1000, 1),
            "bytes_out": self._bytes,
            "client_gone": self._gone,
            **self._who(),
            **({} if call is None else _facts_of(call)),
        }
        if refusal is not None:
            facts |= {"error": refusal.error, "code": refusal.code, "message": refusal.message}
        sums_ms = {stage: round(spent_s * 1000, 2) for stage, spent_s in stages.sums_s().items()}
        if services.tracing is not None:
            services.tracing.end(stages, facts)
        self._log()("request.completed", **facts, stages_ms=sums_ms)

    def _log(self) -> Callable[..., Any]:
        if self._status == HTTPStatus.INTERNAL_SERVER_ERROR:
            return _log.error  # type: ignore[no-any-return]
        if self._route in _QUIET:
            return _log.debug  # type: ignore[no-any-return]
        return _log.warning if self._status > HTTPStatus.INTERNAL_SERVER_ERROR else _log.info  # type: ignore[no-any-return]

    def _outcome(self, call: LiveCall | None) -> str:
        if call is not None and call.ending is not None:
            return call.ending.outcome
        if not self._status:
            return "cancelled"
        if self._status < HTTPStatus.BAD_REQUEST:
            return "ok"
        return "refused" if self._status < HTTPStatus.INTERNAL_SERVER_ERROR else "failed"

    def _who(self) -> dict[str, str | None]:
        caller = self._request.get(CALLER)
        if caller is None:
            return {}
        return {
            "user_id": str(caller.user_id),
            "wallet_id": str(caller.wallet_id),
            "key_id": None if caller.key_id is None else str(caller.key_id),
        }


def _size_of(response: web.StreamResponse) -> int:
    if response.prepared:
        return response.body_length
    return (response.content_length or 0) if isinstance(response, web.Response) else 0


def _facts_of(call: LiveCall) -> dict[str, Any]:
    facts: dict[str, Any] = {"call_id": str(call.call_id), "model": call.model, "stream": call.stream}
    return facts if call.ending is None else {**facts, **_cost_of(call, call.ending)}


def _cost_of(call: LiveCall, ending: Ending) -> dict[str, Any]:
    settlement = call.settlement
    return {
        "state": ending.state,
        "posted": settlement is not None,
        "accuracy": ending.accuracy,
        "source": ending.source,
        "cost_usd": format_usd(ending.cost_nanousd),
        "charge": format_amount(ending.charge_nano),
        "currency": call.caller.currency,
        "tokens_prompt": ending.usage.prompt_tokens,
        "tokens_completion": ending.usage.completion_tokens,
        "generation_id": ending.generation_id,
        "first_byte_ms": ending.first_byte_ms,
        "ended_ms": ending.duration_ms,
    }
