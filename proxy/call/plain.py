"""A whole answer."""

from aiohttp import web

from proxy.call.answer import Answer
from proxy.call.cost import cost_headers, cost_json
from proxy.http.errors import UpstreamError
from proxy.http.fast_answer import HEADS
from proxy.http.request_facts import facts_of, standard_headers, still_there
from proxy.protocol.aggregate import is_stream, plain_from_stream
from proxy.protocol.json_document import with_member
from proxy.protocol.meter import read_plain

_BEGINNING = 4096  # bytes by which a stream is told from JSON


async def relay_plain(request: web.Request, answer: Answer) -> web.Response:
    """Read a whole answer, settle it, and send it with what it cost in its headers.

    A client that leaves early changes nothing: the answer is read to its end, as only there is its cost.

    Raises:
        UpstreamError, UpstreamTimeoutError: the answer broke off or is none.
        PostgresUnavailableError: the call could not be opened; the house pays what the provider billed.
    """
    answer.outcome = "upstream_error"
    body = await answer.read_whole()
    answer.mark_first_byte()
    if is_stream(body[:_BEGINNING]):
        body = plain_from_stream(body) or body  # it streams though it was asked not to
    answer.plain = plain = read_plain(body, price_usage=answer.price_usage())
    answer.complete = True
    await answer.note_id(plain.generation_id)
    await answer.confirm_open()
    if not plain.is_object:
        raise UpstreamError("The provider's answer is not a JSON object.")
    if plain.error is not None and not plain.completion_text:
        raise answer.refusal_inside(plain.error.code, plain.body)
    answer.accept()
    answer.outcome = "completed" if still_there(request) else "client_gone"
    settlement = await answer.settled()
    body = plain.body
    if answer.ask.dialect.tells_cost:
        body = with_member(body, "tuma", cost_json(answer, settlement))
    headers = {**standard_headers(request), **cost_headers(answer, settlement)}
    return facts_of(request).app[HEADS].answer(request, body, headers)
