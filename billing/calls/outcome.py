"""How a call ended, as data."""

from dataclasses import dataclass, field, replace
from typing import Literal
from uuid import UUID

from billing.pricing.cost import Usage

Accuracy = Literal["exact", "estimated"]


Source = Literal["provider_cost", "price_book", "counted", "noted"]


State = Literal["settled", "void", "review"]


@dataclass(frozen=True, slots=True)
class Ending:
    """How a call ended and what it cost.

    Args:
        outcome: in a word, for people: ``completed``, ``client_gone``, ``upstream_error``, ….
        house_nanousd: the part of the cost that the wallet does not pay.
        provider_cost_nanousd: what the provider says it billed to our account, which is less than the cost where a key of our own
            at another provider was used; None when it said nothing.
        exact_attousd: the cost as it says it, where it is finer than nano-dollars, for who wants to follow the charge; else None.
    """

    call_id: UUID
    state: State
    outcome: str
    accuracy: Accuracy = "exact"
    source: Source = "provider_cost"
    generation_id: str | None = None
    cost_nanousd: int = 0
    provider_cost_nanousd: int | None = None
    charge_nano: int = 0
    spread_nano: int = 0
    house_nanousd: int = 0
    usage: Usage = field(default_factory=Usage)
    first_byte_ms: int | None = None
    duration_ms: int | None = None
    exact_attousd: int | None = None

    @property
    def is_fine(self) -> bool:
        """Whether it has figures beyond those of every call."""
        return bool(self.exact_attousd is not None or self.usage.images or self.usage.audio_tokens)


@dataclass(frozen=True, slots=True)
class Settlement:
    """How a call stands after a settle; ``won`` tells whether this attempt ended it. Nano units."""

    call_id: UUID
    won: bool
    state: State
    charge_nano: int
    hold_nano: int
    posted_nano: int
    available_nano: int


def on_the_house(ending: Ending) -> Ending:
    """Return the same ending at the house's cost: the wallet pays nothing."""
    return replace(ending, charge_nano=0, spread_nano=0, house_nanousd=ending.cost_nanousd)


def within_hold(ending: Ending, held_nano: int) -> Ending:
    """Return the same ending with a charge of at most what was held for it; what is beyond that the house pays.

    Args:
        ending: settled, or void.
        held_nano: in nano units of the wallet's currency.
    """
    if ending.charge_nano <= held_nano:
        return ending
    paid_nanousd = (ending.cost_nanousd - ending.house_nanousd) * held_nano // ending.charge_nano
    return replace(
        ending,
        charge_nano=held_nano,
        spread_nano=ending.spread_nano * held_nano // ending.charge_nano,
        house_nanousd=ending.cost_nanousd - paid_nanousd,
    )
