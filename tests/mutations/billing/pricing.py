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
)
