"""The aiohttp application: what is served, and in which order the house is opened and closed."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import cache
from http import HTTPStatus
from typing import Any

import structlog
from aiohttp import web

from billing.errors import TumaError
from config.secrets import Redactor
from config.settings import LimitSettings, Settings
from proxy.call.door import DOOR, Door
from proxy.endpoints import ENDPOINTS
from proxy.http.body import leaves_much_unread
from proxy.http.body_budget import BODIES, BodyBudget
from proxy.http.cors import Cors
from proxy.http.errors import error_response, http_error_response, shape_of
from proxy.http.fast_answer import HEADS, Heads
from proxy.http.headers import UsualHeaders
from proxy.http.request_facts import RATES, RateMemory, Refusal, call_id_of, facts_of, standard_headers
from proxy.http.request_head import check_head, ends_connection
from proxy.identity.authenticate import IDENTITY
from proxy.lifecycle import open_services
from proxy.openapi.document import DOCUMENT, make_document
from proxy.operator.endpoints import ADMIN
from proxy.operator.guard import guard_admin
from proxy.public.health import DRAINING
from proxy.public.webhooks import BURSTS, RefusalBursts
from proxy.services.account import ACCOUNT
from proxy.services.call import CALL
from proxy.services.operator import OPERATOR
from proxy.services.public import PUBLIC
from proxy.services.runtime import RUNTIME
from proxy.telemetry.request_log import TELEMETRY, tell_requests
from proxy.telemetry.shared_counters import WorkerSlot

_log = structlog.get_logger("tuma.requests")
LIMITS = web.AppKey("limits", LimitSettings)
USUAL = web.AppKey("usual headers", UsualHeaders)
CORS = web.AppKey("cors", Cors)
_LOGGED_CHARS_MAX = 300  # of why a request was refused
_hide_keys = Redactor()  # some put their key into the path
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


_EVERY = (*ENDPOINTS, *ADMIN)


def init_app(settings: Settings, slot: WorkerSlot | None = None) -> web.Application:
    """Return the application; servers are reached when it starts, not before.

    Args:
        settings: everything configurable.
        slot: of this worker in its master's shared counters; None for a worker that is alone.
    """
    app = web.Application(
        client_max_size=settings.limits.body_bytes, middlewares=[tell_requests, answer_errors, guard_admin]
    )
    app[RATES] = RateMemory()
    app[BODIES] = BodyBudget(settings.limits)
    app[DOOR] = Door(settings.limits)
    app[BURSTS] = RefusalBursts()
    app[LIMITS] = settings.limits
    app[USUAL] = usual = UsualHeaders(settings.http)
    app[CORS] = cors = Cors(settings.cors)
    app[DRAINING] = draining = asyncio.Event()
    app[HEADS] = Heads(usual, cors, draining)
    app.cleanup_ctx.append(_services(settings, slot))
    app.on_response_prepare.append(_finish_head)
    app.on_shutdown.append(_end_feeds)
    app[DOCUMENT] = _document()
    app.add_routes([endpoint.route for endpoint in _EVERY])
    return app


@cache  # it takes longer than all else that an application begins with
def _document() -> dict[str, Any]:
    return make_document(_EVERY)


def _services(
    settings: Settings, slot: WorkerSlot | None
) -> Callable[[web.Application], AsyncIterator[None]]:
    async def context(app: web.Application) -> AsyncIterator[None]:
        async with open_services(settings, slot) as records:
            app[RUNTIME] = records.runtime
            app[CALL] = records.call
            app[ACCOUNT] = records.account
            app[OPERATOR] = records.operator
            app[PUBLIC] = records.public
            app[IDENTITY] = records.identity
            app[TELEMETRY] = records.telemetry
            yield

    return context


async def _end_feeds(app: web.Application) -> None:
    app[RUNTIME].watchers.close()


async def _finish_head(request: web.Request, response: web.StreamResponse) -> None:
    """Add what every response's head carries; end the connection where nothing more may be read on it."""
    app = request.app
    app[USUAL].add_to(response.headers)
    app[CORS].add_to(request, response)
    if (
        app[DRAINING].is_set()
        or not facts_of(request).head_checked
        or ends_connection(request)
        or leaves_much_unread(request)
    ):
        response.force_close()
        if response.status != HTTPStatus.SWITCHING_PROTOCOLS:
            response.headers["Connection"] = "close"


@web.middleware
async def answer_errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Turn every error into OpenAI's shape; never a stack trace."""
    try:
        facts = facts_of(request)
        check_head(request, facts.app[LIMITS])
        facts.head_checked = True
        return await handler(request)
    except TumaError as error:
        words = str(error)[:_LOGGED_CHARS_MAX]
        facts_of(request).refusal = Refusal(type(error).__name__, str(shape_of(error).code), words)
        return error_response(error, headers=standard_headers(request))
    except web.HTTPException as error:
        if isinstance(error, web.HTTPMethodNotAllowed):
            preflight = request.app[CORS].answer_preflight(request, error.allowed_methods)
            if preflight is not None:
                preflight.headers.update(standard_headers(request))
                return preflight
        return http_error_response(
            error.status,
            _hide_keys(f"{request.method} {request.path}: {error.reason}."),
            headers={
                **standard_headers(request),
                **({"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}),
            },
        )
    except Exception as error:  # noqa: BLE001 - the last resort: logged whole, answered without detail
        _log.exception("request.failed", request_id=str(call_id_of(request)), error=repr(error))
        facts_of(request).refusal = Refusal(type(error).__name__, "internal", "")
        return error_response(TumaError(), headers=standard_headers(request))
