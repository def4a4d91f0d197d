"""Days whose books were proved: read once, then counted as proved (``proved_days.sql``).

A day is proved an hour and more after its end, in UTC, by the ids of its calls and transactions. What is posted into it
later is listed by the posting itself, under a lock that a proof takes alone, and is counted beside it.
"""

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import structlog

from billing.books.usage_proof import compare_usage
from billing.errors import BrokenInvariantError, PostgresUnavailableError
from billing.ids import id_floor
from billing.postgres.database import AWAY, Database

_LOCK = 0x64617973  # "days", as in find_verified
_AFTER_END = timedelta(minutes=65)  # find_verified takes the lock for ids older than 60 minutes
_TIMEOUT_S = 3600.0
_CLOSE_S = 1.0
_FIRST = UUID(int=0)
_ADD_DAY = """
INSERT INTO verified_days (day, end_id, calls, entries, settled_nanousd, cost_nanousd)
SELECT $3, $2, c.calls, e.entries, c.settled + l.lost, e.cost
FROM (SELECT count(*) AS calls, coalesce(sum(cost_nanousd) FILTER (WHERE state = 'settled'), 0) AS settled
      FROM calls WHERE id >= $1 AND id < $2) c,
     (SELECT count(*) AS entries, coalesce(-sum(amount_nano) FILTER (WHERE account = 'provider_cost'), 0) AS cost
      FROM journal_entry WHERE tx_id >= $1 AND tx_id < $2) e,
     (SELECT coalesce(-sum(j.amount_nano), 0) AS lost FROM journal_tx t JOIN journal_entry j ON j.tx_id = t.id
      WHERE t.kind = 'house_loss' AND t.call_id IS NULL AND j.account = 'provider_cost'
        AND t.id >= $1 AND t.id < $2) l
"""
_ADD_WALLETS = """
INSERT INTO verified_wallets (wallet_id, amount_nano)
SELECT wallet_id, sum(amount_nano) FROM journal_entry
WHERE wallet_id IS NOT NULL AND tx_id >= $1 AND tx_id < $2 GROUP BY wallet_id
ON CONFLICT (wallet_id) DO UPDATE SET amount_nano = verified_wallets.amount_nano + excluded.amount_nano
"""
_log = structlog.get_logger("tuma.daybook")


@dataclass(frozen=True, slots=True)
class Proved:
    """What the verified days say in sum; nano-dollars. Every id from ``cut`` on is still to be read."""

    cut: UUID
    days: int
    calls: int
    settled_nanousd: int
    cost_nanousd: int


class DayBook:
    """Proves days and says what they sum to.

    Args:
        database: where the books are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def verify_all(self, *, now: datetime | None = None) -> int:
        """Prove every day that is over and not proved yet; a day in which nothing happened is proved with the next.

        Args:
            now: the time to go by; the clock's, when None.

        Returns:
            how many days that were.

        Raises:
            BrokenInvariantError: a transaction of a day does not balance, or its usage is not what its calls say; that day and later ones are not proved.
            PostgresUnavailableError: Postgres is away; what was proved stays so.
        """
        last = ((now or datetime.now(UTC)) - _AFTER_END).date() - timedelta(days=1)
        connection = await self._database.connect_alone()
        try:
            days = await _unproved_days(connection, last)
            for day in days:
                await _prove(connection, day)
        except AWAY as error:
            raise PostgresUnavailableError(f"Postgres is unavailable: {type(error).__name__}") from error
        finally:
            await connection.close(timeout=_CLOSE_S)
        if days:
            _log.info("days.verified", days=len(days), last=str(days[-1]))
        return len(days)


async def _unproved_days(connection: Any, last: date) -> list[date]:
    """Return the days up to ``last`` with calls or postings of their own, after those proved."""
    cut = await connection.fetchval("SELECT end_id FROM verified_days ORDER BY day DESC LIMIT 1") or _FIRST
    days: list[date] = []
    while True:
        # From one day that has something to the next, by index: an empty year costs nothing.
        found = await connection.fetchval(
            "SELECT least((SELECT id FROM calls WHERE id >= $1 ORDER BY id LIMIT 1),"
            " (SELECT id FROM journal_tx WHERE id >= $1 ORDER BY id LIMIT 1))",
            cut,
        )
        if found is None:
            return days
        day = datetime.fromtimestamp((found.int >> 80) / 1000, tz=UTC).date()
        if day > last:
            return days
        days.append(day)
        cut = _midnight_id(day + timedelta(days=1))


async def _prove(connection: Any, day: date) -> None:
    # Waits for postings into older days that are under way, and keeps new ones waiting until the commit.
    await connection.execute("SELECT pg_advisory_lock($1)", _LOCK, timeout=_TIMEOUT_S)
    try:
        async with connection.transaction(isolation="repeatable_read"):
            first = await connection.fetchval("SELECT end_id FROM verified_days ORDER BY day DESC LIMIT 1")
            end = _midnight_id(day + timedelta(days=1))
            if first is None or first < end:  # else another process was faster
                await _prove_range(connection, day, first or _FIRST, end)
    finally:
        await connection.execute("SELECT pg_advisory_unlock($1)", _LOCK)


async def _prove_range(connection: Any, day: date, first: UUID, end: UUID) -> None:
    off = await connection.fetchrow(
        "SELECT tx_id, currency FROM journal_entry WHERE tx_id >= $1 AND tx_id < $2"
        " GROUP BY tx_id, currency HAVING sum(amount_nano) <> 0 LIMIT 1",
        first,
        end,
        timeout=_TIMEOUT_S,
    )
    if off is not None:
        raise BrokenInvariantError(
            f"transaction {off['tx_id']} of {day} does not balance in {off['currency']}"
        )
    differences = await compare_usage(connection, first, end)
    if differences:
        raise BrokenInvariantError(f"the usage of {day} is not what its calls say: {differences[0]}")
    await connection.execute(_ADD_DAY, first, end, day, timeout=_TIMEOUT_S)
    await connection.execute(_ADD_WALLETS, first, end, timeout=_TIMEOUT_S)


def _midnight_id(day: date) -> UUID:
    return id_floor(datetime(day.year, day.month, day.day, tzinfo=UTC))


async def read_proved(connection: Any) -> Proved:
    """Return what is proved, as the connection's snapshot shows it, what was posted late included.

    Raises:
        PostgresUnavailableError: Postgres is away.
    """
    row = await connection.fetchrow(
        """
        SELECT (SELECT end_id FROM verified_days ORDER BY day DESC LIMIT 1) AS cut, count(*) AS days,
               coalesce(sum(calls), 0) AS calls, coalesce(sum(settled_nanousd), 0) AS settled,
               coalesce(sum(cost_nanousd), 0) AS cost,
               (SELECT coalesce(sum(settled_nanousd), 0) FROM late_postings) AS late_settled,
               (SELECT coalesce(-sum(e.amount_nano), 0) FROM journal_entry e
                WHERE e.account = 'provider_cost' AND e.tx_id IN (SELECT tx_id FROM late_postings)) AS late_cost
        FROM verified_days
        """
    )
    return Proved(
        row["cut"] or _FIRST,
        row["days"],
        int(row["calls"]),
        int(row["settled"] + row["late_settled"]),
        int(row["cost"] + row["late_cost"]),
    )


NOTHING_PROVED = Proved(_FIRST, 0, 0, 0, 0)
