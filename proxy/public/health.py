"""``/healthz``: the process lives. ``/readyz``: it can serve calls, or says what is missing."""

import asyncio
from collections.abc import Awaitable

from aiohttp import web

from billing.errors import TumaError
from proxy.http.request_facts import standard_headers
from proxy.http.typed_answer import JsonAnswer, answer
from proxy.public.answers import HealthJson, ReadinessJson
from proxy.services.public import PUBLIC, PublicServices

DRAINING = web.AppKey("draining", asyncio.Event)


async def healthz(request: web.Request) -> JsonAnswer[HealthJson]:
    """Liveness: touches nothing."""
    return answer(request, {"status": "ok"})


async def readyz(request: web.Request) -> JsonAnswer[ReadinessJson]:
    """Readiness: Postgres and Redis answer, the provider serves us, there are prices to quote with, and the worker is not shutting down."""
    services = request.app[PUBLIC]
    checks = {
        "postgres": await _check(_ask_postgres(services)),
        "redis": await _check(_ask_redis(services)),
        "provider": services.quota.state,
        "prices": "ok" if services.prices.models else "no model has a price: run `tuma models sync`",
        "accepting": "shutting down" if request.app[DRAINING].is_set() else "ok",
    }
    ready = all(state == "ok" for state in checks.values())
    return JsonAnswer(
        {"status": "ready" if ready else "not ready", "checks": checks},
        status=200 if ready else 503,
        headers={**standard_headers(request), **({} if ready else {"Retry-After": "2"})},
    )


async def _ask_postgres(services: PublicServices) -> None:
    async with services.database.connection() as connection:
        await connection.fetchval("SELECT 1")


async def _ask_redis(services: PublicServices) -> None:
    await services.pipe.ping()


async def _check(question: Awaitable[None]) -> str:
    try:
        await question
    except TumaError as error:
        return str(error)
    return "ok"
