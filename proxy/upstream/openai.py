"""Any server that speaks OpenAI's protocol: it reports tokens, the price book makes money of them."""

from proxy.upstream.adapter import Upstream


class OpenAIUpstream(Upstream):
    """OpenAI, vLLM, a gateway of one's own.

    Hanging up does not stop the billing for certain, and there is no record to ask afterwards: an answer is read on to
    its end, where its usage is.
    """
