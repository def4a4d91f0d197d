"""Our provider cost beside the provider's own totals, with what calls in flight explain."""

from dataclasses import dataclass, field
from typing import Any

from billing.errors import ProviderUnavailableError
from billing.money import attousd_from_decimal, format_usd, nanousd_from_attousd
from billing.postgres.database import Database
from billing.provider.records import Provider, Source


@dataclass(frozen=True, slots=True)
class Totals:
    """One comparison; nano-dollars, counted from our first call.

    The provider was asked between two looks at our books: it cannot have billed less than we had settled before, nor
    more than we had settled after and still held for calls in flight.

    Args:
        billed: by the provider, by each of its own sums.
        before: what we had settled before it was asked.
        after: what we had settled afterwards.
        held: for calls in flight then.
        live: how many of these there were.
        away: which of the provider's sums did not answer, and what came instead.
    """

    billed: dict[Source, int]
    before: int
    after: int
    held: int
    live: int
    away: dict[str, str] = field(default_factory=dict)

    @property
    def source(self) -> Source:
        """The sum that is closest to us: our key's, if it is known."""
        return "key" if "key" in self.billed else "credits"

    @property
    def drift(self) -> int:
        """What the provider billed less what we settled; while calls are in flight part of it is theirs."""
        return self.billed[self.source] - self.after

    @property
    def agree(self) -> bool:
        """Whether calls in flight explain every difference."""
        return self.before <= self.billed[self.source] <= self.after + self.held

    @property
    def is_quiet(self) -> bool:
        """Whether nothing was in flight, so that the drift says all."""
        return self.live == 0 and self.before == self.after

    def __str__(self) -> str:
        return (
            f"ours {format_usd(self.after)} USD, the provider's {format_usd(self.billed[self.source])} USD,"
            f" drift {format_usd(self.drift)} USD, {self.live} calls not ended (up to {format_usd(self.held)} USD)"
        )


async def compare_totals(database: Database, provider: Provider) -> Totals | None:
    """Compare once; None where the provider has no total.

    A total of the whole account never stands in for one of our key that does not answer: others may use the account, too.

    Raises:
        ProviderUnavailableError: our key's total cannot be asked for, or what it had billed before our first call was never recorded.
        PostgresUnavailableError: Postgres is away.
    """
    before = await _look(database)
    said = await provider.find_totals_usd()
    if not said:
        return None
    away: dict[str, str] = {
        source: str(total) for source, total in said.items() if isinstance(total, ProviderUnavailableError)
    }
    if "key" in away:
        raise ProviderUnavailableError(away["key"])
    after = await _look(database)
    async with database.connection() as connection:
        rows = await connection.fetch("SELECT source, total_nanousd FROM provider_openings")
    openings = {row["source"]: row["total_nanousd"] for row in rows}
    billed: dict[Source, int] = {
        source: nanousd_from_attousd(attousd_from_decimal(total)) - openings[source]
        for source, total in said.items()
        if source in openings and not isinstance(total, ProviderUnavailableError)
    }
    if not billed:
        for total in said.values():
            if isinstance(total, ProviderUnavailableError):
                raise total
        raise ProviderUnavailableError(
            "what the provider had billed before our first call was never recorded"
        )
    return Totals(billed, int(before["cost"]), int(after["cost"]), int(after["held"]), after["live"], away)


async def _look(database: Database) -> Any:
    async with database.connection() as connection:
        return await connection.fetchrow(
            "SELECT (SELECT sum(spent_nanousd) FROM quota_slabs) AS cost, count(*) AS live,"
            " coalesce(sum(hold_nanousd), 0) AS held FROM calls WHERE state IN ('open', 'review')"
        )
