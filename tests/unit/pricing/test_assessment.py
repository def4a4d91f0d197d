"""What a call cost, from the evidence: figures that no amount can be."""

from decimal import Decimal
from typing import Any

import pytest

from billing.calls.assessment import Evidence, assess, in_review
from billing.calls.outcome import Ending
from billing.fx.quote import FxQuote
from billing.ids import new_id
from billing.pricing.cost import TOKENS_MAX, Price, Usage

PRICE = Price(new_id(), "m", Decimal(1), Decimal(10_000))
USD = FxQuote(new_id(), "USD", Decimal(1), 0)
NGN = FxQuote(new_id(), "NGN", Decimal(1600), 0)


@pytest.mark.parametrize(
    ("evidence", "fx"),
    [
        (Evidence("g", billed_usd=Decimal(4611686019)), USD),
        (Evidence("g", billed_usd=Decimal("1e300")), USD),
        (Evidence("g", billed_usd=Decimal(4_000_000)), NGN),  # fits as a cost, not as a charge
        (Evidence("g", usage=Usage(1, TOKENS_MAX), bills_by_price_book=True), USD),
        (Evidence("g", usage=Usage(1, TOKENS_MAX), counted=True), USD),
        (Evidence("g", billed_usd=Decimal(1), own_key_usd=Decimal(2)), USD),
    ],
)
def test_people_look_at_what_no_amount_can_be(evidence: Evidence, fx: FxQuote) -> None:
    ending = assess(
        new_id(), evidence, price=PRICE, fx=fx, outcome="completed", first_byte_ms=1, duration_ms=2
    )
    assert (ending.state, ending.cost_nanousd, ending.charge_nano) == ("review", 0, 0)
    assert (ending.outcome, ending.generation_id, ending.first_byte_ms, ending.duration_ms) == (
        "completed",
        "g",
        1,
        2,
    )
    assert in_review(ending) == ending


def test_what_adds_up_is_exact_and_what_does_not_is_estimated() -> None:
    def settled(**more: Any) -> Ending:
        evidence = Evidence("g", usage=Usage(10, 2), bills_by_price_book=True, **more)
        return assess(new_id(), evidence, price=PRICE, fx=USD, outcome="completed")

    assert (settled().accuracy, settled().source) == ("exact", "price_book")
    assert (settled(adds_up=False).accuracy, settled(adds_up=False).source) == ("estimated", "price_book")
    assert (settled(counted=True).accuracy, settled(counted=True).source) == ("estimated", "counted")


def test_a_key_of_our_own_is_part_of_the_cost_and_not_of_the_providers_bill() -> None:
    evidence = Evidence("g", billed_usd=Decimal("0.00021"), own_key_usd=Decimal("0.0002"))
    ending = assess(new_id(), evidence, price=PRICE, fx=USD, outcome="completed")
    assert (ending.cost_nanousd, ending.charge_nano, ending.provider_cost_nanousd) == (
        210_000,
        210_000,
        10_000,
    )
