"""Counting the tokens of an answer that a provider does not count: kept raw while it streams, read in batches.

Reading an event costs far more than passing it on, and most providers send usage at the end. So events are kept as
they came, their number and size give a cheap estimate, and only ``fold`` reads them.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from proxy.protocol.sse import EventSplitter, event_data

_TAIL_CHARACTERS = 64  # text counted before, so that a word cut in two by folding is not counted as two
_REASONING_NAMES = (
    "reasoning",
    "reasoning_content",
)  # OpenRouter; DeepSeek and vLLM. Some send both, the same twice.

_NO_TEXT = ("response.audio.delta",)  # base64


@dataclass(slots=True)
class _Choice:
    finished: bool = False
    pieces: list[str] = field(default_factory=list)
    tail: str = ""


class Transcript:
    """What the choices of one streamed answer said."""

    mark: ClassVar[bytes] = b'"choices"'  # is once in every event that says something

    def __init__(self) -> None:
        self._raw: list[bytes] = []
        self._choices: dict[int, _Choice] = {}
        self._events = 0
        self._tokens = 0
        self._fresh_events = 0
        self._envelope_bytes: int | None = None
        self.kept_bytes = 0

    def keep_read(self, event: bytes, fields: Mapping[str, Any]) -> None:
        """Keep a whole event that was read already, if it says something."""
        if self._says(fields):
            self.keep(event, fields)

    def keep(self, events: bytes, fields: Mapping[str, Any] | None = None) -> None:
        """Keep whole events.

        Args:
            events: raw, one or more.
            fields: those of a single event, if it was read already.
        """
        count = events.count(self.mark)
        if not count and b"data" not in events:
            return  # nothing but comments
        size = len(events)
        self._raw.append(events)
        self.kept_bytes += size
        if not count:
            self._fresh_events += 1
            return
        self._fresh_events += count
        if fields is not None:
            self._note_envelope(size - len(self._text_of(fields).encode(errors="surrogatepass")))
        elif self._envelope_bytes is None:
            self._note_first_envelope(events)
        else:
            self._note_envelope(size // count)

    def _note_envelope(self, size: int) -> None:
        if self._envelope_bytes is None or size < self._envelope_bytes:
            self._envelope_bytes = max(0, size)

    def _note_first_envelope(self, events: bytes) -> None:
        """Read one event: taken whole for an envelope, it would hide that much of every later one."""
        event = next(iter(EventSplitter(len(events)).feed(events)), b"")
        fields = _read_fields(event_data(event) or b"")
        if fields is not None:
            text = self._text_of(fields)
            self._note_envelope(len(event) - len(text.encode(errors="surrogatepass")))

    def estimate(self, bytes_per_token: int) -> int:
        """Return about how many tokens there are: at least one per event, and more where events are large.

        What every event repeats (id, model, names of members) is taken to be as large as in the smallest one.
        """
        content_bytes = self.kept_bytes - self._fresh_events * (self._envelope_bytes or 0)
        return self._tokens + self._fresh_events + max(0, content_bytes) // bytes_per_token

    @property
    def least(self) -> int:
        """Tokens, if each event since the last ``fold`` has one."""
        return self._tokens + self._fresh_events

    def fold(self, count_text: Callable[[str], int]) -> int:
        """Count what was kept since the last time, drop it, and return the count of everything so far."""
        self._read()
        for choice in self._choices.values():
            if not choice.pieces:
                continue
            text = choice.tail + "".join(choice.pieces)
            before = count_text(_well_formed(choice.tail)) if choice.tail else 0
            self._tokens += max(0, count_text(_well_formed(text)) - before)
            choice.pieces.clear()
            choice.tail = text[-_TAIL_CHARACTERS:]
        self.kept_bytes = self._fresh_events = 0
        return self._tokens

    @property
    def events(self) -> int:
        """Events that carried choices, or could not be read."""
        self._read()
        return self._events

    @property
    def finished(self) -> bool:
        """Whether there are choices, and all have ended."""
        self._read()
        return bool(self._choices) and not self.unfinished()

    def unfinished(self) -> list[int]:
        """Return the indices of the choices that have not ended; the first one if none has begun."""
        self._read()
        if not self._choices:
            return [0]
        return sorted(index for index, choice in self._choices.items() if not choice.finished)

    def _read(self) -> None:
        if not self._raw:
            return
        raw = b"".join(self._raw)
        self._raw.clear()
        splitter = EventSplitter(len(raw))
        for event in (*splitter.feed(raw), splitter.flush()):
            data = event_data(event)
            if data is not None and data.strip():
                self._read_event(data)

    def _read_event(self, data: bytes) -> None:
        fields = _read_fields(data)
        if fields is None:
            self._events += 1
            return
        if self._says(fields):
            self._events += 1
            self._note_said(fields)

    @staticmethod
    def _says(fields: Mapping[str, Any]) -> bool:
        choices = fields.get("choices")
        return isinstance(choices, list) and bool(choices)

    @staticmethod
    def _text_of(fields: Mapping[str, Any]) -> str:
        return text_of_choices(fields.get("choices"))

    def _note_said(self, fields: Mapping[str, Any]) -> None:
        for position, choice in enumerate(fields["choices"]):
            if isinstance(choice, dict):
                index = choice.get("index")
                known = self._choices.setdefault(index if isinstance(index, int) else position, _Choice())
                known.pieces.extend(_texts_of_choice(choice))
                known.finished = known.finished or bool(choice.get("finish_reason"))  # "" is no reason


class ResponseTranscript(Transcript):
    """What the deltas of one streamed answer of the Responses API said; later events that repeat them say nothing new."""

    mark: ClassVar[bytes] = b'"delta"'

    def keep(self, events: bytes, fields: Mapping[str, Any] | None = None) -> None:
        """Keep whole events, if there is a delta among them, or one that cannot be read."""
        if self.mark in events or b'"type"' not in events:
            super().keep(events, fields)

    @staticmethod
    def _says(fields: Mapping[str, Any]) -> bool:
        kind = fields.get("type")
        return (
            isinstance(fields.get("delta"), str)
            and isinstance(kind, str)
            and kind.endswith(".delta")
            and kind not in _NO_TEXT
        )

    @staticmethod
    def _text_of(fields: Mapping[str, Any]) -> str:
        return _well_formed("".join(_strings(fields, "delta")))

    def _note_said(self, fields: Mapping[str, Any]) -> None:
        index = fields.get("output_index")
        known = self._choices.setdefault(index if isinstance(index, int) else 0, _Choice())
        known.pieces.extend(_strings(fields, "delta"))


def _read_fields(data: bytes) -> dict[str, Any] | None:
    try:
        fields = json.loads(data.decode())
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def text_of_choices(choices: Any) -> str:
    """Return everything that choices say, plain or streamed: content, reasoning, refusal, and calls of tools."""
    if not isinstance(choices, list):
        return ""
    return _well_formed(
        "".join(text for choice in choices if isinstance(choice, dict) for text in _texts_of_choice(choice))
    )


def text_of_output(output: Any) -> str:
    """Return everything that the ``output`` of the Responses API says: messages, summaries, and calls of functions."""
    if not isinstance(output, list):
        return ""
    texts: list[str] = []
    for item in output:
        if isinstance(item, dict):
            texts += _texts_of_parts(item.get("content"))
            texts += _texts_of_parts(item.get("summary"))
            texts += _strings(item, "name", "arguments", "input")
    return _well_formed("".join(texts))


def _texts_of_choice(choice: Mapping[str, Any]) -> Iterator[str]:
    yield from _strings(choice, "text")
    for name in ("delta", "message"):
        message = choice.get(name)
        if isinstance(message, dict):
            yield from _texts_of_parts(message.get("content"))
            yield from _reasoning(message)
            yield from _strings(message, "refusal")
            yield from _calls(message)


def _reasoning(message: Mapping[str, Any]) -> list[str]:
    for name in _REASONING_NAMES:
        if texts := _strings(message, name):
            return texts
    return _texts_of_parts(message.get("reasoning_details"))


def _calls(message: Mapping[str, Any]) -> Iterator[str]:
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        if isinstance(call, dict):
            for kind in ("function", "custom"):
                called = call.get(kind)
                if isinstance(called, dict):
                    yield from _strings(called, "name", "arguments", "input")
    legacy = message.get("function_call")
    if isinstance(legacy, dict):
        yield from _strings(legacy, "name", "arguments")


def _texts_of_parts(content: Any) -> list[str]:
    """Return the texts of a content that is a string, or a list of parts as newer models send it."""
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        return []
    return [
        text
        for part in content
        if isinstance(part, dict)
        for text in _strings(part, "text", "summary", "refusal")
    ]


def _strings(fields: Mapping[str, Any], *names: str) -> list[str]:
    return [value for name in names if isinstance(value := fields.get(name), str) and value]


def _well_formed(text: str) -> str:
    """Join surrogates that were escaped in two events; replace those that are alone, as no tokenizer takes them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
