"""HTTP/1.1 as a provider speaks it: a response's head and body out of bytes that come in any pieces. Does no IO.

One pass over what a read brought: however many HTTP chunks are in it, their data becomes one ``bytes``. What two readers could read
differently is refused, as the rest of one answer must never pass for the beginning of the next. Source: RFC 9112 (messages),
RFC 9110 (semantics).
"""

import re
import zlib

import aiohttp

HEAD_BYTES_MAX = 32 * 1024
INFLATED_BYTES_MAX = 64 * 1024  # of one step
_SIZE_LINE_BYTES_MAX = 1024  # of one chunk, extensions included
_TRAILER_BYTES_MAX = 16 * 1024
_INTERIM_MAX = 16  # heads of 1xx before the one that counts
_HEAD_END = b"\r\n\r\n"
_LINE_END = b"\r\n"
_SWITCHING_PROTOCOLS = 101
_OK = 200
_NO_BODY = (204, 304)
_HEAD = re.compile(
    rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [^\r\n\0]*+)?+((?:\r\n[!#$%&'*+.^_`|~0-9A-Za-z-]++:[^\r\n\0]*+)*+)"
)
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*+(?:;[^\r\n\0]*+)?")
_LENGTHS = {b"%x" % length: length for length in range(1, 2048)}  # most chunks have one of these
_BULK_BYTES_MIN = 1024  # of a read that probably has several chunks
_LENGTH = re.compile(r"[0-9]{1,15}")
# Of these each one counts; of other headers that are there twice the first does.
_LISTS = frozenset(("content-length", "transfer-encoding", "content-encoding", "connection"))
_GZIP = ("gzip", "x-gzip")
_GZIP_WINDOW = 16 + zlib.MAX_WBITS
_DEFLATE = 8  # zlib's own mark, in the low half of its first byte


class MalformedAnswerError(aiohttp.ClientPayloadError):
    """What the provider sent is no HTTP/1.1 response, or one that could be read in two ways."""


class BrokenAnswerError(aiohttp.ClientPayloadError):
    """The provider's connection ended before its response did."""


class LengthBody:
    """A body whose head names its length.

    Args:
        length: in bytes.
    """

    __slots__ = ("_missing", "ended", "left")

    def __init__(self, length: int) -> None:
        self._missing = length
        self.ended = not length
        self.left = b""  # what came after the end

    def feed(self, data: bytes) -> bytes:
        """Take what came; return what of it is the body's."""
        self._missing -= len(data)
        if self._missing > 0:
            return data
        self.ended = True
        if self._missing:
            data, self.left = data[: self._missing], data[self._missing :]
        return data

    def end(self) -> None:
        """The connection has ended."""
        if not self.ended:
            raise BrokenAnswerError(f"{self._missing} bytes of the answer are missing")


class ChunkedBody:
    """A body in chunks. Their extensions and the trailers after them are passed over."""

    __slots__ = ("_in_trailers", "_kept", "_missing", "ended", "left")

    def __init__(self) -> None:
        self.ended = False
        self.left = b""  # what came after the end
        self._kept = b""  # the beginning of a line that is not whole yet
        self._missing = (
            0  # until the end of the chunk under way, its line's end included; 0: a size comes next
        )
        self._in_trailers = False

    def feed(self, data: bytes) -> bytes:
        """Take what came; return what of it is the body's, as one piece.

        Raises:
            MalformedAnswerError: these are no chunks.
        """
        if self._kept:
            data = self._kept + data
        position = 0
        pieces: list[bytes] = []
        if not self._in_trailers:
            position = self._take_chunks(data, pieces)
        if self._in_trailers:
            position = self._end_trailers(data, position)
        rest = data[position:]
        if self.ended:
            self.left, self._kept = rest, b""
        else:
            self._kept = rest
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _take_chunks(self, data: bytes, pieces: list[bytes]) -> int:
        """Add the data of all chunks to ``pieces``; return where the rest begins."""
        end, missing = len(data), self._missing
        position = 0 if missing or end < _BULK_BYTES_MIN else _take_bulk(data, pieces)
        while True:
            if not missing:
                line_end = data.find(_LINE_END, position)
                length = _LENGTHS.get(data[position:line_end]) if line_end >= 0 else None
                if length is None:
                    length = _read_size(data, position, line_end)
                    if length is None:
                        break
                    if not length:
                        self._in_trailers = True
                        position = line_end + 2
                        break
                position = line_end + 2
                missing = length + 2
            stop = position + missing
            if stop > end:
                got = min(end - position, missing - 2)
                if got > 0:
                    pieces.append(data[position : position + got])
                    position += got
                    missing -= got
                break
            if data[stop - 2 : stop] != _LINE_END:
                raise MalformedAnswerError("a chunk of the answer is longer than it says")
            pieces.append(data[position : stop - 2])
            position, missing = stop, 0
        self._missing = missing
        return position

    def _end_trailers(self, data: bytes, position: int) -> int:
        """Pass over the trailers, if they are whole; return where the rest begins."""
        if data.startswith(_LINE_END, position):
            self.ended = True
            return position + len(_LINE_END)
        found = data.find(_HEAD_END, position)
        if (len(data) if found < 0 else found) - position > _TRAILER_BYTES_MAX:
            raise MalformedAnswerError("the answer's trailers are too large")
        if found < 0:
            return position
        self.ended = True
        return found + len(_HEAD_END)

    def end(self) -> None:
        """The connection has ended."""
        if not self.ended:
            raise BrokenAnswerError("the answer's last chunk is missing")


def _take_bulk(data: bytes, pieces: list[bytes]) -> int:
    """Add the data of many chunks at once, if none of it has a line's end in it; return where the rest begins.

    Cut at its line ends, it is then sizes and data in turn; that each piece is as long as its size says proves it.
    """
    lines = data.split(_LINE_END)
    count = (len(lines) - 1) // 2 * 2  # the last line is not whole
    if count and lines[count - 2] == b"0":
        count -= 2  # the last chunk
    found = lines[1:count:2]
    if not found or list(map(_LENGTHS.get, lines[:count:2])) != list(map(len, found)):
        return 0
    pieces += found
    return len(data) - len(_LINE_END.join(lines[count:]))


def _read_size(data: bytes, position: int, line_end: int) -> int | None:
    """Return a chunk's size; None while its line is not whole.

    Raises:
        MalformedAnswerError: it is none, or its line is too long.
    """
    if (len(data) if line_end < 0 else line_end) - position > _SIZE_LINE_BYTES_MAX:
        raise MalformedAnswerError("the size of a chunk is too long")
    if line_end < 0:
        return None
    found = _SIZE.fullmatch(data, position, line_end)
    if found is None:
        raise MalformedAnswerError("a chunk of the answer has no size")
    return int(found[1], 16)


class UntilCloseBody:
    """A body that ends with its connection."""

    __slots__ = ("ended", "left")

    def __init__(self) -> None:
        self.ended = False
        self.left = b""

    def feed(self, data: bytes) -> bytes:
        """Take what came: all of it is the body's."""
        return data

    def end(self) -> None:
        """The connection has ended, and so the body."""
        self.ended = True


Body = LengthBody | ChunkedBody | UntilCloseBody


class ResponseParser:
    """Reads one response. ``status`` is 0 until its head is there."""

    __slots__ = ("_body", "_interim", "_kept", "ended", "headers", "is_reusable", "status")

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}  # by lower-case name
        self.ended = False
        self.is_reusable = False  # another request may follow on its connection
        self._kept = b""  # of a head that is not whole
        self._interim = 0
        self._body: Body | None = None

    def feed(self, data: bytes) -> bytes:
        """Take what came; return what of it is the body's.

        Raises:
            MalformedAnswerError: this is no HTTP/1.1 response.
        """
        body = self._body
        if body is None:
            body, data = self._take_heads(data)
            if body is None:
                return b""
            self._body = body
            if body.ended:  # there is none
                body.left, data = data, b""
        data = body.feed(data) if data else b""
        if body.ended:
            self._finish(body)
        return data

    def end(self) -> None:
        """The connection has ended.

        Raises:
            BrokenAnswerError: before the response did.
        """
        if self._body is None:
            raise BrokenAnswerError("the answer's head is missing")
        self._body.end()
        self.ended = True

    def _finish(self, body: Body) -> None:
        self.ended = True
        self.is_reusable = self.is_reusable and not body.left

    def _take_heads(self, data: bytes) -> tuple[Body | None, bytes]:
        """Read the head, and interim ones before it; return the body that it announces, and what came of it."""
        if self._kept:
            data, self._kept = self._kept + data, b""
        start = 0
        while (stop := data.find(_HEAD_END, start)) >= 0:
            if stop - start > HEAD_BYTES_MAX:
                break
            status, version, headers = parse_head(data[start:stop])
            start = stop + len(_HEAD_END)
            if status >= _OK:
                self.status, self.headers = status, headers
                body = body_of(status, version, headers)
                self.is_reusable = (
                    version == 1
                    and status not in _NO_BODY  # some send one all the same
                    and not isinstance(body, UntilCloseBody)
                    and "close" not in _tokens(headers.get("connection", ""))
                )
                return body, data[start:]
            self._interim += 1
            if status == _SWITCHING_PROTOCOLS or self._interim > _INTERIM_MAX:
                raise MalformedAnswerError(f"the answer begins with status {status}")
        self._kept = data[start:]
        if len(self._kept) > HEAD_BYTES_MAX:
            raise MalformedAnswerError("the answer's head is too large")
        return None, b""


def parse_head(head: bytes) -> tuple[int, int, dict[str, str]]:
    """Return the status, the minor version, and the headers by lower-case name.

    Raises:
        MalformedAnswerError: it is no head of HTTP/1.
    """
    found = _HEAD.fullmatch(head)
    if found is None:
        raise MalformedAnswerError("the answer's head is not HTTP/1.1")
    headers: dict[str, str] = {}
    for line in found[3].decode("latin-1").split("\r\n")[1:]:
        name, _, value = line.partition(":")
        name = name.lower()
        value = value.strip(" \t")
        if name not in headers:
            headers[name] = value
        elif name in _LISTS:
            headers[name] += f", {value}"
    return int(found[2]), int(found[1]), headers


def body_of(status: int, version: int, headers: dict[str, str]) -> Body:
    """Return how the body of an answer to a POST is framed (RFC 9112, section 6.3).

    Raises:
        MalformedAnswerError: in a way that could be read differently.
    """
    if status in _NO_BODY:
        return LengthBody(0)
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None:
        if length is not None or version == 0 or coding.lower() != "chunked":
            raise MalformedAnswerError("the answer's framing is ambiguous")
        return ChunkedBody()
    if length is None:
        return UntilCloseBody()
    if _LENGTH.fullmatch(length) is None:
        raise MalformedAnswerError("the answer's length is no number")
    return LengthBody(int(length))


def _tokens(value: str) -> list[str]:
    return [token.strip().lower() for token in value.split(",")]


class Inflater:
    """Takes a content coding off a body, a bounded piece at a time.

    Args:
        coding: gzip or deflate.
    """

    __slots__ = ("_engine", "_is_full", "_is_gzip", "_pending")

    def __init__(self, coding: str) -> None:
        self._is_gzip = coding in _GZIP
        self._engine: zlib._Decompress | None = None
        self._pending = b""
        self._is_full = (
            False  # the last piece was as large as one may be: more of it may be inside the engine
        )

    def feed(self, data: bytes) -> None:
        """Take more of the body as it came."""
        self._pending += data

    def take(self) -> bytes:
        """Return the next piece, at most ``INFLATED_BYTES_MAX`` of it; nothing if more must be fed first.

        Raises:
            MalformedAnswerError: it is not compressed as its head says.
        """
        try:
            while self._pending or self._is_full:
                piece = self._inflate()
                if piece:
                    return piece
        except zlib.error as error:
            raise MalformedAnswerError(f"the answer is not compressed as it says: {error}") from None
        return b""

    def _inflate(self) -> bytes:
        engine = self._engine
        if engine is None or engine.eof:
            engine = self._engine = self._make_engine()
        piece = engine.decompress(self._pending, INFLATED_BYTES_MAX)
        self._pending = engine.unused_data if engine.eof else engine.unconsumed_tail
        self._is_full = len(piece) == INFLATED_BYTES_MAX and not engine.eof
        return piece

    def _make_engine(self) -> "zlib._Decompress":
        if self._is_gzip:
            return zlib.decompressobj(_GZIP_WINDOW)  # also for another member of the same file
        if self._engine is not None:
            raise zlib.error("something follows its end")
        # As zlib has it, by the book, or bare, as some servers send it.
        is_zlib = self._pending[0] & 0xF == _DEFLATE
        return zlib.decompressobj(zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS)

    def end(self) -> None:
        """The body has ended.

        Raises:
            BrokenAnswerError: before what was compressed did.
        """
        if self._engine is not None and not self._engine.eof:
            raise BrokenAnswerError("the compressed answer is not whole")


def inflater_for(headers: dict[str, str]) -> Inflater | None:
    """Return what takes the body's content coding off; None if it has none.

    Raises:
        MalformedAnswerError: it is one that was not asked for and that nothing here can read.
    """
    coding = headers.get("content-encoding", "").lower()
    if coding in {"", "identity"}:
        return None
    if coding in _GZIP or coding == "deflate":
        return Inflater(coding)
    raise MalformedAnswerError("the answer has a content coding that was not asked for")
