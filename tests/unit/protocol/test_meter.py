"""Metering: what passes, what is known, what is counted."""

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.protocol.meter import StreamError, StreamMeter, read_plain
from proxy.protocol.sse import EventTooLargeError

_DONE = b"data: [DONE]\n\n"


def _event(fields: Any, end: bytes = b"\n\n", *, spaced: bool = False) -> bytes:
    return b"data: " + json.dumps(fields, separators=None if spaced else (",", ":")).encode() + end


def _chunk(content: str = "x", *, index: int = 0, reason: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": index, "delta": {"content": content}, "finish_reason": reason}
    return {"id": "gen-1", "created": 17, "model": "m", "choices": [choice], **more}


def _said(meter: StreamMeter) -> list[str]:
    texts: list[str] = []

    def count(text: str) -> int:
        texts.append(text)
        return len(text)

    meter.fold(count)
    return texts


def _head(meter: StreamMeter) -> tuple[str | None, str | None, int | None]:
    return meter.generation_id, meter.model, meter.created


class _Careful(StreamMeter):
    """Reads every event."""

    def _glance(self, events: bytes) -> bytes | None:
        del events
        return None


_words = st.sampled_from(
    [
        "usage",
        "error",
        "[DONE]",
        "choices",
        "id",
        "Ω🌍\ud83c",
        '"usage":null',
        ',"usage":null}\n\n',
        '\\"error\\"',
        "a\n\nb",
    ]
)
_contents = st.text(max_size=6) | _words
_usages = st.sampled_from(
    [None, {}, {"prompt_tokens": 3, "completion_tokens": 2}, {"cost": 0.5, "prompt_tokens": 1}]
)
_choices = st.lists(
    st.fixed_dictionaries(
        {
            "index": st.integers(0, 2),
            "delta": st.dictionaries(
                st.sampled_from(
                    ["content", "reasoning", "reasoning_content", "refusal", "usage", "error", "x"]
                ),
                st.none() | _contents,
                max_size=2,
            ),
            "finish_reason": st.sampled_from([None, None, "stop"]),
        }
    ),
    max_size=2,
)
_fields = st.fixed_dictionaries(
    {},
    optional={
        "id": st.sampled_from(["gen-1", "", "gen-2"]),
        "model": _contents,
        "choices": _choices,
        "x": st.fixed_dictionaries({"usage": _usages}),
        "usage": _usages,
        "error": st.sampled_from([None, {"code": 502, "message": "gone"}, "gone"]),
        "obfuscation": st.just("aB") | _contents,
    },
)


@st.composite
def _streams(draw: st.DrawFn) -> list[bytes]:
    """Events of an answer, in every framing."""
    events = []
    for _ in range(draw(st.integers(0, 8))):
        end = draw(st.sampled_from([b"\n\n", b"\n\n", b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\n\n"]))
        kind = draw(st.integers(0, 9))
        if kind == 0:
            events.append(draw(st.sampled_from([b": OPENROUTER PROCESSING", b"event: ping", b"data:"])) + end)
        elif kind == 1:
            events.append(
                draw(st.sampled_from([b"data: {broken", b"data: 7", b"data: \xff", b'data: {"a":NaN}'])) + end
            )
        else:
            fields = draw(_fields)
            names = draw(st.permutations(sorted(fields)))
            text = json.dumps(
                {name: fields[name] for name in names},
                separators=draw(st.sampled_from([None, (",", ":")])),
                ensure_ascii=draw(st.booleans()),
            ).encode(errors="replace")
            if draw(st.integers(0, 4)) == 0:
                text = text.replace(b'"usage"', b'"\\u0075sage"').replace(b'"id"', b'"\\u0069d"')
            events.append(b"data: " + text + end)
    if draw(st.booleans()):
        events.append(_DONE)
    return events


def _run(meter: StreamMeter, pieces: list[bytes]) -> dict[str, Any]:
    out = b"".join([meter.feed(piece) for piece in pieces]) + meter.finish()
    return {
        "out": out,
        "head": _head(meter),
        "usage": meter.usage,
        "error": meter.error,
        "done": (meter.done, meter.done_event),
        "finished": meter.finished,
        "events": meter.events,
        "unfinished": meter.clean_end(usage_json="{}"),
        "said": _said(meter),
    }


@settings(max_examples=400, deadline=None)
@given(events=_streams(), asked=st.booleans(), priced=st.booleans(), data=st.data())
def test_a_glance_and_any_split_give_what_reading_everything_gives(
    events: list[bytes],
    asked: bool,
    priced: bool,
    data: st.DataObject,
) -> None:
    stream = b"".join(events)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=8)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]

    def price(_: Mapping[str, Any]) -> str | None:
        return "0.25" if priced else None

    careful = _run(_Careful(include_usage=asked, price_usage=price), [stream])
    for ways in ([stream], events, pieces, [stream[i : i + 1] for i in range(len(stream))]):
        assert _run(StreamMeter(include_usage=asked, price_usage=price), ways) == careful


def test_an_ordinary_chunk_passes_as_the_same_object() -> None:
    meter = StreamMeter(include_usage=False)
    meter.feed(_event(_chunk("first")))
    chunk = _event(_chunk("second")) + _event(_chunk("third"))
    assert meter.feed(chunk) is chunk
    assert _said(meter) == ["firstsecondthird"]


def test_the_id_is_known_before_its_event_passes() -> None:
    meter = StreamMeter(include_usage=False)
    assert meter.feed(b": OPENROUTER PROCESSING\n\n") == b": OPENROUTER PROCESSING\n\n"
    event = _event(_chunk())
    assert meter.feed(event[:-1]) == b""
    assert _head(meter) == (None, None, None)
    assert meter.feed(event[-1:]) == event
    assert _head(meter) == ("gen-1", "m", 17)


def test_an_id_that_comes_late_is_found() -> None:
    meter = StreamMeter(include_usage=False)
    anonymous = _event({"choices": [{"index": 0, "delta": {"content": "a"}}]})
    assert meter.feed(anonymous) == anonymous
    meter.feed(_event({"id": "", "choices": []}) + _event(_chunk()))
    assert meter.generation_id == "gen-1"


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
@pytest.mark.parametrize(
    ("fields", "passed"),
    [
        (_chunk(usage=None), _chunk()),
        (_chunk(usage=None, obfuscation="aB", tier=None), _chunk(obfuscation="aB", tier=None)),
        (_chunk(usage={"prompt_tokens": 1}), _chunk()),
        ({"usage": None, **_chunk()}, _chunk()),
        (
            {"id": "gen-1", "choices": [], "usage": None, "filters": []},
            {"id": "gen-1", "choices": [], "filters": []},
        ),
        ({"id": "gen-1", "choices": [], "usage": {}}, None),
        ({"id": "gen-1", "usage": {"prompt_tokens": 1}}, None),
        (_chunk(inner={"usage": None}), _chunk(inner={"usage": None})),
        (_chunk(inner={"a": 1, "usage": None}), _chunk(inner={"a": 1, "usage": None})),
        (
            {"choices": [], "usage": {"prompt_tokens": 1}, "error": {"code": 500}},
            {"choices": [], "error": {"code": 500}},
        ),
    ],
)
def test_usage_is_cut_out_for_a_client_that_did_not_ask(
    fields: dict[str, Any], passed: dict[str, Any] | None, end: bytes
) -> None:
    meter = StreamMeter(include_usage=False)
    first = _event(_chunk("first"))
    got = meter.feed(first + _event(fields, end)) + meter.finish()
    assert got == first + (b"" if passed is None else _event(passed, end))
    assert meter.usage == (fields["usage"] if isinstance(fields.get("usage"), dict) else None)


def test_usage_is_exact_and_the_last_one_counts() -> None:
    meter = StreamMeter(include_usage=True)
    stream = b"".join(
        [
            b'data: {"id":"g","choices":[{"index":0,"delta":{}}],"usage":{"completion_tokens":1,"cost":0.1}}\n\n',
            b'data: {"choices":[],"usage":{"completion_tokens":2,"cost":0.30000000000000000001}}\n\n',
            b'data: {"choices":[],"usage":null}\n\n',
        ]
    )
    assert meter.feed(stream) == stream
    assert meter.usage == {"completion_tokens": 2, "cost": Decimal("0.30000000000000000001")}


def test_cost_is_set_where_it_is_known() -> None:
    asked_about: list[Mapping[str, Any]] = []

    def price(usage: Mapping[str, Any]) -> str | None:
        asked_about.append(usage)
        return None if usage.get("cost") == 0 else "0.000125"

    meter = StreamMeter(include_usage=True, price_usage=price)
    event = b'id: 4\r\ndata:{"id":"g","choices":[],"usage": { "prompt_tokens" : 1.0}, "x":1.50}\r\n\r\n'
    expected = event.replace(b'{ "prompt', b'{"cost":0.000125, "prompt')
    assert meter.feed(event) == expected
    assert asked_about == [{"prompt_tokens": Decimal("1.0")}]
    assert meter.usage == {"prompt_tokens": Decimal("1.0")}, (
        "what the provider said stays apart from what we add"
    )
    own = _event({"choices": [], "usage": {"cost": 0}})
    assert meter.feed(own) == own
    for other in (None, 7):
        assert meter.feed(_event({"usage": {"cost": other}})) == _event({"usage": {"cost": 0.000125}})


def test_done_is_kept_back_and_ends_everything() -> None:
    meter = StreamMeter(include_usage=False)
    first = _event(_chunk())
    assert meter.feed(first + b": bye\ndata: [DONE]\r\n\r\n" + _event(_chunk("late"))) == first
    assert meter.done
    assert meter.done_event == b": bye\ndata: [DONE]\r\n\r\n"
    assert meter.feed(_event(_chunk("later"))) == b""
    assert meter.finish() == b""
    assert _said(meter) == ["x"]


def test_done_without_its_blank_line() -> None:
    meter = StreamMeter(include_usage=False)
    assert meter.feed(b"data: [DONE]\n") + meter.finish() == b""
    assert meter.done
    assert meter.done_event == _DONE


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\r"])
def test_a_last_event_without_its_blank_line_counts_and_can_be_followed(end: bytes) -> None:
    meter = StreamMeter(include_usage=False)
    got = meter.feed(_event(_chunk(reason="stop"), end)) + meter.finish()
    assert got.startswith(_event(_chunk(reason="stop"), b""))
    assert got.endswith((b"\n\n", b"\r\n\r\n"))
    assert meter.finished


def test_a_comment_cut_short_does_not_swallow_what_follows() -> None:
    meter = StreamMeter(include_usage=False)
    assert meter.feed(b": OPENROUTER PROC") + meter.finish() == b": OPENROUTER PROC\n\n"


def test_an_event_cut_short_is_dropped() -> None:
    meter = StreamMeter(include_usage=False)
    assert meter.feed(_event(_chunk())[:-10]) + meter.finish() == b""
    assert meter.events == 0


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        ({"code": 502, "message": "gone"}, StreamError("gone", "502", {"code": 502, "message": "gone"})),
        ({"code": "busy"}, StreamError("", "busy", {"code": "busy"})),
        ({"code": None, "message": 3}, StreamError("", None, {"code": None, "message": 3})),
        ("gone", StreamError("gone", None, "gone")),
        (True, StreamError("", None, True)),
        (None, None),
    ],
)
def test_errors(raw: Any, error: StreamError | None) -> None:
    meter = StreamMeter(include_usage=False)
    event = _event(_chunk(error=raw))
    assert meter.feed(event) == event
    meter.feed(_event({"error": "a second one"}))
    assert meter.error == (error or StreamError("a second one", None, "a second one"))
    assert read_plain(json.dumps({"error": raw}).encode()).error == error


def test_finished_needs_every_choice() -> None:
    meter = StreamMeter(include_usage=False)
    assert not meter.finished
    meter.feed(_event(_chunk("a", index=0)))
    meter.feed(_event(_chunk("b", index=1)))
    meter.feed(_event(_chunk("", index=0, reason="stop")))
    assert not meter.finished
    meter.feed(_event(_chunk("", index=1, reason="length"), spaced=True))
    assert meter.finished


def test_malformed_data_passes_and_counts_as_an_event() -> None:
    meter = StreamMeter(include_usage=False)
    odd = b'data: {oops "usage"\n\ndata: \xff\xfe\n\ndata: [1]\n\n'
    assert meter.feed(odd) == odd
    assert meter.events == 3


def test_a_key_named_twice_is_metered_but_not_touched() -> None:
    meter = StreamMeter(include_usage=False, price_usage=lambda _: "1")
    twice = b'data: {"id":"g","usage":{"cost":1},"choices":[{"index":0,"delta":{}}],"usage":{"cost":2.5}}\n\n'
    assert meter.feed(twice) == twice
    assert meter.usage == {"cost": Decimal("2.5")}
    inner = b'{"usage":{"a":1,"a":2}}'
    assert read_plain(inner, price_usage=lambda _: "1").body == inner


@pytest.mark.parametrize("number", ["1e999999999", "1e99999999999999999999", "NaN"])
def test_a_key_named_twice_is_no_way_around_the_bound_on_numbers(number: str) -> None:
    body = f'{{"id":"g","id":"g","usage":{{"prompt_tokens":{number}}}}}'.encode()
    usage = read_plain(body).usage
    assert usage is not None
    assert isinstance(usage["prompt_tokens"], float)


def test_an_int_of_thousands_of_digits_is_not_read() -> None:
    body = f'{{"id":"g","id":"g","usage":{{"prompt_tokens":{"9" * 5_000}}}}}'.encode()
    assert not read_plain(body).is_object
    meter = StreamMeter(include_usage=False)
    event = b"data: " + body + b"\n\n"
    assert meter.feed(event) == event
    assert meter.usage is None


def test_an_event_has_a_bound() -> None:
    meter = StreamMeter(include_usage=False, event_bytes_max=300)
    many = _event(_chunk()) * 10
    assert meter.feed(many) == many
    with pytest.raises(EventTooLargeError):
        meter.feed(_event(_chunk("y" * 300)))


def test_fold_counts_everything_that_the_model_wrote() -> None:
    meter = StreamMeter(include_usage=False)
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": ""},
        {
            "reasoning": "r1",
            "reasoning_content": "r1",
            "reasoning_details": [{"type": "reasoning.text", "text": "r1"}],
        },
        {
            "reasoning_details": [
                {"type": "reasoning.summary", "summary": "s2"},
                {"type": "reasoning.encrypted", "data": "zz"},
            ]
        },
        {"reasoning_content": "r3"},
        {"content": "c4"},
        {"content": [{"type": "text", "text": "c5"}]},
        {"refusal": "no6"},
        {"tool_calls": [{"index": 0, "id": "call", "function": {"name": "f7", "arguments": "{"}}]},
        {
            "tool_calls": [
                {"index": 0, "function": {"arguments": "}"}},
                {"custom": {"name": "g8", "input": "i9"}},
            ]
        },
        {"function_call": {"name": "h", "arguments": "[]"}},
        {"content": None, "tool_calls": "odd", "function_call": 3, "refusal": [1]},
    ]
    for delta in deltas:
        meter.feed(_event({"id": "g", "choices": [{"index": 0, "delta": delta}]}))
    meter.feed(_event({"choices": [{"index": 1, "text": "legacy"}, "odd", {"index": "odd"}]}))
    assert _said(meter) == ["r1s2r3c4c5no6f7{}g8i9h[]", "legacy"]


def test_folding_in_pieces_counts_no_word_twice() -> None:
    def words(text: str) -> int:
        return len(text.split())

    meter = StreamMeter(include_usage=False)
    pieces = ["It is", " a tru", "th univer", "sally ack", "nowledged", "."]
    for piece in pieces:
        meter.feed(_event(_chunk(piece)))
        meter.fold(words)
    assert meter.kept_bytes == 0
    assert meter.fold(words) == words("".join(pieces)) == meter.progress_tokens()


def test_a_surrogate_pair_cut_in_two_is_counted_whole() -> None:
    meter = StreamMeter(include_usage=False)
    meter.feed(_event(_chunk("\ud83c")) + _event(_chunk("\udf0d")) + _event(_chunk("\udf0d", index=1)))
    assert _said(meter) == ["🌍", "\ufffd"]


@given(st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=40), st.integers(1, 5))
def test_progress_is_at_least_a_token_per_event_and_grows(contents: list[str], fold_every: int) -> None:
    meter = StreamMeter(include_usage=False)
    before = 0
    for number, content in enumerate(contents, 1):
        meter.feed(_event(_chunk(content)))
        assert meter.progress_tokens() > before
        if number % fold_every == 0:
            meter.fold(lambda text: len(text.encode(errors="replace")))
        before = meter.progress_tokens()
    assert meter.progress_tokens() >= len(contents)


def test_progress_sees_large_events() -> None:
    meter = StreamMeter(include_usage=False)
    meter.feed(_event(_chunk("word " * 400)))
    assert meter.progress_tokens() >= 400
    meter.feed(b": OPENROUTER PROCESSING\n\n" * 1000)
    assert meter.progress_tokens() < 1000


@pytest.mark.parametrize(
    "before",
    [
        b"",
        _event({"id": "gen-1", "choices": []}),
        b'data: {"id":"gen-1","choices":[{"cut":"' + b"x" * 900 + b"\n\n",
    ],
)
def test_progress_sees_large_events_from_the_first_on(before: bytes) -> None:
    meter = StreamMeter(include_usage=False)
    meter.feed(before)
    for _ in range(5):
        meter.feed(_event({"choices": [{"index": 0, "delta": {"content": "word " * 100}}]}))
    assert meter.progress_tokens() >= 500


@pytest.mark.parametrize("asked", [False, True])
def test_clean_end(asked: bool) -> None:
    meter = StreamMeter(include_usage=asked)
    meter.feed(
        _event(_chunk("a", index=2))
        + _event(_chunk("b", index=0))
        + _event(_chunk("c", index=1, reason="stop"))
    )
    head = {"id": "gen-1", "object": "chat.completion.chunk", "created": 17, "model": "m"}
    expected = [
        _event({**head, "choices": [{"index": index, "delta": {}, "finish_reason": "length"}]})
        for index in (0, 2)
    ]
    if asked:
        expected.append(_event({**head, "choices": [], "usage": {"prompt_tokens": 5, "cost": 0.5}}))
    assert meter.clean_end(usage_json='{"prompt_tokens":5,"cost":0.5}') == b"".join(expected)
    assert meter.done_event == _DONE
    assert b'"usage"' not in meter.clean_end(usage_json=None)


def test_clean_end_before_anything_came() -> None:
    meter = StreamMeter(include_usage=True)
    chunk = json.loads(meter.clean_end(usage_json=None).removeprefix(b"data: "))
    assert chunk["choices"] == [{"index": 0, "delta": {}, "finish_reason": "length"}]
    assert meter.done_event == _DONE


def test_error_event() -> None:
    assert (
        StreamMeter(include_usage=False).error_event({"message": "a\nb", "code": None})
        == b'data: {"error":{"message":"a\\nb","code":null}}\n\n'
    )
