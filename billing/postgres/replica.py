"""Reads that may be of a moment before: by a replica while it follows closely, else by the primary.

Only sums for people's eyes are read so. What a decision hangs on, a balance above all, is read from the primary.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

import asyncpg
import structlog

from billing.errors import InputError, NotFoundError, PostgresUnavailableError
from billing.meters import Meters
from billing.postgres.database import Database, check_dsn

Result = TypeVar("Result")
# What is done with a connection, inside one transaction; told since when the replica may not know everything, None on the primary.
Work = Callable[[Any, datetime | None], Awaitable[Result]]
_log = structlog.get_logger("tuma.replica")
# Every worker says every few seconds that it lives, so that while anybody serves, the latest commit is never long ago. The
# replica's own sum of what it received would not show that it receives nothing any more.
POSITION = """
    SELECT pg_is_in_recovery() AS follows, pg_last_xact_replay_timestamp() AS as_of,
           extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp())::double precision AS behind_s
"""


class _UnfitError(Exception):
    """The replica cannot answer this; ``str`` is why, as it is counted.

    Args:
        why: in one word.
        lasts: it will not answer the next question either.
        behind_s: how far it is behind, if that is why.
    """

    def __init__(self, why: str, *, lasts: bool = True, behind_s: float | None = None) -> None:
        super().__init__(why)
        self.lasts = lasts
        self.behind_s = behind_s


class Late:
    """Reads by one role, on whichever of two servers is fit.

    Args:
        primary: asked where the replica is unfit, or there is none.
        replica: by the same role.
        meters: where is counted who answered.
    """

    def __init__(
        self, primary: Database, replica: Database | None = None, meters: Meters | None = None
    ) -> None:
        self._primary = primary
        self._replica = replica
        self._meters = meters or Meters()
        self._unfit: str | None = None  # why the replica was not asked last; None: it was
        self._paused_until_s = float("-inf")

    async def read(self, work: Work[Result], *, owner: UUID | None = None) -> Result:
        """Do the work inside one transaction that only reads, perhaps twice.

        Args:
            work: what is done.
            owner: as which person; None: as the role itself.

        Raises:
            PostgresUnavailableError: the primary is away, and the replica cannot answer.
            TumaError: what the work raises.
        """
        if self._replica is not None:
            if self._unfit is not None and time.monotonic() < self._paused_until_s:
                self._meters.replica_reads.add(1, self._unfit)
            else:
                try:
                    found = await self._ask(self._replica, work, owner)
                except _UnfitError as error:
                    self._leave(error)
                else:
                    self._follow()
                    return found
        async with _lend(self._primary, owner) as connection:
            return await work(connection, None)

    async def _ask(self, replica: Database, work: Work[Result], owner: UUID | None) -> Result:
        """Do the work on the replica.

        Raises:
            _UnfitError: it must be done on the primary.
        """
        working = False
        try:
            async with _lend(replica, owner) as connection:
                as_of = await self._look(connection)
                working = True
                return await work(connection, as_of)
        except NotFoundError:  # it may be too new for the replica
            raise _UnfitError("unknown", lasts=False) from None
        except InputError as error:
            if working:
                raise
            _log.warning("replica.refused", error=str(error))
            raise _UnfitError("refused") from error
        except PostgresUnavailableError as error:
            raise _UnfitError("away") from error
        # Rows that it had to remove while we read; a migration that it has not heard of.
        except asyncpg.PostgresError as error:
            _log.warning("replica.failed", error=type(error).__name__)
            raise _UnfitError("failed", lasts=False) from error

    async def _look(self, connection: Any) -> datetime:
        """Return up to when the replica knows everything; by the primary's clock, as commits are dated."""
        position = await connection.fetchrow(POSITION)
        if not position["follows"]:  # promoted, it goes a way of its own
            raise _UnfitError("no_replica")
        behind_s = position["behind_s"]
        if behind_s is None or behind_s > self._primary.settings.replica_lag_s:
            raise _UnfitError("behind", behind_s=behind_s)
        as_of: datetime = position["as_of"]
        return as_of

    def _leave(self, error: _UnfitError) -> None:
        why = str(error)
        self._meters.replica_reads.add(1, why)
        if not error.lasts:
            return
        if self._unfit != why:
            _log.warning("replica.left", why=why, behind_s=error.behind_s)
        self._unfit = why
        self._paused_until_s = time.monotonic() + self._primary.settings.replica_pause_s

    def _follow(self) -> None:
        self._meters.replica_reads.add(1, "replica")
        if self._unfit is not None:
            _log.info("replica.asked", after=self._unfit)
        self._unfit = None


def open_late(primary: Database, *, name: str, meters: Meters | None = None) -> tuple[Late, Database | None]:
    """Return how this role reads late, and the replica's pool, which the caller closes; None where no replica is set.

    Raises:
        InputError: the replica's DSN cannot be read.
    """
    settings = primary.settings
    dsn = settings.replica_dsn.get_secret_value()
    if not dsn:
        return Late(primary), None
    check_dsn(dsn, name="TUMA_POSTGRES__REPLICA_DSN")
    replica = Database(settings, name=name, role=primary.role, replica=True, meters=meters)
    return Late(primary, replica, meters), replica


@asynccontextmanager
async def _lend(database: Database, owner: UUID | None) -> AsyncIterator[Any]:
    lent = database.transaction(readonly=True) if owner is None else database.as_person(owner, readonly=True)
    async with lent as connection:
        yield connection
