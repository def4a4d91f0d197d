"""What a reconciliation found, in words and as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from uuid import UUID

from billing.books.answers import DifferenceJson, ReconciliationJson
from billing.money import format_usd

_WORDS = {
    "estimated": "charged by an estimate",
    "changed": "billed otherwise than the answer had said",
    "void_but_billed": "void, yet billed",
    "in_review": "in review, and known to the provider after all",
    "unknown_to_provider": "not known to the provider",
    "beyond_reason": "billed at a figure that no amount can be",
    "billed_without_an_answer": "billed without an answer that reached us",
    "answered_after_all": "booked as a loss before its call was settled; taken back",
    "billed_less_than_settled": "billed less in total than we settled",
    "billed_beyond_calls_in_flight": "billed more in total than settled and running calls explain",
    "account_used_elsewhere": "billed to the account by other keys than ours, or credited to it",
    "day_and_model": "another sum for a day and model",
}


_NAMES = {
    "activity": "the provider's sums by day and model",
    "bills": "the provider's record of calls",
    "credits": "the provider's total of our account",
    "key": "the provider's total of our key",
}


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference found; nano-dollars.

    Args:
        tx_id: the posting that repaired it.
        note: where it lies, if that is no call.
        known: an earlier run reported the same.
    """

    call_id: UUID | None
    cause: str
    ours_nanousd: int
    provider_nanousd: int | None
    tx_id: UUID | None = None
    note: str = ""
    known: bool = False

    @property
    def place(self) -> tuple[object, ...]:
        """What makes it the same as another run's."""
        return self.call_id, self.cause, self.ours_nanousd, self.provider_nanousd, self.note

    def as_json(self) -> DifferenceJson:
        """Return the contract's shape."""
        return {
            "call_id": None if self.call_id is None else str(self.call_id),
            "cause": self.cause,
            "ours_usd": format_usd(self.ours_nanousd),
            "provider_usd": None if self.provider_nanousd is None else format_usd(self.provider_nanousd),
            "corrected": self.tx_id is not None,
            "note": self.note,
            "known": self.known,
        }

    def __str__(self) -> str:
        theirs = "nothing" if self.provider_nanousd is None else f"{format_usd(self.provider_nanousd)} USD"
        where = f"call {self.call_id}" if self.call_id is not None else (self.note or "in total")
        done = "; corrected" if self.tx_id is not None else "; known before" if self.known else ""
        return f"{where}: {_WORDS[self.cause]}: ours {format_usd(self.ours_nanousd)} USD, the provider's {theirs}{done}"


@dataclass(frozen=True, slots=True)
class Report:
    """What a run found.

    Args:
        drift_nanousd: the provider's total less ours, after corrections; None where it has no total, or does not tell it now.
        away: which of the provider's records did not answer, and what came instead. Nothing was compared with them.
    """

    calls_checked: int
    days_checked: int
    differences: list[Difference] = field(default_factory=list)
    drift_nanousd: int | None = None
    live_calls: int = 0
    away: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> ReconciliationJson:
        """Return the contract's shape, and the report in words."""
        return {
            "drift_usd": None if self.drift_nanousd is None else format_usd(self.drift_nanousd),
            "differences": [item.as_json() for item in self.differences],
            "calls_checked": self.calls_checked,
            "days_checked": self.days_checked,
            "calls_in_flight": self.live_calls,
            "complete": not self.away,
            "away": sorted(self.away),
            "report": str(self),
        }

    def __str__(self) -> str:
        corrected = sum(item.tx_id is not None for item in self.differences)
        asked = f"Asked the provider about {self.calls_checked} calls and {self.days_checked} days: "
        lines = [asked + f"{len(self.differences)} differences, {corrected} of them corrected."]
        lines += [f"- {item}" for item in self.differences]
        lines += [
            f"Not complete: {_NAMES[source]} did not answer ({said}); nothing was compared with it."
            for source, said in sorted(self.away.items())
        ]
        if self.drift_nanousd is None:
            never = "key" not in self.away
            lines.append(f"The provider {'does' if never else 'did'} not say what it billed in total.")
        elif self.drift_nanousd == 0:
            lines.append("In total our books and the provider's agree to the nano-dollar.")
        else:
            lines.append(
                f"In total the provider's books differ from ours by {format_usd(self.drift_nanousd)} USD,"
                f" with {self.live_calls} calls in flight."
            )
        return "\n".join(lines)
