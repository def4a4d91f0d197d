"""Request smuggling: heads that another server could read differently are refused, and what may follow them is not read.

aiohttp's parser refuses most such heads by itself (``tests/proxy/test_smuggling.py`` goes through them). Here is the
rest: what it lets through, and connections on which nothing more is read, as what follows might be no request.
Source: RFC 9112, sections 3.2, 6.1, 6.3 and 11.2.
"""

import re
from collections.abc import Sequence

from aiohttp import hdrs, web
from aiohttp.http_parser import RawRequestMessage

from config.settings import LimitSettings
from proxy.http.errors import AmbiguousRequestError, BodyTooLargeError, HeadTooLargeError

# uri-host [":" port]: a name, an IPv4 address, or an IPv6 address in brackets.
_HOST = re.compile(r"(?:[A-Za-z0-9._~%!$&'()*+,;=-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
# Of these a second one must not be there to choose from; aiohttp sees to Host, Content-Length and Transfer-Encoding.
_ONCE = frozenset((b"authorization", b"x-tuma-wallet", b"idempotency-key", b"expect"))
# Gateways that put headers into variables cannot tell these with an underscore from those with a hyphen.
_LOOKED_LIKE = frozenset((b"content-length", b"transfer-encoding", b"x-tuma-wallet", b"x-forwarded-for"))
_BETWEEN = b"\n"  # in no name
_PER_FIELD_BYTES = 4  # colon, space and the line's end


def check_head(request: web.Request, limits: LimitSettings) -> None:
    """Refuse a head that could be read in two ways, or that is too large; nothing was done yet.

    Raises:
        AmbiguousRequestError, HeadTooLargeError, BodyTooLargeError: the connection is to be closed.
    """
    message = request._message  # noqa: SLF001 - one look in place of five
    _check_fields(message, limits)
    headers, target = message.headers, message.path
    coding = headers.get(hdrs.TRANSFER_ENCODING)
    if coding is not None and coding.lower() != "chunked":
        raise AmbiguousRequestError("The only transfer coding is 'chunked'.")
    if message.method == hdrs.METH_CONNECT:
        raise AmbiguousRequestError("CONNECT is not served.")
    if "#" in target:
        raise AmbiguousRequestError("The request's target has a fragment.")
    if _HOST.fullmatch(headers.get(hdrs.HOST, "")) is None:
        raise AmbiguousRequestError("The header 'Host' is not valid.")
    length = headers.get(hdrs.CONTENT_LENGTH)
    if length is not None and int(length) > limits.body_bytes:
        raise BodyTooLargeError(f"The body is larger than {limits.body_bytes} bytes.")


def _check_fields(message: RawRequestMessage, limits: LimitSettings) -> None:
    size = len(message.path)
    if message.raw_headers:
        names, values = zip(*message.raw_headers, strict=True)
        joined = _BETWEEN.join(names).lower()
        if b"_" in joined or len(set(joined.split(_BETWEEN))) != len(names):
            _check_names(joined.split(_BETWEEN))
        size += len(joined) + 1 + sum(map(len, values)) + len(names) * (_PER_FIELD_BYTES - len(_BETWEEN))
    if size > limits.head_bytes:
        raise HeadTooLargeError(f"The request's head is larger than {limits.head_bytes} bytes.")


def _check_names(names: Sequence[bytes]) -> None:
    seen: set[bytes] = set()
    for lower in names:
        if lower in _ONCE:
            if lower in seen:
                raise AmbiguousRequestError(f"The header {lower.decode()!r} is there twice.")
            seen.add(lower)
        elif b"_" in lower and lower.replace(b"_", b"-") in _LOOKED_LIKE:
            raise AmbiguousRequestError("A header's name has an underscore where a hyphen belongs.")


def ends_connection(request: web.Request) -> bool:
    """Tell whether nothing more may be read on a request's connection, though it was served.

    After a chunked body: aiohttp takes the last field of its trailer for a header of the *next* request, which a front
    proxy may send for somebody else. After an offer to change the protocol: what follows is perhaps no HTTP, and
    aiohttp drops what came in the same packet.
    """
    headers = request._message.headers  # noqa: SLF001 - as above
    return hdrs.TRANSFER_ENCODING in headers or hdrs.UPGRADE in headers
