"""A whole answer."""

import aiohttp
from aiohttp import web

from proxy.call.answer import Answer, _confirm_open, _error_status, _price_usage, _settled
from proxy.call.cost import cost_headers, cost_json
from proxy.http.errors import UpstreamError, UpstreamTimeoutError
from proxy.http.fast_answer import HEADS
from proxy.http.request_facts import facts_of, standard_headers
from proxy.protocol.json_document import with_member
from proxy.protocol.meter import read_plain


async def relay_plain(request: web.Request, answer: Answer) -> web.Response:
    """Read a whole answer, settle it, and send it with what it cost in its headers.

    A client that leaves early changes nothing: the answer is read to its end, as only there is its cost.

    Raises:
        UpstreamError, UpstreamTimeoutError: the answer broke off or is none.
        PostgresUnavailableError: the call could not be opened; the house pays what the provider billed.
    """
    answer.outcome = "upstream_error"
    body = await _read_answer(answer)
    answer.mark_first_byte()
    answer.plain = plain = read_plain(body, price_usage=_price_usage(answer))
    answer.complete = True
    await answer.note_id(plain.generation_id)
    await _confirm_open(answer)
    if not plain.is_object:
        raise UpstreamError("The provider's answer is not a JSON object.")
    if plain.error is not None and not plain.completion_text:
        raise answer.refusal(_error_status(plain.error.code), plain.body, {})
    answer.accept()
    answer.outcome = "completed" if _still_there(request) else "client_gone"
    settlement = await _settled(answer)
    body = plain.body
    if answer.ask.dialect.tells_cost:
        body = with_member(body, "tuma", cost_json(answer, settlement))
    headers = {**standard_headers(request), **cost_headers(answer, settlement)}
    return facts_of(request).app[HEADS].answer(request, body, headers)


async def _read_answer(answer: Answer) -> bytes:
    assert answer.response is not None
    most = answer.services.settings.upstream.answer_bytes
    pieces: list[bytes] = []
    size = 0
    try:
        while piece := await answer.response.read_some():
            pieces.append(piece)
            size += len(piece)
            if size > most:
                raise UpstreamError("The provider's answer is too large.")
    except TimeoutError as error:
        answer.outcome = "upstream_timeout"
        raise UpstreamTimeoutError("The provider stopped answering.") from error
    except (aiohttp.ClientError, OSError) as error:
        raise UpstreamError(f"The provider's answer broke off: {type(error).__name__}.") from error
    return b"".join(pieces)


def _still_there(request: web.Request) -> bool:
    transport = request.transport
    return transport is not None and not transport.is_closing()
