"""Guards of ``billing/pricing/``."""

from tests.mutations.mutation import Mutation

MUTATIONS = (
    Mutation(
        "a text beside something else hides nothing",
        "billing/pricing/tokens.py",
        '            if kind in _TEXTS or (kind is None and "content" not in part):\n                return',
        "            if True:\n                return",
        "tests/unit/pricing/test_tokens.py",
    ),
    Mutation(
        "a hold grows at the dearest price",
        "billing/pricing/quote.py",
        "for price in (self.price, *self.others)",
        "for price in (self.price,)",
        "tests/proxy/call/test_stream.py::test_the_hold_grows_at_the_price_of_the_dearest_that_may_answer",
    ),
    Mutation(
        "a model without a price is refused",
        "billing/pricing/quoting.py",
        "found = [prices.get_model(name) for name in models]",
        "found = [prices.models.get(name) or next(iter(prices.models.values())) for name in models]",
        "tests/proxy/call/test_bad_input.py",
    ),
    Mutation(
        "reasoning beside the completion is billed",
        "billing/pricing/usage.py",
        "        return made + reasoning, reasoning\n",
        "        return made, min(reasoning, made)\n",
        "tests/unit/pricing/test_usage.py",
    ),
    Mutation(
        "what only the total shows is billed",
        "billing/pricing/usage.py",
        "    unexplained = max(total - prompt - made, 0)\n",
        "    unexplained = 0\n",
        "tests/unit/pricing/test_usage.py",
    ),
    Mutation(
        "Anthropic's cache comes in addition",
        "billing/pricing/usage.py",
        "        if counts.find(*_ANTHROPIC):  # in addition to the prompt's own\n            prompt += in_cache\n",
        "        pass\n",
        "tests/unit/pricing/test_usage.py",
    ),
    Mutation(
        "of two figures for what is cached the smaller counts",
        "billing/pricing/usage.py",
        "inside=_PROMPT_DETAILS), least=True",
        "inside=_PROMPT_DETAILS), least=False",
        "tests/unit/pricing/test_usage.py",
    ),
    Mutation(
        "what has no price in the book makes an estimate",
        "billing/pricing/usage.py",
        "or _is_beyond_the_book(counts)",
        "or False",
        "tests/unit/pricing/test_usage.py",
    ),
    Mutation(
        "OpenRouter's repeated cost is not billed twice",
        "billing/pricing/usage.py",
        'said.get("is_byok") is not True',
        "False",
        "tests/unit/pricing/test_usage.py",
    ),
    Mutation(
        "a bound is used only where the wallet covers many",
        "billing/pricing/lazily.py",
        "        nano >= quote.hold_nano + spare_nano\n",
        "        True\n",
        "tests/unit/pricing/test_lazily.py",
    ),
    Mutation(
        "a bound is used only where the user's caps cover many",
        "billing/pricing/lazily.py",
        "nanousd >= quote.hold_nanousd + spare_nanousd",
        "True",
        "tests/unit/pricing/test_lazily.py",
    ),
    Mutation(
        "a bound is used only where the minute's tokens cover many",
        "billing/pricing/lazily.py",
        "tokens >= quote.completion_tokens + (1 + _SPARE) * quote.prompt.tokens",
        "True",
        "tests/unit/pricing/test_lazily.py",
    ),
    Mutation(
        "a bound counts bytes, not characters",
        "billing/pricing/tokens.py",
        '    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))\n',
        "    return len(text)\n",
        "tests/unit/pricing/test_tokens.py",
    ),
)
