"""What the books should say, in plain arithmetic: no code of ours, no database, every sum taken anew from the calls."""

from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil
from uuid import UUID

LIVE = ("open", "review")


@dataclass(frozen=True)
class Coin:
    """A currency: units for one dollar, and the markup on them."""

    currency: str
    rate: Fraction
    markup_bps: int

    def charge(self, cost_nanousd: int) -> int:
        return ceil(cost_nanousd * self.rate * (1 + Fraction(self.markup_bps, 10_000)))

    def spread(self, cost_nanousd: int) -> int:
        return self.charge(cost_nanousd) - ceil(cost_nanousd * self.rate)


@dataclass
class Purse:
    """A wallet as it should be; nano units. ``caps`` in total: on the wallet in its coin, on its user in dollars."""

    coin: Coin
    overdraft: int = 0
    credits: int = 0
    calls: list["Story"] = field(default_factory=list)
    frozen: bool = False
    caps: dict[str, int] = field(default_factory=dict)

    def counted(self, scope: str) -> tuple[int, int]:
        """What a cap counts as held and as spent."""
        live = [call for call in self.calls if call.state in LIVE]
        if scope == "wallet":
            return self.held, sum(call.charge for call in self.calls)
        return sum(call.hold_usd for call in live), sum(call.cost - call.house for call in self.calls)

    def covers(self, hold: int, hold_usd: int) -> bool:
        """Whether so much more may be held."""
        return (
            not self.frozen
            and hold <= self.available
            and all(
                (hold if scope == "wallet" else hold_usd) <= limit - sum(self.counted(scope))
                for scope, limit in self.caps.items()
            )
        )

    def room(self, hold: int, hold_usd: int, most: int) -> int:
        """How many calls of one size, up to ``most``, may be held."""
        return sum(self.covers(hold * many, hold_usd * many) for many in range(1, most + 1))

    @property
    def posted(self) -> int:
        return self.credits - sum(call.charge for call in self.calls)

    @property
    def held(self) -> int:
        return sum(call.hold for call in self.calls if call.state in LIVE)

    @property
    def available(self) -> int:
        return self.posted + self.overdraft - self.held

    @property
    def certain(self) -> bool:
        """Whether Redis knows exactly what Postgres knows, if it knows anything."""
        return not any(call.uncertain for call in self.calls)


@dataclass
class Story:
    """A call as it should be.

    Args:
        hold_usd: the same in nano-dollars.
        state: ``reserved`` (no row yet), ``open``, ``review``, ``settled``, ``void``, or ``gone`` (it never had a row).
        hold: nano units of the wallet's currency.
        generation_id: of the answer, once the provider gave one.
        known: whether our row names the answer's id.
        noted: whether Redis does.
        tokens: of the answer, as noted for a provider without records.
        lost: whether its worker is taken for dead; late: whether that worker has ended it nevertheless.
        uncertain: whether its hold may be counted otherwise in Redis than in Postgres.
        written_off: whether a reconciliation has booked what it cost as part of what no call explains.
    """

    call_id: UUID
    purse: Purse
    hold: int
    hold_usd: int
    state: str = "reserved"
    generation_id: str | None = None
    known: bool = False
    noted: bool = False
    tokens: int = 0
    lost: bool = False
    late: bool = False
    uncertain: bool = False
    written_off: bool = False
    accuracy: str | None = None
    cost: int = 0
    charge: int = 0
    spread: int = 0
    house: int = 0

    def settle(self, cost: int, *, accuracy: str = "exact") -> None:
        self.state, self.accuracy, self.cost = "settled", accuracy, cost
        self.charge, self.spread = self.purse.coin.charge(cost), self.purse.coin.spread(cost)
        self.known = self.known or self.generation_id is not None

    def settle_on_the_house(self, cost: int) -> None:
        """The provider billed what Postgres had refused."""
        self.settle(cost)
        self.charge = self.spread = 0
        self.house = cost

    def correct(self, bill: int, *, estimate: bool) -> None:
        """Our cost follows the bill; the charge follows it down always, up only from an estimate and without a refund."""
        charge = self.purse.coin.charge(bill)
        if charge < self.charge or (charge > self.charge and estimate and self.house == 0):
            self.charge, self.spread, self.house = charge, self.purse.coin.spread(bill), 0
        else:
            self.house = max(bill - (self.cost - self.house), 0)
        self.cost, self.accuracy, self.known = bill, "exact", True
        if bill > 0 or self.charge > 0:
            self.state = "settled"

    def refund(self, amount: int) -> None:
        self.house += (self.cost - self.house) * amount // self.charge
        self.spread -= self.spread * amount // self.charge
        self.charge -= amount
        self.spread = min(self.spread, self.charge)
