"""``POST /v1/estimate``: what a chat completion would cost and hold, and whether it would be admitted."""

from collections.abc import Callable

from aiohttp import web

from billing.errors import RateLimitError, RefusalError, TumaError, UnavailableError
from billing.identity.caller import Caller
from billing.money import format_amount, format_usd, nanousd_from_attousd
from billing.pricing.estimate import Estimate, Spread, estimate_call
from billing.pricing.quote import Quote
from proxy.call.answers import (
    AmountSpreadJson,
    EstimateJson,
    QuotedFields,
    RefusalJson,
    TokenSpreadJson,
)
from proxy.call.chat import quote_for
from proxy.call.cost import fx_json
from proxy.http.errors import error_object, shape_of
from proxy.http.request_facts import call_id_of
from proxy.http.typed_answer import JsonAnswer, answer
from proxy.identity.authenticate import authenticate
from proxy.protocol.ask import Ask, read_ask
from proxy.protocol.dialects import CHAT
from proxy.services.call import CALL, CallServices


async def estimate(request: web.Request) -> JsonAnswer[EstimateJson]:
    """What a chat completion would cost and hold, and whether it would be admitted. Nothing is sent, held or counted."""
    services = request.app[CALL]
    caller = await authenticate(request)
    ask = await read_ask(
        request, services.settings.limits, CHAT, services.policy, caller=caller, threads=services.threads
    )
    quote = await quote_for(request, services, caller, ask)
    settings = services.settings.holds
    found = estimate_call(
        [services.prices.get_model(name).price for name in ask.models],
        prompt=quote.prompt,
        output=ask.output,
        default_tokens=settings.plain_default_tokens,
        expected_tokens=settings.expected_tokens,
    )
    quote, refusal = await _find_refusal(request, services, caller, ask, quote)
    return answer(
        request,
        {**_as_json(ask, quote, found), "admitted": refusal is None, "refusal": _refusal_json(refusal)},
    )


async def _find_refusal(
    request: web.Request, services: CallServices, caller: Caller, ask: Ask, quote: Quote
) -> tuple[Quote, TumaError | None]:
    """Return what would be held just now, and what the call would be refused with; None if it would be admitted."""
    try:
        caller.require_models(ask.models)
        return await services.calls.look(caller, quote, call_id=call_id_of(request)), None
    except (RefusalError, UnavailableError) as refusal:
        return quote, refusal


def _refusal_json(refusal: TumaError | None) -> RefusalJson | None:
    if refusal is None:
        return None
    after_ms = refusal.retry_after_ms if isinstance(refusal, RateLimitError) else None
    return {"status": shape_of(refusal).status, "retry_after_ms": after_ms, **error_object(refusal)}


def _as_json(ask: Ask, quote: Quote, found: Estimate) -> QuotedFields:
    fx = quote.fx
    return {
        "object": "estimate",
        "model": ask.model,
        "tokens_prompt": _tokens(found.prompt_tokens),
        "tokens_completion": _tokens(found.completion_tokens),
        "cost_usd": _amounts(found.cost_attousd, lambda cost: format_usd(nanousd_from_attousd(cost))),
        "charge": _amounts(found.cost_attousd, lambda cost: format_amount(fx.charge(cost).charge_nano)),
        "hold": format_amount(quote.hold_nano),
        "hold_usd": format_usd(quote.hold_nanousd),
        "currency": fx.currency,
        **fx_json(fx),
    }


def _tokens(spread: Spread) -> TokenSpreadJson:
    return {"least": spread.least, "expected": spread.expected, "most": spread.most}


def _amounts(spread: Spread, write: Callable[[int], str]) -> AmountSpreadJson:
    return {
        "least": write(spread.least),
        "expected": write(spread.expected),
        "most": write(spread.most),
    }
