"""The way of one call, top to bottom.

authenticate → read the ask → quote → reserve (Redis) → open (Postgres) beside send (provider) → relay and meter →
settle (Postgres) → release (Redis).
"""

import contextlib
import math
from collections.abc import Mapping
from typing import Annotated, Any

from aiohttp import web

from billing.calls.live_call import LiveCall
from billing.errors import (
    CapExceededError,
    InsufficientFundsError,
    ProviderQuotaError,
    RateLimitError,
    RefusalError,
)
from billing.holds.admission import Room
from billing.identity.caller import Caller
from billing.pricing.estimate import PROMPT_MOST
from billing.pricing.lazily import is_covered
from billing.pricing.quote import Quote
from billing.pricing.quoting import quote_ask
from billing.pricing.tokens import PromptCount
from proxy.call.answer import Answer
from proxy.call.answers import (
    ChatCompletionJson,
    ChatCompletionWithCostJson,
    CompletionJson,
    EmbeddingsJson,
    ResponseJson,
)
from proxy.call.door import DOOR
from proxy.call.plain import relay_plain
from proxy.call.stream import relay_stream
from proxy.http.request_facts import RATES, facts_of, still_there
from proxy.identity.authenticate import authenticate
from proxy.protocol.ask import Ask, read_ask
from proxy.protocol.dialects import CHAT, CHAT_WITH_COST, COMPLETIONS, EMBEDDINGS, RESPONSES, Dialect
from proxy.services.call import CALL, CallServices

_GONE_OVER_AT_ONCE = 64 * 1024  # nodes of a request of which a bound is made on the event loop
_BY_AMOUNT = (InsufficientFundsError, CapExceededError, RateLimitError, ProviderQuotaError)  # less may pass


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
    room = await facts_of(request).app[DOOR].look(request, services, caller)
    ask = await read_ask(
        request,
        services.settings.limits,
        dialect,
        services.policy,
        caller=caller,
        threads=services.threads,
    )
    caller.require_models(ask.models)
    call = await _reserve(request, services, caller, ask, room)
    answer = Answer(services, call, ask)
    try:
        services.calls.open(call)
        await answer.send()
        if ask.stream:
            return await relay_stream(request, answer)
        return await relay_plain(request, answer)
    finally:
        answer.conclude()  # on every way out: settle, then release, in a task of its own that nothing here can cancel


async def quote_for(
    request: web.Request, services: CallServices, caller: Caller, ask: Ask, *, lazily: bool = False
) -> Quote:
    """Quote what was asked, in the currency of the caller's wallet.

    Args:
        request: of the call; once its client has hung up, nothing more is counted.
        services: the rooms.
        caller: who pays.
        ask: what was asked.
        lazily: the prompt is not counted, but taken for as much as it can be.

    Raises:
        ModelNotFoundError, PriceMissingError, FxUnavailableError, FxStaleError: see ``quote_ask``.
        BadRequestError: see ``Upstream.check``.
    """
    counter = services.counter
    services.upstream.check(ask)

    async def count_of(fields: Mapping[str, Any]) -> PromptCount:
        if lazily:
            return counter.bound_prompt(fields, ask.model)
        return await counter.count_prompt_async(
            fields, ask.model, ask.work, owner=caller.user_id, wanted=lambda: still_there(request)
        )

    async def count_predicted() -> int:
        if ask.predicted is None:
            return 0
        # All of it is billed at the price of output, so the provider's count is taken at the upper end of its band.
        return math.ceil((await count_of({"prompt": ask.predicted})).tokens * PROMPT_MOST)

    return await quote_ask(
        services.upstream.output_of(ask),
        count=lambda: count_of(ask.fields),
        models=ask.models,
        currency=caller.currency,
        stream=ask.stream,
        prices=services.prices,
        fx=services.fx,
        settings=services.settings.holds,
        extras=services.upstream.extras_of(ask),
        beside_tokens=await count_predicted(),
    )


async def _reserve(
    request: web.Request, services: CallServices, caller: Caller, ask: Ask, room: Room | None
) -> LiveCall:
    """Reserve by a bound of the prompt where the wallet covers that anyway, else by its count."""
    long = len(ask.body) >= services.settings.limits.look_bytes
    if room is not None and long and ask.nodes <= _GONE_OVER_AT_ONCE:
        quote = await quote_for(request, services, caller, ask, lazily=True)
        if is_covered(quote, nano=room.nano, nanousd=room.nanousd, tokens=room.tokens):
            with contextlib.suppress(*_BY_AMOUNT):
                return await _take(request, services, caller, ask, quote)
    return await _take(request, services, caller, ask, await quote_for(request, services, caller, ask))


async def _take(
    request: web.Request, services: CallServices, caller: Caller, ask: Ask, quote: Quote
) -> LiveCall:
    facts = facts_of(request)
    rates, door = facts.app[RATES], facts.app[DOOR]
    facts.stages.mark("quote")
    try:
        call = await services.calls.reserve(
            caller, quote, call_id=facts.call_id, model=ask.model, stream=ask.stream
        )
    except RefusalError as refusal:
        door.refused(caller)
        if isinstance(refusal, RateLimitError) and refusal.state is not None:
            rates.remember(caller, refusal.state)
        raise
    facts.stages.mark("reserve")
    facts.call, call.stages = call, facts.stages
    rates.remember(caller, call.rates)
    door.admitted(caller)
    return call
