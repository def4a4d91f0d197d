"""A provider that lacks the money for a bound on the output that was ours: it is told smaller ones before that is a refusal.

Nobody asked for that much: a request without a bound is told what its wallet can pay, up to the model's maximum, and a provider
checks what is left of our account against what it is told. OpenRouter says how many tokens it would serve (402: "You requested up
to 65536 tokens, but can only afford 30104", as reported in github.com/can1357/oh-my-pi/issues/9569 and
github.com/QwenLM/qwen-code/issues/73). Refused like that, nothing was begun and nothing is billed, so it may be asked again.
"""

import re
from http import HTTPStatus

from billing.pricing.quote import Quote
from config.settings import HoldSettings
from proxy.http.errors import UpstreamRefusesUsError, upstream_error
from proxy.upstream.client import UpstreamResponse

_LESS = 4  # where it does not say what it would serve
_AFFORDED = re.compile(rb"can only afford (\d{1,9})\b")
_SPARED = 16  # of what it would serve, one part is left: other calls of the account are paid meanwhile


def smaller_bound(
    quote: Quote, response: UpstreamResponse, body: bytes, settings: HoldSettings, *, first: bool
) -> Quote | None:
    """Return the quote at the bound to be told next; None where the refusal stands.

    What is held stays as it is, and is more than enough.

    Args:
        quote: with the bound that the provider was told.
        response: of the provider.
        body: of its answer.
        settings: the least output that is an answer.
        first: it is the call's first refusal. What it said would be served is believed once.
    """
    if response.status != HTTPStatus.PAYMENT_REQUIRED or not quote.open_ended:
        return None
    error = upstream_error(response.status, body, response.headers, redact=str)
    if not isinstance(error, UpstreamRefusesUsError) or error.is_empty:
        return None  # busy, or without any money
    said = _AFFORDED.search(body)
    afforded = quote.told_tokens if said is None else int(said[1])
    believed = first and afforded < quote.told_tokens
    tokens = afforded - afforded // _SPARED if believed else min(afforded, quote.told_tokens // _LESS)
    return quote.told(tokens) if tokens >= max(settings.least_tokens, 1) else None
