"""Golden transcripts: streams as providers send them (``*.sse``), and what a client gets that asked for no usage (``*.client``)."""

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.protocol.meter import CompletionMeter, StreamMeter
from proxy.protocol.responses_meter import ResponseMeter

_HERE = Path(__file__).parent
_OPENAI = ("chatcmpl-CaB1xQ2", "gpt-4o-mini-2024-07-18", 1762330001)
_OPENROUTER = ("gen-1762330055-hQ7wTn", "meta-llama/llama-3.3-70b-instruct", 1762330055)
_MISTRAL = ("cmpl-crlf-7", "mistral-small", 1762330400)


@dataclass(frozen=True)
class Golden:
    head: tuple[str | None, str | None, int | None]
    texts: tuple[str, ...]
    events: int
    tokens: tuple[int, int] | None = None  # prompt, completion
    cost: Decimal | None = None
    done: bool = True
    finished: bool = True
    error_code: str | None = None
    meter: type[StreamMeter] = StreamMeter


GOLDEN = {
    "openai": Golden(_OPENAI, ("Habari! Karibu 🌍.",), 6, (19, 5)),
    "openrouter": Golden(_OPENROUTER, ("One, two, three and four.",), 6, (21, 4), cost=Decimal("0.00000512")),
    "vllm": Golden(("chatcmpl-0d5e0a", "Qwen/Qwen2.5-7B-Instruct", 1762330100), ("你好，世界",), 6, (30, 5)),
    "anthropic_reasoning": Golden(
        ("gen-1762330200-Zr4m", "anthropic/claude-sonnet-4", 1762330200),
        ("The user asks for a sum.2 + 2 = 4",),
        6,
        (44, 31),
        cost=Decimal("0.000597"),
    ),
    "azure": Golden(("chatcmpl-Az9", "gpt-4o-2024-11-20", 1762330300), ("Hello there",), 4, (9, 3)),
    "tool_calls": Golden(
        _OPENAI, ('get_weather{"city":"Nairobi","usage":"error","note":"[DONE]"}get_time{}',), 7, (81, 40)
    ),
    "two_choices": Golden(_OPENAI, ("Heads.", "Tails!"), 7, (7, 4)),
    "crlf": Golden(_MISTRAL, ("Bonjour à tous",), 4, (6, 4)),
    "mixed_line_ends": Golden(_MISTRAL, ("ABC",), 3, (2, 3)),
    "error_midway": Golden(_OPENROUTER, ("Let me think",), 3, error_code="502"),
    "error_first": Golden((None, None, None), (), 0, done=False, finished=False, error_code="429"),
    "usage_beside_choices": Golden(_MISTRAL, ("Sawa sawa",), 4, (11, 3)),
    "usage_missing": Golden(_MISTRAL, ("no counts here",), 4),
    "tricky_content": Golden(
        _MISTRAL,
        ('usageerror[DONE]data: [DONE]\n\n{"usage":{"cost":1}}"finish_reason":"stop" x',),
        9,
        (3, 9),
    ),
    "cut_midway": Golden(_MISTRAL, ("half a",), 2, done=False, finished=False),
    "no_last_blank_line": Golden(_MISTRAL, ("done",), 1, (3, 1)),
    "completions": Golden(
        ("cmpl-7", "gpt-3.5-turbo-instruct", 1762330600), (" there was",), 3, (3, 2), meter=CompletionMeter
    ),
    # Its texts are once in deltas, and again in the events after them; its end is the event that has usage.
    "responses": Golden(
        ("resp_68af4030baa48193b0b43b4c2a176a1a", _OPENAI[1], 1762330500),
        ('Habari ya "response.completed" 🌍.', '{"q":"delta"}'),
        7,
        (14, 11),
        cost=None,
        finished=False,
        meter=ResponseMeter,
    ),
    "responses_failed": Golden(
        ("resp_f", _OPENAI[1], 1762330500),
        ("Let me",),
        1,
        finished=False,
        error_code="server_error",
        meter=ResponseMeter,
    ),
}
_NAMES = sorted(GOLDEN)


def _bytes(name: str) -> bytes:
    return (_HERE / f"{name}.sse").read_bytes()


def _run(name: str, pieces: Iterable[bytes], *, include_usage: bool = False) -> dict[str, Any]:
    meter = GOLDEN[name].meter(include_usage=include_usage, price_usage=lambda _: "0.25")
    out = b"".join([meter.feed(piece) for piece in pieces]) + meter.finish()
    texts: list[str] = []

    def count(text: str) -> int:
        texts.append(text)
        return len(text)

    return {
        "out": out,
        "head": (meter.generation_id, meter.model, meter.created),
        "usage": meter.usage,
        "error": meter.error,
        "done": (meter.done, meter.done_event),
        "finished": meter.finished,
        "events": meter.events,
        "tokens": meter.fold(count),
        "texts": tuple(texts),
    }


def test_every_transcript_is_expected() -> None:
    assert sorted(path.stem for path in _HERE.glob("*.sse")) == _NAMES


@pytest.mark.parametrize("name", _NAMES)
def test_metering_and_what_the_client_gets(name: str) -> None:
    golden, found = GOLDEN[name], _run(name, [_bytes(name)])
    assert found["out"] == (_HERE / f"{name}.client").read_bytes()
    assert found["head"] == golden.head
    assert found["texts"] == golden.texts
    assert found["tokens"] == sum(map(len, golden.texts))
    assert found["events"] == golden.events
    assert found["done"][0] is golden.done
    assert found["finished"] is golden.finished
    assert (found["error"].code if found["error"] else None) == golden.error_code
    usage = found["usage"]
    prompt, completion = golden.meter.usage_names
    assert (usage and (usage[prompt], usage[completion])) == golden.tokens
    assert (usage and usage.get("cost")) == golden.cost


@pytest.mark.parametrize("name", sorted(set(_NAMES) - {"cut_midway", "no_last_blank_line"}))
def test_nothing_changes_for_a_client_that_asked_for_usage(name: str) -> None:
    whole = _bytes(name)
    meter = GOLDEN[name].meter(include_usage=True)
    out = meter.feed(whole) + meter.finish()
    assert whole.startswith(out + meter.done_event)
    assert meter.done or out == whole


@pytest.mark.parametrize("name", _NAMES)
def test_one_byte_at_a_time(name: str) -> None:
    whole = _bytes(name)
    for asked in (False, True):
        bytewise = _run(name, [whole[i : i + 1] for i in range(len(whole))], include_usage=asked)
        assert bytewise == _run(name, [whole], include_usage=asked)


@pytest.mark.parametrize("name", _NAMES)
def test_every_split_in_two(name: str) -> None:
    whole = _bytes(name)
    expected = _run(name, [whole])
    for at in range(1, len(whole)):
        assert _run(name, [whole[:at], whole[at:]]) == expected, at


@settings(max_examples=150, deadline=None)
@given(data=st.data(), name=st.sampled_from(_NAMES), asked=st.booleans())
def test_any_split(data: st.DataObject, name: str, asked: bool) -> None:
    whole = _bytes(name)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)), max_size=12)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert _run(name, pieces, include_usage=asked) == _run(name, [whole], include_usage=asked)
