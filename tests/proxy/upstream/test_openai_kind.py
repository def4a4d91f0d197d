"""A provider that reports tokens and no money, and keeps no records: OpenAI's own protocol."""

from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import aiohttp
import pytest
from openai import AsyncOpenAI

from config.settings import Settings
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.support.payers import Payer, make_payer, sync_models
from tests.support.running import Running, run_proxy

MODEL = "openai/gpt-4o-mini"
HELLO: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def proxy(settings: Settings, office: Office, sim: SimulatedProvider) -> AsyncIterator[Running]:
    await sync_models(office)
    sim.set_behaviour(omit_cost=True, usage="every_chunk_null")
    upstream = settings.upstream.model_copy(update={"kind": "openai"})
    async with run_proxy(settings.model_copy(update={"upstream": upstream})) as running:
        yield running


@pytest.fixture
async def payer(office: Office) -> Payer:
    return await make_payer(office)


async def last_call(office: Office) -> Any:
    async with office.database.connection() as connection:
        return await connection.fetchrow(
            "SELECT c.state, c.accuracy, u.source, c.charge_nano FROM calls c JOIN usage u ON u.call_id = c.id"
            " ORDER BY c.id DESC LIMIT 1"
        )


async def test_usage_at_the_price_book_is_exact(
    proxy: Running, office: Office, payer: Payer, sim: SimulatedProvider
) -> None:
    client: Any = AsyncOpenAI(base_url=f"{proxy.base_url}/v1", api_key=payer.secret, max_retries=0)
    answer = await client.chat.completions.create(model=MODEL, messages=HELLO)
    assert Decimal(str(answer.usage.cost)) == Decimal(sim.books.total_nanousd).scaleb(-9)
    assert tuple(await last_call(office)) == ("settled", "exact", "price_book", sim.books.total_nanousd)
    before = sim.books.total_nanousd
    stream = await client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert Decimal(str(chunks[-1].usage.cost)) == Decimal(sim.books.total_nanousd - before).scaleb(-9)
    assert "usage" not in sim.requests[-1].body, "OpenRouter's own member is not sent to others"
    stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    assert all("usage" not in chunk.model_fields_set for chunk in [chunk async for chunk in stream])
    await proxy.quiet()
    wallet = await office.wallets.get_wallet(payer.wallet_id)
    assert 10**10 - wallet.posted_nano == sim.books.total_nanousd


async def test_an_answer_is_read_to_its_end_for_a_client_that_left(
    proxy: Running, office: Office, payer: Payer, sim: SimulatedProvider
) -> None:
    body = {"model": MODEL, "messages": HELLO, "stream": True, "sim": {"chunk_delay_ms": 20}}
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {payer.secret}"}) as session:
        response = await session.post(f"{proxy.base_url}/v1/chat/completions", json=body)
        await response.content.readline()
        response.close()
    await proxy.quiet()
    (generation,) = sim.books.generations.values()
    assert (generation.cancelled, generation.completion_tokens) == (False, 20)
    assert tuple(await last_call(office)) == ("settled", "exact", "price_book", generation.cost_nanousd)


async def test_without_usage_the_tokens_are_counted(
    proxy: Running, office: Office, payer: Payer, sim: SimulatedProvider
) -> None:
    sim.set_behaviour(usage="missing")
    client: Any = AsyncOpenAI(base_url=f"{proxy.base_url}/v1", api_key=payer.secret, max_retries=0)
    async for _ in await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True):
        pass
    await proxy.quiet()
    state, accuracy, source, charge = await last_call(office)
    assert (state, accuracy, source) == ("settled", "estimated", "counted")
    assert abs(charge - sim.books.total_nanousd) < sim.books.total_nanousd


@pytest.mark.parametrize("stream", [False, True])
async def test_usage_of_nothing_for_something_is_no_usage(
    proxy: Running, office: Office, payer: Payer, sim: SimulatedProvider, stream: bool
) -> None:
    sim.set_behaviour(usage="zeros", omit_cost=True)
    body = {"model": MODEL, "messages": HELLO, "stream": stream}
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {payer.secret}"}) as session:
        async with session.post(f"{proxy.base_url}/v1/chat/completions", json=body) as response:
            assert response.status == 200
            assert '"cost"' not in await response.text()
        await proxy.quiet()
        state, accuracy, source, charge = await last_call(office)
        assert (state, accuracy, source) == ("settled", "estimated", "counted")
        assert charge > 0
        embedding = {"model": "openai/text-embedding-3-small", "input": "some words"}
        async with session.post(f"{proxy.base_url}/v1/embeddings", json=embedding) as response:
            assert response.status == 200
    await proxy.quiet()
    state, accuracy, source, charge = await last_call(office)
    assert (state, accuracy, source) == ("settled", "estimated", "counted")
    assert charge > 0


async def test_what_openrouter_alone_knows_is_not_sent(
    proxy: Running, payer: Payer, sim: SimulatedProvider
) -> None:
    body = {"model": MODEL, "messages": HELLO, "stream": True, "usage": {"include": True}}
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {payer.secret}"}) as session:
        async with session.post(f"{proxy.base_url}/v1/chat/completions", json=body) as response:
            assert response.status == 200
            assert '"prompt_tokens"' in await response.text(), "it asked for usage"
        assert sim.requests[-1].body.keys() & {"usage", "stream_options"} == {"stream_options"}
        several = {**body, "models": ["openai/gpt-4o"]}
        async with session.post(f"{proxy.base_url}/v1/chat/completions", json=several) as response:
            error = (await response.json())["error"]
            assert (response.status, error["param"]) == (400, "models"), (
                "which of them answered, nobody could tell"
            )
        alone = {**body, "models": [MODEL]}
        async with session.post(f"{proxy.base_url}/v1/chat/completions", json=alone) as response:
            assert response.status == 200
            await response.read()


@pytest.mark.parametrize(("asked", "sent"), [({}, False), ({"store": None}, False), ({"store": True}, True)])
async def test_nothing_is_kept_that_nobody_asked_to_keep(
    proxy: Running, payer: Payer, sim: SimulatedProvider, asked: dict[str, Any], sent: bool
) -> None:
    body = {"model": MODEL, "input": "hi", **asked}
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {payer.secret}"}) as session,
        session.post(f"{proxy.base_url}/v1/responses", json=body) as response,
    ):
        assert response.status == 200
    assert sim.requests[-1].body["store"] is sent
