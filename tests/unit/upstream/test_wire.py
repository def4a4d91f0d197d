"""HTTP/1.1 read out of any pieces."""

import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.upstream.wire import (
    HEAD_BYTES_MAX,
    INFLATED_BYTES_MAX,
    BrokenAnswerError,
    ChunkedBody,
    Inflater,
    MalformedAnswerError,
    ResponseParser,
    inflater_for,
)

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
_data = st.one_of(
    st.binary(min_size=1, max_size=40),
    st.lists(st.sampled_from([b"\r\n", b"\r", b"\n", b"0", b"5\r\nhello", b"0\r\n\r\n"]), min_size=1).map(
        b"".join
    ),
    st.integers(1, 5000).map(lambda size: b"x" * size),
)
_size = st.sampled_from(["{:x}", "{:X}", "{:04x}", "{:x} ", "{:x}\t;", "{:x};name=value", '{:x} ; a="b;c"'])


@st.composite
def _responses(draw: st.DrawFn) -> tuple[bytes, bytes, bool]:
    """A response, its body, and whether it ends without its connection."""
    pieces = draw(st.lists(_data, max_size=30))
    body = b"".join(pieces)
    head = (
        draw(
            st.sampled_from([b"", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 \r\nLink: x\r\n\r\n" * 3])
        )
        + OK
    )
    kind = draw(st.sampled_from(["chunked", "length", "close"]))
    if kind == "close":
        return head + b"\r\n" + body, body, False
    if kind == "length":
        return head + b"content-LENGTH:%d \r\n\r\n" % len(body) + body, body, True
    sizes = draw(
        st.one_of(
            st.just(["{:x}"] * len(pieces)), st.lists(_size, min_size=len(pieces), max_size=len(pieces))
        )
    )
    chunks = [
        size.format(len(piece)).encode() + b"\r\n" + piece + b"\r\n"
        for size, piece in zip(sizes, pieces, strict=False)
    ]
    last = draw(st.sampled_from([b"0\r\n\r\n", b"000;x\r\n\r\n", b"0\r\nX-Sum: 1\r\nX-More: 2\r\n\r\n"]))
    return head + b"Transfer-Encoding: Chunked\r\n\r\n" + b"".join(chunks) + last, body, True


def read(pieces: list[bytes]) -> tuple[bytes, ResponseParser]:
    parser = ResponseParser()
    return b"".join([parser.feed(piece) for piece in pieces]), parser


@given(_responses(), st.data())
def test_splits_make_no_difference(made: tuple[bytes, bytes, bool], data: st.DataObject) -> None:
    stream, body, ends = made
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=20)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    for split in (pieces, [stream], [stream[at : at + 1] for at in range(len(stream))]):
        found, parser = read(split)
        assert (parser.status, found, parser.ended, parser.is_reusable) == (200, body, ends, ends)
        if not ends:
            parser.end()
            assert parser.ended


@given(_responses(), st.binary(min_size=1, max_size=9))
def test_what_follows_the_end_is_not_the_bodys(made: tuple[bytes, bytes, bool], more: bytes) -> None:
    stream, body, ends = made
    if ends:
        found, parser = read([stream + more])
        assert (found, parser.ended, parser.is_reusable) == (body, True, False)


@given(_responses(), st.data())
def test_an_end_before_the_end_is_seen(made: tuple[bytes, bytes, bool], data: st.DataObject) -> None:
    stream, body, ends = made
    if ends:
        part = stream[: data.draw(st.integers(0, len(stream) - 1))]
        found, parser = read([part])
        assert body.startswith(found)
        assert not parser.ended
        with pytest.raises(BrokenAnswerError):
            parser.end()


@pytest.mark.parametrize(
    "stream",
    [
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.2 200 OK\r\n\r\n",
        b"HTTP/1.1 099 OK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1  200 OK\r\n\r\n",
        b"\r\nHTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 17,
        OK + b"No colon\r\n\r\n",
        OK + b"Space : before\r\n\r\n",
        OK + b": no name\r\n\r\n",
        OK + b"Folded: a\r\n b\r\n\r\n",
        OK + b"Zero: a\0b\r\n\r\n",
        OK + b"Lf: a\nContent-Length: 5\r\n\r\n",
        OK + b"Cr: a\rContent-Length: 5\r\n\r\n",
        OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        OK + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n",
        OK + b"Content-Length: -5\r\n\r\n",
        OK + b"Content-Length: +5\r\n\r\n",
        OK + b"Content-Length: 5 5\r\n\r\n",
        OK + b"Content-Length: 0x5\r\n\r\n",
        OK + b"Content-Length: \r\n\r\n",
        OK + "Content-Length: ٥\r\n\r\n".encode(),
        OK + b"Content-Length: 99999999999999999999\r\n\r\n",
        OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
        OK + b"Transfer-Encoding: identity\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        OK + b"X: " + b"a" * HEAD_BYTES_MAX + b"\r\n\r\n",
        OK + b"X: " + b"a" * HEAD_BYTES_MAX,
        *(
            CHUNKED + size + b"\r\nhello\r\n"
            for size in (b"", b"+5", b"-5", b"0x5", b"5_", b" 5", b"5 5", b"g", b"\xd9\xa5")
        ),
        CHUNKED + b"5;\0\r\nhello\r\n",
        CHUNKED + b"5;a\nb\r\nhello\r\n",
        CHUNKED + b"1" * 16 + b"\r\nhello\r\n",
        CHUNKED + b"4\r\nhello\r\n",
        CHUNKED + b"6\r\nhello\r\n0\r\n\r\n",
        CHUNKED + b"5\r\nhello\n0\n\n    ",
        CHUNKED + b"5;" + b"a" * 2000 + b"\r\nhello\r\n",
        CHUNKED + b"5;" + b"a" * 2000,
        CHUNKED + b"0\r\n" + b"X: a\r\n" * 9000 + b"\r\n",
        CHUNKED + b"0\r\n" + b"X: a\r\n" * 9000,
        CHUNKED + b"5\r\nhello\r\n" * 300 + b"5\r\nhell\r\n0\r\n\r\n",
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(stream: bytes) -> None:
    with pytest.raises(MalformedAnswerError):
        read([stream])
    step = 1 if len(stream) < 5000 else 999
    with pytest.raises(MalformedAnswerError):
        read([stream[at : at + step] for at in range(0, len(stream), step)])


@pytest.mark.parametrize(
    ("head", "reusable", "left"),
    [
        (b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", True, b""),
        (b"HTTP/1.1 200\r\nContent-Length: 0\r\nConnection: keep-alive\r\n\r\n", True, b""),
        (b"HTTP/1.1 200\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", False, b""),
        (b"HTTP/1.1 200\r\nContent-Length: 0\r\nConnection: x\r\nConnection: y , Close\r\n\r\n", False, b""),
        (b"HTTP/1.0 200\r\nContent-Length: 0\r\nConnection: keep-alive\r\n\r\n", False, b""),
        (b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", False, b"H"),
        (b"HTTP/1.1 204\r\n\r\n", False, b""),
        (b"HTTP/1.1 204\r\nContent-Length: 5\r\n\r\n", False, b"hello"),
        (b"HTTP/1.1 304\r\nTransfer-Encoding: chunked\r\n\r\n", False, b""),
    ],
)
def test_when_a_connection_serves_again(head: bytes, reusable: bool, left: bytes) -> None:
    found, parser = read([head + left])
    assert (found, parser.ended, parser.is_reusable) == (b"", True, reusable)


def test_headers_are_by_lower_case_name_and_the_first_counts() -> None:
    _, parser = read([OK + b"X-Generation-ID:\t gen-1 \r\nx-generation-id: gen-2\r\nEmpty:\r\n\r\n"])
    assert parser.headers == {"x-generation-id": "gen-1", "empty": ""}


def test_many_chunks_of_one_read_are_one_piece() -> None:
    body = ChunkedBody()
    chunks = b"".join(b"%x\r\n%b\r\n" % (size, b"x" * size) for size in range(100, 200))
    assert body.feed(chunks + b"5\r\nhe") == b"x" * sum(range(100, 200)) + b"he"
    assert body.feed(b"llo\r\n0\r\n\r") == b"llo"
    assert body.feed(b"\n") == b""
    assert body.ended


@st.composite
def _compressed(draw: st.DrawFn) -> tuple[str, bytes, bytes]:
    plain = draw(st.binary(max_size=200)) * draw(st.sampled_from([1, 3, 3000]))
    coding = draw(st.sampled_from(["gzip", "X-GZip", "deflate", "bare"]))
    if coding == "bare":
        engine = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        return "Deflate", engine.compress(plain) + engine.flush(), plain
    if coding == "deflate":
        return coding, zlib.compress(plain), plain
    return coding, gzip.compress(plain) + gzip.compress(b"more"), plain + b"more"


def inflate(coding: str, pieces: list[bytes]) -> bytes:
    inflater = inflater_for({"content-encoding": coding})
    assert inflater is not None
    found = []
    for piece in pieces:
        inflater.feed(piece)
        while part := inflater.take():
            assert len(part) <= INFLATED_BYTES_MAX
            found.append(part)
    inflater.end()
    return b"".join(found)


@given(_compressed(), st.data())
def test_content_codings(made: tuple[str, bytes, bytes], data: st.DataObject) -> None:
    coding, stream, plain = made
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=20)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert inflate(coding, pieces) == plain
    assert inflate(coding, [stream]) == plain


def test_a_bomb_goes_off_in_small_pieces() -> None:
    inflater = Inflater("gzip")
    inflater.feed(gzip.compress(bytes(50_000_000)))
    sizes = []
    while piece := inflater.take():
        sizes.append(len(piece))
    assert max(sizes) <= INFLATED_BYTES_MAX
    assert sum(sizes) == 50_000_000


def test_what_is_not_compressed_as_it_says() -> None:
    for coding in ("br", "zstd", "gzip, gzip", "compress"):
        with pytest.raises(MalformedAnswerError):
            inflater_for({"content-encoding": coding})
    assert inflater_for({"content-encoding": "Identity"}) is None
    assert inflate("gzip", []) == b""
    for coding, stream in (
        ("gzip", b"plain text"),
        ("gzip", gzip.compress(b"a") + b"rest"),
        ("deflate", b"xplain text"),
        ("deflate", zlib.compress(b"a") + b"rest"),
    ):
        with pytest.raises(MalformedAnswerError):
            inflate(coding, [stream])
    for coding, stream in (("gzip", gzip.compress(b"a")), ("deflate", zlib.compress(b"a"))):
        with pytest.raises(BrokenAnswerError):
            inflate(coding, [stream[:-1]])
