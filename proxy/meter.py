"""Metering an answer as its bytes pass. Pure.

Protocols: OpenAI's chat completion chunks (``stream_options.include_usage`` puts the usage into a last chunk without
choices) and OpenRouter's (comments while it waits, usage with its cost beside or after the last choice, errors as
events). The common chunk is recognised by a few byte searches and passed on without being parsed; whatever could
matter to the bill, or should not reach the client, goes the long way.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from proxy.jsonspan import JsonSpanError, Member, scan_object, set_members
from proxy.sse import EventSplitter, event_data, with_data

_EVENT_BYTES_MAX = 4 * 1024 * 1024
_BYTES_PER_TOKEN = 3
_ENVELOPE_SLACK = 24  # later chunks lack the first one's role
_TEXT_FIELDS = ("content", "reasoning", "reasoning_content", "refusal")

PriceUsage = Callable[[Mapping[str, Any]], str | None]


@dataclass(frozen=True, slots=True)
class StreamError:
    """An error that the provider sent inside an answer; ``raw`` is its error object."""

    message: str
    code: str | None
    raw: Mapping[str, Any]


class StreamMeter:
    """Meters one streamed chat completion.

    Args:
        include_usage: whether the client asked for the usage chunk; else usage is kept from it.
        choices: how many choices were asked for (``n``).
        event_bytes_max: bytes of one event at most.
        price_usage: gives ``usage.cost`` as JSON text where the provider sends none.
    """

    def __init__(
        self,
        *,
        include_usage: bool,
        choices: int = 1,
        event_bytes_max: int = _EVENT_BYTES_MAX,
        price_usage: PriceUsage | None = None,
    ) -> None:
        self.generation_id: str | None = None
        self.model: str | None = None
        self.created: int | None = None
        self.usage: Mapping[str, Any] | None = None
        self.error: StreamError | None = None
        self.done = False
        self.done_event = b""
        self.events = 0
        self.kept_bytes = 0
        self._include_usage = include_usage
        self._choices = choices
        self._price_usage = price_usage
        self._splitter = EventSplitter(pending_max=event_bytes_max)
        self._kept: list[bytes] = []
        self._kept_events = 0
        self._folded_tokens = 0
        self._envelope = 0
        self._seen: set[int] = set()
        self._finished: set[int] = set()

    @property
    def finished(self) -> bool:
        """Whether every choice has its ``finish_reason``."""
        return len(self._finished) >= max(self._choices, len(self._seen))

    def feed(self, data: bytes) -> bytes:
        """Take bytes as they came; return what goes on to the client now: whole events.

        ``[DONE]`` is kept back, and nothing after it is passed: the relay sends it when the call's end is decided.

        Raises:
            EventTooLargeError: an event exceeds the bound.
        """
        if self.done:
            return b""
        if not self._splitter.pending and self._is_common(data):
            events = data.count(b"\n\n")
            self.events += events
            self._keep(data, events)
            return data
        return b"".join([self._pass_event(event) for event in self._splitter.feed(data)])

    def _is_common(self, data: bytes) -> bool:
        """Tell whether these bytes are whole content chunks and nothing else. The order puts the likeliest no first."""
        return (
            data.endswith(b"\n\n")
            and self.generation_id is not None
            and data.startswith(b"data: {")
            and b'"usage"' not in data
            and data.count(b'"finish_reason":null') == data.count(b'"finish_reason"')
            and b'"error"' not in data
            and b"[DONE]" not in data
            and b'"choices":[{' in data
            and data.count(b"\n\n") == data.count(b"data: {")
            and b"\r" not in data
            and self._choices == 1
        )

    def _keep(self, data: bytes, events: int) -> None:
        self._kept.append(data)
        self.kept_bytes += len(data)
        self._kept_events += events

    def _pass_event(self, event: bytes) -> bytes:
        data = event_data(event)
        if self.done or data is None:
            return b"" if self.done else event
        if data.strip() == b"[DONE]":
            self.done, self.done_event = True, event
            return b""
        try:
            members = scan_object(data.decode("utf-8"), exact_numbers=True)
        except (JsonSpanError, UnicodeDecodeError):
            self.events += 1
            return event
        fields = {member.key: member.value for member in members}
        self._note(fields, event)
        if "usage" not in fields:
            return event
        return self._pass_usage(event, data, members, fields)

    def _note(self, fields: Mapping[str, Any], event: bytes) -> None:
        if self.generation_id is None and isinstance(fields.get("id"), str) and fields["id"]:
            self.generation_id = fields["id"]
            self.model = fields.get("model") if isinstance(fields.get("model"), str) else None
            self.created = fields.get("created") if isinstance(fields.get("created"), int) else None
        if fields.get("error") is not None and self.error is None:
            self.error = _stream_error(fields["error"])
        if isinstance(fields.get("usage"), Mapping):
            self.usage = fields["usage"]
        choices = fields.get("choices")
        if isinstance(choices, list) and choices:
            self.events += 1
            self._keep(event, 1)
            if not self._envelope:
                self._envelope = max(len(event) - _ENVELOPE_SLACK, 1)
            for choice in choices:
                self._note_choice(choice)

    def _note_choice(self, choice: object) -> None:
        if not isinstance(choice, Mapping):
            return
        index = choice.get("index", 0)
        if isinstance(index, int):
            self._seen.add(index)
            if choice.get("finish_reason") is not None:
                self._finished.add(index)

    def _pass_usage(self, event: bytes, data: bytes, members: list[Member], fields: Mapping[str, Any]) -> bytes:
        text = data.decode("utf-8")
        usage = fields["usage"]
        if not self._include_usage:
            if usage is not None and not fields.get("choices"):
                return b""
            return with_data(event, data, set_members(text, members, {"usage": None}).encode())
        priced = _with_cost(text, members, usage, self._price_usage)
        return event if priced is None else with_data(event, data, priced.encode())

    def finish(self) -> bytes:
        """Return what goes on at the end of the stream: an event that lacked only its blank line."""
        rest = self._splitter.flush()
        return self._pass_event(rest) if rest and not self.done else b""

    def progress_tokens(self) -> int:
        """Return roughly how many completion tokens passed so far, rather more than fewer; nothing is parsed."""
        text_bytes = max(self.kept_bytes - self._kept_events * self._envelope, 0)
        return self._folded_tokens + self._kept_events + text_bytes // _BYTES_PER_TOKEN

    def fold(self, count_text: Callable[[str], int]) -> int:
        """Count exactly what passed so far, and let go of the bytes kept for it.

        Args:
            count_text: counts tokens of a text.

        Returns:
            completion tokens so far.
        """
        texts: dict[int, list[str]] = {}
        splitter = EventSplitter(pending_max=self.kept_bytes + 1)
        for kept in self._kept:
            for event in splitter.feed(kept):
                _collect(event, texts)
        if splitter.pending:
            _collect(splitter.flush(), texts)
        self._folded_tokens += sum(count_text("".join(pieces)) for pieces in texts.values())
        self._kept.clear()
        self.kept_bytes = self._kept_events = 0
        return self._folded_tokens

    def clean_end(self, *, usage_json: str) -> bytes:
        """Return the events that end the answer as if it had reached its bound, usage and ``[DONE]`` included."""
        head = {
            "id": self.generation_id or "",
            "object": "chat.completion.chunk",
            "created": self.created or 0,
            "model": self.model or "",
        }
        out = []
        for index in sorted((self._seen or {0}) - self._finished):
            choice = {"index": index, "delta": {}, "finish_reason": "length"}
            out.append(f"data: {json.dumps({**head, 'choices': [choice]})}\n\n")
        if self._include_usage:
            out.append(f'data: {json.dumps({**head, "choices": []})[:-1]}, "usage": {usage_json}}}\n\n')
        return ("".join(out) + "data: [DONE]\n\n").encode()


def _collect(event: bytes, texts: dict[int, list[str]]) -> None:
    try:
        chunk = json.loads(event_data(event) or b"null")
    except (ValueError, RecursionError):
        return
    choices = chunk.get("choices") if isinstance(chunk, dict) else None
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict):
            pieces = texts.setdefault(choice.get("index", 0), [])
            pieces.extend(_texts_of(choice.get("delta") or choice.get("message")))
            if isinstance(choice.get("text"), str):
                pieces.append(choice["text"])


def _texts_of(message: object) -> list[str]:
    """Return what of a message or delta was generated: text, reasoning, and calls of tools."""
    if not isinstance(message, Mapping):
        return []
    found = [message[name] for name in _TEXT_FIELDS if isinstance(message.get(name), str)]
    calls = message.get("tool_calls")
    functions = [call.get("function") for call in calls if isinstance(call, Mapping)] if isinstance(calls, list) else []
    for function in (*functions, message.get("function_call")):
        if isinstance(function, Mapping):
            found += [function[name] for name in ("name", "arguments") if isinstance(function.get(name), str)]
    return found


def _with_cost(text: str, members: list[Member], usage: object, price_usage: PriceUsage | None) -> str | None:
    """Return the object with ``usage.cost`` added; None where it has one, or none can be given."""
    if price_usage is None or not isinstance(usage, Mapping) or usage.get("cost") is not None:
        return None
    cost = price_usage(usage)
    if cost is None:
        return None
    member = next(member for member in members if member.key == "usage")
    inner = text[member.value_start : member.end]
    try:
        priced = set_members(inner, scan_object(inner), {"cost": cost})
    except JsonSpanError:
        return None
    return set_members(text, members, {"usage": priced})


def _stream_error(error: object) -> StreamError:
    if isinstance(error, Mapping):
        code = error.get("code")
        return StreamError(str(error.get("message") or "error"), None if code is None else str(code), error)
    return StreamError(str(error), None, {"message": str(error)})


def error_event(error: Mapping[str, Any]) -> bytes:
    """Return an error as an event, for an answer whose headers are sent already."""
    return f"data: {json.dumps({'error': error}, default=str)}\n\n".encode()


@dataclass(frozen=True, slots=True)
class PlainAnswer:
    """A plain answer; ``body`` is what goes on to the client, ``usage`` the provider's with exact numbers."""

    body: bytes
    is_object: bool = False
    generation_id: str | None = None
    usage: Mapping[str, Any] | None = None
    error: StreamError | None = None
    completion_text: str = ""
    has_answer: bool = False


def read_plain(body: bytes, *, price_usage: PriceUsage | None = None) -> PlainAnswer:
    """Read a plain answer; its bytes stay as they are, but for ``usage.cost`` where the provider sends none."""
    try:
        text = body.decode("utf-8")
        members = scan_object(text, exact_numbers=True)
    except (JsonSpanError, UnicodeDecodeError):
        return PlainAnswer(body)
    fields = {member.key: member.value for member in members}
    usage = fields.get("usage") if isinstance(fields.get("usage"), Mapping) else None
    priced = _with_cost(text, members, usage, price_usage)
    texts: list[str] = []
    choices = fields.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, Mapping):
            texts += _texts_of(choice.get("message"))
            if isinstance(choice.get("text"), str):
                texts.append(choice["text"])
    generation_id = fields.get("id")
    return PlainAnswer(
        body=body if priced is None else priced.encode(),
        is_object=True,
        generation_id=generation_id if isinstance(generation_id, str) and generation_id else None,
        usage=usage,
        error=_stream_error(fields["error"]) if fields.get("error") is not None else None,
        completion_text="".join(texts),
        has_answer=bool(choices),
    )

