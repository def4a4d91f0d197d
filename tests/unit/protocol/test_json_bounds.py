"""What a JSON text weighs, told from its bytes: never less than it does, and little more than it may."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing.threads import finish
from proxy.protocol import json_bounds
from proxy.protocol.json_bounds import JsonBounds, TooMuchJsonError, weigh

MANY = JsonBounds(10**9, 10**9)
NASTY = st.text(st.sampled_from('[]{},:"\\e.\n aü'), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | NASTY,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(NASTY, inner, max_size=5),
    max_leaves=20,
)


def weight_of(value: Any) -> int:
    """What the docstrings say: containers eight, members five more, the rest one; without what fractions add."""
    if isinstance(value, dict):
        return 8 + sum(5 + weight_of(item) for item in value.values())
    return 8 + sum(map(weight_of, value)) if isinstance(value, list) else 1


def depth_of(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


@settings(max_examples=300)
@given(VALUES, st.booleans())
def test_nothing_is_weighed_too_light(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only).encode()
    weight, depth = weight_of(value), depth_of(value)
    assert weigh(text, MANY) >= weight
    with pytest.raises(TooMuchJsonError):
        weigh(text, JsonBounds(max(weight - 1, 0), 10**9))
    if depth:
        with pytest.raises(TooMuchJsonError):
            weigh(text, JsonBounds(10**9, depth - 1))
    # And what stands in texts is not: empty containers count a value more, fractions two, long numbers their digits.
    weigh(text, JsonBounds(3 * weight + len(text) // 4 + 2, depth))


@pytest.mark.parametrize("piece", [b"[],", b"{},", b'"",', b"1,", b'{"":0},', b'"\\"",', b"[[],", b"1e5,"])
def test_sixteen_megabytes_of_little_are_refused(piece: bytes) -> None:
    bounds = JsonBounds(400_000, 100)
    with pytest.raises(TooMuchJsonError):
        weigh(b'{"a":[' + piece * (16 * 1024 * 1024 // len(piece)) + b"0]}", bounds)


def test_numbers_of_thousands_of_digits_weigh_as_many_numbers() -> None:
    number = b"9" * 4_299  # one digit less than Python refuses
    weigh(b"[" + b",".join([number] * 100) + b"]", JsonBounds(120_000, 1))
    with pytest.raises(TooMuchJsonError):
        weigh(b"[" + b",".join([number] * 3_800) + b"]", JsonBounds(400_000, 1))


def test_long_texts_weigh_nothing() -> None:
    bounds = JsonBounds(1_000, 3)
    text = json.dumps({"messages": [{"role": "user", "content": 'a[{"b": [1,2,3]}]\\ ' * 50_000}]}).encode()
    assert weigh(text, bounds) < 100


def test_a_prompt_of_token_ids_is_within_the_usual_bounds() -> None:
    """OpenAI takes 300,000 tokens in one request for embeddings (platform.openai.com/docs/guides/embeddings)."""
    weigh(json.dumps({"input": [[123456] * 1000] * 300}, indent=4).encode(), JsonBounds(400_000, 100))


def test_depth() -> None:
    text = b'{"a":' + b"[" * 99 + b"]" * 99 + b"}"
    weigh(text, JsonBounds(10_000, 100))
    with pytest.raises(TooMuchJsonError):
        weigh(text, JsonBounds(10_000, 99))


@settings(max_examples=200)
@given(VALUES, st.integers(1, 7))
def test_pieces_are_weighed_as_the_whole_is(value: Any, size: int) -> None:
    text, depth = json.dumps(value).encode(), depth_of(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_bounds, "_PIECE_BYTES", size)
        weight = finish(json_bounds._weighing_outside_texts(text, MANY))
        assert weight_of(value) <= weight <= 3 * weight_of(value) + len(text) // 4 + 2
        if depth:
            with pytest.raises(TooMuchJsonError):
                weigh(text, JsonBounds(10**9, depth - 1))
        weigh(text, JsonBounds(10**9, depth))
