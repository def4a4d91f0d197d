"""Metering of plain answers, which come whole."""

import json
from decimal import Decimal

import pytest

from proxy.protocol.meter import read_plain


def test_plain_chat_completion() -> None:
    message = {
        "role": "assistant",
        "reasoning": "hm",
        "content": "Sawa",
        "tool_calls": [{"function": {"name": "f"}}],
    }
    body = (
        b" \n\n "
        + json.dumps(
            {
                "id": "gen-9",
                "model": "m",
                "choices": [{"message": message}],
                "usage": {"prompt_tokens": 1, "cost": 0.25},
            }
        ).encode()
    )
    plain = read_plain(body, price_usage=lambda _: None)
    assert plain.body is body
    assert (plain.generation_id, plain.model, plain.error, plain.is_object) == ("gen-9", "m", None, True)
    assert plain.usage == {"prompt_tokens": 1, "cost": Decimal("0.25")}
    assert plain.completion_text == "Sawahmf"


def test_plain_cost_is_added() -> None:
    body = b'\n{"id":"e", "data":[0.10], "usage":{"prompt_tokens":4}}'
    plain = read_plain(body, price_usage=lambda usage: f"0.{usage['prompt_tokens']}")
    assert plain.body == b'\n{"id":"e", "data":[0.10], "usage":{"cost":0.4,"prompt_tokens":4}}'
    assert read_plain(body, price_usage=lambda _: None).body is body
    assert read_plain(body).body is body


def test_plain_response_of_the_responses_api() -> None:
    output = [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm "}]},
        {
            "type": "message",
            "content": [{"type": "output_text", "text": "Sawa"}, {"type": "refusal", "refusal": "!"}],
        },
        {"type": "function_call", "name": "f", "arguments": "{}"},
        "odd",
    ]
    plain = read_plain(json.dumps({"id": "resp_1", "output": output, "error": None}).encode())
    assert plain.completion_text == "hm Sawa!f{}"
    assert plain.usage is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"  \n",
        b"null",
        b"[]",
        b'"x"',
        b"<html></html>",
        b'{"id":',
        b'{"a":1}{',
        b"\xff{}",
        b'{"a":' + b"[" * 100_000,
    ],
)
def test_plain_answers_that_are_none(body: bytes) -> None:
    plain = read_plain(body, price_usage=lambda _: "1")
    assert not plain.is_object
    assert plain.body is body
    assert (plain.generation_id, plain.usage, plain.error, plain.completion_text) == (None, None, None, "")


def test_plain_oddities() -> None:
    plain = read_plain(
        b'{"id":7,"model":null,"usage":[1],"choices":{"a":1},"output":"x"}', price_usage=lambda _: "1"
    )
    assert plain.is_object
    assert (plain.generation_id, plain.model, plain.usage, plain.completion_text) == (None, None, None, "")
