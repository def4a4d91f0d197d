"""The way of one call, top to bottom.

authenticate → read the ask → quote → reserve (Redis) → open (Postgres) beside send (provider) → relay and meter →
settle (Postgres) → release (Redis).
"""

from typing import Annotated

from aiohttp import web

from billing.calls.live_call import LiveCall
from billing.errors import RateLimitError
from billing.identity.caller import Caller
from billing.pricing.quote import Quote
from billing.pricing.quoting import quote_ask
from proxy.call.answer import Answer
from proxy.call.answers import (
    ChatCompletionJson,
    ChatCompletionWithCostJson,
    CompletionJson,
    EmbeddingsJson,
    ResponseJson,
)
from proxy.call.plain import relay_plain
from proxy.call.stream import relay_stream
from proxy.http.request_facts import RATES, facts_of
from proxy.identity.authenticate import authenticate
from proxy.protocol.ask import Ask, read_ask
from proxy.protocol.dialects import CHAT, CHAT_WITH_COST, COMPLETIONS, EMBEDDINGS, RESPONSES, Dialect
from proxy.services.call import CALL, CallServices


async def chat_completions(request: web.Request) -> Annotated[web.StreamResponse, ChatCompletionJson]:
    """``POST /v1/chat/completions``: OpenAI's shape, plain or streamed, paid from the caller's wallet."""
    return await _call(request, CHAT)


async def chat_with_cost(request: web.Request) -> Annotated[web.StreamResponse, ChatCompletionWithCostJson]:
    """``POST /api/chat``: a chat completion that tells what it cost: as its member ``tuma``, or in a last chunk that has it."""
    return await _call(request, CHAT_WITH_COST)


async def completions(request: web.Request) -> Annotated[web.StreamResponse, CompletionJson]:
    """``POST /v1/completions``: OpenAI's legacy shape, plain or streamed, paid from the caller's wallet."""
    return await _call(request, COMPLETIONS)


async def embeddings(request: web.Request) -> Annotated[web.StreamResponse, EmbeddingsJson]:
    """``POST /v1/embeddings``: OpenAI's shape, paid from the caller's wallet."""
    return await _call(request, EMBEDDINGS)


async def responses(request: web.Request) -> Annotated[web.StreamResponse, ResponseJson]:
    """``POST /v1/responses``: OpenAI's Responses API without stored state, plain or streamed, paid from the caller's wallet."""
    return await _call(request, RESPONSES)


async def _call(request: web.Request, dialect: Dialect) -> web.StreamResponse:
    services = facts_of(request).app[CALL]
    caller = await authenticate(request)
    ask = await read_ask(request, services.settings.limits, dialect)
    caller.require_models(ask.models)
    call = await _reserve(request, services, caller, ask)
    answer = Answer(services, call, ask)
    try:
        services.calls.open(call)
        await answer.send()
        if ask.stream:
            return await relay_stream(request, answer)
        return await relay_plain(request, answer)
    finally:
        answer.conclude()  # on every way out: settle, then release, in a task of its own that nothing here can cancel


async def quote_for(services: CallServices, caller: Caller, ask: Ask) -> Quote:
    """Quote what was asked, in the currency of the caller's wallet.

    Raises:
        ModelNotFoundError, FxUnavailableError, FxStaleError: see ``quote_ask``.
    """
    return await quote_ask(
        ask.fields,
        ask.output,
        models=ask.models,
        currency=caller.currency,
        stream=ask.stream,
        body_bytes=ask.size,
        prices=services.prices,
        fx=services.fx,
        counter=services.counter,
        settings=services.settings.holds,
    )


async def _reserve(request: web.Request, services: CallServices, caller: Caller, ask: Ask) -> LiveCall:
    quote = await quote_for(services, caller, ask)
    facts = facts_of(request)
    rates = facts.app[RATES]
    facts.stages.mark("quote")
    try:
        call = await services.calls.reserve(
            caller, quote, call_id=facts.call_id, model=ask.model, stream=ask.stream
        )
    except RateLimitError as refusal:
        if refusal.state is not None:
            rates.remember(caller, refusal.state)
        raise
    facts.stages.mark("reserve")
    facts.call, call.stages = call, facts.stages
    rates.remember(caller, call.rates)
    return call
