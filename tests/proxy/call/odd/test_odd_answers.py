"""Answers that are whole but unexpected are kept and paid as they are billed; what ends before its first token is not paid."""

import asyncio
import json
import time
from collections.abc import AsyncIterator

import pytest

from config.settings import Settings
from scripts.office import Office
from tests.proxy.call.scripted import (
    COST_NANO,
    DONE,
    USAGE,
    Case,
    Scripted,
    Turn,
    chunk,
    completion,
    running,
    sse,
)
from tests.support.payers import Payer


@pytest.fixture
async def case(settings: Settings, provider: Scripted, office: Office, payer: Payer) -> AsyncIterator[Case]:
    async with running(settings, provider, office, payer) as made:
        yield made


def texts(body: bytes) -> str:
    """Return what a stream says."""
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith(b"data: {")]
    return "".join(
        choice["delta"].get("content") or "" for event in events for choice in event.get("choices", ())
    )


async def test_a_stream_where_a_whole_was_asked_for(case: Case) -> None:
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a"'}}
    more = {"index": 0, "function": {"arguments": ":1}"}}

    async def script(turn: Turn) -> None:
        first, second = chunk("Hel"), chunk("lo")
        first["choices"][0]["delta"] |= {"role": "assistant", "tool_calls": [call]}
        second["choices"][0]["delta"] |= {"tool_calls": [more]}
        await turn.stream(b": hi\n\n", first, second, chunk("", "stop"), chunk(usage=USAGE), DONE)

    status, body = await case.ask(script)
    assert status == 200
    answer = json.loads(body)
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice == {
        "index": 0,
        "finish_reason": "stop",
        "message": {
            "role": "assistant",
            "content": "Hello",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
            ],
        },
    }
    assert answer["usage"]["total_tokens"] == 1100
    assert case.headers["x-tuma-cost-usd"] == "0.00021"
    assert await case.charged() == COST_NANO


@pytest.mark.parametrize("media_type", ["application/json", "text/html"])
async def test_a_stream_that_has_another_name(case: Case, media_type: str) -> None:
    async def script(turn: Turn) -> None:
        await turn.head(media_type)
        await turn.send(b"\n")
        await asyncio.sleep(0.05)
        await turn.send(sse(chunk("Hello")) + sse(chunk("", "stop")) + sse(chunk(usage=USAGE)) + DONE)

    status, body = await case.ask(script, stream=True)
    assert (status, texts(body)) == (200, "Hello")
    assert body.endswith(DONE)
    assert await case.charged() == COST_NANO


async def test_a_whole_where_a_stream_was_asked_for(case: Case) -> None:
    status, body = await case.ask(lambda turn: turn.plain(completion(usage=USAGE)), stream=True)
    assert (status, json.loads(body)["choices"][0]["message"]["content"]) == (200, "Hello there.")
    assert await case.charged() == COST_NANO


@pytest.mark.parametrize("odd", ["NaN", "Infinity", "-Infinity", "1e500", "1e-500", "1e99999999999999999999"])
async def test_numbers_that_are_none(case: Case, odd: str) -> None:
    text = json.dumps(completion(usage=USAGE, odd={"p": 7})).replace('"p": 7', f'"p": {odd}')
    status, body = await case.ask(lambda turn: turn.plain(text.encode()))
    assert status == 200
    assert f'"p": {odd}'.encode() in body
    assert await case.charged() == COST_NANO

    async def script(turn: Turn) -> None:
        event = sse(chunk("", "stop", usage=USAGE, odd={"p": 7})).replace(b'"p": 7', f'"p": {odd}'.encode())
        await turn.stream(chunk("Hello"), event, DONE)

    status, body = await case.ask(script, stream=True)
    assert (status, texts(body)) == (200, "Hello")
    assert await case.charged() == COST_NANO


@pytest.mark.parametrize("stream", [False, True])
async def test_a_byte_order_mark(case: Case, stream: bool) -> None:
    bom = b"\xef\xbb\xbf"

    async def script(turn: Turn) -> None:
        if stream:
            await turn.stream(bom, chunk("Hello"), chunk("", "stop"), chunk(usage=USAGE), DONE)
        else:
            await turn.plain(bom + json.dumps(completion(usage=USAGE)).encode())

    status, body = await case.ask(script, stream=stream)
    assert (status, b"Hello" in body) == (200, True)
    assert await case.charged() == COST_NANO


async def test_usage_after_the_end_is_read_and_not_passed_on(case: Case) -> None:
    async def script(turn: Turn) -> None:
        await turn.stream(chunk("Hello"), chunk("", "stop"), DONE)
        await asyncio.sleep(0.05)
        await turn.send(sse(chunk(usage=USAGE)))

    status, body = await case.ask(script, stream=True, stream_options={"include_usage": True})
    assert (status, texts(body), b"usage" in body) == (200, "Hello", False)
    assert body.endswith(DONE)
    assert await case.charged() == COST_NANO


@pytest.mark.parametrize("beats", [False, True])
async def test_a_stream_that_said_all_and_never_ends(case: Case, beats: bool) -> None:
    async def script(turn: Turn) -> None:
        await turn.stream(chunk("Hello"), chunk("", "stop", usage=USAGE))
        for _ in range(400):
            await asyncio.sleep(0.05)
            if beats:
                await turn.send(b": beat\n\n")

    began_s = time.monotonic()
    status, body = await case.ask(script, stream=True)
    assert time.monotonic() - began_s < 5
    assert (status, texts(body)) == (200, "Hello")
    assert body.endswith(DONE)
    assert tuple(await case.call())[:4] == ("settled", "completed", "exact", COST_NANO)


async def test_nobody_waits_long_for_usage_after_the_end(case: Case) -> None:
    async def script(turn: Turn) -> None:
        await turn.stream(chunk("Hello"), chunk("", "stop"), DONE)
        for _ in range(400):
            await asyncio.sleep(0.02)
            await turn.send(b": beat\n\n")

    began_s = time.monotonic()
    status, body = await case.ask(script, stream=True)
    assert time.monotonic() - began_s < 5
    assert (status, texts(body), body.endswith(DONE)) == (200, "Hello", True)
    assert (await case.call())["source"] == "counted"


async def test_figures_that_come_before_the_end_are_waited_with(case: Case) -> None:
    """Usage in every chunk is no end: a pause between them is the model's."""

    async def script(turn: Turn) -> None:
        await turn.stream(chunk("Hel", usage={**USAGE, "completion_tokens": 1, "total_tokens": 1001}))
        await asyncio.sleep(1.0)
        await turn.send(sse(chunk("lo", "stop", usage=USAGE)) + DONE)

    status, body = await case.ask(script, stream=True)
    assert (status, texts(body)) == (200, "Hello")
    assert tuple(await case.call())[:4] == ("settled", "completed", "exact", COST_NANO)


async def test_an_empty_reason_is_no_end(case: Case) -> None:
    async def script(turn: Turn) -> None:
        await turn.stream(chunk("Hel", ""), chunk("lo", ""))

    status, body = await case.ask(script, stream=True)
    assert status == 200
    assert b'"error"' in body
    assert b"[DONE]" not in body
    assert (await case.call())["outcome"] == "upstream_error"


@pytest.mark.parametrize("stream", [False, True])
async def test_usage_is_shown_to_who_asks_for_it_in_openrouters_way(case: Case, stream: bool) -> None:
    async def script(turn: Turn) -> None:
        if turn.body.get("stream"):
            assert turn.body["stream_options"] == {"include_usage": True}
            await turn.stream(chunk("Hello"), chunk("", "stop"), chunk(usage=USAGE), DONE)
        else:
            await turn.plain(completion(usage=USAGE))

    status, body = await case.ask(script, stream=stream, usage={"include": True})
    assert (status, b'"total_tokens"' in body) == (200, True)
    status, body = await case.ask(script, stream=stream, usage={"include": False})
    assert (status, b'"total_tokens"' in body) == (200, not stream)


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_the_cost_that_a_gateway_names(
    settings: Settings, provider: Scripted, office: Office, payer: Payer, trusted: bool, stream: bool
) -> None:
    async def script(turn: Turn) -> None:
        usage = {**USAGE, "cost": 0.5}
        if stream:
            await turn.stream(chunk("Hello"), chunk("", "stop"), chunk(usage=usage), DONE)
        else:
            await turn.plain(completion(usage=usage))

    async with running(settings, provider, office, payer, trust_cost=trusted) as case:
        status, body = await case.ask(
            script, stream=stream, stream_options={"include_usage": True} if stream else None
        )
        assert status == 200
        source, cost = ("provider_cost", 500_000_000) if trusted else ("price_book", COST_NANO)
        stands = await case.call()
        assert (stands["source"], stands["accuracy"], stands["charge_nano"]) == (source, "exact", cost)
        assert (b'"cost": 0.5' in body, b'"cost": 0.00021' in body) == (trusted, not trusted)

        async def free(turn: Turn) -> None:
            await turn.plain(completion(usage={**USAGE, "cost": 0}))

        assert (await case.ask(free))[0] == 200
        assert await case.charged() == COST_NANO


async def test_the_prompt_is_counted_where_only_the_completion_is_told(case: Case) -> None:
    usage = {"prompt_tokens": 0, "completion_tokens": 100, "total_tokens": 100}
    assert (await case.ask(lambda turn: turn.plain(completion(usage=usage))))[0] == 200
    stands = await case.call()
    assert (stands["source"], stands["accuracy"]) == ("price_book", "estimated")
    assert stands["charge_nano"] > 100 * 600 + 500 * 150


ERROR = {"error": {"message": "overloaded", "code": 503}}


@pytest.mark.parametrize("how", ["in a whole", "first", "after the role", "cut after the role", "silence"])
async def test_an_error_before_any_token_costs_nothing(
    settings: Settings, provider: Scripted, office: Office, payer: Payer, how: str
) -> None:
    role = chunk("")
    role["choices"][0]["delta"]["role"] = "assistant"

    async def script(turn: Turn) -> None:
        match how:
            case "in a whole":
                await turn.plain({"id": "gen-1", **ERROR})
            case "first":
                await turn.stream({"id": "gen-1", **ERROR})
            case "after the role":
                await turn.stream(role, ERROR)
            case "cut after the role":
                await turn.stream(role)
            case _:
                await turn.stream(role)
                await asyncio.sleep(20)

    async with running(settings, provider, office, payer, idle_timeout_s=0.3) as case:
        status, body = await case.ask(script, stream=how != "in a whole")
        assert status in (200, 502)
        assert b'"error"' in body
        stands = await case.call()
        assert (stands["state"], await case.charged()) == ("void", 0)


@pytest.mark.parametrize("recorded", [False, True])
async def test_an_error_before_any_token_is_paid_if_the_record_says_so(
    settings: Settings, provider: Scripted, office: Office, payer: Payer, recorded: bool
) -> None:
    if recorded:
        provider.records["gen-1"] = {"id": "gen-1", "total_cost": 0.002, "native_tokens_prompt": 500}
    async with running(settings, provider, office, payer, kind="openrouter", generation_wait_s=0.3) as case:
        status, _ = await case.ask(lambda turn: turn.stream({"id": "gen-1", **ERROR}), stream=True)
        assert status == 502
        stands = await case.call()
        assert (stands["state"], await case.charged()) == (
            ("settled", 2_000_000) if recorded else ("void", 0)
        )


async def test_a_zero_is_no_price_where_tokens_have_one(
    settings: Settings, provider: Scripted, office: Office, payer: Payer
) -> None:
    provider.records["gen-1"] = {"id": "gen-1", "total_cost": 0.0003, "native_tokens_prompt": 1000}
    async with running(settings, provider, office, payer, kind="openrouter") as case:
        assert (await case.ask(lambda turn: turn.plain(completion(usage={**USAGE, "cost": 0}))))[0] == 200
        stands = await case.call()
        assert (stands["source"], stands["accuracy"], stands["charge_nano"]) == (
            "provider_cost",
            "exact",
            300_000,
        )


async def test_the_first_byte_of_a_stream_may_take_longer_than_the_next(
    settings: Settings, provider: Scripted, office: Office, payer: Payer
) -> None:
    async def script(turn: Turn) -> None:
        await turn.head("text/event-stream")
        await asyncio.sleep(0.8)
        await turn.send(sse(chunk("Hello")))
        if turn.body.get("seed"):
            await asyncio.sleep(20)
        await turn.send(sse(chunk("", "stop", usage=USAGE)) + DONE)

    async with running(
        settings, provider, office, payer, idle_timeout_s=0.3, first_byte_timeout_s=5.0
    ) as case:
        status, body = await case.ask(script, stream=True)
        assert (status, texts(body), body.endswith(DONE)) == (200, "Hello", True)
        began_s = time.monotonic()
        status, body = await case.ask(script, stream=True, seed=1)
        assert (status, b"upstream_timeout" in body) == (200, True)
        assert time.monotonic() - began_s < 4


@pytest.mark.parametrize("kind", ["openai", "openrouter"])
@pytest.mark.parametrize("begun", [False, True])
async def test_a_timeout_says_whether_to_ask_again(
    settings: Settings, provider: Scripted, office: Office, payer: Payer, kind: str, begun: bool
) -> None:
    """The wallet pays nothing; what a provider without records may have billed is in the books as an estimate, at the house's cost."""

    async def silent(turn: Turn) -> None:
        if begun:
            await turn.head()
            await turn.send(b'{"id": "gen-1", "choices": [')
        await asyncio.sleep(20)

    async with running(
        settings, provider, office, payer, kind=kind, first_byte_timeout_s=0.3, generation_wait_s=0.2
    ) as case:
        status, _ = await case.ask(silent)
        assert (status, case.headers.get("x-should-retry")) == (504, "false")
        stands = await case.call()
    assert stands["charge_nano"] == 0
    if kind == "openai":
        assert (stands["state"], stands["accuracy"], stands["source"]) == ("settled", "estimated", "counted")
        assert stands["cost_nanousd"] > 500 * 150 + 256 * 600
    else:
        assert (stands["state"], stands["cost_nanousd"]) == ("void", 0)
