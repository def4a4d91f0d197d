"""Keeps calls alive: leases of a worker and of its holds are renewed with progress, and ids of answers are noted.

A worker that dies leaves its calls to the sweeper, which goes by what was noted here: in Redis beside the hold, and of answers
that last in Postgres, too.

A worker that only stood still (its event loop, its process or its machine) does not know that it was taken for dead. The sweeper
touches a call only when both leases have run out, the worker's in Postgres and the hold's in Redis; so a worker that finds both
overdue begins a new epoch, in which it asks of every older call whether it is still its own before anything more is passed on.
As long as one of them was renewed in time, nothing is asked.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Mapping
from uuid import UUID

import structlog

from billing.calls.ledger import Ledger
from billing.calls.live_call import LiveCall
from billing.errors import PostgresUnavailableError, RedisUnavailableError, WorkerStalledError
from billing.holds.holds import Holds
from billing.postgres.database import Database
from billing.tasks import TrackedTasks, wait_until_done
from config.settings import Settings

_log = structlog.get_logger("tuma.calls")
_RENEW_TOGETHER = 100
# A clock that goes on while the machine is suspended, where there is one.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def read_clock_s() -> float:
    """Return the seconds by which leases run out here."""
    return time.clock_gettime(_CLOCK)


class Leases:
    """The leases of one worker and of its calls.

    Args:
        database: where the worker's lease is.
        holds: where those of its calls are.
        ledger: where ids of answers that last are noted.
        live: the calls in flight; whoever opens and ends them keeps it.
        tasks: in which notes are written that nobody waits for yet.
        worker_id: whose calls these are; its lease in Postgres keeps the sweeper off them.
        settings: of leases, notes and group commit.
    """

    def __init__(
        self,
        database: Database,
        holds: Holds,
        ledger: Ledger,
        live: Mapping[UUID, LiveCall],
        tasks: TrackedTasks,
        *,
        worker_id: UUID,
        settings: Settings,
    ) -> None:
        self._database = database
        self._holds = holds
        self._ledger = ledger
        self._live = live
        self._tasks = tasks
        self._worker_id = worker_id
        self._renew_s = settings.holds.renew_s
        self._note_s = settings.holds.note_s
        self._worker_lease_s = settings.sweep.worker_lease_s
        self._hold_lease_s = settings.holds.lease_s
        self._epoch = 0
        self._until_s = (
            math.inf
        )  # until then one of the leases holds; before the worker is registered it has none
        self._asking: asyncio.Task[None] | None = None
        self._open_wait_s = settings.batch.open_wait_s

    async def register_worker(self, *, host: str, pid: int) -> None:
        """Make this worker known, with a lease.

        Raises:
            PostgresUnavailableError: Postgres is away.
        """
        sent_s = read_clock_s()
        async with self._database.connection() as connection:
            await connection.execute(
                "SELECT register_worker($1, $2, $3, make_interval(secs => $4))",
                self._worker_id,
                host,
                pid,
                self._worker_lease_s,
            )
        self._until_s = sent_s + self._worker_lease_s

    # Whether a call is still this worker's own

    def begin(self, call: LiveCall) -> None:
        """Take a call up: it is this worker's own as of now."""
        self._notice_standstill()
        call.epoch = self._epoch

    def is_own(self, call: LiveCall) -> bool:
        """Whether nobody can have ended the call meanwhile; without a round trip."""
        return call.epoch == self._epoch and read_clock_s() < self._until_s

    def _notice_standstill(self) -> None:
        if read_clock_s() >= self._until_s:
            _log.warning("worker.stood_still", overdue_s=round(read_clock_s() - self._until_s, 3))
            self._epoch += 1
            self._until_s = (
                read_clock_s() + self._hold_lease_s
            )  # calls that begin now have holds of their own

    async def confirm_own(self, call: LiveCall) -> None:
        """Make sure that the call is still this worker's own; a question to Postgres, if the worker stood still.

        Raises:
            WorkerStalledError: somebody else ended it.
            PostgresUnavailableError: nobody can tell.
        """
        self._notice_standstill()
        while call.epoch != self._epoch and not call.is_lost and call.call_id in self._live:
            await self._ask_together()
            self._notice_standstill()  # meanwhile, again
        if call.is_lost:
            raise WorkerStalledError("This server stood still for too long to answer this call; try again.")

    async def _ask_together(self) -> None:
        """Ask, or wait for the answer to who asked first.

        Raises:
            PostgresUnavailableError: nobody can tell.
        """
        if self._asking is None or self._asking.done():
            self._asking = self._tasks.start(self._ask_whose(), name="ask whose calls these are")
        asking = self._asking
        if not await wait_until_done(asking, self._open_wait_s):
            raise PostgresUnavailableError("Postgres does not answer.", retry_after_s=5)
        asking.result()

    def _find_doubtful(self) -> list[LiveCall]:
        return [call for call in self._live.values() if call.epoch != self._epoch and not call.is_lost]

    async def _ask_whose(self) -> None:
        """Ask of all calls of earlier epochs, once the worker's lease keeps the sweeper off them again.

        Raises:
            PostgresUnavailableError: nobody can tell.
        """
        epoch = self._epoch
        await self._renew_lease()
        calls = self._find_doubtful()
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                "SELECT id FROM find_ended($1) AS ended (id)", [call.call_id for call in calls]
            )
        ended = {row["id"] for row in rows}
        for call in calls:
            call.is_lost = call.call_id in ended
            if not call.is_lost:
                call.epoch = epoch  # a lost one never is of an epoch again, so nobody takes it for their own
        if ended:
            _log.error("calls.lost", calls=len(ended))

    async def note(self, call: LiveCall, **notes: str) -> None:
        """Note what the sweeper would need, should this worker die now: the generation id, progress.

        Redis being away is no reason to stop an answer: the note stays with the call and goes along with the next, and
        the answer's id into Postgres.
        """
        call.notes.update(notes)
        try:
            await self._renew(call, exact=False)
        except RedisUnavailableError:
            if call.opened is not None and "generation_id" in notes:
                await wait_until_done(call.opened, self._open_wait_s)
                await self._note_in_postgres([call])

    def note_soon(self, call: LiveCall, **notes: str) -> None:
        """Begin to note, as ``note`` does; ``confirm_open`` waits for it beside the commit."""
        call.notes.update(notes)
        if call.turn.locked():
            call.noting = self._tasks.start(self.note(call, **notes), name=f"note {call.call_id}")
            return
        if call.progress is not None:
            call.notes.update(call.progress(False))
        call.noting = asyncio.ensure_future(self._holds.begin_renew(call.hold, call.notes))

    async def confirm_noted(self, call: LiveCall) -> None:
        """Wait for what ``note_soon`` began; where Redis is away, the id goes into Postgres."""
        noting, call.noting = call.noting, None
        if noting is None:
            return
        await wait_until_done(noting)
        if isinstance(noting.exception(), RedisUnavailableError):
            await self._note_in_postgres([call])
        else:
            noting.result()

    async def _renew(self, call: LiveCall, *, exact: bool = True) -> None:
        async with call.turn:
            if call.call_id in self._live and not call.is_lost:
                if call.progress is not None and call.generation_id is not None:
                    call.notes.update(call.progress(exact))
                await self._holds.renew(call.hold, call.notes)

    async def run(self) -> None:
        """Renew the worker's lease and its calls' leases until cancelled."""
        while True:
            started = time.monotonic()
            self._notice_standstill()
            if self._find_doubtful():
                with contextlib.suppress(PostgresUnavailableError):
                    await self._ask_together()  # first, lest the hold of a call that was ended be put back
            sent_s = read_clock_s()
            _, renewed = await asyncio.gather(self._renew_worker(), self._renew_calls())
            if renewed:
                self._last_until(sent_s + self._hold_lease_s)
            await asyncio.sleep(max(self._renew_s - (time.monotonic() - started), 0.1))

    def _last_until(self, until_s: float) -> None:
        self._until_s = until_s if self._until_s == math.inf else max(self._until_s, until_s)

    async def _renew_calls(self) -> bool:
        """Renew the leases of all calls; tell whether all of them were."""
        calls, whole = list(self._live.values()), True
        for start in range(0, len(calls), _RENEW_TOGETHER):
            together = calls[start : start + _RENEW_TOGETHER]
            found = await asyncio.gather(*(self._renew(call) for call in together), return_exceptions=True)
            errors = [error for error in found if error is not None]
            for error in errors:
                if not isinstance(error, RedisUnavailableError):
                    raise error
            if errors:
                whole = False
                _log.warning("leases.not_renewed", calls=len(errors), error=str(errors[0]))
            if len(errors) == len(together):
                break  # all of Redis is away, not a shard of a cluster
        return whole

    async def run_notes(self) -> None:
        """Write the ids of answers that last to Postgres, too, until cancelled."""
        while True:
            await asyncio.sleep(self._note_s)
            await self._note_in_postgres(list(self._live.values()))

    async def _note_in_postgres(self, calls: list[LiveCall]) -> None:
        """Write the answers' ids of calls that last, beside those in Redis: one statement, once per call."""
        new = [
            call
            for call in calls
            if call.generation_id is not None
            and not call.noted_in_postgres
            and call.opened is not None
            and call.opened.done()
        ]
        if not new:
            return
        ids = {call.call_id: call.generation_id for call in new if call.generation_id is not None}
        try:
            noted = await self._ledger.note_calls(ids)
        except PostgresUnavailableError as error:
            _log.warning("ids.not_noted", calls=len(new), error=str(error))
            return
        for call in new:
            call.noted_in_postgres = call.call_id in noted

    async def _renew_worker(self) -> None:
        try:
            await self._renew_lease()
        except PostgresUnavailableError as error:
            _log.warning("worker.lease_not_renewed", error=str(error))

    async def _renew_lease(self) -> None:
        """Renew the worker's lease in Postgres.

        Raises:
            PostgresUnavailableError: whether it was renewed is unknown.
        """
        sent_s = read_clock_s()  # the lease begins after this, so it lasts at least so long
        async with self._database.connection() as connection:
            await connection.execute(
                "SELECT renew_worker($1, make_interval(secs => $2))", self._worker_id, self._worker_lease_s
            )
        self._last_until(sent_s + self._worker_lease_s)

    async def sign_off_worker(self) -> None:
        """Give up the worker's lease: the sweeper takes what is left of its calls."""
        try:
            async with self._database.connection() as connection:
                await connection.execute("SELECT sign_off_worker($1)", self._worker_id)
        except PostgresUnavailableError:
            _log.warning("worker.not_signed_off")
