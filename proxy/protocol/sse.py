"""Cutting a stream of server-sent events into whole events, without changing a byte.

The grammar is that of the WHATWG HTML standard, section 9.2.6 "Interpreting an event stream": lines end with LF, CR LF
or CR; a blank line ends an event; a line that begins with a colon is a comment.
https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

import re

BOM = b"\xef\xbb\xbf"
# Atomic groups: the LF of a CR LF must not be taken for a line of its own.
_EVENT_END = re.compile(rb"(?>\r\n|\r|\n)(?>\r\n|\r|\n)")
_BLANK_LINE = re.compile(rb"\r\n|\r|\n")
_EVENT_END_MAX = 4  # bytes: two times CR LF


class EventTooLargeError(ValueError):
    """An event is larger than the bound on what may wait in memory."""


class EventSplitter:
    r"""Cuts bytes, however they were split on their way, into whole raw events.

    The events do not depend on where the bytes were split: an event that ends with CR at the very end of what arrived
    waits for one byte more, as an LF that follows would be part of it. A blank line beyond the one that ends an event
    is an event of its own, without data.

    Args:
        pending_max: bytes that one event may have.
    """

    def __init__(self, pending_max: int) -> None:
        self._pending_max = pending_max
        self._buffer = bytearray()

    @property
    def pending(self) -> int:
        """Bytes that wait for the end of their event."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes and return the events that they complete, each with the blank line that ends it.

        Raises:
            EventTooLargeError: an event exceeds ``pending_max``; nothing more should be fed.
        """
        buffer = self._buffer
        search_from = max(0, len(buffer) - _EVENT_END_MAX + 1)
        buffer += data
        events: list[bytes] = []
        start = 0
        while match := _BLANK_LINE.match(buffer, start) or _EVENT_END.search(buffer, search_from):
            end = match.end()
            if end == len(buffer) and buffer.endswith(b"\r"):
                break
            self._check(end - start)
            events.append(bytes(buffer[start:end]))
            start = search_from = end
        del buffer[:start]
        self._check(len(buffer))
        return events

    def _check(self, size: int) -> None:
        if size > self._pending_max:
            raise EventTooLargeError(f"An event is larger than {self._pending_max} bytes.")

    def flush(self) -> bytes:
        """Return what waits and forget it; at the end of a stream, an event whose blank line never came."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest


def event_data(event: bytes) -> bytes | None:
    """Return the data of one raw event, its lines joined by LF; None if it has no ``data`` line (a comment, say)."""
    if event.startswith(b"data: "):
        line = event[6:].rstrip(b"\r\n")
        if b"\n" not in line and b"\r" not in line:
            return line
    values = [line[_value_at(line) :].rstrip(b"\r\n") for line in _lines(event) if _is_data(line)]
    return b"\n".join(values) if values else None


def replace_data(event: bytes, data: bytes) -> bytes:
    """Return the event with other data; comments, other fields, spacing and line ends stay as they are.

    Args:
        event: one raw event that has data.
        data: its new data, which may have several lines.
    """
    pieces: list[bytes] = []
    placed = False
    for line in _lines(event):
        if not _is_data(line):
            pieces.append(line)
        elif not placed:
            placed = True
            prefix = line[: _value_at(line)]
            ending = line[len(line.rstrip(b"\r\n")) :]
            if not prefix.endswith((b":", b": ")):
                prefix += b":"
            pieces += [prefix + value + ending for value in data.split(b"\n")]
    return b"".join(pieces)


def close_event(rest: bytes) -> bytes:
    """Return the last bytes of a stream with the line ends that their event lacks, so that another can follow."""
    ended = rest[-_EVENT_END_MAX:]
    if not rest.strip(b"\r\n") or any(match.end() == len(ended) for match in _EVENT_END.finditer(ended)):
        return rest
    if rest.endswith(b"\r\n"):
        return rest + b"\r\n"
    return rest + (b"\n" if rest.endswith(b"\n") else b"\n\n")


def _lines(event: bytes) -> list[bytes]:
    return event.splitlines(keepends=True)


def _is_data(line: bytes) -> bool:
    # Only a stream's first line may begin with a byte order mark; to be lenient with others harms nobody.
    name = line.removeprefix(BOM).partition(b":")[0]
    return name.rstrip(b"\r\n") == b"data"


def _value_at(line: bytes) -> int:
    """Return where a field's value begins: after the colon and one space."""
    colon = line.find(b":")
    if colon < 0:
        return len(line.rstrip(b"\r\n"))
    return colon + 2 if line[colon + 1 : colon + 2] == b" " else colon + 1
