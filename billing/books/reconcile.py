"""Reconciliation: our books beside the provider's, by call, by day and model, and in total; differences have a cause.

Our cost follows the provider's bill always; the wallet is corrected downward always, upward only where its charge was
an estimate. What the provider billed beyond all calls (an answer of which no byte ever came back) is the house's loss,
booked when nothing is in flight.

A record of the provider's that does not answer stops no other: the run goes on with those that do, says which did not, and
is not complete. Nothing that the missing one could explain is called a difference, or booked.

What can interrupt it: every correction is a transaction of its own, and idempotent; a run that dies is repeated by the
next. One runs at a time among all processes, by an advisory lock, since two would book the same loss twice.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import structlog

from billing.books.reconciliation_report import Difference, Report
from billing.books.totals import Totals, compare_totals
from billing.calls.assessment import Evidence
from billing.calls.corrections import Corrections
from billing.calls.ledger import Ledger
from billing.calls.sweeper import assess_row
from billing.errors import ProviderUnavailableError
from billing.ids import new_id
from billing.money import AMOUNT_MAX_NANO, NANO, attousd_from_decimal, nanousd_from_attousd
from billing.postgres.database import Database
from billing.provider.records import Provider
from config.settings import ReconcileSettings

_LOCK = 0x7265636F  # "reco"
_LOCK_POLL_S = 0.2
_CLOSE_S = 5.0
_TOGETHER = 8
_QUIET_PAUSE_S = 0.5
_ACTIVITY_DAYS = 30  # how far back /activity reaches
_log = structlog.get_logger("tuma.reconcile")


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
        self._ledger = Ledger(database, worker_id=new_id())
        self._corrections = Corrections(database, charge_estimates_upward=settings.charge_estimates_upward)

    async def run(self, *, now: datetime | None = None) -> Report:
        """Reconcile once, after a run of another process has ended; repeating it posts nothing new.

        Args:
            now: the time to go by for days that are over; the clock's, when None.

        Raises:
            ProviderUnavailableError: none of the provider's records answers.
            PostgresUnavailableError: Postgres is away, or another run does not end.
        """
        async with self._alone():
            return await self._run((now or datetime.now(UTC)).date())

    async def run_quietly(self) -> None:
        """Reconcile as a routine: the report goes to the log, as an alarm where something stays unexplained.

        Raises:
            ProviderUnavailableError, PostgresUnavailableError: as ``run``.
        """
        report = await self.run()
        left = [item for item in report.differences if item.tx_id is None and not item.known]
        log = _log.error if left else _log.warning if report.away else _log.info
        log(
            "reconciled",
            report=str(report),
            differences=len(report.differences),
            not_corrected=len(left),
            away=sorted(report.away),
        )

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        lock = await self._database.connect_alone()
        try:
            deadline = time.monotonic() + self._settings.wait_s
            while not await lock.fetchval("SELECT pg_try_advisory_lock($1)", _LOCK):
                if time.monotonic() > deadline:
                    raise ProviderUnavailableError("another reconciliation is running")
                await asyncio.sleep(_LOCK_POLL_S)
            yield
        finally:
            await lock.close(timeout=_CLOSE_S)

    async def _run(self, today: date) -> Report:
        run_id = new_id()
        async with self._database.connection() as connection:
            await connection.execute("INSERT INTO reconciliation_runs (id) VALUES ($1)", run_id)
        away: dict[str, str] = {}
        differences, checked = await self._compare_calls(away)
        days, off = await self._compare_days(today, away)
        news = [item for item in await self._recall(off) if not item.known]
        if news and self._provider.keeps_bills and "bills" not in away:
            rows = await self._find_calls_of(news)
            found, asked = await self._compare_all(rows, away)
            differences += found
            checked += asked
            days, off = await self._compare_days(today, away)
        totals, found = await self._compare_totals(away)
        if {"key", "activity"} <= away.keys() and not checked:
            raise ProviderUnavailableError(away["key"])  # nothing was compared with anything
        differences = await self._recall([*differences, *off, *found])
        drift = None if totals is None else totals.drift
        report = Report(checked, days, differences, drift, totals.live if totals else 0, away)
        await self._record(run_id, report)
        return report

    async def _compare_calls(self, away: dict[str, str]) -> tuple[list[Difference], int]:
        """Compare the calls in review, the doubtful, and a sample; what differs, and how many were asked about."""
        if not self._provider.keeps_bills:
            return [], 0
        differences: list[Difference] = []
        reviewed = 0
        try:
            for row in await self._find_reviewed():
                differences.append(await self._review(row))
                reviewed += 1
        except ProviderUnavailableError as error:
            away["bills"] = str(error)
        rows = await self._find_doubtful() + await self._find_sample()
        found, asked = await self._compare_all(rows, away)
        return differences + found, reviewed + asked

    async def _recall(self, differences: list[Difference]) -> list[Difference]:
        """Mark what an earlier run reported and could not repair either."""
        if not differences:
            return []
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                "SELECT call_id, cause, ours_nanousd, provider_nanousd, note FROM reconciliation_diffs"
                " WHERE tx_id IS NULL AND cause = ANY ($1)",
                list({item.cause for item in differences}),
            )
        known = {tuple(row) for row in rows}
        return [replace(item, known=item.tx_id is None and item.place in known) for item in differences]

    async def _find_reviewed(self) -> list[Any]:
        async with self._database.connection() as connection:
            rows: list[Any] = await connection.fetch(
                """
                SELECT c.id, c.wallet_id, c.model, c.generation_id, f.id AS fx_id, f.currency, f.rate, f.markup_bps,
                       p.id AS price_id, p.prompt_usd, p.completion_usd, p.cached_read_usd, p.cached_write_usd,
                       p.reasoning_usd, p.image_usd, p.audio_usd, p.request_usd
                FROM calls c JOIN fx_quotes f ON f.id = c.fx_quote_id JOIN model_prices p ON p.id = c.price_id
                WHERE c.state = 'review' ORDER BY c.id LIMIT $1
                """,
                self._settings.rows,
            )
        return rows

    async def _review(self, row: Any) -> Difference:
        """End a call in review if the provider knows it after all; its hold is given back."""
        bill = await self._provider.find_bill(row["generation_id"])
        if bill is None:
            return Difference(row["id"], "unknown_to_provider", 0, None)
        ending = assess_row(row, Evidence.of(bill), outcome="worker_lost")
        if ending.state == "review":
            return Difference(row["id"], "beyond_reason", 0, None, note=f"{bill.cost_usd:.3E} USD")
        await self._ledger.settle_calls([ending])
        async with self._database.connection() as connection:
            await connection.execute("SELECT pg_notify('tuma', 'wallet:' || $1::uuid)", row["wallet_id"])
        return Difference(row["id"], "in_review", 0, ending.cost_nanousd, row["id"])

    async def _find_doubtful(self) -> list[Any]:
        """Return the ended calls that are not exact; those of which the provider may know something."""
        async with self._database.connection() as connection:
            rows: list[Any] = await connection.fetch(
                """
                SELECT id, state, accuracy, generation_id, cost_nanousd FROM calls
                WHERE ((state = 'settled' AND (accuracy = 'estimated' OR provider_cost_nanousd IS NULL)) OR state = 'void')
                  AND generation_id IS NOT NULL
                ORDER BY id DESC LIMIT $1
                """,
                self._settings.rows,
            )
        return rows

    async def _find_sample(self) -> list[Any]:
        async with self._database.connection() as connection:
            rows: list[Any] = await connection.fetch(
                """
                SELECT id, state, accuracy, generation_id, cost_nanousd FROM (
                    SELECT * FROM calls WHERE state = 'settled' AND accuracy = 'exact' AND generation_id IS NOT NULL
                    ORDER BY id DESC LIMIT $1) latest
                ORDER BY random() LIMIT $2
                """,
                self._settings.rows,
                self._settings.sample,
            )
        return rows

    async def _find_calls_of(self, off: list[Difference]) -> list[Any]:
        """Return the calls of the days and models whose sums differ."""
        async with self._database.connection() as connection:
            rows: list[Any] = await connection.fetch(
                """
                SELECT id, state, accuracy, generation_id, cost_nanousd FROM calls
                WHERE state IN ('settled', 'void') AND generation_id IS NOT NULL AND id >= uuid_floor($1)
                  AND to_char(uuid_moment(id) AT TIME ZONE 'UTC', 'YYYY-MM-DD ') || model = ANY ($2)
                ORDER BY id LIMIT $3
                """,
                datetime.now(UTC) - timedelta(days=_ACTIVITY_DAYS + 1),
                [item.note for item in off],
                self._settings.rows,
            )
        return rows

    async def _compare_all(self, rows: list[Any], away: dict[str, str]) -> tuple[list[Difference], int]:
        """Compare calls with their records until these do not answer; what differs, and how many were asked about."""
        found: list[Difference] = []
        asked = 0
        for start in range(0, len(rows), _TOGETHER):
            if "bills" in away:
                break
            together = (self._compare(row) for row in rows[start : start + _TOGETHER])
            for item in await asyncio.gather(*together, return_exceptions=True):
                if isinstance(item, ProviderUnavailableError):
                    away["bills"] = str(item)
                    continue
                if isinstance(item, BaseException):
                    raise item
                asked += 1
                if item is not None:
                    found.append(item)
        return found, asked

    async def _compare(self, row: Any) -> Difference | None:
        bill = await self._provider.find_bill(row["generation_id"])
        ours = row["cost_nanousd"]
        if bill is None:
            return Difference(row["id"], "unknown_to_provider", ours, None)
        if bill.cost_usd * NANO > AMOUNT_MAX_NANO:
            return Difference(row["id"], "beyond_reason", ours, None, note=f"{bill.cost_usd:.3E} USD")
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

    async def _compare_days(self, today: date, away: dict[str, str]) -> tuple[int, list[Difference]]:
        """Compare each day that is over, model by model; how many days, and what differs.

        A call belongs to the day on which it arrived here, at the provider to that on which it arrived there; so one
        that crosses midnight in between shows on two days with opposite signs.
        """
        try:
            activity = await self._provider.find_activity()
        except ProviderUnavailableError as error:
            away["activity"] = str(error)
            return 0, []
        if activity is None:
            return 0, []
        theirs = {
            (item.day, item.model): nanousd_from_attousd(attousd_from_decimal(item.cost_usd))
            for item in activity
            if today - timedelta(days=_ACTIVITY_DAYS) <= item.day < today
        }
        days = sorted({day for day, _ in theirs})
        if not days:
            return 0, []
        begin = datetime(days[0].year, days[0].month, days[0].day, tzinfo=UTC)
        end = datetime(today.year, today.month, today.day, tzinfo=UTC)
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                """
                SELECT (uuid_moment(id) AT TIME ZONE 'UTC')::date AS day, model,
                       sum(least(provider_cost_nanousd, cost_nanousd))::bigint AS cost
                FROM calls WHERE state = 'settled' AND id >= uuid_floor($1) AND id < uuid_floor($2) GROUP BY 1, 2
                """,
                begin,
                end,
            )
        ours = {(row["day"], row["model"]): row["cost"] for row in rows}
        off = [
            Difference(
                None, "day_and_model", ours.get(place, 0), theirs.get(place, 0), note=f"{place[0]} {place[1]}"
            )
            for place in sorted(ours.keys() | theirs.keys())
            if ours.get(place, 0) != theirs.get(place, 0)
        ]
        return len(days), off

    async def _look_at_totals(self, away: dict[str, str]) -> Totals | None:
        try:
            totals = await compare_totals(self._database, self._provider)
        except ProviderUnavailableError as error:
            away["key"] = str(error)
            return None
        if totals is not None:
            away.update(totals.away)
        return totals

    async def _compare_totals(self, away: dict[str, str]) -> tuple[Totals | None, list[Difference]]:
        """Compare the totals, and book what no call explains as the house's loss if nothing is in flight.

        Nothing is booked, or called a difference, while a record is away that might explain it by a call.
        """
        totals = await self._look_at_totals(away)
        if totals is None:
            return None, []
        found = _elsewhere(totals)
        if (totals.agree and totals.drift == 0) or away.keys() - {"credits"}:
            return totals, found
        if not totals.is_quiet:
            if not totals.agree:
                cause = "billed_beyond_calls_in_flight" if totals.drift > 0 else "billed_less_than_settled"
                found.append(Difference(None, cause, totals.after, totals.billed[totals.source]))
            return totals, found
        await asyncio.sleep(_QUIET_PAUSE_S)
        again = await self._look_at_totals(away)
        if again is None or not again.is_quiet or again.drift != totals.drift:
            return again, found  # not quiet after all: the next run tells
        found += await self._book(totals)
        return await self._look_at_totals(away), found

    async def _book(self, totals: Totals) -> list[Difference]:
        """Book what the totals differ by while all is quiet, or take back what was booked too much."""
        billed = totals.billed[totals.source]
        if totals.drift > 0:
            tx_id = await self._book_loss(totals.drift)
            return [Difference(None, "billed_without_an_answer", totals.after, billed, tx_id)]
        found = []
        # A loss that was booked without a call, and whose call was settled since, would count twice.
        twice = min(-totals.drift, await self._booked_without_call())
        if twice:
            tx_id = await self._book_loss(-twice)
            found.append(Difference(None, "answered_after_all", totals.after, billed, tx_id))
        if twice < -totals.drift:
            found.append(Difference(None, "billed_less_than_settled", totals.after - twice, billed))
        return found

    async def _booked_without_call(self) -> int:
        async with self._database.connection() as connection:
            return int(
                await connection.fetchval(
                    "SELECT coalesce(-sum(e.amount_nano), 0) FROM journal_tx t JOIN journal_entry e ON e.tx_id = t.id"
                    " WHERE t.kind = 'house_loss' AND t.call_id IS NULL AND e.account = 'provider_cost'"
                )
            )

    async def _book_loss(self, drift_nanousd: int) -> UUID:
        """Post what the provider billed without a call, or take back, where negative, what was posted so before."""
        tx_id = new_id()
        memo = (
            "billed by the provider without an answer"
            if drift_nanousd > 0
            else "a loss whose call was settled since"
        )
        async with self._database.transaction() as connection:
            await connection.execute("SELECT book_loss($1, $2, $3)", tx_id, drift_nanousd, memo)
        return tx_id

    async def _record(self, run_id: UUID, report: Report) -> None:
        async with self._database.transaction() as connection:
            await connection.executemany(
                "INSERT INTO reconciliation_diffs (id, run_id, call_id, cause, ours_nanousd, provider_nanousd, tx_id, note)"
                " VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
                [
                    (
                        new_id(),
                        run_id,
                        item.call_id,
                        item.cause,
                        item.ours_nanousd,
                        item.provider_nanousd,
                        item.tx_id,
                        item.note,
                    )
                    for item in report.differences
                    if not item.known
                ],
            )
            await connection.execute(
                "UPDATE reconciliation_runs SET ended_at = now(), calls_checked = $2, drift_nanousd = $3, away = $4,"
                " our_total_nanousd = (SELECT sum(spent_nanousd) FROM quota_slabs) WHERE id = $1",
                run_id,
                report.calls_checked,
                report.drift_nanousd,
                sorted(report.away),
            )


def _elsewhere(totals: Totals) -> list[Difference]:
    """Return what the account was billed that our key was not, where both are known."""
    if len(totals.billed) < 2 or totals.billed["credits"] == totals.billed["key"]:  # noqa: PLR2004 - both
        return []
    return [
        Difference(
            None, "account_used_elsewhere", totals.billed["key"], totals.billed["credits"], note="account"
        )
    ]
