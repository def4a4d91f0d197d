"""Cutting server-sent events."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.protocol.sse import EventSplitter, EventTooLargeError, close_event, event_data, replace_data

_MAX = 1 << 20
_streams = st.lists(
    st.sampled_from([b"data: x", b"data:", b"d", b":", b"\n", b"\r\n", b"\r"]), max_size=30
).map(b"".join)


def _reference(stream: bytes) -> list[bytes | None]:
    """The standard's own algorithm, line by line: the data of each event that a client would see."""
    text = stream.decode().replace("\r\n", "\n").replace("\r", "\n")
    seen: list[bytes | None] = []
    buffer: list[str] = []
    for line in text.split("\n")[:-1]:
        if not line:
            if buffer:
                seen.append("\n".join(buffer).encode())
            buffer = []
        elif line.split(":", 1)[0] == "data":
            buffer.append(line.partition(":")[2].removeprefix(" "))
    return seen


def _split(pieces: list[bytes]) -> tuple[list[bytes], bytes]:
    splitter = EventSplitter(_MAX)
    events = [event for piece in pieces for event in splitter.feed(piece)]
    return events, splitter.flush()


@given(_streams)
def test_sees_what_a_browser_sees(stream: bytes) -> None:
    events, rest = _split([stream])
    assert b"".join(events) + rest == stream
    closed = [event for event in [*events, rest] if close_event(event) == event]
    assert [data for event in closed if (data := event_data(event)) is not None] == _reference(stream)


@given(_streams, st.data())
def test_splits_make_no_difference(stream: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)))))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert _split(pieces) == _split([stream])
    assert _split([stream[i : i + 1] for i in range(len(stream))]) == _split([stream])


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\n\r\n", b"\r\n\n", b"\r\r\n"])
def test_an_event_is_given_as_soon_as_it_is_whole(end: bytes) -> None:
    splitter = EventSplitter(_MAX)
    event = b"data: 1" + end
    assert splitter.feed(event) == [event]
    assert splitter.pending == 0


def test_a_last_cr_waits_for_its_lf() -> None:
    splitter = EventSplitter(_MAX)
    assert splitter.feed(b"data: 1\r\n\r") == []
    assert splitter.pending == 10
    assert splitter.feed(b"\ndata: 2\r\r") == [b"data: 1\r\n\r\n"]
    assert splitter.feed(b"d") == [b"data: 2\r\r"]
    assert splitter.flush() == b"d"
    assert splitter.pending == 0


def test_more_blank_lines_do_not_wait_for_the_next_event() -> None:
    splitter = EventSplitter(_MAX)
    assert splitter.feed(b"\ndata: 1\n\n\r\n\n\r") == [b"\n", b"data: 1\n\n", b"\r\n", b"\n"]
    assert splitter.feed(b"d") == [b"\r"]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_too_large(size: int) -> None:
    event = b"data: 12\n\n"
    exact, small = EventSplitter(len(event)), EventSplitter(len(event) - 1)
    pieces = [event[i : i + size] for i in range(0, len(event), size)]
    assert [found for piece in pieces for found in exact.feed(piece)] == [event]
    with pytest.raises(EventTooLargeError):
        for piece in pieces:
            small.feed(piece)


def test_many_events_in_one_piece_have_no_bound() -> None:
    assert len(EventSplitter(20).feed(b"data: 12\n\n" * 1000)) == 1000


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: x\n\n", b"x"),
        (b"data:x\n\n", b"x"),
        (b"data:  x \n\n", b" x "),
        (b"data: a\r\ndata: b\rdata:c\n\n", b"a\nb\nc"),
        (b"data\n\n", b""),
        (b"data:\n\n", b""),
        (b"data:\ndata\n\n", b"\n"),
        (b": comment\n\n", None),
        (b"\n\n", None),
        (b"", None),
        (b"event: error\nid: 7\ndata: x\nretry: 3\n\n", b"x"),
        (b"datax: y\n\n", None),
        (b" data: y\n\n", None),
        (b"\n\ndata: late\n\n", b"late"),
        (b"\xef\xbb\xbfdata: first\n\n", b"first"),
        (b"data: cut", b"cut"),
    ],
)
def test_event_data(event: bytes, data: bytes | None) -> None:
    assert event_data(event) == data


@pytest.mark.parametrize(
    ("event", "data", "expected"),
    [
        (b"data: x\n\n", b"y", b"data: y\n\n"),
        (b"data:x\r\n\r\n", b"y", b"data:y\r\n\r\n"),
        (b"data\n\n", b"y", b"data:y\n\n"),
        (
            b": c\r\nid: 1\r\ndata: x\r\nevent: e\r\n\r\n",
            b"y",
            b": c\r\nid: 1\r\ndata: y\r\nevent: e\r\n\r\n",
        ),
        (b"data: a\ndata: b\ndata: c\n\n", b"y", b"data: y\n\n"),
        (b"data: a\ndata: b\n\n", b"1\n2\n3", b"data: 1\ndata: 2\ndata: 3\n\n"),
        (b"\xef\xbb\xbfdata: x\n\n", b"y", b"\xef\xbb\xbfdata: y\n\n"),
    ],
)
def test_replace_data(event: bytes, data: bytes, expected: bytes) -> None:
    assert replace_data(event, data) == expected
    assert event_data(expected) == data


@pytest.mark.parametrize(
    "end", [b"", b"\n", b"\r", b"\r\n", b"\n\n", b"\r\r", b"\r\n\r", b"\r\n\r\n", b"\n\r"]
)
def test_a_closed_event_can_be_followed(end: bytes) -> None:
    closed = close_event(b"data: x" + end)
    assert closed.startswith(b"data: x" + end)
    events, rest = _split([closed + b"data: y\n\n"])
    assert [event_data(event) for event in events] == [b"x", b"y"]
    assert rest == b""
