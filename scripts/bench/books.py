"""Whether the books hold after a run, and agree with what the provider counted by itself, to the nano."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from billing.books.proof import Books
from billing.books.usage_proof import FIRST_ID
from billing.errors import TumaError
from billing.money import format_usd
from scripts.office import Office

_QUIET_S = 60.0
_POLL_S = 0.1
_Ask = Callable[[str, str], Awaitable[dict[str, Any]]]


class BenchError(TumaError):
    """The bench could not measure, or what it measured lost money."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Calls and their cost, as somebody has them in their books."""

    calls: int
    nanousd: int

    def __str__(self) -> str:
        return f"{self.calls} calls for {format_usd(self.nanousd)} USD"


NOTHING = Standing(0, 0)


async def compare(
    ask: _Ask,
    office: Office,
    key: str,
    *,
    answered: int,
    before: Standing = NOTHING,
    since: UUID = FIRST_ID,
    quiet_s: float = _QUIET_S,
) -> Standing:
    """Wait until no call is open; return what the provider and Tuma have, when they have the same.

    Args:
        ask: asks the provider, as ``Stand.ask_upstream`` does.
        office: whose database has the calls of this key, and no others.
        key: with which the provider was called.
        answered: how many calls the client counted.
        before: what is known of the calls that are older than ``since``, and ended; they are not read again.
        since: a call's least id.
        quiet_s: how long is waited.

    Raises:
        BenchError: they have not.
    """
    deadline = time.monotonic() + quiet_s
    while True:
        ours, still_open = await _read(office, since)
        told = await ask("/bench/books", key)
        theirs = Standing(told["calls"] - before.calls, told["nanousd"] - before.nanousd)
        if not still_open and ours == theirs:
            break
        if time.monotonic() > deadline:
            raise BenchError(f"the provider billed {theirs}; the books have {ours}, and {still_open} open")
        await asyncio.sleep(_POLL_S)
    if ours.calls != answered:
        raise BenchError(f"the client had {answered} answers; the provider and the books have {ours}")
    return ours


async def _read(office: Office, since: UUID) -> tuple[Standing, int]:
    async with office.database.connection() as connection:
        row = await connection.fetchrow(
            "SELECT count(*) FILTER (WHERE state = 'settled') AS settled, count(*) FILTER (WHERE state <> 'settled') AS others,"
            " coalesce(sum(provider_cost_nanousd), 0)::bigint AS cost FROM calls"
            " WHERE id >= $1",
            since,
        )
    return Standing(row["settled"], row["cost"]), row["others"]


async def prove(office: Office) -> list[str]:
    """Prove I1 to I8 and the sums of usage; return the names of what was proved.

    Raises:
        BenchError: one does not hold.
    """
    sweep = office.settings.sweep
    grace_s = office.settings.holds.lease_s + sweep.period_s * 2 + sweep.review_after_s
    found = await Books(office.database, office.holds, office.upstream, sweep_grace_s=grace_s).check()
    wrong = [f"{name}: {check.detail}" for name, check in found.items() if not check.ok]
    if wrong:
        raise BenchError("the books do not hold: " + "; ".join(wrong))
    return list(found)
