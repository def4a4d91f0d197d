"""The provider's quota: no call is sent that it could not pay for, and none while it refuses us.

The quota is an account in Postgres (``quota.sql``). Each worker leases slabs of it and takes its calls' holds from
them, in memory, so that no call waits for Postgres and nothing is shared by all calls.

What can interrupt it: a worker that dies leaves its slab leased until the sweeper returns it; what its calls cost is
counted in the commit that settles them, so nothing of it is lost or counted twice.
"""

import asyncio
import math
import time
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from uuid import UUID

import structlog

from billing.errors import PostgresUnavailableError, ProviderQuotaError
from billing.money import attousd_from_decimal, format_usd, nanousd_from_attousd
from billing.postgres.database import Database
from billing.provider.records import Provider
from billing.provider.refusals import Judge, Refusal
from billing.tasks import TrackedTasks
from config.settings import QuotaSettings

_log = structlog.get_logger("tuma.quota")
_ALARM_AT = 3  # calls refused in a row, for whomever it is meant
_REFUSED_FOR_S = 0.5  # how long a refusal of the account is believed


@dataclass(slots=True)
class _Pause:
    """Why nothing is sent, and until when (monotonic seconds)."""

    until_s: float
    reason: str


class Quota:
    """This worker's part of the provider's quota.

    Args:
        database: where the account is.
        provider: who is asked whether a refusal of one call is meant for all.
        worker_id: who leases.
        settings: sizes and periods.
    """

    def __init__(
        self, database: Database, provider: Provider, *, worker_id: UUID, settings: QuotaSettings
    ) -> None:
        self._database = database
        self._provider = provider
        self._worker_id = worker_id
        self._settings = settings
        self._slab_nanousd = _nanousd(settings.slab_usd)
        self._unlimited = False
        self._free_nanousd = 0
        self._held_nanousd = 0
        self._taken_s = 0.0
        self._leasing = asyncio.Lock()
        self._refused_nanousd = 0
        self._refused_until_s = 0.0
        self._pause: _Pause | None = None
        self._pauses = 0  # one after the other
        self._judge = Judge(provider, window_s=settings.refusals_s)
        self._asking = False  # of one refusal at a time
        self._told_s = -math.inf  # when operators were last told of calls that are refused without a pause
        self._trying: UUID | None = None  # the one call that finds out whether the provider serves us again
        self._tried_by: UUID | None = None  # whose call did that last, in vain
        self._tasks = TrackedTasks()

    @property
    def free_nanousd(self) -> int:
        """What is left of the slabs leased, in nano-dollars."""
        return self._free_nanousd

    @property
    def state(self) -> str:
        """``ok``, or in words why calls are refused now."""
        now_s = time.monotonic()
        if self._pause is not None and self._pause.until_s > now_s:
            return self._pause.reason
        used_up = self._refused_until_s > now_s and self._refused_nanousd <= self._slab_nanousd
        return (
            "the provider's quota is used up" if used_up else "ok"
        )  # a call larger than a slab tells of itself alone

    def covers(self, nanousd: int) -> bool:
        """Whether a hold can be taken of what is leased already."""
        return self._unlimited or self._free_nanousd >= nanousd

    async def take(self, nanousd: int) -> int:
        """Set a hold aside, in nano-dollars; return what was taken, to be given back: 0 where there is no limit.

        Raises:
            ProviderQuotaError: the quota does not cover it.
            PostgresUnavailableError: a slab is needed and Postgres is away.
        """
        self._taken_s = time.monotonic()
        if not self.covers(nanousd):
            async with self._leasing:
                while not self.covers(nanousd):
                    await self._lease(nanousd - self._free_nanousd)
        if self._unlimited:
            return 0
        self._free_nanousd -= nanousd
        self._held_nanousd += nanousd
        return nanousd

    async def _lease(self, need: int) -> None:
        self._require_not_refused(need)
        async with self._database.connection() as connection:
            row = await connection.fetchrow(
                "SELECT given, free FROM lease_quota($1, $2, $3, $4)",
                self._worker_id,
                self._free_nanousd + self._held_nanousd,
                need,
                max(need, self._slab_nanousd),
            )
        if row["free"] is None:
            self._unlimited = True
        elif row["given"] < need:
            self._refused_nanousd, self._refused_until_s = need, time.monotonic() + _REFUSED_FOR_S
            _log.error(
                "provider.quota_used_up", free_usd=format_usd(row["free"]), needed_usd=format_usd(need)
            )
            raise _used_up()
        else:
            self._refused_until_s = 0.0
            self._free_nanousd += row["given"]

    def give_back(self, taken_nanousd: int, *, spent_nanousd: int) -> None:
        """Drop a hold; what the call was settled at is spent, and counted so in Postgres by the settlement itself."""
        self._held_nanousd -= taken_nanousd
        if not self._unlimited:
            self._free_nanousd += taken_nanousd - spent_nanousd

    # The provider refuses us

    def admit(self, call_id: UUID, user_id: UUID) -> None:
        """Let a call pass, unless the provider refuses us; after a pause one call at a time finds out.

        Whose call found out last leaves the next try to others for a while: what is refused may be theirs alone.

        Raises:
            ProviderQuotaError: nothing is sent now.
        """
        if self._pause is None:
            return
        self._require_no_pause(self._pause)
        if user_id == self._tried_by and time.monotonic() < self._pause.until_s + self._settings.pause_s:
            raise _refuses_us(self._pause.reason, self._settings.pause_s)
        self._trying = call_id

    def _require_not_refused(self, need: int) -> None:
        if need >= self._refused_nanousd and time.monotonic() < self._refused_until_s:
            raise _used_up()

    def look(self, nanousd: int) -> None:
        """Raise what a hold would be refused with just now, as far as is known; nothing is leased, and nobody is let pass.

        Raises:
            ProviderQuotaError: nothing is sent now.
        """
        if self._pause is not None:
            self._require_no_pause(self._pause)
        if not self.covers(nanousd):
            self._require_not_refused(nanousd - self._free_nanousd)

    def _require_no_pause(self, pause: _Pause) -> None:
        left_s = pause.until_s - time.monotonic()
        if left_s > 0 or self._trying is not None:
            raise _refuses_us(pause.reason, left_s)

    def refused(self, refusal: Refusal) -> None:
        """The provider refused a call with words about our key or account: find out whether it means all of them."""
        self._judge.note(refusal)
        _log.warning("provider.refused_a_call", reason=refusal.reason, in_a_row=self._judge.in_a_row)
        if self._trying == refusal.call_id:
            self._tried_by = refusal.user_id
        if not self._asking:
            self._asking = True
            self._tasks.start(self._look_into(refusal), name="ask about a refusal")

    async def _look_into(self, refusal: Refusal) -> None:
        try:
            if await self._judge.is_for_all(refusal, paused=self._pause is not None):
                self.pause(refusal.reason)
            elif self._judge.in_a_row >= _ALARM_AT:
                await self._tell_refusals(refusal.reason)
        finally:
            self._asking = False
            if self._trying == refusal.call_id:
                self._trying = None

    async def _tell_refusals(self, reason: str) -> None:
        """Tell operators of calls that are refused while nobody is served, though nobody else is stopped for it."""
        now_s = time.monotonic()
        if now_s - self._told_s < self._settings.pause_s:
            return
        self._told_s = now_s
        try:
            async with self._database.transaction() as connection:
                await connection.execute("SELECT note_refusals($1)", reason)
        except PostgresUnavailableError as error:
            _log.warning("refusals.not_told", error=str(error))

    def pause(self, reason: str) -> None:
        """Stop admitting; longer each time that the provider goes on refusing."""
        self._trying = None
        if self._pause is not None and self._pause.until_s > time.monotonic():
            return  # one of those sent before the first refusal
        pause_s = min(self._settings.pause_s * 2**self._pauses, self._settings.pause_max_s)
        self._pauses += 1
        self._pause = _Pause(time.monotonic() + pause_s, reason)
        _log.error("provider.refuses_us", reason=reason, paused_s=pause_s)
        self._tasks.start(self._tell_pause(reason, pause_s), name="tell of the pause")

    async def _tell_pause(self, reason: str, pause_s: float) -> None:
        try:
            async with self._database.transaction() as connection:
                await connection.execute(
                    "SELECT pause_provider(make_interval(secs => $1), $2)", pause_s, reason
                )
        except PostgresUnavailableError as error:
            _log.warning("pause.not_told", error=str(error))

    def served(self, call_id: UUID) -> None:
        """The provider accepted a call: if that one was to find out, it serves us again."""
        if self._pause is None:
            self._judge.served()
        elif self._trying == call_id:
            _log.warning("provider.serves_us_again")
            self._pause, self._trying, self._tried_by, self._pauses = None, None, None, 0
            self._judge.served()
            self._tasks.start(self._judge.doubt(), name="ask about the account after a pause")

    def ended(self, call_id: UUID) -> None:
        """A call ended; if it was to find out whether the provider serves us and did not, the next one may."""
        if self._trying == call_id and not self._asking:
            self._trying = None

    # What the other workers and the provider say

    async def load(self, _detail: str = "*") -> None:
        """Take over what changed in the account: a pause, or a limit where there was none."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow("SELECT * FROM read_pause()")
        if not row["unlimited"]:
            self._unlimited = False
        if row["left_s"] is not None and row["left_s"] > 0 and self._pause is None:
            self._pause = _Pause(time.monotonic() + row["left_s"], row["pause_reason"])

    async def run(self) -> None:
        """Give back what lies idle, so that other workers may use it, until cancelled."""
        while True:
            await asyncio.sleep(self._settings.idle_s)
            idle = time.monotonic() - self._taken_s >= self._settings.idle_s
            await self._return(keep_nanousd=0 if idle else self._slab_nanousd)

    async def _return(self, *, keep_nanousd: int) -> None:
        """Give back what is free beyond ``keep_nanousd``, and what a lease gave whose answer was lost."""
        if self._unlimited:
            return
        async with self._leasing:
            self._free_nanousd = min(
                self._free_nanousd, keep_nanousd
            )  # first, lest it be given back and used, too
            try:
                async with self._database.connection() as connection:
                    await connection.execute(
                        "SELECT return_slab($1, $2)",
                        self._worker_id,
                        self._free_nanousd + self._held_nanousd,
                    )
            except PostgresUnavailableError as error:
                _log.warning("slab.not_returned", error=str(error))

    async def close(self) -> None:
        """Give everything back; after this worker's calls have ended."""
        await self._tasks.drain(1.0)
        await self._return(keep_nanousd=0)


class QuotaWatch:
    """Asks the provider what is left, and raises the alarm when that is little; one worker at a time does.

    Args:
        database: where the account is.
        provider: who knows.
        settings: how often, and what is little.
    """

    def __init__(self, database: Database, provider: Provider, settings: QuotaSettings) -> None:
        self._database = database
        self._provider = provider
        self._settings = settings

    async def observe(self) -> int | None:
        """Ask once, and set the account by it.

        Returns:
            what is left in nano-dollars; None where there is no limit.

        Raises:
            ProviderUnavailableError, PostgresUnavailableError: nothing was changed.
        """
        async with self._database.connection() as connection:
            spent: int = int(await connection.fetchval("SELECT sum(spent_nanousd) FROM quota_slabs"))
        left = await self._find_left(spent)
        granted = None if left is None else left + spent
        async with self._database.transaction() as connection:
            before = await connection.fetchrow("SELECT * FROM provider_quota FOR UPDATE")
            low = left is not None and left < _nanousd(self._settings.low_usd)
            await connection.execute(
                "UPDATE provider_quota SET granted_nanousd = $1, left_nanousd = $2, low = $3, asked_at = now()",
                granted,
                left,
                low,
            )
            if (before["granted_nanousd"] is None) != (granted is None):
                await connection.execute("SELECT pg_notify('tuma', 'quota:')")
        self._report(before, left, low=low)
        return left

    async def _find_left(self, spent_nanousd: int) -> int | None:
        """Return the least of what the provider and the operator say is left."""
        said = await self._provider.find_left_usd()
        found = [] if said is None else [_nanousd(max(said, Decimal(0)))]
        if self._settings.budget_usd is not None:
            found.append(max(_nanousd(self._settings.budget_usd) - spent_nanousd, 0))
        return min(found, default=None)

    @staticmethod
    def _report(before: Any, left: int | None, *, low: bool) -> None:
        if left is not None and low and not before["low"]:
            _log.error("provider.quota_low", left_usd=format_usd(left))
        elif before["low"] and not low:
            _log.warning("provider.quota_no_longer_low", left_usd=None if left is None else format_usd(left))


async def return_slabs(database: Database, *, grace_s: float) -> int:
    """Return what ended workers had leased and not spent; how many workers that were.

    Args:
        database: where the account is.
        grace_s: seconds past the end of a worker's lease.
    """
    async with database.connection() as connection:
        count: int = await connection.fetchval("SELECT return_slabs(make_interval(secs => $1))", grace_s)
    return count


def _nanousd(usd: Decimal) -> int:
    return nanousd_from_attousd(attousd_from_decimal(usd))


def _refuses_us(reason: str, left_s: float) -> ProviderQuotaError:
    return ProviderQuotaError(
        f"The provider does not serve us now ({reason}); the operator has been told.",
        retry_after_s=max(1, math.ceil(left_s)),
    )


def _used_up() -> ProviderQuotaError:
    return ProviderQuotaError(
        "The provider's quota is used up; the operator has been told.", retry_after_s=30
    )
