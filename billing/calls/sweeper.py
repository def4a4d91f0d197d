"""The sweeper: ends the calls whose worker died, by what the provider billed.

Rules (DESIGN section 3), for a call that is live in Postgres while neither its worker nor its hold's lease is alive:

* a settlement noted in Redis is posted as it is: its worker died waiting for Postgres;
* the provider's id of the answer is known: its record settles the call exactly. While it denies the id the call is
  asked for again, less and less often; past a limit it goes to ``review``, its hold kept, and is still asked for;
* the id is known but this provider keeps no records: settled as estimated, at the progress noted;
* no id is known: no byte of the answer reached the client, so the call is void. Should the provider have billed it
  all the same, that shows in the totals.

Then holds left in Redis whose calls ended, or never began, are dropped, and what ended workers had leased of the
provider's quota is returned. Everything may be repeated, and may race with a late settlement of the original worker:
exactly one wins.
"""

import asyncio
import time
from collections.abc import Coroutine, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import asyncpg
import structlog

from billing.calls.assessment import Evidence, assess, ending_from_note, in_review
from billing.calls.ledger import Ledger
from billing.calls.outcome import Ending, Settlement
from billing.errors import (
    PostgresUnavailableError,
    ProviderUnavailableError,
    RedisUnavailableError,
    TumaError,
)
from billing.fx.quote import FxQuote
from billing.holds.hold import SHARDS, ExpiredLease
from billing.holds.holds import Holds
from billing.ids import minted_at, new_id
from billing.meters import Meters
from billing.postgres.database import AWAY, Database
from billing.pricing.cost import Price, Usage
from billing.provider.quota import return_slabs
from billing.provider.records import Provider
from config.settings import SweepSettings

_log = structlog.get_logger("tuma.sweeper")
_LOCK = 0x73776565  # "swee"
_PARTITIONS_AHEAD = 3
_CLOSE_S = 5.0
_STALLED = "20s"  # of silence, and whoever sweeps is taken to stand still
_TOGETHER = 16  # orphans whose records are asked for at once


@dataclass(slots=True)
class _Later:
    """When a call's record is asked for again, as the provider did not know it yet; monotonic seconds."""

    at_s: float
    pause_s: float


@dataclass(slots=True)
class SweepCounts:
    """What one sweep did: calls by how they ended, and holds dropped."""

    exact: int = 0
    estimated: int = 0
    void: int = 0
    review: int = 0
    waiting: int = 0
    holds_dropped: int = 0

    def as_json(self) -> dict[str, int]:
        """Return the counts by name."""
        return asdict(self)


class Sweeper:
    """Sweeps, one at a time among all processes, by an advisory lock of Postgres.

    Args:
        database: where calls are.
        holds: where their holds and notes are.
        provider: whose records tell what they cost.
        settings: pace and limits.
        meters: where sweeps are counted.
    """

    def __init__(
        self,
        database: Database,
        holds: Holds,
        provider: Provider,
        settings: SweepSettings,
        meters: Meters | None = None,
    ) -> None:
        self._meters = meters or Meters()
        self._database = database
        self._holds = holds
        self._provider = provider
        self._settings = settings
        self._ledger = Ledger(database, worker_id=new_id())
        self._later: dict[UUID, _Later] = {}

    async def run(self) -> None:
        """Sweep at the set pace until cancelled."""
        while True:
            await asyncio.sleep(self._settings.period_s)
            try:
                counts = await self.sweep()
            except TumaError as error:
                _log.warning("sweep.failed", error=str(error))
                self._meters.sweeps.add(1, "failed")
                continue
            if counts is not None:
                self._meters.sweeps.add(1, "completed")
                for result, count in counts.as_json().items():
                    if result != "waiting":  # it is waiting at every sweep
                        self._meters.swept.add(count, result)
            if counts is not None and any(counts.as_json().values()):
                _log.info("sweep.completed", **counts.as_json())

    async def sweep(self) -> SweepCounts | None:
        """Sweep once; None when another process is sweeping.

        Raises:
            PostgresUnavailableError: nothing half-done is left behind; sweep again.
            RedisUnavailableError: it, or one shard of it, is away; of the other shards all was swept.
        """
        # A process that stands still keeps what it has locked: its session ends, and the next one sweeps. Both may then end the same
        # calls, each of which ends once.
        lock = await self._database.connect_alone(idle_session_timeout=_STALLED)
        try:
            if not await lock.fetchval("SELECT pg_try_advisory_lock($1)", _LOCK):
                return None
            counts = SweepCounts()
            await lock.execute("SELECT ensure_partitions($1)", _PARTITIONS_AHEAD)
            orphans = await self._find_orphans()
            known = {row["id"] for row in orphans}
            self._later = {call_id: later for call_id, later in self._later.items() if call_id in known}
            away: list[RedisUnavailableError] = []
            for start in range(0, len(orphans), _TOGETHER):
                await _show_life(lock)
                away += await _gather_what_is_there(
                    self._end_orphan(row, counts) for row in orphans[start : start + _TOGETHER]
                )
            away += await self._drop_stale_holds(counts)
            await return_slabs(self._database, grace_s=self._settings.worker_lease_s)
            if away:
                raise away[0]
            return counts
        finally:
            await lock.close(timeout=_CLOSE_S)

    async def _find_orphans(self) -> list[Any]:
        async with self._database.connection() as connection:
            rows: list[Any] = await connection.fetch(
                """
                SELECT c.id, c.user_id, c.wallet_id, c.key_id, c.model, c.state, c.generation_id, c.opened_at,
                       f.id AS fx_id, f.currency, f.rate, f.markup_bps,
                       p.id AS price_id, p.prompt_usd, p.completion_usd, p.cached_read_usd, p.cached_write_usd,
                       p.reasoning_usd, p.image_usd, p.audio_usd, p.request_usd
                FROM calls c JOIN fx_quotes f ON f.id = c.fx_quote_id JOIN model_prices p ON p.id = c.price_id
                LEFT JOIN workers w ON w.id = c.worker_id
                WHERE c.state IN ('open', 'review')
                  AND (w.id IS NULL OR w.stopped_at IS NOT NULL OR w.lease_until < now())
                ORDER BY c.id LIMIT $1
                """,
                self._settings.rows,
            )
        return rows

    async def _end_orphan(self, row: Any, counts: SweepCounts) -> None:
        lease = ExpiredLease(row["id"], row["wallet_id"], row["user_id"], row["key_id"])
        if await self._holds.has_live_lease(lease):
            counts.waiting += 1  # the worker lives, only Postgres has not heard from it
            return
        ending = await self._judge(row)
        if ending is None or (ending.state == "review" and row["state"] == "review"):
            counts.waiting += 1
            return
        try:
            settlement = (await self._ledger.settle_calls([ending]))[0]
        except asyncpg.DataError as error:
            # It does not fit the books: people look at it, and the others are swept.
            if row["state"] == "review":
                counts.waiting += 1
                return
            _log.error("sweep.refused", call_id=str(ending.call_id), error=str(error))
            ending = in_review(ending)
            settlement = (await self._ledger.settle_calls([ending]))[0]
        if not settlement.won:
            return
        self._count(ending, counts)
        if settlement.state != "review":
            await self._holds.forget(lease)
        self._report(ending, settlement)

    async def _judge(self, row: Any) -> Ending | None:
        """Return how the call ends; None to ask again at the next sweep."""
        notes = await self._holds.find_notes(row["user_id"], row["id"])
        if "settlement" in notes:
            return ending_from_note(row["id"], notes["settlement"])
        generation_id = notes.get("generation_id") or row["generation_id"]
        if generation_id is None:
            return assess_row(row, Evidence(), outcome="worker_lost")
        if not self._provider.keeps_bills:
            usage = Usage(
                prompt_tokens=int(notes.get("prompt_tokens", 0)),
                completion_tokens=int(notes.get("completion_tokens", 0)),
            )
            return assess_row(
                row, Evidence(generation_id=generation_id, usage=usage, counted=True), outcome="worker_lost"
            )
        if not self._is_due(row["id"]):
            return None
        try:
            bill = await self._provider.find_bill(generation_id)
        except ProviderUnavailableError as error:
            _log.warning("sweep.provider_away", call_id=str(row["id"]), error=str(error))
            return None
        if bill is not None:
            return assess_row(row, Evidence.of(bill), outcome="worker_lost")
        self._put_off(row["id"])
        if (datetime.now(UTC) - minted_at(row["id"])).total_seconds() < self._settings.review_after_s:
            return None
        return Ending(row["id"], "review", "worker_lost", generation_id=generation_id)

    def _is_due(self, call_id: UUID) -> bool:
        later = self._later.get(call_id)
        return later is None or time.monotonic() >= later.at_s

    def _put_off(self, call_id: UUID) -> None:
        before = self._later.get(call_id)
        pause_s = self._settings.period_s if before is None else before.pause_s * 2
        pause_s = min(pause_s, self._settings.ask_again_max_s)
        self._later[call_id] = _Later(time.monotonic() + pause_s, pause_s)

    @staticmethod
    def _count(ending: Ending, counts: SweepCounts) -> None:
        name = ending.accuracy if ending.state == "settled" else ending.state
        setattr(counts, name, getattr(counts, name) + 1)

    @staticmethod
    def _report(ending: Ending, settlement: Settlement) -> None:
        _log.info(
            "call.swept",
            call_id=str(ending.call_id),
            state=settlement.state,
            accuracy=ending.accuracy,
            generation_id=ending.generation_id,
            cost_nanousd=ending.cost_nanousd,
            charge_nano=settlement.charge_nano,
        )

    async def _drop_stale_holds(self, counts: SweepCounts) -> list[RedisUnavailableError]:
        leases: list[ExpiredLease] = []

        async def find(shard: int) -> None:
            leases.extend(await self._holds.find_leases_of(shard, expired=True, limit=self._settings.rows))

        away = await _gather_what_is_there(find(shard) for shard in range(SHARDS))
        if not leases:
            return away
        async with self._database.connection() as connection:
            live = await connection.fetch(
                "SELECT id FROM calls WHERE id = ANY ($1) AND state IN ('open', 'review')",
                [lease.call_id for lease in leases],
            )
        kept = {row["id"] for row in live}
        for lease in leases:
            if lease.call_id not in kept:
                await self._holds.forget(lease)
                counts.holds_dropped += 1
        return away


async def _show_life(lock: Any) -> None:
    """Keep the session that holds the lock.

    Raises:
        PostgresUnavailableError: it has ended, and somebody else may sweep.
    """
    try:
        await lock.execute("SELECT")
    except AWAY as error:
        raise PostgresUnavailableError("the sweep stood still, so another may have begun") from error


async def _gather_what_is_there(work: Iterable[Coroutine[Any, Any, None]]) -> list[RedisUnavailableError]:
    """Do what can be done while a shard of Redis is away, and return what was said of it."""
    away = []
    for error in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(error, RedisUnavailableError):
            away.append(error)
        elif error is not None:
            raise error
    return away


def assess_row(row: Any, evidence: Evidence, *, outcome: str) -> Ending:
    """Assess a call from its row, joined with the price and the exchange rate that were pinned for it."""
    price = Price(
        id=row["price_id"],
        model=row["model"],
        prompt_usd=row["prompt_usd"],
        completion_usd=row["completion_usd"],
        cached_read_usd=row["cached_read_usd"],
        cached_write_usd=row["cached_write_usd"],
        reasoning_usd=row["reasoning_usd"],
        image_usd=row["image_usd"],
        audio_usd=row["audio_usd"],
        request_usd=row["request_usd"],
    )
    fx = FxQuote(row["fx_id"], row["currency"], row["rate"], row["markup_bps"])
    return assess(row["id"], evidence, price=price, fx=fx, outcome=outcome)
