"""Whose fault a provider's refusal is, seen from outside: one caller's stops nobody else, an account's is found out.

What providers send is published: OpenRouter's limits (https://openrouter.ai/docs/api_reference/limits) and errors
(https://openrouter.ai/docs/api_reference/errors-and-debugging), OpenAI's billing codes
(https://help.openai.com/en/articles/6614457), LiteLLM's 401 for a model that its key may not use.
"""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import pytest
from aiohttp import web
from pydantic import SecretStr

from billing.provider.refusals import CALLERS_MIN, Standing, Subject
from config.settings import QuotaSettings, Settings, UpstreamSettings
from proxy.http.errors import (
    ProxyError,
    UpstreamBusyError,
    UpstreamRefusedError,
    UpstreamRefusesUsError,
    upstream_error,
)
from proxy.upstream.adapter import Upstream
from proxy.upstream.openai import OpenAIUpstream
from proxy.upstream.openrouter import OpenRouterUpstream
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.proxy.upstream.test_provider_quota import MODEL, call, ready, until_served, with_quota
from tests.support.books import check_books
from tests.support.payers import make_payer, sync_models
from tests.support.running import run_proxy

OTHERS = ("openai/gpt-4o", "anthropic/claude-sonnet-4.5")
NOT_THIS_MODEL = {"error": {"message": "key not allowed to access model", "type": "key_model_access_denied"}}
EMPTY = {
    "error": {
        "message": "You exceeded your current quota, please check your plan and billing details.",
        "type": "insufficient_quota",
        "param": None,
        "code": "insufficient_quota",
    }
}


def error_of(
    status: int, error: dict[str, Any], headers: dict[str, str] | None = None, *, whole: bool = False
) -> ProxyError:
    body = error if whole else {"error": error}
    return upstream_error(status, json.dumps(body).encode(), headers or {}, redact=str)


@pytest.mark.parametrize(
    ("status", "error", "subject", "is_empty"),
    [
        (401, {"message": "No cookie auth credentials found", "code": 401}, "key", False),
        (402, {"message": "can only afford 3919", "code": 402, "metadata": {"x": None}}, "money", False),
        (402, {"code": 402, "metadata": {"limit_source": "openrouter_credits"}}, "money", False),
        (403, {"code": 403, "metadata": {"limit_source": "openrouter_key_limit"}}, "money", False),
        (429, EMPTY["error"], "money", True),
        (429, {"type": "insufficient_quota", "code": "credit_balance_exhausted"}, "money", True),
        (429, {"type": "billing", "code": "project_spend_limit_exceeded"}, "money", True),
        (403, EMPTY["error"], "money", True),
        (502, EMPTY["error"], "money", True),  # inside a 200
    ],
)
def test_words_about_our_account(status: int, error: dict[str, Any], subject: str, is_empty: bool) -> None:
    found = error_of(status, error)
    assert isinstance(found, UpstreamRefusesUsError)
    assert (found.subject, found.is_empty) == (subject, is_empty)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (
            403,
            {"code": 403, "message": "flagged", "metadata": {"reasons": ["violence"], "flagged_input": "x"}},
        ),
        (403, {"code": 403, "message": "Request blocked", "metadata": {"patterns": ["ignore all"]}}),
        (403, {"code": 403, "message": "no", "metadata": {"limit_source": ["openrouter_"]}}),
        (404, {"code": "model_not_found", "type": "invalid_request_error"}),
        (400, {"code": "context_length_exceeded"}),
    ],
)
def test_words_about_the_callers_input(status: int, error: dict[str, Any]) -> None:
    found = error_of(status, error)
    assert isinstance(found, UpstreamRefusedError)
    assert found.status == status


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (429, {"code": "rate_limit_exceeded", "type": "requests"}),
        (402, {"code": 402, "metadata": {"limit_source": "openrouter_in_flight_budget"}}),
    ],
)
def test_too_much_at_once_is_a_matter_of_waiting(status: int, error: dict[str, Any]) -> None:
    found = error_of(status, error, {"retry-after": "7"})
    assert isinstance(found, UpstreamBusyError)
    assert found.retry_after == "7"


def of_kind(settings: Settings, kind: str) -> Settings:
    upstream = settings.upstream.model_copy(update={"kind": kind})
    return with_quota(settings.model_copy(update={"upstream": upstream}), pause_s=30)


@pytest.mark.parametrize("kind", ["openai", "openrouter"])
async def test_one_caller_with_one_model_or_large_requests_stops_nobody(
    settings: Settings, office: Office, sim: SimulatedProvider, kind: str
) -> None:
    await sync_models(office)
    sim.set_behaviour(model=OTHERS[0], fail_status=401, fail_body=NOT_THIS_MODEL)
    sim.set_behaviour(model=OTHERS[1], fail_status=402)
    one, other = await make_payer(office), await make_payer(office)
    async with run_proxy(of_kind(settings, kind)) as proxy:
        for _ in range(5):
            for model in OTHERS:
                assert (await call(proxy, one, model=model))[:2] == (503, "provider_quota_exhausted")
        assert (await call(proxy, other))[0] == 200
        assert (await call(proxy, one))[0] == 200
        assert (await ready(proxy))["provider"] == "ok"
        await proxy.quiet()
        if kind == "openrouter":
            await check_books(office)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_empty_account_is_no_rate_limit(
    settings: Settings, office: Office, sim: SimulatedProvider, stream: bool
) -> None:
    await sync_models(office)
    sim.set_behaviour(fail_status=429, fail_body=EMPTY)
    payer = await make_payer(office)
    async with run_proxy(of_kind(settings, "openai")) as proxy:
        before = len(sim.requests)
        answers = [await call(proxy, payer, stream=stream) for _ in range(10)]
        assert {answer[:2] for answer in answers} == {(503, "provider_quota_exhausted")}
        assert len(sim.requests) - before <= 2, "nothing is sent in vain"
        assert (await ready(proxy))["provider"].startswith("429: You exceeded")
    async with office.database.connection() as connection:
        assert await connection.fetchval("SELECT paused_until > now() FROM provider_quota"), (
            "an alert's condition"
        )


async def test_different_callers_and_models_find_out_of_an_account_without_a_record(
    settings: Settings, office: Office, sim: SimulatedProvider
) -> None:
    await sync_models(office)
    sim.set_behaviour(fail_status=402)
    payers = [await make_payer(office) for _ in range(CALLERS_MIN)]
    paced = of_kind(settings, "openai")
    paced = paced.model_copy(update={"quota": QuotaSettings(pause_s=0.5, pause_max_s=0.5)})
    async with run_proxy(paced) as proxy:
        for payer, model in zip(payers, (MODEL, *OTHERS), strict=True):
            assert (await ready(proxy))["provider"] == "ok"
            assert (await call(proxy, payer, model=model))[0] == 503
        assert (await ready(proxy))["provider"] != "ok"
        before = len(sim.requests)
        assert (await call(proxy, payers[0]))[0] == 503
        assert len(sim.requests) == before
        sim.reset_behaviour()
        await until_served(proxy, payers[1])


async def test_an_account_whose_record_says_that_it_is_empty_is_believed(
    settings: Settings, office: Office, sim: SimulatedProvider
) -> None:
    await sync_models(office)
    payer = await make_payer(office)
    async with run_proxy(with_quota(settings, pause_s=30, observe_s=60)) as proxy:
        sim.set_behaviour(fail_status=402)
        sim.set_credits(Decimal(0))
        assert (await call(proxy, payer))[0] == 503
        assert (await ready(proxy))["provider"] == "402: Simulated failure"


@asynccontextmanager
async def records_that_answer(said: Mapping[str, tuple[int, Any]]) -> AsyncIterator[str]:
    async def record(request: web.Request) -> web.Response:
        status, body = said[request.match_info["name"]]
        return web.json_response(body, status=status)

    app = web.Application()
    app.router.add_get("/v1/{name}", record)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


async def standing_of(
    kind: type[Upstream], said: Mapping[str, tuple[int, Any]], subject: Subject
) -> Standing:
    async with records_that_answer(said) as base_url:
        upstream = kind(UpstreamSettings(base_url=base_url, api_key=SecretStr("sk-x")))
        await upstream.start()
        try:
            return await upstream.find_standing(subject)
        finally:
            await upstream.close()


@pytest.mark.parametrize(
    ("status", "body", "standing"),
    [
        (401, {"error": {"code": "invalid_api_key"}}, "refused"),
        (200, {"data": []}, "unknown"),  # some show it to everybody
        (403, {"error": {"message": "no"}}, "unknown"),
        (401, {"error": {"message": "Missing scopes: api.model.read"}}, "unknown"),
        (500, {}, "unknown"),
    ],
)
async def test_what_the_list_of_models_tells_of_our_key(status: int, body: Any, standing: Standing) -> None:
    assert await standing_of(OpenAIUpstream, {"models": (status, body)}, "key") == standing
    assert await standing_of(OpenAIUpstream, {}, "money") == "unknown"


NO_LIMIT = (200, {"data": {"limit_remaining": None, "usage": 5}})
LIMIT_USED = (200, {"data": {"limit_remaining": -0.01, "usage": 5}})
NOT_FOR_THIS_KEY = (403, {"error": {"code": 403, "message": "Only management keys"}})


def credits_of(bought: float, used: float) -> tuple[int, Any]:
    return 200, {"data": {"total_credits": bought, "total_usage": used}}


@pytest.mark.parametrize(
    ("key", "account", "of_key", "of_money"),
    [
        ((401, {"error": {"code": 401}}), credits_of(9, 1), "refused", "refused"),
        (NO_LIMIT, credits_of(9, 1), "served", "served"),
        (NO_LIMIT, credits_of(9, 9), "served", "refused"),
        (NO_LIMIT, NOT_FOR_THIS_KEY, "served", "unknown"),
        (LIMIT_USED, NOT_FOR_THIS_KEY, "served", "refused"),
        (LIMIT_USED, credits_of(9, 1), "served", "refused"),
    ],
)
async def test_what_openrouters_records_tell(
    key: tuple[int, Any], account: tuple[int, Any], of_key: Standing, of_money: Standing
) -> None:
    said = {"key": key, "credits": account}
    assert await standing_of(OpenRouterUpstream, said, "key") == of_key
    assert await standing_of(OpenRouterUpstream, said, "money") == of_money
