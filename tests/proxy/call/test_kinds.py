"""Completions, embeddings and responses: other dialects, the same way of a call, paid to the nano."""

import asyncio
import base64
import json
import struct
from decimal import Decimal
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI

from config.settings import Settings
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, sync_models
from tests.support.running import Running, run_proxy

MODEL = "openai/gpt-4o"
EMBEDDER = "openai/text-embedding-3-small"
ASKS: dict[str, dict[str, Any]] = {
    "completions": {"model": MODEL, "prompt": "Count to twenty, slowly."},
    "responses": {"model": MODEL, "input": "Count to twenty, slowly."},
}
STORED = {"type": "file", "file": {"file_id": "file-1"}}
KINDS = pytest.mark.parametrize("kind", ASKS)


@pytest.fixture
async def payer(office: Office) -> Payer:
    return await make_payer(office)


@pytest.fixture
async def client(proxy: Running, payer: Payer) -> Any:
    return client_of(proxy, payer)


def client_of(proxy: Running, payer: Payer) -> Any:
    return AsyncOpenAI(base_url=f"{proxy.base_url}/v1", api_key=payer.secret, max_retries=0)


def billed(sim: SimulatedProvider) -> Decimal:
    return Decimal(sim.books.total_nanousd).scaleb(-9)


async def check_paid(
    office: Office, payer: Payer, sim: SimulatedProvider, *, of: str = "10", accuracy: str = "exact"
) -> None:
    """The wallet paid what the provider's own books say, and the books hold."""
    wallet = await office.wallets.get_wallet(payer.wallet_id)
    assert Decimal(of) - Decimal(wallet.as_json()["posted"]) == billed(sim) > 0
    async with office.database.connection() as connection:
        found = await connection.fetch("SELECT DISTINCT accuracy, state FROM calls")
    assert found == [(accuracy, "settled")]
    await check_books(office)


async def create(client: Any, kind: str, told: dict[str, Any] | None = None, **more: Any) -> Any:
    return await getattr(client, kind).create(**ASKS[kind], **more, extra_body={"sim": told or {}})


def text_of(kind: str, events: list[Any]) -> str:
    if kind == "completions":
        return "".join(choice.text for chunk in events for choice in chunk.choices if choice.index == 0)
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


@KINDS
async def test_a_plain_answer_is_paid_and_says_so(
    client: Any, office: Office, payer: Payer, sim: SimulatedProvider, kind: str
) -> None:
    raw = await getattr(client, kind).with_raw_response.create(**ASKS[kind])
    answer = raw.parse()
    text = answer.choices[0].text if kind == "completions" else answer.output_text
    assert len(text.split()) == 20
    assert Decimal(raw.headers["x-tuma-cost-usd"]) == billed(sim) == Decimal(str(answer.usage.cost))
    assert Decimal(raw.headers["x-tuma-balance"]) == Decimal(10) - billed(sim)
    assert "stream_options" not in sim.requests[-1].body
    await check_paid(office, payer, sim)


MANNERS: tuple[dict[str, Any], ...] = (
    {},
    {"usage": "missing"},
    {"omit_cost": True},
    {"crlf": True, "split_bytes": 7},
    {"split_bytes": 1, "chunks": 5},
    {"events_per_write": 6, "comments": 3},
    {"x_sim_extra": {"note": '"usage" [DONE] response.completed "error"', "n": 1.5}},
    {"generation_id_header": True},
)


@KINDS
async def test_every_stream_is_paid_to_the_nano(
    client: Any, office: Office, payer: Payer, proxy: Running, sim: SimulatedProvider, kind: str
) -> None:
    for told in MANNERS:
        before = billed(sim)
        events = [event async for event in await create(client, kind, told, stream=True)]
        assert len(text_of(kind, events).split()) == told.get("chunks", 20), told
        if kind == "completions":
            assert all(chunk.object == "text_completion" and chunk.usage is None for chunk in events)
            assert sim.requests[-1].body["stream_options"] == {"include_usage": True}
        else:
            assert events[-1].type == "response.completed"
            assert [event.sequence_number for event in events] == list(range(len(events)))
            assert events[-1].response.output_text == text_of(kind, events)
            assert "stream_options" not in sim.requests[-1].body
            if not told:
                assert Decimal(str(events[-1].response.usage.cost)) == billed(sim) - before
    await proxy.quiet()
    await check_paid(office, payer, sim)


async def test_a_completion_of_several_prompts_and_choices(
    client: Any, office: Office, payer: Payer, proxy: Running, sim: SimulatedProvider
) -> None:
    for prompt in (["one", "two"], [[1, 2, 3], [4]], [7, 8, 9]):
        answer = await client.completions.create(
            model=MODEL, prompt=prompt, n=2, best_of=3, max_tokens=5, echo=prompt == ["one", "two"]
        )
        prompts = 1 if prompt == [7, 8, 9] else 2
        assert [choice.index for choice in answer.choices] == list(range(2 * prompts))
        assert answer.usage.completion_tokens == 3 * prompts * 5
        assert sim.requests[-1].body["prompt"] == prompt
    async with office.database.connection() as connection:
        rows = await connection.fetch("SELECT hold_nano, charge_nano FROM calls")
    assert all(row["hold_nano"] >= row["charge_nano"] for row in rows), "each prompt's choices are held for"
    await proxy.quiet()
    await check_paid(office, payer, sim)


async def test_a_completions_stream_tells_usage_if_asked(client: Any, sim: SimulatedProvider) -> None:
    stream = await create(client, "completions", stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert Decimal(str(chunks[-1].usage.cost)) == billed(sim)


async def test_embeddings(
    client: Any, office: Office, payer: Payer, proxy: Running, sim: SimulatedProvider
) -> None:
    given: Any
    for given in ("one text", ["one", "two"], [1, 2, 3], [[1, 2], [3]], "x" * 40_000):
        before = billed(sim)
        raw = await client.embeddings.with_raw_response.create(model=EMBEDDER, input=given)
        answer = raw.parse()
        many = isinstance(given, list) and not isinstance(given[0], int)
        assert len(answer.data) == (len(given) if many else 1)
        assert len(answer.data[0].embedding) == 8
        cost = billed(sim) - before
        assert Decimal(raw.headers["x-tuma-cost-usd"]) == cost == Decimal(str(answer.usage.cost))
    async with office.database.connection() as connection:
        rows = await connection.fetch(
            "SELECT c.hold_nano, c.charge_nano, u.completion_tokens FROM calls c JOIN usage u ON u.call_id = c.id"
        )
    for row in rows:
        assert row["completion_tokens"] == 0
        assert row["hold_nano"] <= 40 * row["charge_nano"], "only the prompt is held"
    await proxy.quiet()
    await check_paid(office, payer, sim)


async def test_vectors_pass_byte_for_byte(proxy: Running, payer: Payer, sim: SimulatedProvider) -> None:
    answers = {}
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {payer.secret}"}) as session:
        for encoding in ("float", "base64"):
            body = {"model": EMBEDDER, "input": "x", "encoding_format": encoding, "dimensions": 5}
            async with session.post(f"{proxy.base_url}/v1/embeddings", json=body) as response:
                through = await response.read()
            headers = {"Authorization": "Bearer sk-sim"}
            async with session.post(f"{sim.base_url}/embeddings", json=body, headers=headers) as response:
                direct = await response.read()
            answers[encoding] = json.loads(through)["data"][0]["embedding"]
            assert through.partition(b',"id"')[0] == direct.partition(b',"id"')[0]
    assert list(struct.unpack("<5f", base64.b64decode(answers["base64"]))) == answers["float"]


async def test_what_a_response_asks_for_passes_untouched(
    client: Any, office: Office, sim: SimulatedProvider
) -> None:
    tools = [
        {
            "type": "function",
            "name": "lookup",
            "parameters": {"type": "object", "properties": {}},
            "strict": True,
        }
    ]
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "look it up"}]},
        {"type": "function_call", "call_id": "c1", "name": "lookup", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "42"},
    ]
    more = {"tools": tools, "instructions": "Be brief.", "store": False, "metadata": {"a": "b"}}
    answer = await client.responses.create(
        model=MODEL, input=items, max_output_tokens=16, **more, extra_body={"sim": {"tool_calls": True}}
    )
    assert answer.output[0].type == "function_call"
    sent = sim.requests[-1].body
    assert {name: sent[name] for name in more} == more
    assert (sent["input"], sent["max_output_tokens"]) == (items, 16)
    async with client.responses.stream(model=MODEL, input="hi") as stream:
        final = await stream.get_final_response()
    assert len(final.output_text.split()) == 20
    await check_books(office)


async def test_what_would_escape_the_meter_is_refused(
    client: Any, office: Office, sim: SimulatedProvider
) -> None:
    refused: tuple[tuple[str, Any], ...] = (
        ("background", True),
        ("previous_response_id", "resp_1"),
        ("conversation", "conv_1"),
        ("prompt", {"id": "pmpt_1"}),
        ("input", [{"type": "item_reference", "id": "msg_1"}]),
        ("input", [{"id": "msg_1"}]),  # the same: the type may be left out
        ("input", [{"type": None, "id": "msg_1", "role": "user"}]),
        ("input", [{"role": "user", "content": [{"type": "input_file", "file_id": "file-1"}]}]),
        ("input", [{"role": "user", "content": [{"type": "input_image", "file_id": "file-1"}]}]),
        (
            "input",
            [{"type": "function_call_output", "output": [{"type": "input_file", "file_id": "file-1"}]}],
        ),
        ("input", []),
        ("tools", [{"type": "web_search"}]),
        ("max_output_tokens", 0),
    )
    for member, value in refused:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(**{**ASKS["responses"], member: value})
        assert caught.value.param == member
    assert not sim.requests
    async with office.database.connection() as connection:
        assert await connection.fetchval("SELECT count(*) FROM calls") == 0


async def test_bad_asks_are_refused(proxy: Running, payer: Payer, sim: SimulatedProvider) -> None:
    bad: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("completions", {"prompt": None}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [True]}, "prompt"),
        ("completions", {"prompt": [["a"]]}, "prompt"),
        ("completions", {"prompt": ["x"] * 2049}, "prompt"),
        ("completions", {"prompt": "x", "best_of": "9"}, "best_of"),
        ("completions", {"prompt": "x", "max_tokens": -1}, "max_tokens"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "best_of": "9"}, "best_of"),
        ("chat/completions", {"messages": [{"role": "user", "content": [STORED]}]}, "messages"),
        ("embeddings", {"input": "x", "stream": True}, "stream"),
        ("embeddings", {"input": [[]]}, "input"),
        ("embeddings", {}, "input"),
        ("responses", {"input": "x", "stream_options": []}, "stream_options"),
    )
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {payer.secret}"}) as session:
        for path, body, param in bad:
            async with session.post(f"{proxy.base_url}/v1/{path}", json={"model": MODEL, **body}) as response:
                assert response.status == 400, (path, body)
                assert (await response.json())["error"]["param"] == param
    assert not sim.requests


@KINDS
async def test_client_gone_after_every_few_chunks(
    proxy: Running, office: Office, sim: SimulatedProvider, kind: str
) -> None:
    payers = [await make_payer(office) for _ in range(0, 20, 4)]

    async def leave_after(chunks: int, payer: Payer) -> None:
        body = {**ASKS[kind], "stream": True, "sim": {"chunk_delay_ms": 8}}
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {payer.secret}"}) as session:
            response = await session.post(f"{proxy.base_url}/v1/{kind}", json=body)
            seen = 0
            while seen < chunks:
                seen += (await response.content.readline()).startswith(b"data:")
            response.close()

    await asyncio.gather(*(leave_after(index * 4, payer) for index, payer in enumerate(payers)))
    await proxy.quiet()
    await sim.books.wait_quiet()
    by_request = {entry.request_id: entry.cost_nanousd for entry in sim.books.generations.values()}
    async with office.database.connection() as connection:
        rows = await connection.fetch("SELECT id, charge_nano, accuracy, state FROM calls")
    assert len(rows) == len(payers)
    for row in rows:
        assert (row["state"], row["accuracy"]) == ("settled", "exact")
        assert row["charge_nano"] == by_request[str(row["id"])] > 0
    await check_books(office)


async def test_an_embeddings_client_that_leaves_pays(
    proxy: Running, office: Office, payer: Payer, sim: SimulatedProvider
) -> None:
    body = {"model": EMBEDDER, "input": "x" * 100, "sim": {"first_delay_ms": 300}}
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {payer.secret}"}) as session:
        asking = asyncio.get_running_loop().create_task(
            session.post(f"{proxy.base_url}/v1/embeddings", json=body)
        )
        while not sim.books.open_count:
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.wait((asking,))
    await sim.books.wait_quiet()
    await proxy.quiet()
    await check_paid(office, payer, sim)


async def test_a_response_that_breaks_off_is_paid_as_far_as_it_was_billed(
    client: Any, office: Office, payer: Payer, proxy: Running, sim: SimulatedProvider
) -> None:
    for told in ({"cut_after": 4}, {"done": False}, {"error_after": 4}):
        events: list[Any] = []
        try:
            async for event in await create(client, "responses", told, stream=True):
                events.append(event)
        except openai.APIError as error:
            assert error.code == "upstream_error"
            assert "error_after" not in told
        else:
            assert events[-1].type == "response.failed"
            assert "error_after" in told
    await proxy.quiet()
    await check_paid(office, payer, sim)


@KINDS
async def test_an_error_before_the_first_token_is_an_error_of_http(
    client: Any, office: Office, payer: Payer, proxy: Running, kind: str
) -> None:
    for told in ({"error_before_first": True}, {"fail_status": 500}, {"html_body": True}):
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError):
                await create(client, kind, told, stream=stream)
    await proxy.quiet()
    assert (await office.wallets.get_wallet(payer.wallet_id)).posted_nano == 10 * 10**9
    await check_books(office)


@KINDS
async def test_an_empty_wallet_ends_the_answer_cleanly(
    proxy: Running, office: Office, sim: SimulatedProvider, kind: str
) -> None:
    payer = await make_payer(office, amount="0.011")
    more = {"stream_options": {"include_usage": True}} if kind == "completions" else {}
    stream = await create(
        client_of(proxy, payer), kind, {"chunks": 4000, "chunk_delay_ms": 1}, stream=True, **more
    )
    events = [event async for event in stream]
    words = len(text_of(kind, events).split())
    assert 500 < words < 2000
    if kind == "completions":
        reasons = [
            choice.finish_reason for chunk in events for choice in chunk.choices if choice.finish_reason
        ]
        assert (reasons, events[-1].choices) == (["length"], [])
        usage = events[-1].usage
        assert usage.completion_tokens > 500
    else:
        last = events[-1]
        assert (last.type, last.response.status) == ("response.incomplete", "incomplete")
        assert last.response.incomplete_details.reason == "max_output_tokens"
        assert last.response.id == events[0].response.id
        assert [event.sequence_number for event in events] == list(range(len(events)))
        usage = last.response.usage
        assert usage.output_tokens > 500
    assert Decimal(str(usage.cost)) > 0
    await proxy.quiet()
    assert (await office.wallets.get_wallet(payer.wallet_id)).posted_nano >= 0
    await check_paid(office, payer, sim, of="0.011")


@KINDS
async def test_the_hold_grows_with_the_answer(
    client: Any, office: Office, payer: Payer, proxy: Running, sim: SimulatedProvider, kind: str
) -> None:
    events = [
        event
        async for event in await create(
            client,
            kind,
            {"chunks": 3000, "events_per_write": 50, "stall_after": 2500, "stall_s": 0.2},
            stream=True,
        )
    ]
    assert len(text_of(kind, events).split()) == 3000
    await proxy.quiet()  # on a busy machine the stream may end before its settlement is posted
    async with office.database.connection() as connection:
        row = await connection.fetchrow("SELECT hold_nano, charge_nano FROM calls")
    assert row["hold_nano"] >= row["charge_nano"] == sim.books.total_nanousd
    await check_paid(office, payer, sim)


async def test_a_provider_without_costs_is_paid_by_the_price_book(
    settings: Settings, office: Office, payer: Payer, sim: SimulatedProvider
) -> None:
    """Usage gains ``cost`` wherever it is: beside the choices, beside the vectors, inside the last event."""
    await sync_models(office)
    sim.set_behaviour(omit_cost=True)
    upstream = settings.upstream.model_copy(update={"kind": "openai"})
    async with run_proxy(settings.model_copy(update={"upstream": upstream})) as proxy:
        client = client_of(proxy, payer)
        costs = [
            (await create(client, "completions")).usage.cost,
            (await client.embeddings.create(model=EMBEDDER, input="hello there")).usage.cost,
            (await create(client, "responses")).usage.cost,
        ]
        events = [event async for event in await create(client, "responses", stream=True)]
        costs.append(events[-1].response.usage.cost)
        assert sum(Decimal(str(cost)) for cost in costs) == billed(sim)
        await proxy.quiet()
        before = (await office.wallets.get_wallet(payer.wallet_id)).posted_nano
        assert Decimal(10**10 - before).scaleb(-9) == billed(sim)
        sim.set_behaviour(usage="missing")
        for ask in (
            client.embeddings.create(
                model=EMBEDDER, input="no usage, no id", extra_body={"sim": {"anonymous": True}}
            ),
            create(client, "completions"),
            create(client, "responses"),
        ):
            await ask
            await proxy.quiet()
            after = (await office.wallets.get_wallet(payer.wallet_id)).posted_nano
            assert after < before, "without a word from the provider the tokens are counted here"
            before = after
