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

from billing.calls.live_call import LiveCall
from billing.money import format_amount, format_usd
from proxy.http.request_facts import Facts, facts_of
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.tracing import Tracing

_log = structlog.get_logger("tuma.requests")
_QUIET = frozenset(("/healthz", "/readyz", "/metrics"))  # asked all the time, by machines
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"))
_NO_ROUTE = "none"
_REFUSED = int(HTTPStatus.BAD_REQUEST)
_FAILED = int(HTTPStatus.INTERNAL_SERVER_ERROR)
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Telemetry:
    """What a request is counted and traced by."""

    metrics: Metrics
    tracing: Tracing | None


TELEMETRY = web.AppKey("telemetry", Telemetry)


@web.middleware
async def tell_requests(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Tell of every request, however it ends."""
    facts = facts_of(request)
    telemetry = facts.app[TELEMETRY]
    if telemetry.tracing is not None:
        facts.stages.trace = telemetry.tracing.begin(request.headers, facts.stages)
    response = None
    try:
        response = await handler(request)
        return response
    finally:
        done = _Completed(request, facts, telemetry, response)
        call = facts.call
        if call is None or (call.ended is not None and call.ended.done()):
            done.tell()
        else:
            call.on_ended = done.tell


class _Completed:
    """A request that was answered, and its call if it was one."""

    __slots__ = ("_bytes", "_facts", "_gone", "_method", "_route", "_status", "_telemetry", "_took_s")

    def __init__(
        self, request: web.Request, facts: Facts, telemetry: Telemetry, response: web.StreamResponse | None
    ) -> None:
        self._facts = facts
        self._telemetry = telemetry
        self._status = 0 if response is None else response.status
        self._bytes = 0 if response is None else _size_of(response)
        self._took_s = time.perf_counter() - facts.stages.began_s
        transport = request.transport
        self._gone = response is None or transport is None or transport.is_closing()
        self._route = _NO_ROUTE if facts.route is None else facts.route
        method = request.method
        self._method = method if method in _METHODS else "other"

    def tell(self) -> None:
        """Count it, log it, and end its trace."""
        facts, telemetry = self._facts, self._telemetry
        call, caller, refusal, stages = facts.call, facts.caller, facts.refusal, facts.stages
        meters = telemetry.metrics.meters
        meters.requests.add(1, self._method, self._route, str(self._status))
        told: dict[str, Any] = {
            "request_id": facts.call_id_text,
            "method": self._method,
            "route": self._route,
            "status": self._status,
            "outcome": self._outcome(call),
            "duration_ms": round(self._took_s * 1000, 1),
            "bytes_out": self._bytes,
            "client_gone": self._gone,
        }
        if caller is not None:
            told["user_id"] = str(caller.user_id)
            told["wallet_id"] = str(caller.wallet_id)
            told["key_id"] = None if caller.key_id is None else str(caller.key_id)
        if call is not None:
            _add_call(told, call)
        if refusal is not None:
            meters.refusals.add(1, refusal.code)
            told["error"], told["code"], told["message"] = refusal.error, refusal.code, refusal.message
        if telemetry.tracing is not None:
            telemetry.tracing.end(stages, told)
        told["stages_ms"] = {stage: round(spent_s * 1000, 2) for stage, spent_s in stages.sums_s().items()}
        self._log()("request.completed", **told)

    def _log(self) -> Callable[..., Any]:
        if self._status == _FAILED:
            return _log.error  # type: ignore[no-any-return]
        if self._route in _QUIET:
            return _log.debug  # type: ignore[no-any-return]
        return _log.warning if self._status > _FAILED else _log.info  # type: ignore[no-any-return]

    def _outcome(self, call: LiveCall | None) -> str:
        if call is not None and call.ending is not None:
            return call.ending.outcome
        if not self._status:
            return "cancelled"
        if self._status < _REFUSED:
            return "ok"
        return "refused" if self._status < _FAILED else "failed"


def _size_of(response: web.StreamResponse) -> int:
    if response.prepared:
        return response.body_length
    return (response.content_length or 0) if isinstance(response, web.Response) else 0


def _add_call(told: dict[str, Any], call: LiveCall) -> None:
    told["call_id"] = str(call.call_id)
    told["model"] = call.model
    told["stream"] = call.stream
    ending = call.ending
    if ending is None:
        return
    told["state"] = ending.state
    told["posted"] = call.settlement is not None
    told["accuracy"] = ending.accuracy
    told["source"] = ending.source
    told["cost_usd"] = format_usd(ending.cost_nanousd)
    told["charge"] = format_amount(ending.charge_nano)
    told["currency"] = call.caller.currency
    told["tokens_prompt"] = ending.usage.prompt_tokens
    told["tokens_completion"] = ending.usage.completion_tokens
    told["generation_id"] = ending.generation_id
    told["first_byte_ms"] = ending.first_byte_ms
    told["ended_ms"] = ending.duration_ms
