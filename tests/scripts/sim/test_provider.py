"""The simulated provider over real sockets: protocol, faults, callers who leave, restarts."""

import asyncio
import json
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientPayloadError, TCPConnector
from aiohttp import ClientSession as Session

from scripts.sim.exact_json import usd
from scripts.sim.provider import SimulatedProvider as Sim
from tests.support.paths import ROOT

KEY = "sk-sim"
AUTH = {"Authorization": f"Bearer {KEY}"}
MODEL = "openai/gpt-4o-mini"
PROMPT_TOKENS = 5


def body_of(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], **fields}


@pytest.fixture
async def sim() -> AsyncIterator[Sim]:
    async with Sim() as provider:
        yield provider


@pytest.fixture
async def client() -> AsyncIterator[Session]:
    async with Session(headers=AUTH, connector=TCPConnector(limit=0)) as session:
        yield session


async def get(client: Session, url: str, **options: Any) -> tuple[int, Any]:
    async with client.get(url, **options) as response:
        return response.status, json.loads(await response.read(), parse_float=Decimal)


async def post(client: Session, provider: Sim, /, **fields: Any) -> tuple[int, bytes]:
    async with client.post(f"{provider.base_url}/chat/completions", json=body_of(**fields)) as response:
        return response.status, await response.read()


def read_events(data: bytes) -> list[Any]:
    lines = [line[6:].rstrip("\r") for line in data.decode().split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line, parse_float=Decimal) for line in lines]


def only_entry(sim: Sim) -> Any:
    (entry,) = sim.books.generations.values()
    return entry


def raw_request(**fields: Any) -> bytes:
    body = json.dumps(body_of(**fields)).encode()
    head = f"Authorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    return f"POST /api/v1/chat/completions HTTP/1.0\r\n{head}".encode() + body


@asynccontextmanager
async def leaving_after(client: Session, sim: Sim, sent: int, /, **behaviour: Any) -> AsyncIterator[None]:
    """Read so many chunks of a stream that then pauses, run the block, and close the connection."""
    body = body_of(stream=True, sim={"chunks": 20, **behaviour})
    response = await client.post(f"{sim.base_url}/chat/completions", json=body)
    seen = b""
    while seen.count(b"data: ") < sent:
        assert not response.content.at_eof(), seen
        seen += await response.content.readany()
    assert seen.count(b"data: ") == sent
    yield
    response.close()


# The protocol


async def test_a_plain_answer(sim: Sim, client: Session) -> None:
    status, data = await post(client, sim, n=2, max_tokens=4, user="u-1", sim={"cached_tokens": 2})
    answer, entry = json.loads(data, parse_float=Decimal), only_entry(sim)
    assert status == 200
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["the a of to"] * 2
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    # 3 fresh and 2 cached prompt tokens, 8 of completion: 450 + 150 + 4800 nano-USD.
    assert answer["usage"]["cost"] == Decimal("0.0000054")
    assert (entry.cost_nanousd, entry.user) == (5_400, "u-1")
    assert (entry.completion_tokens, entry.cached_tokens) == (8, 2)
    assert sim.books.total_nanousd == 5_400
    assert answer["id"] == entry.id


async def test_a_stream(sim: Sim, client: Session) -> None:
    url = f"{sim.base_url}/chat/completions"
    sent = body_of(stream=True, sim={"generation_id_header": True, "comments": 5, "crlf": True})
    async with client.post(url, json=sent, headers={"X-Request-Id": "r-1"}) as response:
        data = await response.read()
        assert response.content_type == "text/event-stream"
        generation_id = response.headers["X-Generation-Id"]
    events, entry = read_events(data), only_entry(sim)
    assert data.startswith(b": OPENROUTER PROCESSING\r\n\r\n")
    assert data.count(b": OPENROUTER PROCESSING\r\n\r\n") == 4
    assert (len(events), events[-1], events[-2]["choices"]) == (23, "[DONE]", [])
    assert events[-2]["usage"]["cost"] == usd(entry.cost_nanousd)
    assert entry.cost_nanousd == PROMPT_TOKENS * 150 + 20 * 600
    assert (entry.id, entry.request_id, entry.finish_reason) == (generation_id, "r-1", "stop")


async def test_echo_and_models_with_manners(sim: Sim, client: Session) -> None:
    _, data = await post(
        client, sim, model="sim/echo", messages=[{"role": "user", "content": "say  this\nback "}]
    )
    assert json.loads(data)["choices"][0]["message"]["content"] == "say  this\nback "
    _, data = await post(client, sim, model="sim/tools", stream=True)
    assert read_events(data)[-3]["choices"][0]["finish_reason"] == "tool_calls"


async def test_the_account(sim: Sim, client: Session) -> None:
    _, data = await post(client, sim)
    generation_id = json.loads(data)["id"]
    used = usd(sim.books.total_nanousd)
    _, key = await get(client, f"{sim.base_url}/key")
    assert (key["data"]["usage"], key["data"]["limit_remaining"]) == (used, 1000 - used)
    assert (await get(client, f"{sim.base_url}/credits"))[1]["data"]["total_usage"] == used
    status, record = await get(client, f"{sim.base_url}/generation", params={"id": generation_id})
    assert (status, record["data"]["total_cost"], record["data"]["cancelled"]) == (200, used, False)
    _, activity = await get(client, f"{sim.base_url}/activity")
    assert [(row["model"], row["usage"]) for row in activity["data"]] == [(MODEL, used)]
    _, models = await get(client, f"{sim.base_url}/models", headers={"Authorization": ""})
    assert {model["id"]: model["pricing"]["prompt"] for model in models["data"]}[MODEL] == "0.00000015"
    _, books = await get(client, f"{sim.origin}/sim/books")
    assert (books["total_nanousd"], books["open"], len(books["generations"])) == (
        sim.books.total_nanousd,
        0,
        1,
    )
    assert (await get(client, f"{sim.origin}/sim/books/{generation_id}"))[1] == books["generations"][0]
    assert (await get(client, f"{sim.origin}/sim/books/gen-0"))[0] == 404
    assert (await get(client, f"{sim.origin}/sim/health"))[0] == 200


async def test_a_record_that_is_late_or_never_shows(sim: Sim, client: Session) -> None:
    url = f"{sim.base_url}/generation"
    for behaviour, later in (({"generation_delay_s": 0.2}, 200), ({"generation_missing": True}, 404)):
        _, data = await post(client, sim, sim=behaviour)
        params = {"id": json.loads(data)["id"]}
        status, answer = await get(client, url, params=params)
        assert (status, answer["error"]["code"]) == (404, 404)
        assert answer["error"]["message"] == f"Generation {params['id']} not found"
        await asyncio.sleep(0.25)
        assert (await get(client, url, params=params))[0] == later


async def test_bad_requests_bill_nothing(sim: Sim, client: Session) -> None:
    url = f"{sim.base_url}/chat/completions"
    wrong: list[dict[str, Any]] = [{"messages": []}, {"sim": {"chunkz": 1}}]
    bodies: list[bytes] = [
        *(b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000),
        json.dumps(body_of(model="x")).encode(),
    ]
    bodies += [json.dumps(body_of(**fields)).encode() for fields in wrong]
    for body in bodies:
        async with client.post(url, data=body) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (400, 400), body[:60]
    for path, headers, expected in (
        ("/key", {"Authorization": "Bearer sk-other"}, 401),
        ("/generation", {"Authorization": ""}, 401),
        ("/nothing", AUTH, 404),
        ("/chat/completions", AUTH, 405),
    ):
        status, answer = await get(client, f"{sim.base_url}{path}", headers=headers)
        assert (status, answer["error"]["code"]) == (expected, expected)
    assert sim.books.generations == {}


async def test_requests_are_noted_as_they_came(sim: Sim, client: Session) -> None:
    await post(client, sim, temperature=0.25, unknown={"a": [1]})
    await client.post(
        f"{sim.base_url}/chat/completions", data=b" " * 300_000, headers={"Authorization": "Bearer no"}
    )
    _, listed = await get(client, f"{sim.origin}/sim/requests")
    assert listed[0]["body"] == body_of(temperature=Decimal("0.25"), unknown={"a": [1]})
    assert listed[0]["headers"]["authorization"] == f"Bearer {KEY}"
    assert (listed[1]["body"], listed[1]["body_bytes"], listed[1]["headers"]["authorization"]) == (
        None,
        300_000,
        "Bearer no",
    )
    for _ in range(210):
        await client.post(f"{sim.base_url}/chat/completions", data=b"{}")
    assert len(sim.requests) == 200


# How it was told to behave


async def test_what_a_request_says_goes_before_model_and_server(sim: Sim, client: Session) -> None:
    async def count(**fields: Any) -> int:
        _, data = await post(client, sim, **fields)
        return int(json.loads(data)["usage"]["completion_tokens"])

    tell = f"{sim.origin}/sim/behaviour"
    assert await count() == 20
    assert (await client.post(tell, json={"chunks": 7, "crlf": True})).status == 200
    assert (await client.post(tell, json={"model": MODEL, "behaviour": {"chunks": 5}})).status == 200
    assert [await count(), await count(model="openai/gpt-4o"), await count(sim={"chunks": 3})] == [5, 7, 3]
    sim.set_behaviour(model=MODEL)
    assert await count() == 7
    assert (await client.delete(tell)).status == 200
    assert await count() == 20
    wrong: list[Any] = [
        {"chunkz": 1},
        {"self": 1},
        [],
        {"model": "x"},
        {"model": MODEL, "chunks": 1},
        {"model": []},
    ]
    for bad in wrong:
        assert (await client.post(tell, json=bad)).status == 400
    assert await count() == 20


async def test_failures_before_anything_bill_nothing(sim: Sim, client: Session) -> None:
    url = f"{sim.base_url}/chat/completions"
    told = {
        "fail_status": 429,
        "fail_body": {"error": {"code": 429, "message": "slow"}},
        "fail_headers": {"Retry-After": "3"},
    }
    async with client.post(url, json=body_of(sim=told)) as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "3")
        assert await response.json() == told["fail_body"]
    status, data = await post(client, sim, stream=True, sim={"fail_status": 500, "fail_body": "oops"})
    assert (status, data) == (500, b"oops")
    status, data = await post(client, sim, sim={"fail_status": 503})
    assert (status, json.loads(data)["error"]["code"]) == (503, 503)
    for stream in (True, False):
        assert await post(client, sim, stream=stream, sim={"null_body": True}) == (200, b"null")
        assert (await post(client, sim, stream=stream, sim={"html_body": True}))[1].startswith(b"<html>")
    _, data = await post(client, sim, stream=True, sim={"error_before_first": True})
    assert [list(event) for event in read_events(data)] == [["error"]]
    _, data = await post(client, sim, sim={"error_before_first": True})
    assert json.loads(data)["error"]["code"] == 502
    assert sim.books.generations == {}


@pytest.mark.parametrize("after", [0, 3, 20])
@pytest.mark.parametrize("mode", ["stream", "plain"])
async def test_an_answer_that_breaks_off_bills_what_was_sent(
    sim: Sim, client: Session, mode: str, after: int
) -> None:
    stream = mode == "stream"
    _, data = await post(client, sim, stream=stream, sim={"error_after": after})
    if stream:
        assert len(read_events(data)) == after + 1
        assert read_events(data)[-1]["choices"][0]["finish_reason"] == "error"
    assert (only_entry(sim).completion_tokens, only_entry(sim).finish_reason) == (after, "error")
    sim.books.generations.clear()
    with pytest.raises(ClientPayloadError):
        await post(client, sim, stream=stream, sim={"cut_after": after})
    assert (only_entry(sim).completion_tokens, only_entry(sim).cancelled) == (after, False)
    assert sim.books.total_nanousd == 2 * (PROMPT_TOKENS * 150 + after * 600)


async def test_a_cut_stream_delivers_what_it_bills_to_a_slow_reader(sim: Sim) -> None:
    with socket.socket() as raw:
        # Before connecting: the window of an open connection does not shrink well.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.setblocking(False)
        await asyncio.get_running_loop().sock_connect(raw, sim.address)
        reader, writer = await asyncio.open_connection(sock=raw, limit=4096)
        writer.write(
            raw_request(stream=True, sim={"chunks": 20_000, "cut_after": 19_999, "events_per_write": 20_000})
        )
        await asyncio.sleep(0.1)
        data = await reader.read()
        writer.close()
    assert data.count(b"data: ") == only_entry(sim).completion_tokens == 19_999
    assert not data.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize(
    "behaviour", [{"split_bytes": 1}, {"split_bytes": 7}, {"events_per_write": 3}, {"events_per_write": 999}]
)
async def test_the_bytes_are_the_same_however_they_are_written(
    sim: Sim, client: Session, behaviour: dict[str, Any]
) -> None:
    told = {"text": "wörds — 日本語 and 🎈 more", "comments": 2, "crlf": True}
    texts = []
    for extra in ({}, behaviour):
        _, data = await post(client, sim, stream=True, sim={**told, **extra})
        texts.append(re.sub(rb'"id":"gen-[^"]+"|"created":\d+', b"", data))
    assert texts[0] == texts[1]
    assert {entry.cost_nanousd for entry in sim.books.generations.values()} == {PROMPT_TOKENS * 150 + 6 * 600}


async def test_an_unknown_field_passes_digit_by_digit(sim: Sim, client: Session) -> None:
    payload = json.dumps(body_of(sim={"x_sim_extra": {"number": "@"}})).replace('"@"', "1.50")
    async with client.post(f"{sim.base_url}/chat/completions", data=payload) as response:
        assert b'"x_sim_extra":{"number":1.50}' in await response.read()


async def test_a_stall_is_silence_and_then_the_rest(sim: Sim, client: Session) -> None:
    loop = asyncio.get_running_loop()
    for stream in (True, False):
        started = loop.time()
        _, data = await post(client, sim, stream=stream, sim={"stall_after": 3, "stall_s": 0.2})
        assert 0.2 <= loop.time() - started < 2
        if stream:
            assert len(read_events(data)) == 23
    assert {entry.completion_tokens for entry in sim.books.generations.values()} == {20}


async def test_delays_add_up(sim: Sim, client: Session) -> None:
    loop = asyncio.get_running_loop()
    for stream in (True, False):
        started = loop.time()
        await post(
            client, sim, stream=stream, sim={"chunks": 5, "first_delay_ms": 100, "chunk_delay_ms": 25.5}
        )
        assert 0.2 <= loop.time() - started < 2


# Callers who leave


async def test_leaving_after_any_chunk_bills_what_was_sent_or_all(sim: Sim, client: Session) -> None:
    for cancellable, billed in ((True, None), (False, 20)):
        for chunks in range(21):
            sim.books.generations.clear()
            async with leaving_after(client, sim, chunks, stall_after=chunks, cancellable=cancellable):
                assert (sim.books.open_count, only_entry(sim).cost_nanousd) == (1, 0)
            await sim.books.wait_quiet(timeout_s=2)
            entry = only_entry(sim)
            assert entry.completion_tokens == (chunks if billed is None else billed)
            assert entry.cost_nanousd == PROMPT_TOKENS * 150 + entry.completion_tokens * 600
            assert entry.cancelled
            assert entry.finish_reason == (None if billed is None else "stop")


async def test_what_waits_for_a_fuller_write_is_sent_before_a_stall(sim: Sim, client: Session) -> None:
    async with leaving_after(client, sim, 5, events_per_write=4, stall_after=5):
        pass
    await sim.books.wait_quiet(timeout_s=2)
    assert only_entry(sim).completion_tokens == 5


async def test_leaving_before_the_first_chunk(sim: Sim, client: Session) -> None:
    async with leaving_after(client, sim, 0, first_delay_ms=60_000):
        generation_id = only_entry(sim).id
        status, _ = await get(client, f"{sim.base_url}/generation", params={"id": generation_id})
        assert status == 404
    await sim.books.wait_quiet(timeout_s=2)
    assert only_entry(sim).cost_nanousd == PROMPT_TOKENS * 150
    _, record = await get(client, f"{sim.base_url}/generation", params={"id": generation_id})
    assert (record["data"]["cancelled"], record["data"]["finish_reason"]) == (True, None)
    assert record["data"]["total_cost"] == usd(PROMPT_TOKENS * 150)


async def test_what_is_not_cancellable_goes_on_at_its_pace(sim: Sim, client: Session) -> None:
    async with leaving_after(client, sim, 1, cancellable=False, chunk_delay_ms=20):
        pass
    await asyncio.sleep(0.1)
    assert sim.books.open_count == 1
    await sim.books.wait_quiet(timeout_s=2)
    entry = only_entry(sim)
    assert entry.completion_tokens == 20
    assert entry.ended_s - entry.started_s >= 19 * 0.020 - 0.01


async def test_a_plain_call_is_billed_whole_whoever_leaves(sim: Sim, client: Session) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await post(client, sim, sim={"first_delay_ms": 150, "stall_after": 2})
    await sim.books.wait_quiet(timeout_s=2)
    assert (only_entry(sim).completion_tokens, only_entry(sim).cancelled) == (20, True)


async def test_leaving_in_the_middle_of_a_fast_long_stream(sim: Sim, client: Session) -> None:
    for cancellable in (True, False):
        sim.books.generations.clear()
        body = body_of(
            stream=True, sim={"chunks": 200_000, "cancellable": cancellable, "events_per_write": 10}
        )
        response = await client.post(f"{sim.base_url}/chat/completions", json=body)
        await response.content.readany()
        response.close()
        await sim.books.wait_quiet(timeout_s=20)
        assert (only_entry(sim).completion_tokens < 200_000) == cancellable
        assert only_entry(sim).cancelled


async def test_a_raw_socket_that_half_closes(sim: Sim) -> None:
    reader, writer = await asyncio.open_connection(*sim.address)
    writer.write(raw_request(stream=True, sim={"stall_after": 2}))
    seen = b""
    while seen.count(b"data: ") < 2:
        assert not reader.at_eof(), seen
        seen += await reader.read(4096)
    writer.write_eof()
    await sim.books.wait_quiet(timeout_s=2)
    assert only_entry(sim).completion_tokens == 2
    writer.close()


# Load and restarts


async def test_hundreds_of_streams_at_once(sim: Sim, client: Session) -> None:
    async def one(index: int) -> None:
        behaviour = {"chunks": 1 + index % 7, "chunk_delay_ms": index % 3, "cancellable": index % 2 == 0}
        if index % 5:
            await post(client, sim, stream=True, sim=behaviour)
        else:
            async with leaving_after(
                client, sim, index % 4, **behaviour | {"chunks": 9, "stall_after": index % 4}
            ):
                pass

    await asyncio.gather(*(one(index) for index in range(300)))
    await sim.books.wait_quiet(timeout_s=5)
    entries = list(sim.books.generations.values())
    assert len(entries) == 300
    assert sim.books.total_nanousd == sum(entry.cost_nanousd for entry in entries)
    assert sum(entry.cancelled for entry in entries) == 60


async def test_shutdown_bills_what_runs(tmp_path: Path, client: Session) -> None:
    path = tmp_path / "books.jsonl"
    async with Sim(books_path=path) as sim:
        for behaviour in ({}, {"cancellable": False}):
            response = await client.post(
                f"{sim.base_url}/chat/completions",
                json=body_of(stream=True, sim={"stall_after": 3, **behaviour}),
            )
            await response.content.readany()
        async with leaving_after(client, sim, 1, cancellable=False, chunk_delay_ms=60_000):
            pass
        assert sim.books.open_count == 3
        started = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - started < 0.8
    async with Sim(books_path=path) as again:
        assert sorted(entry.completion_tokens for entry in again.books.generations.values()) == [3, 20, 20]
        assert again.books.total_nanousd == sim.books.total_nanousd == 3 * PROMPT_TOKENS * 150 + 43 * 600


@asynccontextmanager
async def running_process(books: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    options = f"-m scripts.sim.provider --api-key {KEY} --credits-usd 12.5 --books".split()
    process = await asyncio.create_subprocess_exec(
        sys.executable, *options, str(books), cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        matched = re.fullmatch(r"simulated provider on (http://127\.0\.0\.1:\d+/api/v1)\n", line)
        assert matched is not None, line
        yield process, matched[1]
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_the_process_keeps_its_books_through_kill_and_sigterm(tmp_path: Path, client: Session) -> None:
    books = tmp_path / "books.jsonl"
    cost = PROMPT_TOKENS * 150 + 20 * 600
    for run, (number, code) in enumerate(((signal.SIGKILL, -9), (signal.SIGTERM, 0))):
        async with running_process(books) as (process, base_url):
            url = f"{base_url}/chat/completions"
            await (await client.post(url, json=body_of())).read()
            stalled = await client.post(url, json=body_of(stream=True, sim={"stall_after": 0}))
            _, key = await get(client, f"{base_url}/key")
            assert (key["data"]["usage"], key["data"]["limit"]) == (usd((run + 1) * cost), Decimal("12.5"))
            process.send_signal(number)
            assert await asyncio.wait_for(process.wait(), timeout=5) == code
            stalled.close()
    async with Sim(books_path=books) as sim:
        # The stream that ran at the kill is lost; the one at SIGTERM was billed for its prompt.
        assert sim.books.total_nanousd == 2 * cost + PROMPT_TOKENS * 150
