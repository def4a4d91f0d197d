"""``POST /api/chat``: every answer tells what it cost, and what it tells is what the books say."""

import asyncio
import json
import time
from decimal import Decimal
from typing import Any

import aiohttp
import jwt
import openai
import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, DefaultHttpxClient, OpenAI

from billing.ids import parse_id
from billing.reports.call_view import describe_call
from config.settings import Settings
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.faults.test_limits import SECRET
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, set_rate, sync_models
from tests.support.running import Running, run_proxy
from tests.support.settings import make_settings

MODEL = "openai/gpt-4o"
HELLO: Any = [{"role": "user", "content": "Count to twenty, slowly."}]


def body(*, stream: bool = True, **told: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": HELLO, "stream": stream, "sim": told}


async def naira(proxy: Running, office: Office, amount: str = "50000") -> Payer:
    await set_rate(office, "NGN", "1600", markup_bps=250)
    await proxy.services.fx.load()
    return await make_payer(office, amount=amount, currency="NGN")


async def post(proxy: Running, secret: str, told: dict[str, Any]) -> bytes:
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {secret}"}) as session,
        session.post(f"{proxy.base_url}/api/chat", json=told) as response,
    ):
        assert response.status == 200, await response.text()
        return await response.read()


def events_of(stream: bytes) -> list[Any]:
    found = [event.removeprefix(b"data: ") for event in stream.split(b"\n\n") if event.startswith(b"data: ")]
    return [event.decode() if event == b"[DONE]" else json.loads(event) for event in found]


async def check_told(cost: dict[str, Any], office: Office, payer: Payer, sim: SimulatedProvider) -> None:
    """What was told is what was posted, and the balance told is the one that the wallet has."""
    call = await describe_call(office.database, parse_id(cost["call_id"], "call"))
    for name in ("state", "accuracy", "cost_usd", "charge", "currency", "tokens_prompt", "tokens_completion"):
        assert cost[name] == call[name], name
    billed = Decimal(sim.books.total_nanousd).scaleb(-9)
    assert Decimal(cost["cost_usd"]) == billed > 0
    assert Decimal(cost["charge"]) == billed * Decimal(cost["fx_rate"]) * (
        1 + Decimal(cost["markup_bps"]) / 10_000
    )
    wallet = await office.wallets.get_wallet(payer.wallet_id)
    assert cost["balance"] == wallet.as_json()["posted"]


async def test_a_plain_answer_has_its_cost_and_is_otherwise_untouched(
    proxy: Running, office: Office, sim: SimulatedProvider
) -> None:
    payer = await naira(proxy, office)
    raw = await post(proxy, payer.secret, body(stream=False, x_sim_extra={"odd": 1.50}))
    answer = json.loads(raw)
    await check_told(answer["tuma"], office, payer, sim)
    assert (answer["tuma"]["fx_rate"], answer["tuma"]["markup_bps"]) == ("1600", 250)
    text = raw.decode()
    start = text.index('"tuma":')
    spliced = text[:start] + text[text.index("},", start) + 2 :]
    assert spliced.startswith('{"id":"gen-')
    assert '"x_sim_extra":{"odd":1.5' in spliced
    assert "tuma" not in spliced
    await check_books(office)


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"usage": "missing"},
        {"usage": "missing", "generation_delay_s": 1.5},
        {"usage": "beside_choices", "crlf": True, "split_bytes": 7},
        {"done": False},
    ],
    ids=str,
)
async def test_a_stream_ends_with_its_cost(
    proxy: Running, office: Office, sim: SimulatedProvider, told: dict[str, Any]
) -> None:
    payer = await naira(proxy, office)
    raw = await post(proxy, payer.secret, body(**told))
    events = events_of(raw.replace(b"\r\n", b"\n"))
    if told.get("done", True):
        assert events.pop() == "[DONE]"
    assert events[-1]["choices"] == []
    assert events[-1]["id"] == events[0]["id"]
    await check_told(events[-1]["tuma"], office, payer, sim)
    assert events[-1]["tuma"]["accuracy"] == "exact"
    told_usage = [event for event in events if event.get("usage")]
    assert len(told_usage) == (told.get("usage") != "missing"), "usage is given without asking"
    await check_books(office)


@pytest.mark.parametrize("told", [{"error_after": 4}, {"cut_after": 4}], ids=str)
async def test_a_stream_that_breaks_tells_its_cost_too(
    proxy: Running, office: Office, sim: SimulatedProvider, told: dict[str, Any]
) -> None:
    payer = await naira(proxy, office)
    events = events_of(await post(proxy, payer.secret, body(**told)))
    assert events[-2]["error"]["message"]
    await check_told(events[-1]["tuma"], office, payer, sim)
    await check_books(office)


async def test_a_stream_that_stalls_tells_its_cost_too(
    settings: Settings, office: Office, sim: SimulatedProvider
) -> None:
    await sync_models(office)
    payer = await make_payer(office)
    upstream = settings.upstream.model_copy(update={"idle_timeout_s": 0.5})
    async with run_proxy(settings.model_copy(update={"upstream": upstream})) as proxy:
        events = events_of(await post(proxy, payer.secret, body(stall_after=3, stall_s=60)))
        assert events[-2]["error"]["code"] == "upstream_timeout"
        await check_told(events[-1]["tuma"], office, payer, sim)
        await check_books(office)


async def test_a_stream_out_of_funds_tells_its_cost(
    proxy: Running, office: Office, sim: SimulatedProvider
) -> None:
    payer = await naira(proxy, office, amount="18.1")
    events = events_of(await post(proxy, payer.secret, body(chunks=4000, chunk_delay_ms=1)))
    assert events[-1] == "[DONE]"
    assert events[-4]["choices"][0]["finish_reason"] == "length"
    assert events[-3]["usage"]["completion_tokens"] > 100
    await check_told(events[-2]["tuma"], office, payer, sim)
    await check_books(office)


async def test_a_settlement_that_waits_for_postgres_is_pending(
    settings: Settings, office: Office, sim: SimulatedProvider
) -> None:
    await sync_models(office)
    payer = await make_payer(office)
    upstream = settings.upstream.model_copy(update={"generation_wait_s": 0.2})
    batch = settings.batch.model_copy(update={"settle_wait_s": 0.2})
    async with run_proxy(settings.model_copy(update={"batch": batch, "upstream": upstream})) as proxy:
        for told in ({}, {"usage": "missing", "generation_missing": True}):
            for stream in (True, False):
                async with office.database.transaction() as connection:
                    await connection.execute("LOCK TABLE journal_tx IN SHARE MODE")  # nothing can be posted
                    raw = await post(proxy, payer.secret, body(stream=stream, **told))
                cost = events_of(raw)[-2]["tuma"] if stream else json.loads(raw)["tuma"]
                assert (cost["state"], cost["balance"]) == ("pending", None)
                if not told:
                    last = list(sim.books.generations.values())[-1]
                    assert Decimal(cost["cost_usd"]) == Decimal(last.cost_nanousd).scaleb(-9)
                await proxy.quiet(20)


def aim(request: Any) -> None:
    request.url = request.url.copy_with(path="/api/chat")


async def aim_async(request: Any) -> None:
    aim(request)


async def test_the_sdk_reads_it(proxy: Running, office: Office, sim: SimulatedProvider) -> None:
    """The SDK takes the cost for one chunk more, without choices, as it takes the one with usage."""
    payer = await make_payer(office)
    http = DefaultAsyncHttpxClient(event_hooks={"request": [aim_async]})
    client: Any = AsyncOpenAI(base_url=proxy.base_url, api_key=payer.secret, max_retries=0, http_client=http)
    plain = await client.chat.completions.create(model=MODEL, messages=HELLO)
    assert plain.choices[0].message.content
    await check_told(plain.tuma, office, payer, sim)
    before = sim.books.total_nanousd
    chunks = [
        chunk
        async for chunk in await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    ]
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert len(text.split()) == 20
    assert chunks[-1].choices == []
    assert Decimal(chunks[-1].tuma["cost_usd"]) == Decimal(sim.books.total_nanousd - before).scaleb(-9)
    async with client.chat.completions.stream(model=MODEL, messages=HELLO) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == text
    with pytest.raises(openai.APIError):
        broken = await client.chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, extra_body={"sim": {"cut_after": 3}}
        )
        [chunk async for chunk in broken]
    await http.aclose()

    def work() -> list[Any]:
        with (
            DefaultHttpxClient(event_hooks={"request": [aim]}) as own,
            OpenAI(base_url=proxy.base_url, api_key=payer.secret, http_client=own) as sync,
        ):
            return list(sync.chat.completions.create(model=MODEL, messages=HELLO, stream=True))

    assert (await asyncio.to_thread(work))[-1].tuma["state"] == "settled"
    await proxy.quiet()
    await check_books(office)


async def test_a_frontends_token_pays_too(
    dsn: str, redis_url: str, office: Office, sim: SimulatedProvider
) -> None:
    await sync_models(office)
    auth = {"jwt_secret": SECRET, "default_currency": "USD"}
    settings = make_settings(postgres_dsn=dsn, redis_url=redis_url, upstream_url=sim.base_url, auth=auth)
    token = jwt.encode({"sub": "ada", "exp": time.time() + 600}, SECRET, algorithm="HS256")
    async with run_proxy(settings) as proxy:
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session:
            async with session.get(f"{proxy.base_url}/v1/wallet") as response:
                assert response.status == 200
            (wallet,) = await office.wallets.find_wallets()
            await office.wallets.credit(wallet.id, 10**9, reason="test")
            await office.cool(wallet.id)
            events = events_of(await post(proxy, token, body()))
        cost = events[-2]["tuma"]
        assert Decimal(1) - Decimal(cost["balance"]) == Decimal(sim.books.total_nanousd).scaleb(-9) > 0
        await check_books(office)


async def test_refusals_are_as_ever(proxy: Running, office: Office) -> None:
    poor = await make_payer(office, amount="0")
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {poor.secret}"}) as session,
        session.post(f"{proxy.base_url}/api/chat", json=body()) as response,
    ):
        assert (response.status, (await response.json())["error"]["code"]) == (402, "insufficient_funds")
