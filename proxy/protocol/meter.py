"""Metering an answer while it passes: what goes on to the client, and what the answer costs.

The protocol is OpenAI's chat completions (https://platform.openai.com/docs/api-reference/chat-streaming) with
OpenRouter's additions (https://openrouter.ai/docs/api-reference/streaming): ``usage.cost``, ``reasoning``, comment
lines while a model warms up, and a top-level ``error`` in an event when an answer fails midway. A stream is one of
server-sent events (WHATWG HTML, section 9.2) that ends with ``data: [DONE]``.

Most bytes are only looked at: JSON is parsed for the first event, for usage and errors, and where tokens must be
counted because the provider did not say how many there were.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from proxy.protocol.json_document import JsonDocument, read_document, with_cost
from proxy.protocol.json_spans import set_members
from proxy.protocol.sse import BOM, EventSplitter, EventTooLargeError, close_event, event_data, replace_data
from proxy.protocol.transcript import Transcript, text_of_choices, text_of_output
from proxy.protocol.usage_found import UsageFound, find_usage

EVENT_BYTES_MAX = 32 * 1024 * 1024  # a picture of 20 MiB in base64
_BYTES_PER_TOKEN = 3  # on the low side for text, so that the estimate is on the high one
_DONE = b"[DONE]"
_VECTORS = frozenset(("data",))  # thousands of numbers, none of which is an amount
_BLANK = b"\n\n"  # ends an event, whatever the line ends of the others are
_MARKS = (b'"id"', b'"error"', _DONE, b"\\u00", b'"usage"')  # the first one counts until the id is known
_USAGE, _NULL = 4, b":null"
_LETTER_ESCAPE = re.compile(
    rb"\\u00[567]"
)  # a key may be spelled with escapes, if only to slip past a byte search
# A null usage that is certainly the event's own: only simple members stand between it and the event's last brace.
_NULL_USAGE = re.compile(
    rb',"usage":null(?=(?:,"\w+":(?:"[^"\\\r\n]*"|null))*\}(?:\n\n|\r\n\r\n))',
)


@dataclass(frozen=True, slots=True)
class StreamError:
    """An error that came inside an answer.

    Args:
        message: for people; empty if the provider gave none.
        code: as text, often an HTTP status.
        raw: the value of the ``error`` member, parsed.
    """

    message: str
    code: str | None
    raw: Any


@dataclass(frozen=True, slots=True)
class PlainAnswer:
    """A whole answer, read.

    Args:
        generation_id: the provider's.
        model: that answered.
        usage: as reported, numbers with a fraction as ``Decimal``.
        error: an error inside a successful answer.
        fields: all of it, parsed.
        body: what goes on to the client.
        is_object: False if the body is no JSON object at all; then nothing else is known.
    """

    generation_id: str | None
    model: str | None
    usage: Mapping[str, Any] | None
    error: StreamError | None
    fields: Mapping[str, Any]
    body: bytes
    is_object: bool

    @property
    def completion_text(self) -> str:
        """Everything the model wrote, to count its tokens where usage is missing."""
        return text_of_choices(self.fields.get("choices")) + text_of_output(self.fields.get("output"))


class _Telling:
    """Finds where an event that must be read begins to show it; ``_glance`` decides.

    Each mark is looked for once in all of the bytes: a byte search is many times faster than an expression of them all.

    Args:
        data: whole events, and perhaps a part of one.
    """

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = [-1] * len(_MARKS)

    def find(self, start: int, *, without_id: bool) -> int:
        """Return the place of the first mark from ``start`` on; the length, where there is none."""
        data, at = self._data, self._at
        first = len(data)
        for index in range(without_id, len(_MARKS)):
            if at[index] < start:
                place = data.find(_MARKS[index], start)
                while index == _USAGE and place >= 0 and data.startswith(_NULL, place + len(_MARKS[_USAGE])):
                    place = data.find(_MARKS[_USAGE], place + 1)
                at[index] = len(data) if place < 0 else place
            first = min(first, at[index])
        return first


class StreamMeter:
    """Meters one streamed chat completion; how its bytes are split makes no difference to what comes out.

    Args:
        include_usage: the client asked for usage. If not, usage is metered and cut out.
        event_bytes_max: bytes that one event may have.
        price_usage: makes ``usage.cost`` (a JSON number in USD); None leaves it as the provider sends it.
    """

    kind: ClassVar[str] = "chat.completion.chunk"
    usage_names: ClassVar[tuple[str, str]] = ("prompt_tokens", "completion_tokens")
    transcript: ClassVar[type[Transcript]] = Transcript

    def __init__(
        self,
        *,
        include_usage: bool,
        event_bytes_max: int = EVENT_BYTES_MAX,
        price_usage: Callable[[Mapping[str, Any]], str | None] | None = None,
    ) -> None:
        self._include_usage = include_usage
        self._event_bytes_max = event_bytes_max
        self._price_usage = price_usage
        self._splitter = EventSplitter(event_bytes_max)
        self._transcript = self.transcript()
        self.generation_id: str | None = None
        self.model: str | None = None
        self.created: int | None = None
        self._found = UsageFound()
        self.usage: Mapping[str, Any] | None = None
        self.error: StreamError | None = None
        self.done = False
        self.done_event = b""

    @property
    def kept_bytes(self) -> int:
        """Bytes kept for counting since the last ``fold``."""
        return self._transcript.kept_bytes

    @property
    def events(self) -> int:
        """Events so far that carried choices, or could not be read."""
        return self._transcript.events

    @property
    def finished(self) -> bool:
        """Whether at least one choice was seen, and each that was seen has ended with a reason."""
        return self._transcript.finished

    def feed(self, data: bytes) -> bytes:
        """Take bytes of the answer and return those that go on to the client now: whole events, mostly unchanged.

        ``data: [DONE]`` is not returned but kept as ``done_event``; of what follows it only usage is noted.

        Raises:
            EventTooLargeError: an event exceeds the bound.
        """
        if self.done:
            self._read_late(data)
            return b""
        if self._splitter.pending or len(data) > self._event_bytes_max:
            return b"".join(self._read(data))
        passed = self._glance(data)
        return b"".join(self._read_some(data)) if passed is None else passed

    def _read_some(self, data: bytes) -> Iterator[bytes]:
        """Read the events that need it; the many between them, which one read may bring, are only glanced at together."""
        start, telling = 0, _Telling(data)
        while start < len(data) and not self.done:
            told_at = telling.find(start, without_id=self.generation_id is not None)
            cut = max(data.rfind(_BLANK, start, told_at) + len(_BLANK), start)
            if cut > start + 1:
                events = data[start:cut]
                passed = self._glance(events)
                if passed is None:
                    yield from self._read(events)
                else:
                    yield passed
                start = cut
                continue
            end = data.find(_BLANK, told_at)
            end = len(data) if end < 0 else end + len(_BLANK)
            yield from self._read(data[start:end])
            start = end
        if self.done:
            self._read_late(data[start:])

    def _glance(self, events: bytes) -> bytes | None:
        """Return what passes if the bytes show that nothing in them needs reading; None if they must be read."""
        if (
            not events.endswith((b"\n\n", b"\r\n\r\n"))
            or b'"error"' in events
            or _DONE in events
            or (b"\\u00" in events and _LETTER_ESCAPE.search(events))
            or (self.generation_id is None and b'"id"' in events)
        ):
            return None
        passed = events
        if b'"usage"' in events:
            usages = events.count(b'"usage"')
            if self._include_usage:
                nulls = events.count(b'"usage":null')
            else:
                passed, nulls = _NULL_USAGE.subn(b"", events)
            if nulls != usages:
                return None
        self._transcript.keep(events)
        return passed

    def _read(self, data: bytes) -> Iterator[bytes]:
        events = iter(self._splitter.feed(data))
        for event in events:
            passed = self._glance(event)
            yield self._take(event) if passed is None else passed
            if self.done:
                break
        self._note_late(events)

    def _read_late(self, data: bytes) -> None:
        with contextlib.suppress(EventTooLargeError):
            self._note_late(self._splitter.feed(data))

    def _note_late(self, events: Iterable[bytes]) -> None:
        """Note the usage that some servers tell after the answer's end; what they say of else is not looked at."""
        for event in events:
            found = read_document(event_data(event) or b"") if b'"usage"' in event else None
            if found is not None:
                self._note_usage(found.fields)

    def finish(self) -> bytes:
        """Return the rest at the end of the answer.

        A last event whose blank line never came counts if it can be read, and is given its line ends, so that more can
        follow it. One that was cut in its middle is dropped, as the standard demands of every client.
        """
        rest = self._splitter.flush()
        if self.done:
            self._note_late((rest,))
            return b""
        if not rest:
            return b""
        data = event_data(rest)
        if data and data.strip() != _DONE and read_document(data) is None:
            return b""
        return self._take(close_event(rest))

    def _take(self, event: bytes) -> bytes:
        data = event_data(event)
        if data is None or not data.strip():
            return event
        if data.strip() == _DONE:
            self.done = True
            self.done_event = event
            return b""
        found = read_document(data)
        if found is None:
            self._transcript.keep(event)
            return event
        self._note(found.fields)
        self._transcript.keep_read(event, found.fields)
        return self._passed(event, found)

    def _note(self, fields: Mapping[str, Any]) -> None:
        name = fields.get("id")
        if self.generation_id is None and isinstance(name, str) and name:
            self.generation_id = name
            self.model = _text_or_none(fields.get("model"))
            created = fields.get("created")
            self.created = created if isinstance(created, int) and not isinstance(created, bool) else None
        self._note_usage(fields)
        if self.error is None:
            self.error = find_error(fields)

    def _note_usage(self, fields: Mapping[str, Any]) -> None:
        if self._found.note(fields):
            self.usage = self._found.said

    def end(self) -> None:
        """Take it that the answer has ended, though its provider did not say so."""
        if self.done:
            return
        self.done, self.done_event = True, b"data: " + _DONE + b"\n\n"

    def _passed(self, event: bytes, found: JsonDocument) -> bytes:
        fields = found.fields
        if "usage" not in fields:
            return event
        if self._include_usage:
            priced = with_cost(found, self._price_usage)
            return event if priced is None else replace_data(event, priced.encode())
        if fields["usage"] is not None and not fields.get("choices") and fields.get("error") is None:
            return b""
        if found.ambiguous:
            return event
        passed, nulls = _NULL_USAGE.subn(b"", event)
        if nulls == 1 == event.count(b'"usage"'):
            return passed
        return replace_data(event, set_members(found.text, found.scan(), {"usage": None}).encode())

    def progress_tokens(self) -> int:
        """Return about how many tokens the answer has so far, rather too many than too few; costs next to nothing."""
        return self._transcript.estimate(_BYTES_PER_TOKEN)

    def least_tokens(self) -> int:
        """Return how many tokens the answer has so far if each event since the last ``fold`` is one; costs nothing."""
        return self._transcript.least

    def fold(self, count_text: Callable[[str], int]) -> int:
        """Count what was kept, drop it, and return the tokens of the answer so far.

        Args:
            count_text: counts the tokens of a text as the model does.
        """
        return self._transcript.fold(count_text)

    def clean_end(self, *, usage_json: str | None) -> bytes:
        """Return events that end the answer as if it had reached its bound on tokens; ``done_event`` comes after them.

        Args:
            usage_json: what ``usage`` says, as JSON; sent only if the client asked for usage.
        """
        pieces = [
            json_event({**self._head(), "choices": [self._cut_choice(index)]})
            for index in self._transcript.unfinished()
        ]
        if self._include_usage and usage_json is not None:
            pieces.append(self.extra_event("usage", usage_json))
        self.done_event = b"data: " + _DONE + b"\n\n"
        return b"".join(pieces)

    def extra_event(self, name: str, value: str) -> bytes:
        """Return a chunk without choices that carries one member more, as the one with ``usage`` does.

        Args:
            name: of the member.
            value: JSON text, on one line.
        """
        envelope = json.dumps({**self._head(), "choices": []}, separators=(",", ":"))
        return f'data: {envelope[:-1]},"{name}":{value}}}\n\n'.encode()

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.generation_id or "",
            "object": self.kind,
            "created": self.created or 0,
            "model": self.model or "",
        }

    @staticmethod
    def _cut_choice(index: int) -> dict[str, Any]:
        return {"index": index, "delta": {}, "finish_reason": "length"}

    def error_event(self, error: Mapping[str, Any]) -> bytes:
        """Return the event that reports an error within a stream, as OpenAI and OpenRouter do.

        Args:
            error: the ``error`` object itself.
        """
        return json_event({"error": error})


class CompletionMeter(StreamMeter):
    """Meters one streamed completion of the legacy kind."""

    kind: ClassVar[str] = "text_completion"

    @staticmethod
    def _cut_choice(index: int) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": "length"}


def read_plain(
    body: bytes, *, price_usage: Callable[[Mapping[str, Any]], str | None] | None = None
) -> PlainAnswer:
    """Read a whole answer: a chat completion, completion, embedding or response in OpenAI's shapes.

    White space before it is tolerated: OpenRouter sends it to keep connections alive.

    Args:
        body: as it came; it goes on unchanged, but for ``usage.cost``, and a byte order mark.
        price_usage: as for ``StreamMeter``.
    """
    found = read_document(body, inexact=_VECTORS)
    if found is None:
        return PlainAnswer(None, None, None, None, {}, body, is_object=False)
    fields = found.fields
    priced = with_cost(found, price_usage)
    return PlainAnswer(
        generation_id=_text_or_none(fields.get("id")),
        model=_text_or_none(fields.get("model")),
        usage=find_usage(fields),
        error=find_error(fields),
        fields=fields,
        body=body.removeprefix(BOM) if priced is None else priced.encode(),
        is_object=True,
    )


def find_error(fields: Mapping[str, Any]) -> StreamError | None:
    """Return the error that an answer or one of its events names in ``error``."""
    raw = fields.get("error")
    if raw is None:
        return None
    if not isinstance(raw, dict):
        return StreamError(raw if isinstance(raw, str) else "", None, raw)
    code = raw.get("code")
    known = isinstance(code, int | str) and not isinstance(code, bool)
    return StreamError(_text_or_none(raw.get("message")) or "", str(code) if known else None, raw)


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def json_event(fields: Mapping[str, Any]) -> bytes:
    """Return an event whose data are JSON."""
    return b"data: " + json.dumps(fields, separators=(",", ":"), default=str).encode() + b"\n\n"
