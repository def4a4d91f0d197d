"""The simulated provider without sockets: money as JSON, prices, books, behaviour, asks and the script of an answer."""

import json
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.sim.answers import Answer, Event, Pause
from scripts.sim.behaviour import Behaviour, BehaviourError
from scripts.sim.books import Books, Generation
from scripts.sim.exact_json import dumps, usd, usd_of_femto
from scripts.sim.models import SimModel, sim_models
from scripts.sim.requests import RefusedError, read_ask
from scripts.sim.views import show_activity, show_credits, show_generation, show_key, show_models

MODELS = sim_models()


def ask_of(**fields: Any) -> Any:
    return {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}], **fields}


def answer_of(behaviour: Behaviour | None = None, **fields: Any) -> Answer:
    ask = read_ask(ask_of(stream=True, **fields), MODELS)
    books = Books()
    generation = books.begin(ask.model.id, streamed=True, prompt_tokens=ask.prompt_tokens, cached_tokens=0)
    return Answer(generation, ask.model, ask, behaviour or Behaviour())


def events_of(answer: Answer) -> list[Any]:
    data = b"".join(step.data for step in answer.content() if isinstance(step, Event)) + b"".join(
        answer.tail()
    )
    lines = [line for line in data.decode().split("\n") if line.startswith("data: ")]
    return [
        line[6:] if line == "data: [DONE]" else json.loads(line[6:], parse_float=Decimal) for line in lines
    ]


def bill(books: Books, generation: Generation, cost_nanousd: int, **fields: Any) -> bool:
    facts: dict[str, Any] = {"completion_tokens": 5, "reasoning_tokens": 0, "finish_reason": "stop", **fields}
    return books.bill(generation, cost_nanousd=cost_nanousd, **facts)


# Money as JSON


@given(st.integers(min_value=-(10**40), max_value=10**40))
def test_money_is_written_exactly_in_plain_notation(nanousd: int) -> None:
    text = dumps({"cost": usd(nanousd)})
    assert "e" not in text.removeprefix('{"cost"').lower()
    read = json.loads(text, parse_float=Decimal, parse_int=Decimal)["cost"]
    assert Fraction(read) == Fraction(nanousd, 10**9)


def test_money_examples() -> None:
    assert dumps([usd(12_345), usd(0), usd(1_000_000_000), usd(1), usd(-1_500_000_000)]) == (
        "[0.000012345,0,1,0.000000001,-1.5]"
    )
    assert f"{usd_of_femto(150_000_000):f}" == "0.00000015"


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.text()
        | st.decimals(allow_nan=False, allow_infinity=False, places=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=12,
    )
)
def test_json_reads_back_as_it_was(value: Any) -> None:
    assert json.loads(dumps(value), parse_float=Decimal) == value


# Prices


@given(st.sampled_from(sorted(MODELS)), st.integers(0, 10**7), st.integers(0, 10**7), st.integers(0, 10**7))
def test_a_cost_is_the_exact_sum_rounded_up_once(
    model_id: str, prompt: int, cached: int, completion: int
) -> None:
    model, cached = MODELS[model_id], min(cached, prompt)
    listed = show_models([model])["data"][0]["pricing"]
    exact = (
        (prompt - cached) * Fraction(listed["prompt"])
        + cached * Fraction(listed.get("input_cache_read", listed["prompt"]))
        + completion * Fraction(listed["completion"])
        + Fraction(listed["request"])
    )
    cost = model.cost_nanousd(prompt_tokens=prompt, cached_tokens=cached, completion_tokens=completion)
    assert 0 <= cost - exact * 10**9 < 1


def test_a_dozen_models_of_different_prices() -> None:
    listed = show_models(MODELS.values())["data"]
    prices = {(item["pricing"]["prompt"], item["pricing"]["completion"]) for item in listed}
    assert len(prices) == len(listed) >= 12
    assert {"openai/gpt-4o", "anthropic/claude-sonnet-4.5", "sim/echo", "sim/slow", "sim/stall"} <= set(
        MODELS
    )
    for model in MODELS.values():
        assert Behaviour().told(model.manners) != Behaviour() or not model.manners


# Books


def test_a_generation_is_billed_once() -> None:
    books = Books()
    generation = books.begin("m", streamed=True, prompt_tokens=7, cached_tokens=100)
    assert (books.open_count, books.total_nanousd, generation.cached_tokens) == (1, 0, 7)
    assert bill(books, generation, 40)
    assert not bill(books, generation, 99, cancelled=True)
    assert (books.open_count, books.total_nanousd) == (0, 40)
    assert (generation.cost_nanousd, generation.cancelled) == (40, False)


async def test_wait_quiet_waits_for_the_last_one() -> None:
    books = Books()
    await books.wait_quiet(timeout_s=0.01)
    first, second = (books.begin("m", streamed=True, prompt_tokens=1) for _ in range(2))
    bill(books, first, 1)
    with pytest.raises(TimeoutError):
        await books.wait_quiet(timeout_s=0.01)
    bill(books, second, 1)
    await books.wait_quiet(timeout_s=0.01)


def test_the_books_survive_a_restart_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "books.jsonl"
    books = Books(path)
    books.load()
    billed = books.begin("m", streamed=True, prompt_tokens=3, request_id="r-1", user="u\n1")
    bill(books, billed, 11)
    books.begin("m", streamed=True, prompt_tokens=3)  # open at the kill: never billed
    books.close()
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole + whole[:cut])
        again = Books(path)
        again.load()
        assert (again.total_nanousd, again.open_count) == (11, 0)
        assert again.generations == {billed.id: billed}
        bill(again, again.begin("m", streamed=False, prompt_tokens=1), 5)
        again.close()
        last = Books(path)
        last.load()
        assert (last.total_nanousd, len(last.generations)) == (16, 2)
        last.close()


def test_a_file_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "books.jsonl"
    for text in ("{}\n", "what\n", "[1]\n", '{"id": "x", "other": 1}\n'):
        path.write_text(text)
        with pytest.raises(ValueError, match="not an entry"):
            Books(path).load()


def test_a_record_shows_after_its_delay_only() -> None:
    now = [1_700_000_000.0]
    books = Books(clock=lambda: now[0])
    late = books.begin("m", streamed=True, prompt_tokens=1, delay_s=5)
    hidden = books.begin("m", streamed=True, prompt_tokens=1, missing=True)
    assert books.find_record(late.id) is None
    bill(books, late, 1)
    bill(books, hidden, 1)
    assert books.find_record(late.id) is None
    now[0] += 5
    assert books.find_record(late.id) is late
    assert books.find_record(hidden.id) is None
    assert books.find_record("gen-unknown") is None


def test_what_the_account_pages_say() -> None:
    now = [1_700_000_000.0]
    books = Books(clock=lambda: now[0])
    bill(books, books.begin("b", streamed=True, prompt_tokens=7), 1_000_000_001)
    bill(books, books.begin("a", streamed=True, prompt_tokens=1), 2)
    now[0] += 86_400
    last = books.begin("b", streamed=True, prompt_tokens=1, user="u")
    bill(books, last, 3)
    books.begin("b", streamed=True, prompt_tokens=9)
    rows = show_activity(books, None)["data"]
    assert [(row["date"], row["model"], row["requests"]) for row in rows] == [
        ("2023-11-14", "a", 1),
        ("2023-11-14", "b", 1),
        ("2023-11-15", "b", 1),
    ]
    assert sum(row["usage"] for row in rows) == usd(books.total_nanousd) == Decimal("1.000000006")
    assert show_activity(books, "2023-11-15")["data"] == rows[2:]
    key = show_key(books, Decimal(3))["data"]
    assert (key["usage"], key["limit_remaining"]) == (Decimal("1.000000006"), Decimal("1.999999994"))
    assert show_key(books, Decimal(1))["data"]["limit_remaining"] == 0
    assert show_credits(books, Decimal(3))["data"] == {
        "total_credits": 3,
        "total_usage": Decimal("1.000000006"),
    }
    record = show_generation(last)["data"]
    assert (record["total_cost"], record["external_user"], record["native_tokens_completion"]) == (
        usd(3),
        "u",
        5,
    )
    assert record["created_at"] == "2023-11-15T22:13:20+00:00"


# Behaviour


def test_a_behaviour_is_checked() -> None:
    told = Behaviour().told(
        {"chunks": 3, "chunk_delay_ms": Decimal("0.5"), "fail_status": 503, "split_bytes": 1}
    )
    assert (told.chunks, told.fails_early) == (3, True)
    assert Behaviour().told({}) == Behaviour()
    bad: list[Any] = [{"chunkz": 1}, {1: 2}, [], "chunks", {"chunks": -1}, {"chunks": True}, {"chunks": 1.5}]
    bad += [
        {"chunks": "3"},
        {"crlf": 1},
        {"usage": "never"},
        {"usage": []},
        {"stall_s": "1"},
        {"stall_s": -1},
    ]
    bad += [
        {"fail_status": 200},
        {"split_bytes": 0},
        {"events_per_write": 0},
        {"tokens_per_chunk": 0},
        {"text": 1},
    ]
    bad += [{"fail_headers": {"A": 1}}, {"x_sim_extra": 1}, {"comments": True}, {"stall_s": float("nan")}]
    for changes in bad:
        with pytest.raises(BehaviourError):
            Behaviour().told(changes)


# Asks


def test_an_ask_is_read() -> None:
    parts = [{"type": "text", "text": "abcde"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    messages = [
        {"role": "system", "content": "éé"},
        {"role": "user", "content": parts},
        {"role": "assistant"},
    ]
    ask = read_ask(
        ask_of(messages=messages, max_tokens=9, max_completion_tokens=4, n=3, user="u", other=[1]), MODELS
    )
    assert ask.prompt_tokens == 3 + 3 * 3 + 85  # 9 bytes, three messages, one image
    assert (ask.bound, ask.choices, ask.stream, ask.user, ask.last_text) == (4, 3, False, "u", "abcde")


def test_a_bad_ask_is_refused() -> None:
    bad: list[Any] = [None, [], "x", {}, ask_of(model=None), ask_of(model=["a"]), ask_of(model="gpt-9")]
    messages: list[Any] = [None, [], {}, "hi", [1], [{}], [{"role": "user", "content": 3}]]
    bad += [ask_of(messages=value) for value in messages]
    bad += [
        ask_of(messages=[{"role": "user", "content": ["text"]}]),
        ask_of(stream="yes"),
        ask_of(logprobs=1),
    ]
    bad += [ask_of(max_tokens=value) for value in (0, -1, 1.5, "9", True)]
    bad += [ask_of(n=value) for value in (0, 129, "1")] + [ask_of(sim=3)]
    for body in bad:
        with pytest.raises(RefusedError) as refused:
            read_ask(body, MODELS)
        assert refused.value.status == 400
    with pytest.raises(RefusedError, match="gpt-9 is not a valid model ID"):
        read_ask(ask_of(model="gpt-9"), MODELS)


# The script of an answer


@given(
    chunks=st.integers(0, 12),
    reasoning_chunks=st.integers(0, 4),
    tokens_per_chunk=st.integers(1, 5),
    choices=st.integers(1, 3),
    bound=st.none() | st.integers(1, 40),
    error_after=st.none() | st.integers(0, 15),
    cut_after=st.none() | st.integers(0, 15),
)
def test_the_tokens_sent_are_the_tokens_billed(
    *,
    chunks: int,
    reasoning_chunks: int,
    tokens_per_chunk: int,
    choices: int,
    bound: int | None,
    error_after: int | None,
    cut_after: int | None,
) -> None:
    behaviour = Behaviour(
        chunks=chunks,
        reasoning_chunks=reasoning_chunks,
        tokens_per_chunk=tokens_per_chunk,
        error_after=error_after,
        cut_after=cut_after,
        comments=2,
    )
    answer = answer_of(behaviour, n=choices, max_tokens=bound)
    sent = [step for step in answer.content() if isinstance(step, Event)]
    assert sum(event.tokens for event in sent) == answer.tokens
    assert sum(event.reasoning_tokens for event in sent) == answer.reasoning_tokens <= answer.tokens
    per_choice = (chunks + reasoning_chunks) * tokens_per_chunk
    if error_after is None and cut_after is None:
        assert answer.tokens == choices * min(per_choice, per_choice if bound is None else bound)
        cut_short = bound is not None and bound < per_choice
        assert answer.finish_reason == ("length" if cut_short else "stop")
    else:
        assert answer.finish_reason == "error"


def test_the_events_of_a_stream() -> None:
    answer = answer_of(Behaviour(chunks=3), n=2)
    events = events_of(answer)
    chunks, finishes, usage, done = events[:6], events[6:8], events[8], events[9]
    assert [event["choices"][0]["index"] for event in chunks] == [0, 1] * 3
    assert "".join(event["choices"][0]["delta"]["content"] for event in chunks[::2]) == "the a of"
    assert chunks[0].keys() == {"id", "provider", "model", "object", "created", "choices"}
    assert [event["choices"][0]["finish_reason"] for event in finishes] == ["stop", "stop"]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 6
    assert usage["usage"]["cost"] == usd(answer.cost_nanousd(6))
    assert done == "[DONE]"


def test_the_places_of_usage() -> None:
    def usages(**fields: Any) -> list[Any]:
        events = events_of(answer_of(Behaviour(chunks=2, **fields)))
        return [event.get("usage", "none") for event in events if event != "[DONE]"]

    whole = usages()[-1]
    assert usages() == ["none", "none", "none", whole]
    assert usages(usage="beside_choices") == ["none", "none", whole]
    assert usages(usage="missing") == ["none", "none", "none"]
    assert usages(usage="every_chunk_null") == [None, None, None, whole]
    assert "cost" not in usages(omit_cost=True)[-1]
    assert events_of(answer_of(Behaviour(done=False)))[-1] != "[DONE]"


def test_a_tool_call_has_arguments_that_parse() -> None:
    told = 'a "quoted" wörd\n and more'
    behaviour = Behaviour(tool_calls=True, reasoning_chunks=2, text=told)
    answer = answer_of(behaviour)
    deltas = [event["choices"][0]["delta"] for event in events_of(answer)[:-3]]
    calls = [delta["tool_calls"][0] for delta in deltas[2:]]
    assert [delta["reasoning"] for delta in deltas[:2]] == ["the", " a"]
    assert calls[0]["function"]["name"] == "lookup"
    assert json.loads("".join(call["function"]["arguments"] for call in calls)) == {"text": told}
    assert answer.finish_reason == "tool_calls"
    document = json.loads(answer.document())
    message = document["choices"][0]["message"]
    assert (message["content"], message["reasoning"]) == (None, "the a")
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"text": told}
    assert document["usage"]["completion_tokens_details"]["reasoning_tokens"] == 2


@given(st.text(max_size=60))
def test_a_told_text_comes_back_whole(text: str) -> None:
    answer = answer_of(Behaviour(text=text))
    parts = [
        event["choices"][0]["delta"]["content"]
        for event in events_of(answer)
        if event != "[DONE]" and event["choices"]
    ]
    assert "".join(parts) == text
    assert json.loads(answer.document())["choices"][0]["message"]["content"] == text


def test_where_pauses_and_comments_stand() -> None:
    behaviour = Behaviour(
        chunks=3, first_delay_ms=500, chunk_delay_ms=100, comments=2, stall_after=2, stall_s=9
    )
    answer = answer_of(behaviour)
    steps = [step if isinstance(step, Pause) else step.data[:6] for step in answer.content()]
    comment = b": OPEN"
    assert steps == [
        comment,
        Pause(0.5),
        b"data: ",
        Pause(0.1),
        b"data: ",
        comment,
        Pause(9, stall=True),
        b"data: ",
    ]
    assert answer.duration_s == pytest.approx(0.7)
    last = list(answer_of(Behaviour(chunks=2, stall_after=2, stall_s=1)).content())
    assert last[-1] == Pause(1, stall=True)


def test_an_answer_that_breaks_off() -> None:
    broken = events_of(answer_of(Behaviour(chunks=5, error_after=2)))
    assert len(broken) == 3
    assert broken[2]["error"] == {"code": 502, "message": "Provider disconnected"}
    assert broken[2]["choices"][0]["finish_reason"] == "error"
    assert len(events_of(answer_of(Behaviour(chunks=5, cut_after=2, error_after=3)))) == 2
    document = json.loads(answer_of(Behaviour(chunks=5, error_after=2)).document())
    assert document["error"]["code"] == 502
    assert document["choices"][0]["message"]["content"] == "the a"


def test_unknown_fields_come_back_digit_by_digit() -> None:
    extra = {"number": Decimal("1.50"), "tricky": '"usage":{"cost":9} [DONE]\n\n'}
    answer = answer_of(Behaviour(chunks=1, x_sim_extra=extra, crlf=True, logprobs=True))
    data = b"".join(step.data for step in answer.content() if isinstance(step, Event))
    assert b'"number":1.50' in data
    assert data.endswith(b"\r\n\r\n")
    assert data.count(b"\n") == 2
    event = json.loads(data.removeprefix(b"data: "))
    assert event["choices"][0]["logprobs"]["content"][0]["token"] == "the"


def test_a_lone_surrogate_does_no_harm() -> None:
    answer = answer_of(Behaviour(text="a\ud800b"))
    assert json.loads(answer.document())["choices"][0]["message"]["content"] == "a?b"
    read_ask(ask_of(messages=[{"role": "user", "content": "\ud800"}]), MODELS)


def test_a_fee_is_added_once() -> None:
    model = SimModel("m", "M", 1, 1, request_nanousd=10)
    assert model.cost_nanousd(prompt_tokens=0, cached_tokens=0, completion_tokens=0) == 10
    assert model.cost_nanousd(prompt_tokens=1, cached_tokens=0, completion_tokens=1) == 11
