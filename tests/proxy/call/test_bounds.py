"""No call costs more than is held for it: what the provider is told is what is held, whatever is asked for."""

import asyncio
import json
from collections import Counter
from decimal import Decimal
from typing import Any

import aiohttp
import pytest

from billing.money import format_amount
from billing.wallets.caps import Caps
from config.settings import Settings
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, sync_models
from tests.support.running import Running, run_proxy

MODEL = "openai/gpt-4o"
MOST = 16_384  # tokens that the simulated model gives
HELLO: Any = [{"role": "user", "content": "Think for long."}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": HELLO}
PATHS = {
    "/v1/chat/completions": (CHAT, "max_tokens"),
    "/v1/responses": ({"model": MODEL, "input": "Think for long."}, "max_output_tokens"),
}


async def post(
    proxy: Running, payer: Payer, body: dict[str, Any], path: str = "/v1/chat/completions"
) -> tuple[int, Any]:
    """Ask until it is no 503, which a busy machine's Postgres or Redis may cause: as SDKs do."""
    head = {"Authorization": f"Bearer {payer.secret}"}
    while True:
        async with (
            aiohttp.ClientSession(headers=head) as session,
            session.post(f"{proxy.base_url}{path}", json=body) as response,
        ):
            text = await response.read()
            if response.status == 503:
                continue
            is_json = response.content_type == "application/json"
            return response.status, json.loads(text) if is_json and text else None


async def held(office: Office) -> list[int]:
    async with office.database.connection() as connection:
        rows = await connection.fetch("SELECT hold_nano FROM calls ORDER BY id")
    return [row["hold_nano"] for row in rows]


async def posted(office: Office, payer: Payer) -> Decimal:
    return Decimal((await office.wallets.get_wallet(payer.wallet_id)).as_json()["posted"])


def told(sim: SimulatedProvider) -> list[dict[str, Any]]:
    return [request.body for request in sim.requests if request.path.endswith(("completions", "responses"))]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_a_call_that_names_no_bound_is_held_at_the_models_own(
    proxy: Running, office: Office, sim: SimulatedProvider, path: str, stream: bool
) -> None:
    body, name = PATHS[path]
    payer = await make_payer(office)
    status, _ = await post(proxy, payer, {**body, "stream": stream, "sim": {"chunks": 50_000}}, path)
    assert status == 200
    await proxy.quiet()
    assert told(sim)[-1][name] == MOST
    (hold,) = await held(office)
    assert sim.books.total_nanousd <= hold, "all of its bound was made, and held for"
    assert Decimal(10) - await posted(office, payer) == Decimal(sim.books.total_nanousd).scaleb(-9)
    await check_books(office)


async def test_a_bound_above_the_models_own_is_told_as_that(
    proxy: Running, office: Office, sim: SimulatedProvider
) -> None:
    payer = await make_payer(office)
    for asked in ({"max_tokens": 100}, {"max_completion_tokens": 100}, {"max_tokens": 1_000_000}):
        assert (await post(proxy, payer, {**CHAT, **asked}))[0] == 200
    bounds = [
        {name: body[name] for name in ("max_tokens", "max_completion_tokens") if name in body}
        for body in told(sim)
    ]
    assert bounds == [{"max_tokens": 100}, {"max_completion_tokens": 100}, {"max_tokens": MOST}]
    await proxy.quiet()
    await check_books(office)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_hidden_reasoning_in_parallel_leaves_no_wallet_below_zero(
    proxy: Running, office: Office, sim: SimulatedProvider, stream: bool
) -> None:
    """Forty calls, each of which makes all that it may, at once and before anything of it is seen."""
    payer = await make_payer(office, amount="1")
    behaviour = {"first_delay_ms": 300, "reasoning_chunks": 40_000, "chunks": 1, "events_per_write": 40_001}
    body = {**CHAT, "stream": stream, "sim": behaviour}
    answers = await asyncio.gather(*(post(proxy, payer, body) for _ in range(40)))
    await proxy.quiet()
    statuses = Counter(status for status, _ in answers)
    assert statuses.keys() == {200, 402}, [answer for status, answer in answers if status not in (200, 402)]
    assert statuses[200] >= 6, "a dollar is six times all that the model can give"
    assert 0 <= await posted(office, payer) < 1
    await check_books(office)


async def test_a_wallet_that_pays_for_less_is_told_less(
    proxy: Running, office: Office, sim: SimulatedProvider
) -> None:
    payer = await make_payer(office, amount="0.05")  # a third of what the model can give
    estimate = (await post(proxy, payer, CHAT, "/v1/estimate"))[1]
    assert estimate["admitted"]
    status, _ = await post(proxy, payer, {**CHAT, "sim": {"chunks": 50_000}})
    assert status == 200
    await proxy.quiet()
    assert 4_000 < told(sim)[-1]["max_tokens"] < 5_000
    assert [format_amount(hold) for hold in await held(office)] == [estimate["hold"]]
    assert 0 <= await posted(office, payer) < Decimal("0.0001"), "all that it could pay for was made"
    refused, _ = await post(proxy, payer, CHAT)
    assert refused == 402
    await check_books(office)


async def test_ten_honest_calls_at_once_wait_their_turn(settings: Settings, office: Office) -> None:
    """The holds of three are as much as the wallet has; each costs a hundredth of its hold."""
    await sync_models(office)
    async with run_proxy(settings) as proxy:
        payer = await make_payer(office, amount="0.5")
        body = {**CHAT, "sim": {"chunks": 100, "first_delay_ms": 100}}
        answers = await asyncio.gather(*(post(proxy, payer, body) for _ in range(10)))
        assert [status for status, _ in answers] == [200] * 10
        assert all(answer["choices"][0]["finish_reason"] == "stop" for _, answer in answers)
        await proxy.quiet()
        await check_books(office)


async def test_a_cap_bounds_as_a_wallet_does(proxy: Running, office: Office, sim: SimulatedProvider) -> None:
    payer = await make_payer(office)
    await Caps(office.database).set_caps("key", payer.key_id, {"day": 10**7})
    answers = await asyncio.gather(
        *(post(proxy, payer, {**CHAT, "sim": {"chunks": 50_000}}) for _ in range(8))
    )
    await proxy.quiet()
    assert {status for status, _ in answers} <= {200, 402}
    assert Decimal(10) - await posted(office, payer) <= Decimal("0.01")
    await check_books(office)


async def test_openrouter_is_told_the_prices_that_are_held_for(
    proxy: Running, office: Office, sim: SimulatedProvider
) -> None:
    payer = await make_payer(office)
    assert (await post(proxy, payer, CHAT))[0] == 200
    asked = {"sort": "throughput", "max_price": {"prompt": 1, "completion": "99"}}
    assert (await post(proxy, payer, {**CHAT, "provider": asked}))[0] == 200
    first, second = (body["provider"] for body in told(sim)[-2:])
    assert first == {"max_price": {"prompt": 2.5, "completion": 10.0}}
    assert second == {"sort": "throughput", "max_price": {"prompt": 1.0, "completion": 10.0}}


@pytest.mark.parametrize(
    ("asked", "unit"),
    [
        ({"plugins": [{"id": "web"}]}, "web_search"),
        ({"web_search_options": {"search_context_size": "high"}}, "web_search"),
        ({"service_tier": "priority"}, "tier_priority"),
        ({"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}, "audio_output"),
        ({"provider": {"order": ["pricey"]}}, "routing"),
    ],
    ids=str,
)
async def test_what_is_billed_apart_needs_a_price(
    proxy: Running, office: Office, sim: SimulatedProvider, asked: dict[str, Any], unit: str
) -> None:
    payer = await make_payer(office)
    before = len(sim.requests)
    status, answer = await post(proxy, payer, {**CHAT, **asked})
    assert (status, answer["error"]["code"]) == (400, "price_missing")
    assert unit in answer["error"]["message"]
    assert len(sim.requests) == before
    assert await posted(office, payer) == 10


async def test_a_provider_that_reports_tokens_only_serves_nothing_else(
    settings: Settings, office: Office, sim: SimulatedProvider
) -> None:
    await sync_models(office)
    upstream = settings.upstream.model_copy(update={"kind": "openai"})
    async with run_proxy(settings.model_copy(update={"upstream": upstream})) as proxy:
        payer = await make_payer(office)
        before = len(sim.requests)
        status, answer = await post(proxy, payer, {**CHAT, "service_tier": "priority"})
        assert status == 400
        assert "reports tokens only" in answer["error"]["message"]
        assert len(sim.requests) == before
        assert (await post(proxy, payer, CHAT))[0] == 200
        assert "provider" not in told(sim)[-1]


async def test_rejected_predictions_are_held_for(
    proxy: Running, office: Office, sim: SimulatedProvider
) -> None:
    payer = await make_payer(office)
    plain = (await post(proxy, payer, {**CHAT, "max_tokens": 10}, "/v1/estimate"))[1]
    predicted = {**CHAT, "max_tokens": 10, "prediction": {"type": "content", "content": "word " * 1_000}}
    with_it = (await post(proxy, payer, predicted, "/v1/estimate"))[1]
    more = Decimal(with_it["hold_usd"]) - Decimal(plain["hold_usd"])
    assert more >= 1_000 * Decimal("0.00001")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "file", "file": {"filename": "a.pdf", "file_data": "https://example.com/a.pdf"}},
        {"type": "video_url", "video_url": {"url": "https://example.com/a.mp4"}},
        {"type": "input_audio", "input_audio": {"data": "https://example.com/a.mp3", "format": "mp3"}},
    ],
    ids=lambda part: part["type"],
)
async def test_what_cannot_be_measured_may_fill_the_context(
    proxy: Running, office: Office, sim: SimulatedProvider, part: dict[str, Any]
) -> None:
    payer = await make_payer(office)
    messages = [{"role": "user", "content": [{"type": "text", "text": "Sum this up."}, part]}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 1}
    estimate = (await post(proxy, payer, body, "/v1/estimate"))[1]
    async with office.database.connection() as connection:
        context = await connection.fetchval("SELECT context_tokens FROM models WHERE id = $1", MODEL)
    assert Decimal(estimate["hold_usd"]) >= context * Decimal("0.0000025")
    assert (await post(proxy, payer, body))[0] == 200
    assert told(sim)[-1]["plugins"] == [{"id": "file-parser", "pdf": {"engine": "cloudflare-ai"}}]


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_what_may_fill_the_context_is_held_and_never_charged(
    settings: Settings, office: Office, sim: SimulatedProvider, stream: bool
) -> None:
    """A provider that tells no usage, of a prompt that could have been anything: the wallet pays what was counted."""
    await sync_models(office)
    sim.set_behaviour(usage="missing", omit_cost=True)
    upstream = settings.upstream.model_copy(update={"kind": "openai"})
    part = {"type": "file", "file": {"filename": "a.pdf", "file_data": "https://example.com/a.pdf"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "Sum this up."}, part]}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 10, "stream": stream}
    async with run_proxy(settings.model_copy(update={"upstream": upstream})) as proxy:
        payer = await make_payer(office)
        assert (await post(proxy, payer, body))[0] == 200
        await proxy.quiet()
        (hold,) = await held(office)
        paid = Decimal(10) - await posted(office, payer)
        assert 0 < paid < Decimal("0.01") < Decimal(hold).scaleb(-9)
        async with office.database.connection() as connection:
            assert await connection.fetchval("SELECT prompt_tokens FROM usage") < 2_000
