"""Any server that speaks OpenAI's protocol: it reports tokens, the price book makes money of them."""

import re
from collections.abc import Mapping

from billing.pricing.quote import Quote
from proxy.protocol.ask import Ask
from proxy.upstream.adapter import Upstream

# Models of OpenAI's that refuse `max_tokens`, as they think before they answer; other servers know the older name for certain.
_THINKS = re.compile(r"(?:.*/)?(o\d|gpt-[5-9]|gpt-\d\d)")


class OpenAIUpstream(Upstream):
    """OpenAI, vLLM, a gateway of one's own.

    Hanging up does not stop the billing for certain, and there is no record to ask afterwards: an answer is read on to
    its end, where its usage is.
    """

    def request_changes(self, ask: Ask, quote: Quote) -> Mapping[str, str | None]:
        """Leave out OpenRouter's ``usage``, which means here what ``stream_options`` says: OpenAI refuses names that it does not know."""
        changes = super().request_changes(ask, quote)
        return {**changes, "usage": None} if "usage" in ask.fields else changes

    def bound_name(self, ask: Ask) -> str:
        """Return ``max_completion_tokens`` for models of OpenAI's that know no other, else the name that every server knows."""
        return ask.dialect.bounds[0 if _THINKS.match(ask.model) else -1]
