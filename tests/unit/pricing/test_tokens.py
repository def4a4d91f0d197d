"""Token counts, offline."""

import json
import socket
from fractions import Fraction
from importlib.resources import as_file, files
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing.pricing.tokens import TokenCounter

TEXTS = {
    "English": "The quick brown fox jumps over the lazy dog.",
    "code": "def f(x: int) -> int:\n    return {'a': x ** 2}['a']  # square\n",
    "Swahili": "Habari ya asubuhi, rafiki yangu. Leo ni siku njema.",
    "Yoruba": "Ẹ káàárọ̀, báwo ni ọjọ́ yín ṣe ń lọ?",
    "Arabic": "صباح الخير، كيف حالك اليوم؟",
    "Chinese": "早上好，今天天气怎么样？",
    "emoji": "👩🏽‍💻🚀 ship it 🎉🎉",
}
# Counted with tiktoken 0.14's own o200k_base and cl100k_base.
PUBLISHED = {
    "o200k_base": {"hello world": 2, "tiktoken is great!": 6},
    "cl100k_base": {"tiktoken is great!": 6},
}


@pytest.fixture(scope="module")
def counter() -> TokenCounter:
    return TokenCounter()


def test_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    fresh = TokenCounter()
    fresh.warm()
    assert fresh.count_text("gpt-4", "tiktoken is great!") == PUBLISHED["cl100k_base"]["tiktoken is great!"]
    fresh.close()


@pytest.mark.parametrize("name", ["o200k_base", "cl100k_base"])
def test_the_vocabularies_are_tiktokens_own(
    counter: TokenCounter, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """tiktoken itself, with our folder as its cache, builds the same encoding."""
    import tiktoken
    from tiktoken_ext import openai_public

    with as_file(files("config").joinpath("data", "encodings")) as folder:
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        theirs = tiktoken.Encoding(**getattr(openai_public, name)())
    ours = counter._encoding(name)
    assert ours._pat_str == theirs._pat_str
    assert ours._special_tokens == theirs._special_tokens
    for text in TEXTS.values():
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)
    for text, tokens in PUBLISHED[name].items():
        assert len(ours.encode_ordinary(text)) == tokens


def test_special_tokens_in_a_text_are_text(counter: TokenCounter) -> None:
    assert counter.count_text("gpt-4o", "<|endoftext|>") > 1


@pytest.mark.parametrize(
    ("model", "name", "safety"),
    [
        ("gpt-4o", "o200k_base", 1),
        ("openai/gpt-4o-mini", "o200k_base", 1),
        ("gpt-4.1-nano", "o200k_base", 1),
        ("openai/gpt-5", "o200k_base", 1),
        ("o4-mini", "o200k_base", 1),
        ("chatgpt-4o-latest", "o200k_base", 1),
        ("gpt-4", "cl100k_base", 1),
        ("gpt-4-turbo", "cl100k_base", 1),
        ("openai/gpt-3.5-turbo", "cl100k_base", 1),
        ("text-embedding-3-small", "cl100k_base", 1),
        ("anthropic/claude-sonnet-4.5", "o200k_base", Fraction(3, 2)),
        ("someone/new-model", "o200k_base", Fraction(3, 2)),
        ("my-own-llama", "o200k_base", Fraction(3, 2)),
    ],
)
def test_which_vocabulary_counts(model: str, name: str, safety: Fraction) -> None:
    choice = TokenCounter.encoding_for(model)
    assert (choice.name, choice.safety) == (name, safety)


def test_messages_have_their_overhead(counter: TokenCounter) -> None:
    one = counter.count_prompt({"messages": [{"role": "user", "content": "hello world"}]}, "gpt-4o").tokens
    assert one == 3 + 3 + 1 + 2  # priming, message, role, text
    named = counter.count_prompt(
        {"messages": [{"role": "user", "content": "hello world", "name": "ada"}]}, "gpt-4o"
    )
    assert named.tokens > one
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert (
        counter.count_prompt(
            {"messages": [{"role": "user", "content": "x"}], "tools": tools}, "gpt-4o"
        ).tokens
        > 20
    )


def test_images_audio_and_files_have_figures_and_are_not_read(counter: TokenCounter) -> None:
    payload = "A" * 400_000

    def count(part: dict[str, Any]) -> Any:
        return counter.count_prompt({"messages": [{"role": "user", "content": [part]}]}, "gpt-4o")

    high = count({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{payload}"}})
    low = count({"type": "image_url", "image_url": {"url": "https://x/y.png", "detail": "low"}})
    assert (high.images, low.images) == (1, 1)
    assert 1445 <= high.tokens < 1500
    assert 85 <= low.tokens < 120
    audio = count({"type": "input_audio", "input_audio": {"data": payload, "format": "mp3"}})
    assert 1_000 < audio.tokens < 3_000
    file = count(
        {"type": "file", "file": {"filename": "a.pdf", "file_data": f"data:application/pdf;base64,{payload}"}}
    )
    assert file.open_ended
    assert not high.open_ended
    assert not audio.open_ended
    assert counter.count_prompt({"input": [{"type": "input_image", "image_url": "x"}]}, "acme/new").open_ended
    mini = counter.count_prompt({"input": [{"type": "input_image", "image_url": "x"}]}, "openai/gpt-4o-mini")
    assert mini.tokens >= 2_833 + 8 * 5_667, "OpenAI bills images dearly on this one"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "file", "text": "", "file": {"file_data": "data:application/pdf;base64," + "A" * 400_000}},
        {"type": "image_url", "text": "", "image_url": {"url": "https://x/y.png"}},
        {"type": "input_audio", "text": "", "input_audio": {"data": "A" * 400_000, "format": "mp3"}},
        {"type": "refusal", "text": "", "refusal": "word " * 100_000},
        {"type": "refusal", "refusal": "word " * 100_000},
        {"type": "nobody_knows", "what": "word " * 100_000},
    ],
    ids=["file", "image", "audio", "refusal with text", "refusal", "unknown"],
)
def test_a_part_counts_as_what_it_is_whatever_stands_beside(
    counter: TokenCounter, part: dict[str, Any]
) -> None:
    least = {"image_url": 1_445, "input_audio": 1_000, "file": 1_445}.get(part["type"], 90_000)
    asks: list[dict[str, Any]] = [{"messages": [{"role": "assistant", "content": [part]}]}, {"input": [part]}]
    for ask in asks:
        assert counter.count_prompt(ask, "gpt-4o").tokens >= least


def test_a_message_counts_whatever_stands_beside(counter: TokenCounter) -> None:
    item = {"role": "user", "text": "", "content": "word " * 1_000}
    assert counter.count_prompt({"input": [item]}, "gpt-4o").tokens > 1_000


def test_long_texts_are_counted_in_bounded_time(counter: TokenCounter) -> None:
    assert counter.count_text("gpt-4o", "a" * 1_000_000) > 100_000
    assert counter.count_text("gpt-4o", "x" * 2_500_000) > 800_000


async def test_large_prompts_are_counted_off_the_loop(counter: TokenCounter) -> None:
    import threading

    seen: list[str] = []
    count = counter._count

    def spy(name: str, text: str) -> Any:
        seen.append(threading.current_thread().name)
        return (yield from count(name, text))

    counter._count = spy  # type: ignore[method-assign]
    ask = {"messages": [{"role": "user", "content": "word " * 20_000}]}
    large = await counter.count_prompt_async(ask, "gpt-4o", 100_000)
    small = await counter.count_prompt_async({"messages": [{}], "prompt": "hi"}, "gpt-4o", 10)
    counter._count = count  # type: ignore[method-assign]
    assert large.tokens > 20_000
    assert small.tokens == 7
    assert seen[0].startswith("tokens")
    assert seen[-1] == threading.main_thread().name


def test_items_of_a_response_count_as_what_they_say() -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "lookup", "arguments": '{"q":"x"}'}
    said = {"type": "function_call_output", "call_id": "c1", "output": "42"}
    image = {
        **said,
        "output": [{"type": "input_image", "image_url": "data:image/png;base64," + "A" * 100_000}],
    }
    assert 10 < _SHARED.count_prompt({"input": [call]}, "gpt-4o").tokens < 60
    assert 5 < _SHARED.count_prompt({"input": [said]}, "gpt-4o").tokens < 40
    assert _SHARED.count_prompt({"input": [{**said, "output": "word " * 500}]}, "gpt-4o").tokens > 500
    counted = _SHARED.count_prompt({"input": [image]}, "gpt-4o")
    assert (counted.images, counted.tokens < 1_600) == (1, True)


def test_tools_count_wherever_they_stand() -> None:
    """Codex sends them as the first item of the input: https://github.com/openai/codex."""
    tools = [{"type": "function", "name": "lookup", "description": "Looks a word up. " * 50}]
    said = {"type": "message", "role": "user", "content": "hi"}
    added = {"type": "additional_tools", "role": "developer", "tools": tools}
    beside = _SHARED.count_prompt({"tools": tools, "input": [said]}, "gpt-4o").tokens
    among = _SHARED.count_prompt({"input": [added, said]}, "gpt-4o").tokens
    assert beside <= among <= beside + 20


@pytest.mark.parametrize(
    ("member", "part"),
    [("messages", {}), ("input", {"type": "function_call_output"})],
    ids=["chat", "response"],
)
def test_nesting_has_an_end(member: str, part: dict[str, Any]) -> None:
    nested: Any = "word " * 50
    for _ in range(450):
        nested = {**part, "output" if part else "content": nested}
    assert _SHARED.count_prompt({member: [nested]}, "gpt-4o").tokens > 50


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=200)
@given(
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("messages", "prompt", "input", "tools", "response_format"), json_values)
    )
)
def test_nothing_odd_raises(ask: dict[str, Any]) -> None:
    counter = _SHARED
    assert counter.count_prompt(ask, "gpt-4o").tokens >= 0
    json.dumps(ask)


_SHARED = TokenCounter()


@given(st.text(st.characters(), max_size=300))
def test_counts_never_exceed_the_bytes(text: str) -> None:
    assert _SHARED.count_text("gpt-4o", text) <= max(len(text.encode("utf-8", "replace")) * 3, 1)


def test_a_long_text_counts_the_same_when_it_comes_again() -> None:
    counter = TokenCounter(remembered=2)
    texts = [f"{word} " * 2_000 for word in ("wallet", "money", "pesa")]
    first = [counter.count_text("gpt-4o", text) for text in texts]
    assert first == [_SHARED.count_text("gpt-4o", text) for text in texts]
    assert first == [counter.count_text("gpt-4o", text) for text in texts]
    # Another vocabulary counts otherwise, and is not answered with what the first one counted.
    assert counter.count_text("gpt-4", texts[2]) == _SHARED.count_text("gpt-4", texts[2]) != first[2]
    assert len(counter._remembered) == 2


_PARTS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(
            ["text", "image_url", "input_audio", "file", "refusal", "function_call", "odd"]
        ),
        "text": st.text(st.characters(), max_size=40),
        "content": st.text(max_size=20) | st.lists(json_values, max_size=2),
        "output": json_values,
        "refusal": json_values,
        "name": json_values,
        "input_audio": json_values,
    },
)


@settings(max_examples=300)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(("prompt", "input", "tools", "response_format", "instructions"), json_values),
            "messages": st.lists(
                st.fixed_dictionaries({"content": st.lists(_PARTS, max_size=3)}) | _PARTS, max_size=4
            ),
        },
    ),
    st.sampled_from(["gpt-4o", "gpt-4", "anthropic/claude-sonnet-4.5", "someone/new"]),
)
def test_a_bound_is_never_below_the_count(ask: dict[str, Any], model: str) -> None:
    bound, counted = _SHARED.bound_prompt(ask, model), _SHARED.count_prompt(ask, model)
    assert bound.tokens >= counted.tokens
    assert (bound.images, bound.bound, counted.bound) == (counted.images, True, False)


@pytest.mark.parametrize(
    "text",
    [
        "\ud800" * 500,
        "\x00\x01" * 3_000,
        "🏽‍💻" * 4_000,
        "x" * 2_000_001,
        "é" * 2_000_001,
        "\U0010ffff" * 700,
    ],
)
def test_a_bound_is_never_below_the_count_of_odd_texts(text: str) -> None:
    ask = {"messages": [{"role": "user", "content": text}]}
    for model in ("gpt-4o", "gpt-4"):
        assert _SHARED.bound_prompt(ask, model).tokens >= _SHARED.count_prompt(ask, model).tokens
