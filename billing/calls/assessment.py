"""What a call cost, from the best evidence there is. Pure.

The provider's own figure first; else its token counts at the price book; else tokens counted here.
"""

import json
from dataclasses import dataclass
from decimal import Decimal
from uuid import UUID

from billing.calls.outcome import Accuracy, Ending, Source
from billing.fx.quote import FxQuote
from billing.money import AMOUNT_MAX_NANO, ATTO_PER_NANO, NANO, attousd_from_decimal, nanousd_from_attousd
from billing.pricing.cost import Price, Usage, cost_attousd
from billing.provider.records import Bill

_COST_MAX_USD = AMOUNT_MAX_NANO // NANO


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known about an answer when its call ends.

    Args:
        billed_usd: the provider's own figure for this call, in USD, from the answer or from its records.
        own_key_usd: the part of it that is billed to a key of our own at another provider.
        usage: token counts: the provider's if ``counted`` is false, else ours.
        bills_by_price_book: whether this provider's bill is its usage at the price book, exactly.
        adds_up: whether the counts prove each other; else they are the larger of what they can mean.
    """

    generation_id: str | None = None
    billed_usd: Decimal | None = None
    usage: Usage | None = None
    counted: bool = False
    bills_by_price_book: bool = False
    adds_up: bool = True
    own_key_usd: Decimal = Decimal(0)

    @classmethod
    def of(cls, bill: Bill) -> "Evidence":
        """Return what a provider's record proves."""
        return cls(bill.generation_id, bill.cost_usd, bill.usage, own_key_usd=bill.own_key_usd)


def assess(
    call_id: UUID,
    evidence: Evidence,
    *,
    price: Price,
    fx: FxQuote,
    outcome: str,
    house: bool = False,
    first_byte_ms: int | None = None,
    duration_ms: int | None = None,
) -> Ending:
    """Turn evidence into the ending that settles a call.

    No evidence at all means that nothing was answered: the call is void. A figure beyond what any amount can be is looked at by people.

    Args:
        call_id: which.
        evidence: what is known.
        price: pinned for this call.
        fx: pinned for this call.
        outcome: in a word.
        house: whether the house pays instead of the wallet.
        first_byte_ms: from arrival to the answer's first byte.
        duration_ms: from arrival to the end.
    """
    void = Ending(
        call_id,
        "void",
        outcome,
        generation_id=evidence.generation_id,
        first_byte_ms=first_byte_ms,
        duration_ms=duration_ms,
    )
    if evidence.billed_usd is None and evidence.usage is None:
        return void
    if evidence.billed_usd is not None and not evidence.own_key_usd <= evidence.billed_usd <= _COST_MAX_USD:
        return in_review(void)
    cost, source, accuracy = _cost_of(evidence, price)
    cost_nanousd = nanousd_from_attousd(cost)
    own_nanousd = nanousd_from_attousd(attousd_from_decimal(evidence.own_key_usd))
    charge = fx.charge(0 if house else cost)
    if max(cost_nanousd, charge.charge_nano) > AMOUNT_MAX_NANO:
        return in_review(void)
    return Ending(
        call_id=call_id,
        state="settled",
        outcome=outcome,
        accuracy=accuracy,
        source=source,
        generation_id=evidence.generation_id,
        cost_nanousd=cost_nanousd,
        provider_cost_nanousd=None if evidence.billed_usd is None else cost_nanousd - own_nanousd,
        charge_nano=charge.charge_nano,
        spread_nano=charge.spread_nano,
        house_nanousd=cost_nanousd if house else 0,
        usage=evidence.usage or Usage(),
        first_byte_ms=first_byte_ms,
        duration_ms=duration_ms,
        exact_attousd=cost if source == "provider_cost" and cost % ATTO_PER_NANO else None,
    )


def _cost_of(evidence: Evidence, price: Price) -> tuple[int, Source, Accuracy]:
    """Return the cost in atto-dollars, where it is from, and whether it is the bill."""
    if evidence.billed_usd is not None:
        return attousd_from_decimal(evidence.billed_usd), "provider_cost", "exact"
    cost = cost_attousd(price, evidence.usage or Usage())
    proved = evidence.bills_by_price_book and evidence.adds_up
    if evidence.counted or not proved:
        return cost, "counted" if evidence.counted else "price_book", "estimated"
    return cost, "price_book", "exact"


def ending_as_note(ending: Ending) -> str:
    """Write an ending as text for a call's notes in Redis, for a settlement that waits for Postgres."""
    fields = {name: getattr(ending, name) for name in Ending.__slots__ if name not in ("call_id", "usage")}
    return json.dumps({**fields, "usage": {name: getattr(ending.usage, name) for name in Usage.__slots__}})


def ending_from_note(call_id: UUID, note: str) -> Ending:
    """Read what ``ending_as_note`` wrote."""
    fields = json.loads(note)
    return Ending(call_id=call_id, **{**fields, "usage": Usage(**fields["usage"])})


def in_review(ending: Ending) -> Ending:
    """Return the ending of a call that people must look at: its hold stays, and nothing is paid."""
    return Ending(
        ending.call_id,
        "review",
        ending.outcome,
        generation_id=ending.generation_id,
        first_byte_ms=ending.first_byte_ms,
        duration_ms=ending.duration_ms,
    )
