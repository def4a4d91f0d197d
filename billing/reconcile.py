"""Reconciliation: our books beside the provider's, call by call and in total; differences are rows with a cause.

Our cost follows the provider's bill always; the wallet is corrected downward always, upward only where its charge was
an estimate. What the provider billed beyond all calls (an answer of which no byte ever came back) is the house's loss.
"""

import asyncio
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from billing.corrections import Corrections
from billing.db import Database
from billing.errors import ProviderUnavailableError
from billing.ids import new_id
from billing.money import attousd_from_decimal, format_usd, nanousd_from_attousd
from billing.provider import Provider
from config.settings import ReconcileSettings

_TOGETHER = 8
_QUIET_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference found; nano-dollars. ``tx_id`` is the posting that repaired it."""

    call_id: UUID | None
    cause: str
    ours_nanousd: int
    provider_nanousd: int | None
    tx_id: UUID | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the contract's shape."""
        return {
            "call_id": None if self.call_id is None else str(self.call_id),
            "cause": self.cause,
            "ours_usd": format_usd(self.ours_nanousd),
            "provider_usd": None if self.provider_nanousd is None else format_usd(self.provider_nanousd),
            "corrected": self.tx_id is not None,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """What a run found. ``drift_nanousd``: the provider's total less ours, after corrections; None where it has no total."""

    calls_checked: int
    differences: list[Difference]
    drift_nanousd: int | None
    live_calls: int

    def as_json(self) -> dict[str, Any]:
        """Return the contract's shape."""
        return {
            "drift_usd": None if self.drift_nanousd is None else format_usd(self.drift_nanousd),
            "differences": [item.as_json() for item in self.differences],
            "calls_checked": self.calls_checked,
            "calls_in_flight": self.live_calls,
        }


class Reconciler:
    """Compares and repairs.

    Args:
        database: our books.
        provider: theirs.
        settings: what to ask about, and the policy.
    """

    def __init__(self, database: Database, provider: Provider, settings: ReconcileSettings) -> None:
        self._database = database
        self._provider = provider
        self._settings = settings
        self._corrections = Corrections(database, charge_estimates_upward=settings.charge_estimates_upward)

    async def run(self) -> Report:
        """Reconcile once; repeating it posts nothing new.

        Raises:
            ProviderUnavailableError: the provider cannot be asked; what was corrected stays.
            PostgresUnavailableError: Postgres is away.
        """
        run_id = new_id()
        async with self._database.connection() as connection:
            await connection.execute("INSERT INTO reconciliation_runs (id) VALUES ($1)", run_id)
        rows = await self._find_calls() if self._provider.keeps_bills else []
        differences: list[Difference] = []
        for start in range(0, len(rows), _TOGETHER):
            found = await asyncio.gather(*(self._compare(row) for row in rows[start : start + _TOGETHER]))
            differences += [item for item in found if item is not None]
        drift, live, rest = await self._compare_totals()
        if rest is not None:
            differences.append(rest)
        await self._record(run_id, len(rows), differences, drift)
        return Report(len(rows), differences, drift, live)

    async def _find_calls(self) -> list[Any]:
        """Return every ended call that is not exact, and a sample of those that are."""
        async with self._database.connection() as connection:
            doubtful: list[Any] = await connection.fetch(
                """
                SELECT id, state, accuracy, generation_id, cost_nanousd FROM calls
                WHERE generation_id IS NOT NULL
                  AND ((state = 'settled' AND (accuracy = 'estimated' OR provider_cost_nanousd IS NULL)) OR state = 'void')
                ORDER BY id DESC LIMIT $1
                """,
                self._settings.rows,
            )
            sample: list[Any] = await connection.fetch(
                """
                SELECT id, state, accuracy, generation_id, cost_nanousd FROM (
                    SELECT * FROM calls WHERE state = 'settled' AND accuracy = 'exact' AND generation_id IS NOT NULL
                    ORDER BY id DESC LIMIT $1) latest
                ORDER BY random() LIMIT $2
                """,
                self._settings.rows,
                self._settings.sample,
            )
        return [*doubtful, *sample]

    async def _compare(self, row: Any) -> Difference | None:
        bill = await self._provider.find_bill(row["generation_id"])
        ours = row["cost_nanousd"]
        if bill is None:
            return Difference(row["id"], "unknown_to_provider", ours, None)
        theirs = nanousd_from_attousd(attousd_from_decimal(bill.cost_usd))
        if theirs == ours and row["accuracy"] == "exact":
            return None
        done = await self._corrections.correct(row["id"], bill)
        if theirs == ours:
            return None  # an estimate that was right: marked exact, nothing posted
        cause = {"void": "void_but_billed"}.get(
            row["state"], "estimated" if row["accuracy"] == "estimated" else "changed"
        )
        return Difference(row["id"], cause, ours, theirs, done.tx_id)

    async def _compare_totals(self) -> tuple[int | None, int, Difference | None]:
        """Return the drift, how many calls are live, and what no call explains, booked as the house's loss."""
        drift, live = await self._drift()
        if drift is None or drift == 0 or live:
            return drift, live, None
        await asyncio.sleep(_QUIET_PAUSE_S)
        again, live = await self._drift()
        if again != drift or live:
            return again, live, None  # not quiet: the next run tells
        ours = await self._our_cost()
        if drift < 0:
            return drift, live, Difference(None, "billed_less_than_settled", ours, ours + drift)
        tx_id = await self._book_loss(drift)
        return 0, live, Difference(None, "billed_without_an_answer", ours, ours + drift, tx_id)

    async def _drift(self) -> tuple[int | None, int]:
        total_usd = await self._provider.find_total_usd()
        async with self._database.connection() as connection:
            live: int = await connection.fetchval(
                "SELECT count(*) FROM calls WHERE state IN ('open', 'review')"
            )
            opening = await connection.fetchval(
                "SELECT amount_nanousd FROM shadow_usd_ledger WHERE kind = 'opening'"
            )
        if total_usd is None:
            return None, live
        if opening is None:
            raise ProviderUnavailableError(
                "what the provider had billed before our first call was never recorded"
            )
        billed = nanousd_from_attousd(attousd_from_decimal(total_usd)) - opening
        return billed - await self._our_cost(), live

    async def _our_cost(self) -> int:
        async with self._database.connection() as connection:
            return int(
                await connection.fetchval(
                    "SELECT coalesce(-sum(amount_nano), 0) FROM journal_entry WHERE account = 'provider_cost'"
                )
            )

    async def _book_loss(self, drift_nanousd: int) -> UUID:
        tx_id = new_id()
        accounts = ["house_loss", "revenue", "provider_cost", "provider_prepaid"]
        amounts = [-drift_nanousd, drift_nanousd, -drift_nanousd, drift_nanousd]
        async with self._database.transaction() as connection:
            await connection.execute(
                "INSERT INTO journal_tx (id, kind, memo) VALUES ($1, 'house_loss', 'billed by the provider without an answer')",
                tx_id,
            )
            await connection.execute(
                "SELECT post_entries($1, $2, $3, $4, $5, $6)",
                [tx_id] * 4,
                [1, 2, 3, 4],
                accounts,
                [None] * 4,
                ["USD"] * 4,
                amounts,
            )
            await connection.execute(
                "INSERT INTO shadow_usd_ledger (id, kind, amount_nanousd, memo) VALUES ($1, 'correction', $2, 'reconciliation')",
                tx_id,
                drift_nanousd,
            )
        return tx_id

    async def _record(
        self, run_id: UUID, checked: int, differences: list[Difference], drift: int | None
    ) -> None:
        ours = await self._our_cost()
        async with self._database.transaction() as connection:
            await connection.executemany(
                "INSERT INTO reconciliation_diffs (id, run_id, call_id, cause, ours_nanousd, provider_nanousd, tx_id)"
                " VALUES ($1, $2, $3, $4, $5, $6, $7)",
                [
                    (
                        new_id(),
                        run_id,
                        item.call_id,
                        item.cause,
                        item.ours_nanousd,
                        item.provider_nanousd,
                        item.tx_id,
                    )
                    for item in differences
                ],
            )
            await connection.execute(
                "UPDATE reconciliation_runs SET ended_at = now(), calls_checked = $2, our_total_nanousd = $3, drift_nanousd = $4"
                " WHERE id = $1",
                run_id,
                checked,
                ours,
                drift,
            )
