"""How a charge came about, in lines that can be followed with a calculator. Pure.

Every figure is written in full, as it is in the books; a line with ``=`` holds exactly, and the one rounding is named.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Literal

from billing.fx.quote import FxQuote
from billing.money import (
    ATTO_DECIMALS,
    ATTO_PER_NANO,
    NANO_DECIMALS,
    attousd_from_decimal,
    format_amount,
    format_usd,
    scaled_integer,
)
from billing.pricing.cost import Price, Usage, cost_attousd

ChangeKind = Literal["correction", "refund"]
_TIMES = "×"  # noqa: RUF001 - as people write it
_BPS = 10_000
_BPS_DECIMALS = 4
_BILLED = re.compile(r"the provider billed ([0-9.]+) USD for ")  # what Corrections.correct notes
_BASIS = {
    "provider_cost": "The provider reported what the answer cost.",
    "price_book": "The provider reported tokens; they are priced by the price book.",
    "counted": "The provider reported nothing; tokens counted by Tuma are priced by the price book.",
    "noted": "The provider reported nothing; the tokens noted so far are priced by the price book.",
}
_ENDED_BY = {"worker_lost": "the sweeper, as its worker was lost", "decided": "an operator"}
_DECIDED = "Nobody could tell what the answer cost, so an operator said it."


@dataclass(frozen=True, slots=True)
class Change:
    """A posting after the settlement that names the call; ``amount_nano`` is what the wallet got, negative if it paid."""

    kind: ChangeKind
    memo: str
    at: datetime
    amount_nano: int


@dataclass(frozen=True, slots=True)
class HouseView:
    """What only the operator sees: the provider's bill, and the part of the cost that no wallet pays; nano-dollars."""

    provider_cost_nanousd: int | None
    house_nanousd: int
    spread_nano: int


@dataclass(frozen=True, slots=True)
class CallFacts:
    """What the books say of a call; nano units of the wallet's currency and of USD.

    Args:
        cost_nanousd: as it stands now, after corrections.
        settled_nano: what the wallet paid when the call was settled; None if it was not.
        exact_attousd: the provider's figure, where it is finer than ``cost_nanousd``.
        changes: corrections and refunds, by age.
        house: None for everybody but the operator.
    """

    state: str
    outcome: str | None
    currency: str
    hold_nano: int
    cost_nanousd: int | None
    charge_nano: int | None
    accuracy: str | None
    generation_id: str | None
    ended_at: datetime | None
    source: str | None
    usage: Usage | None
    exact_attousd: int | None
    settled_nano: int | None
    price: Price | None
    fx: FxQuote | None
    changes: Sequence[Change]
    house: HouseView | None = None


def explain(call: CallFacts) -> list[str]:
    """Return how the charge of a call came about, a sentence or a sum per line."""
    return [
        *_explain_end(call),
        *_explain_cost(call),
        *_explain_hold(call),
        *_explain_changes(call),
        *_explain_result(call),
    ]


def _explain_end(call: CallFacts) -> Iterator[str]:
    named = f" The provider's id of the answer: {call.generation_id}." if call.generation_id else ""
    if call.state == "open":
        yield f"The call is under way, or its worker died and the sweeper has yet to end it.{named}"
    elif call.state == "review":
        yield f"The provider does not know the answer, so what it costs is not known; it is still asked.{named}"
    else:
        by = _ENDED_BY.get(call.outcome or "", "its own worker")
        at = "" if call.ended_at is None else f" at {call.ended_at.isoformat()}"
        yield f"The call was ended by {by}{at}: {call.outcome}.{named}"


def _explain_cost(call: CallFacts) -> Iterator[str]:
    if call.settled_nano is None or call.usage is None or call.source is None:
        if call.state == "void":
            yield "Nothing was answered, so it cost nothing."
        return
    yield _DECIDED if call.outcome == "decided" else _BASIS[call.source]
    cost = _find_cost(call)
    if call.source != "provider_cost" and call.price is not None:
        yield from _explain_tokens(call.usage, call.price)
    elif cost is not None:
        yield f"Cost: {_exact(cost, ATTO_DECIMALS)} USD, for {_tokens(call.usage)}."
        if call.price is not None and (parts := _parts(call.usage, call.price)):
            told = " + ".join(
                f"{count} {name} {_TIMES} {_exact(each, ATTO_DECIMALS)}" for count, name, each in parts
            )
            yield f"By our price book: {told} = {_exact(cost_attousd(call.price, call.usage), ATTO_DECIMALS)} USD."
    if cost is None or call.fx is None:
        yield f"Settled at {format_amount(call.settled_nano)} {call.currency}; what it was computed from was corrected since."
        return
    computed = call.fx.charge(cost).charge_nano
    if call.settled_nano == 0 and computed:
        yield f"The wallet was charged 0 {call.currency}: the house pays for this call."
        return
    yield from _explain_conversion(cost, call.fx)
    if call.outcome == "out_of_funds" and call.settled_nano < computed:
        yield f"The wallet was charged the {format_amount(call.settled_nano)} {call.currency} that were held for it: it could not follow."
    elif computed != call.settled_nano:
        yield f"Settled at {format_amount(call.settled_nano)} {call.currency}: digits of the cost beyond these were not kept."


def _find_cost(call: CallFacts) -> int | None:
    """Return what the call was settled at, in atto-dollars; None where a correction has taken its place."""
    assert call.usage is not None
    if call.source != "provider_cost":
        return None if call.price is None else cost_attousd(call.price, call.usage)
    if call.exact_attousd is not None:
        return call.exact_attousd
    corrected = any(change.kind == "correction" for change in call.changes)
    return None if corrected or call.cost_nanousd is None else call.cost_nanousd * ATTO_PER_NANO


def _parts(usage: Usage, price: Price) -> list[tuple[int, str, int]]:
    """Return what is priced: how many, of what, and the price of each in atto-dollars."""
    rates = price.rates
    apart = usage.cached_read_tokens + usage.cached_write_tokens + usage.audio_tokens
    parts = (
        ("prompt tokens", usage.prompt_tokens - apart, rates.prompt),
        ("prompt tokens read from the cache", usage.cached_read_tokens, rates.cached_read),
        ("prompt tokens written to the cache", usage.cached_write_tokens, rates.cached_write),
        ("audio tokens", usage.audio_tokens, rates.audio),
        ("completion tokens", usage.completion_tokens - usage.reasoning_tokens, rates.completion),
        ("reasoning tokens", usage.reasoning_tokens, rates.reasoning),
        ("images", usage.images, rates.image),
        ("request", 1 if rates.request else 0, rates.request),
    )
    return [(count, name, each) for name, count, each in parts if count]


def _explain_tokens(usage: Usage, price: Price) -> Iterator[str]:
    for count, name, each in _parts(usage, price):
        yield (
            f"{count} {name} {_TIMES} {_exact(each, ATTO_DECIMALS)} USD = {_exact(count * each, ATTO_DECIMALS)} USD"
        )
    yield f"Cost: {_exact(cost_attousd(price, usage), ATTO_DECIMALS)} USD."


def _explain_conversion(cost: int, fx: FxQuote) -> Iterator[str]:
    rate = scaled_integer(fx.rate, decimals=ATTO_DECIMALS)
    product = cost * rate * (_BPS + fx.markup_bps)
    exact = _exact(product, 2 * ATTO_DECIMALS + _BPS_DECIMALS)
    charge = fx.charge(cost)
    factors = f"{_exact(cost, ATTO_DECIMALS)} USD"
    if fx.currency != "USD" or fx.rate != 1:
        factors += f" {_TIMES} {_exact(rate, ATTO_DECIMALS)} {fx.currency} per USD"
    if fx.markup_bps:
        factors += f" {_TIMES} (1 + {fx.markup_bps}/{_BPS})"
    yield f"{factors} = {exact} {fx.currency}"
    yield (
        f"Rounded up, this once, to {NANO_DECIMALS} decimals: {format_amount(charge.charge_nano)} {fx.currency}."
    )
    if fx.markup_bps:
        base = format_amount(charge.charge_nano - charge.spread_nano)
        spread = format_amount(charge.spread_nano)
        yield f"Of it, markup: {spread} {fx.currency}; without, rounded up alike, it would be {base} {fx.currency}."


def _explain_hold(call: CallFacts) -> Iterator[str]:
    held = f"{format_amount(call.hold_nano)} {call.currency}"
    if call.state in ("open", "review"):
        yield f"Held of the wallet: {held}, until the call ends."
        return
    paid = call.settled_nano or 0
    back = call.hold_nano - paid
    given = f"{format_amount(back)} {call.currency} given back"
    if back < 0:
        given = f"{format_amount(-back)} {call.currency} taken beyond the hold"
    yield f"Held during the call: {held}; paid when it ended: {format_amount(paid)} {call.currency}; {given}."


def _explain_changes(call: CallFacts) -> Iterator[str]:
    charge = call.settled_nano or 0
    for change in call.changes:
        before, charge = charge, charge - change.amount_nano
        step = f"the charge goes from {format_amount(before)} to {format_amount(charge)} {call.currency}"
        if change.amount_nano == 0:
            step = f"the charge stays {format_amount(charge)} {call.currency}"
        memo = f" ({change.memo})" if change.memo else ""
        yield f"{change.kind.capitalize()} of {change.at.isoformat()}{memo}: {step}."
        billed = _BILLED.match(change.memo) if change.kind == "correction" else None
        if billed is None or call.fx is None or not change.amount_nano:
            continue
        exact = attousd_from_decimal(Decimal(billed[1]))
        if call.fx.charge(exact).charge_nano == charge:
            yield from _explain_conversion(exact, call.fx)


def _explain_result(call: CallFacts) -> Iterator[str]:
    if call.charge_nano is None or call.cost_nanousd is None:
        return
    if call.house is not None:
        if call.house.provider_cost_nanousd is not None:
            yield f"The provider billed {format_usd(call.house.provider_cost_nanousd)} USD (kept to {NANO_DECIMALS} decimals, up)."
            own_nanousd = call.cost_nanousd - call.house.provider_cost_nanousd
            if own_nanousd > 0:
                yield f"{format_usd(own_nanousd)} USD are billed to a key of the house's own at the provider behind it."
        if call.house.house_nanousd:
            yield f"Of the cost the house bears {format_usd(call.house.house_nanousd)} USD."
    if call.accuracy is not None and call.state == "settled":
        why = {
            "exact": "exact: what the provider bills",
            "estimated": "estimated: reconciliation may correct it once the provider names its figure",
        }[call.accuracy]
        yield f"The cost is {why}."
    yield f"Charge: {format_amount(call.charge_nano)} {call.currency}."


def _tokens(usage: Usage) -> str:
    parts = [f"{usage.prompt_tokens} prompt tokens"]
    if usage.cached_read_tokens:
        parts[0] += f" ({usage.cached_read_tokens} of them from the cache)"
    parts.append(f"{usage.completion_tokens} completion tokens")
    if usage.reasoning_tokens:
        parts[1] += f" ({usage.reasoning_tokens} of them reasoning)"
    return " and ".join(parts)


def _exact(number: int, decimals: int) -> str:
    """Write an integer of 10^-decimals as a decimal, in full."""
    whole, fraction = divmod(number, 10**decimals)
    return f"{whole}.{fraction:0{decimals}d}".rstrip("0").rstrip(".")
