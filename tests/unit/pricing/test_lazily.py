"""A prompt is bounded in place of counted only where wallet, caps and windows have room for many such calls more."""

from dataclasses import replace
from decimal import Decimal
from uuid import UUID

import pytest

from billing.fx.quote import FxQuote
from billing.pricing.cost import Price
from billing.pricing.lazily import is_covered
from billing.pricing.quote import quote_call
from billing.pricing.tokens import PromptCount

PRICE = Price(UUID(int=1), "m", Decimal("0.000001"), Decimal("0.000002"))
NAIRA = FxQuote(UUID(int=2), "NGN", Decimal(1600), 0)
QUOTE = quote_call(PRICE, NAIRA, prompt=PromptCount(1_000_000, bound=True), completion_tokens=100)
# One dollar of prompt, 0.0002 of output; thirty-two such prompts beside it.
NANO, NANOUSD, TOKENS = (33 * 10**9 + 200_000) * 1600, 33 * 10**9 + 200_000, 33_000_100


@pytest.mark.parametrize(
    ("nano", "nanousd", "tokens", "covered"),
    [
        (NANO, NANOUSD, TOKENS, True),
        (NANO, None, TOKENS, True),
        (NANO - 1, NANOUSD, TOKENS, False),
        (NANO, NANOUSD - 1, TOKENS, False),
        (NANO, NANOUSD, TOKENS - 1, False),
    ],
)
def test_what_a_bound_takes(nano: int, nanousd: int | None, tokens: int, covered: bool) -> None:
    assert is_covered(QUOTE, nano=nano, nanousd=nanousd, tokens=tokens) is covered


def test_the_dearest_that_may_answer_counts() -> None:
    dear = Price(UUID(int=3), "dear", Decimal("0.00001"), Decimal("0.000002"))
    assert not is_covered(replace(QUOTE, others=(dear,)), nano=NANO, nanousd=None, tokens=TOKENS)
