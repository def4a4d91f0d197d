"""What one process among all does now and then: a turn is claimed in Postgres, by its clock."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from billing.errors import TumaError
from billing.postgres.database import Database

_LOOKS_PER_PERIOD = 4  # so that the turn of a process that died is taken up soon
_log = structlog.get_logger("tuma.routine")


class Routine:
    """Does one thing at a set pace, once among all processes.

    Args:
        database: where turns are claimed.
        name: of the thing.
        period_s: seconds from one turn to the next.
        work: what is done; an expected failure of it is logged, and it is done again at the next turn.
        at_once: look for a turn when it begins, not a while after.
    """

    def __init__(
        self,
        database: Database,
        name: str,
        *,
        period_s: float,
        work: Callable[[], Awaitable[object]],
        at_once: bool = False,
    ) -> None:
        self._database = database
        self.name = name
        self._period_s = period_s
        self._work = work
        self._at_once = at_once

    async def run(self) -> None:
        """Take turns until cancelled."""
        if self._at_once:
            await self.take_turn()
        while True:
            await asyncio.sleep(self._period_s / _LOOKS_PER_PERIOD)
            await self.take_turn()

    async def take_turn(self) -> bool:
        """Do it now if it is time and nobody else has; whether it was done."""
        try:
            async with self._database.connection() as connection:
                mine: bool = await connection.fetchval(
                    "SELECT take_turn($1, make_interval(secs => $2))", self.name, self._period_s
                )
            if mine:
                await self._work()
        except TumaError as error:
            _log.warning("routine.failed", routine=self.name, error=str(error))
            return False
        return mine
