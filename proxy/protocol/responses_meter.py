"""Metering a stream of the Responses API: typed events, the last of which holds the whole answer and its usage.

Source: https://platform.openai.com/docs/api-reference/responses-streaming.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from proxy.protocol.json_document import JsonDocument, read_document, with_cost
from proxy.protocol.json_spans import scan_object, set_members
from proxy.protocol.meter import EVENT_BYTES_MAX, StreamMeter, find_error, json_event
from proxy.protocol.sse import close_event, replace_data
from proxy.protocol.transcript import ResponseTranscript, Transcript

# Types of the events that end an answer of the Responses API.
_LAST_TYPES = frozenset(("response.completed", "response.incomplete", "response.failed"))
_LAST_TYPE = re.compile(rb"response\.(?:completed|incomplete|failed)")
_NUMBER = re.compile(rb'"sequence_number": ?([0-9]{1,9})')
_RESPONSE_CHARS_MAX = 32 * 1024  # of a response's first state, kept for the day that it must be ended


class ResponseMeter(StreamMeter):
    """Meters one streamed answer of the Responses API: typed events, of which the last one holds the whole and its usage.

    That one is the ``done_event``. Source: https://platform.openai.com/docs/api-reference/responses-streaming.
    """

    usage_names: ClassVar[tuple[str, str]] = ("input_tokens", "output_tokens")
    transcript: ClassVar[type[Transcript]] = ResponseTranscript

    def __init__(
        self,
        *,
        include_usage: bool,
        event_bytes_max: int = EVENT_BYTES_MAX,
        price_usage: Callable[[Mapping[str, Any]], str | None] | None = None,
    ) -> None:
        super().__init__(
            include_usage=include_usage, event_bytes_max=event_bytes_max, price_usage=price_usage
        )
        self._response = "{}"  # as the first event shows it
        self._latest = b""  # what passed last, for the number that the next event has

    def _glance(self, events: bytes) -> bytes | None:
        if _LAST_TYPE.search(events):
            return None
        passed = super()._glance(events)
        if passed:
            self._latest = events
        return passed

    def _take(self, event: bytes) -> bytes:
        passed = super()._take(event)
        if passed:
            self._latest = event
        return passed

    def _note(self, fields: Mapping[str, Any]) -> None:
        response = fields.get("response")
        if isinstance(response, dict):
            super()._note({**response, "created": response.get("created_at")})
        elif fields.get("type") == "error" and self.error is None:
            named = fields.get("error")
            self.error = find_error({"error": named if isinstance(named, dict) else dict(fields)})
        elif self.error is None:
            self.error = find_error(fields)

    def _passed(self, event: bytes, found: JsonDocument) -> bytes:
        response = self._find_response(found)
        if response is not None and self._response == "{}" and len(response.text) <= _RESPONSE_CHARS_MAX:
            self._response = response.text
        if found.fields.get("type") not in _LAST_TYPES:
            return event
        priced = None if response is None else with_cost(response, self._price_usage)
        if priced is not None and not found.ambiguous:
            text = set_members(found.text, found.scan(), {"response": priced})
            event = replace_data(event, text.encode())
        self.done, self.done_event = True, close_event(event)
        return b""

    @staticmethod
    def _find_response(found: JsonDocument) -> JsonDocument | None:
        """Return the ``response`` inside an event, with its own text."""
        for member in found.scan():
            if member.key == "response" and isinstance(member.value, dict):
                return read_document(found.text[member.value_start : member.value_end].encode())
        return None

    def clean_end(self, *, usage_json: str | None) -> bytes:
        """Make ``done_event`` end the answer as incomplete, at its bound on tokens. Its text went before, so ``output`` is empty.

        Args:
            usage_json: what ``usage`` says, as JSON.
        """
        changes = {
            "id": json.dumps(self.generation_id or ""),
            "object": '"response"',
            "created_at": json.dumps(self.created or 0),
            "model": json.dumps(self.model or ""),
            "output": "[]",
            "status": '"incomplete"',
            "incomplete_details": '{"reason":"max_output_tokens"}',
        }
        if usage_json is not None:
            details = (
                '"input_tokens_details":{"cached_tokens":0},"output_tokens_details":{"reasoning_tokens":0}'
            )
            changes["usage"] = f"{usage_json[:-1]},{details}}}"
        response = set_members(self._response, scan_object(self._response, lenient=True), changes)
        kind = "response.incomplete"
        data = f'{{"type":"{kind}","sequence_number":{self._next_number()},"response":{response}}}'
        self.done_event = f"event: {kind}\ndata: {data}\n\n".encode()
        return b""

    def error_event(self, error: Mapping[str, Any]) -> bytes:
        """Return an error event of the Responses API, with the ``error`` object that other streams have in it, too."""
        named = {name: error.get(name) for name in ("code", "message", "param")}
        data = {"type": "error", "sequence_number": self._next_number(), **named, "error": error}
        return b"event: error\n" + json_event(data)

    def _next_number(self) -> int:
        numbers = [int(number) for number in _NUMBER.findall(self._latest)]
        return max(numbers, default=-1) + 1
