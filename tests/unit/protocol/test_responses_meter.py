"""Metering of the Responses API: how a response ends, and what is counted once."""

import json
from typing import Any

import pytest

from proxy.protocol.responses_meter import ResponseMeter


def _typed(kind: str, number: int, **fields: Any) -> bytes:
    data = json.dumps({"type": kind, "sequence_number": number, **fields}, separators=(",", ":"))
    return f"event: {kind}\ndata: {data}\n\n".encode()


def _begun() -> ResponseMeter:
    meter = ResponseMeter(include_usage=True)
    response = {
        "id": "resp_1",
        "object": "response",
        "created_at": 17,
        "model": "m",
        "output": [],
        "usage": None,
    }
    meter.feed(_typed("response.created", 0, response={**response, "error": None, "tools": [1.50]}))
    meter.feed(_typed("response.output_text.delta", 1, output_index=0, delta="so "))
    return meter


def test_a_response_is_ended_as_incomplete() -> None:
    meter = _begun()
    meter.feed(_typed("response.output_text.delta", 2, output_index=0, delta="far"))
    assert (
        meter.clean_end(usage_json='{"input_tokens":5,"output_tokens":2,"total_tokens":7,"cost":0.5}') == b""
    )
    name, data = meter.done_event.split(b"\n", 1)
    assert name == b"event: response.incomplete"
    end = json.loads(data.removeprefix(b"data: "))
    assert (end["type"], end["sequence_number"]) == ("response.incomplete", 3)
    response = end["response"]
    assert (response["id"], response["created_at"], response["tools"]) == ("resp_1", 17, [1.5])
    assert (response["status"], response["incomplete_details"]) == (
        "incomplete",
        {"reason": "max_output_tokens"},
    )
    assert (response["usage"]["output_tokens"], response["usage"]["cost"]) == (2, 0.5)
    assert response["usage"]["output_tokens_details"] == {"reasoning_tokens": 0}


def test_a_response_that_never_began_is_ended_too() -> None:
    meter = ResponseMeter(include_usage=True)
    meter.clean_end(usage_json=None)
    end = json.loads(meter.done_event.split(b"data: ", 1)[1])
    assert (end["sequence_number"], end["response"]["status"]) == (0, "incomplete")


def test_an_error_of_the_responses_api() -> None:
    event = _begun().error_event(
        {"message": "gone", "type": "api_error", "param": None, "code": "upstream_error"}
    )
    data = json.loads(event.removeprefix(b"event: error\ndata: "))
    assert (data["type"], data["sequence_number"], data["code"]) == ("error", 2, "upstream_error")
    assert data["error"]["message"] == data["message"] == "gone"
    meter = _begun()
    meter.feed(event)
    assert meter.error is not None
    assert (meter.error.code, meter.done) == ("upstream_error", False)
    meter = _begun()
    meter.feed(
        b'event: error\ndata: {"type":"error","code":"server_error","message":"m","sequence_number":2}\n\n'
    )
    assert meter.error is not None
    assert meter.error.code == "server_error"


@pytest.mark.parametrize("kind", ["completed", "incomplete", "failed"])
def test_the_last_event_of_a_response_is_kept_back_with_its_cost(kind: str) -> None:
    usage = {"input_tokens": 5, "output_tokens": 2}
    for text in ('"type":', '"\\u0074ype":'):  # a key may be spelled with escapes
        meter = ResponseMeter(include_usage=True, price_usage=lambda _: "0.25")
        event = _typed(f"response.{kind}", 1, response={"id": "resp_1", "usage": usage, "odd": 1.50})
        event = event.replace(b'"type":', text.encode())
        assert meter.feed(
            _typed("response.created", 0, response={"id": "resp_1"}) + event + b"data: [DONE]\n\n"
        )
        assert meter.done
        assert meter.usage == usage
        found = json.loads(meter.done_event.split(b"data: ", 1)[1])
        assert found["response"]["usage"] == {**usage, "cost": 0.25}
        assert meter.done_event.replace(b'"cost":0.25,', b"") == event
    twice = b'data: {"type":"response.completed","response":{"id":"a"},"response":{"usage":{"input_tokens":1}}}\n\n'
    meter = ResponseMeter(include_usage=True)
    assert meter.feed(twice) == b""
    assert (meter.done, meter.done_event) == (True, twice)


def test_what_is_said_twice_in_a_response_is_counted_once() -> None:
    meter = _begun()
    meter.feed(_typed("response.output_text.done", 2, output_index=0, text="so " * 1000))
    assert meter.progress_tokens() < 20
    assert meter.fold(len) == 3
