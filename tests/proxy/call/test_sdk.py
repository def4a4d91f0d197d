"""The real OpenAI SDK against the running proxy, over sockets."""

from decimal import Decimal
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from billing.ids import parse_id
from billing.reports.call_view import describe_call
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, set_rate
from tests.support.running import Running

MODEL = "openai/gpt-4o-mini"
HELLO: Any = [{"role": "user", "content": "Say hello, please."}]


@pytest.fixture
async def payer(office: Office) -> Payer:
    return await make_payer(office)


@pytest.fixture
async def client(proxy: Running, payer: Payer) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{proxy.base_url}/v1", api_key=payer.secret, max_retries=0)


async def balance(office: Office, payer: Payer) -> Decimal:
    return Decimal((await office.wallets.get_wallet(payer.wallet_id)).as_json()["posted"])


async def test_plain_call_is_paid_to_the_nano(
    client: Any, office: Office, payer: Payer, sim: SimulatedProvider
) -> None:
    raw = await client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO)
    answer = raw.parse()
    assert answer.choices[0].message.content
    billed = Decimal(sim.books.total_nanousd).scaleb(-9)
    assert Decimal(raw.headers["x-tuma-cost-usd"]) == billed
    assert raw.headers["x-tuma-charge"] == f"{billed.normalize():f} USD"
    assert Decimal(raw.headers["x-tuma-balance"]) == Decimal(10) - billed == await balance(office, payer)
    assert Decimal(str(answer.usage.cost)) == billed
    call = await describe_call(office.database, parse_id(raw.headers["x-request-id"], "call"))
    assert (call["state"], call["accuracy"], call["source"]) == ("settled", "exact", "provider_cost")
    assert call["generation_id"] == answer.id
    assert Decimal(call["cost_usd"] or 0) == Decimal(call["provider_cost_usd"] or 0) == billed
    assert (call["tokens_prompt"], call["tokens_completion"]) == (
        answer.usage.prompt_tokens,
        answer.usage.completion_tokens,
    )
    for name in ("limit", "remaining", "reset"):
        for what in ("requests", "tokens"):
            assert raw.headers[f"x-ratelimit-{name}-{what}"]
    await check_books(office)


async def test_stream_hides_usage_unless_asked(
    client: Any, office: Office, payer: Payer, sim: SimulatedProvider
) -> None:
    text = ""
    stream: Any = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    async for chunk in stream:
        assert chunk.usage is None
        assert chunk.choices
        text += chunk.choices[0].delta.content or ""
    assert len(text.split()) == 20
    assert Decimal(10) - await balance(office, payer) == Decimal(sim.books.total_nanousd).scaleb(-9)
    sent = sim.requests[-1].body
    assert sent["stream_options"] == {"include_usage": True}
    await check_books(office)


async def test_stream_with_usage_carries_its_cost(
    client: Any, office: Office, sim: SimulatedProvider
) -> None:
    chunks = [
        chunk
        async for chunk in await client.chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    ]
    usage = chunks[-1].usage
    assert usage is not None
    assert chunks[-1].choices == []
    assert Decimal(str(usage.cost)) == Decimal(sim.books.total_nanousd).scaleb(-9)
    await check_books(office)


async def test_the_same_with_the_synchronous_client(
    proxy: Running, payer: Payer, office: Office, sim: SimulatedProvider
) -> None:
    import asyncio

    def work() -> str:
        with OpenAI(base_url=f"{proxy.base_url}/v1", api_key=payer.secret) as sync:
            answer = sync.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in answer)

    text = await asyncio.to_thread(work)
    assert len(text.split()) == 20
    await check_books(office)


@pytest.mark.parametrize(
    "told",
    [
        {"usage": "beside_choices"},
        {"usage": "every_chunk_null"},
        {"usage": "missing"},
        {"usage": "missing", "done": False},
        {"omit_cost": True},
        {"crlf": True, "split_bytes": 7},
        {"split_bytes": 1, "chunks": 5},
        {"events_per_write": 6, "comments": 3},
        {"reasoning_chunks": 5, "cached_tokens": 2},
        {"tool_calls": True},
        {"x_sim_extra": {"note": '"usage" [DONE]', "n": 1.5}, "logprobs": True},
        {"generation_id_header": True},
        {"usage": "missing", "generation_delay_s": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [True, False])
async def test_every_dialect_is_settled_exactly(
    client: Any,
    office: Office,
    payer: Payer,
    proxy: Running,
    sim: SimulatedProvider,
    told: dict[str, Any],
    stream: bool,
) -> None:
    answer: Any = await client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=stream, n=2, extra_body={"sim": told}
    )
    if stream:
        parts: dict[int, str] = {0: "", 1: ""}
        async for chunk in answer:
            assert chunk.usage is None
            for choice in chunk.choices:
                delta = choice.delta
                calls = delta.tool_calls or []
                parts[choice.index] += (delta.content or "") + "".join(
                    call.function.arguments for call in calls
                )
        assert parts[0] == parts[1] != ""
    await proxy.quiet()
    assert Decimal(10) - await balance(office, payer) == Decimal(sim.books.total_nanousd).scaleb(-9) > 0
    async with office.database.connection() as connection:
        assert await connection.fetch("SELECT accuracy, state FROM calls") == [("exact", "settled")]
    await check_books(office)


async def test_a_plain_answer_does_not_wait_long_for_its_record(
    client: Any, office: Office, payer: Payer, proxy: Running, sim: SimulatedProvider
) -> None:
    told = {"usage": "missing", "generation_delay_s": 1.5}
    raw = await client.chat.completions.with_raw_response.create(
        model=MODEL, messages=HELLO, extra_body={"sim": told}
    )
    assert raw.parse().choices[0].message.content
    await proxy.quiet()
    assert Decimal(10) - await balance(office, payer) == Decimal(sim.books.total_nanousd).scaleb(-9) > 0
    await check_books(office)


async def test_what_tuma_is_let_pass_passes_both_ways(client: Any, sim: SimulatedProvider) -> None:
    tools = [
        {
            "type": "function",
            "function": {"name": "lookup", "parameters": {"type": "object", "properties": {}}},
        }
    ]
    extra = {
        "sim": {"x_sim_extra": {"number": 1.5}},
        "x_own": {"deep": [1, 2.50, None]},
        "provider": {"sort": "price"},
    }
    answer: Any = await client.chat.completions.create(
        model=MODEL,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "what is it?"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                ],
            }
        ],
        tools=tools,
        response_format={"type": "json_object"},
        logprobs=True,
        extra_body=extra,
    )
    body = sim.requests[-1].body
    assert body["tools"] == tools
    assert body["x_own"] == extra["x_own"]
    assert body["response_format"] == {"type": "json_object"}
    assert body["messages"][0]["content"][1]["image_url"]["url"].startswith("data:image/png")
    assert answer.x_sim_extra == {"number": 1.5}
    headers = sim.requests[-1].headers
    assert headers["authorization"] == "Bearer sk-sim"
    assert "sk-tuma" not in str(sim.requests[-1])


async def test_a_wallet_in_naira_pays_rate_and_markup(
    proxy: Running, office: Office, sim: SimulatedProvider
) -> None:
    await set_rate(office, "NGN", "1600", markup_bps=250)
    await proxy.services.fx.load()
    payer = await make_payer(office, amount="5000", currency="NGN")
    client: Any = AsyncOpenAI(base_url=f"{proxy.base_url}/v1", api_key=payer.secret, max_retries=0)
    raw = await client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO)
    expected = Decimal(sim.books.total_nanousd).scaleb(-9) * 1600 * Decimal("1.025")
    assert Decimal(raw.headers["x-tuma-charge"].split()[0]) == expected
    assert raw.headers["x-tuma-charge"].endswith(" NGN")
    async with office.database.connection() as connection:
        spread = await connection.fetchval(
            "SELECT sum(amount_nano) FROM journal_entry WHERE account = 'fx_spread'"
        )
    assert Decimal(int(spread)).scaleb(-9) == expected - expected / Decimal("1.025")
    await check_books(office)


async def test_errors_become_the_sdks_exceptions(
    proxy: Running, office: Office, payer: Payer, client: Any, sim: SimulatedProvider
) -> None:
    async def fail(status: int, **more: object) -> Any:
        with pytest.raises(openai.APIStatusError) as caught:
            await client.chat.completions.create(
                model=MODEL, messages=HELLO, extra_body={"sim": {"fail_status": status, **more}}
            )
        error: Any = caught.value.body
        assert error["message"]
        assert {"message", "type", "param", "code"} <= error.keys()
        return caught.value

    assert (await fail(400)).status_code == 400
    assert (await fail(422)).status_code == 422
    assert (await fail(401)).code == "provider_quota_exhausted"
    assert (await fail(402)).status_code == 503
    busy = await fail(429, fail_headers={"Retry-After": "7"})
    assert (busy.status_code, busy.response.headers["retry-after"]) == (429, "7")
    assert ((await fail(500)).status_code, (await fail(503)).code) == (502, "upstream_error")
    assert (await fail(504)).code == "upstream_timeout"
    wrong: Any = AsyncOpenAI(base_url=f"{proxy.base_url}/v1", api_key="sk-tuma-wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        await wrong.chat.completions.create(model=MODEL, messages=HELLO)
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="no/such-model", messages=HELLO)
    assert missing.value.code == "model_not_found"
    poor = await make_payer(office, amount="0")
    broke: Any = AsyncOpenAI(base_url=f"{proxy.base_url}/v1", api_key=poor.secret)
    with pytest.raises(openai.APIStatusError) as caught:
        await broke.chat.completions.create(model=MODEL, messages=HELLO)
    assert (caught.value.status_code, caught.value.code) == (402, "insufficient_funds")
    await proxy.quiet()
    assert await balance(office, payer) == 10
    assert sim.books.total_nanousd == 0
    await check_books(office)


@pytest.mark.parametrize(
    "told", [{"null_body": True}, {"html_body": True}, {"error_before_first": True}], ids=str
)
@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_that_is_none_costs_nothing(
    client: Any, office: Office, payer: Payer, proxy: Running, told: dict[str, Any], stream: bool
) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        answer: Any = await client.chat.completions.create(
            model=MODEL, messages=HELLO, stream=stream, extra_body={"sim": told}
        )
        if stream:
            [chunk async for chunk in answer]
    assert caught.value.status_code == 502
    await proxy.quiet()
    assert await balance(office, payer) == 10
    await check_books(office)


@pytest.mark.parametrize("told", [{"error_after": 4}, {"cut_after": 4}], ids=str)
async def test_a_stream_that_breaks_is_paid_as_far_as_it_was_billed(
    client: Any, office: Office, payer: Payer, proxy: Running, sim: SimulatedProvider, told: dict[str, Any]
) -> None:
    stream: Any = await client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, extra_body={"sim": told}
    )
    chunks = []
    with pytest.raises(openai.APIError):
        async for chunk in stream:
            chunks.append(chunk)
    assert len(chunks) in (4, 5)
    await proxy.quiet()
    assert Decimal(10) - await balance(office, payer) == Decimal(sim.books.total_nanousd).scaleb(-9) > 0
    await check_books(office)


async def test_the_default_retries_pay_only_for_answers(
    proxy: Running, office: Office, payer: Payer, sim: SimulatedProvider
) -> None:
    client: Any = AsyncOpenAI(base_url=f"{proxy.base_url}/v1", api_key=payer.secret)
    with pytest.raises(openai.InternalServerError):
        await client.chat.completions.create(
            model=MODEL, messages=HELLO, extra_body={"sim": {"fail_status": 500}}
        )
    assert len(sim.requests) == 3
    await proxy.quiet()
    assert await balance(office, payer) == 10
    async with office.database.connection() as connection:
        assert await connection.fetchval("SELECT count(*) FROM calls WHERE state = 'void'") == 3
    await check_books(office)


async def test_models_and_wallet(client: Any, proxy: Running, payer: Payer) -> None:
    import aiohttp

    models = [model async for model in client.models.list()]
    assert MODEL in {model.id for model in models}
    one = await client.models.retrieve(MODEL)
    assert one.pricing["prompt"] == "0.00000015"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("no/such-model")
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {payer.secret}"}) as session:
        async with session.get(f"{proxy.base_url}/v1/wallet") as response:
            wallet = await response.json()
        for path in ("/healthz", "/readyz"):
            async with session.get(proxy.base_url + path) as response:
                assert response.status == 200, await response.text()
    assert wallet["posted"] == wallet["available"] == "10"
    assert (wallet["held"], wallet["currency"], wallet["status"]) == ("0", "USD", "active")
