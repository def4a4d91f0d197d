"""The ledger in Postgres: open, extend and settle calls, each in batches of one function call and one commit.

Every function may be repeated with the same input (a commit whose answer was lost): see ``ledger.sql``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

from billing.calls.outcome import Ending, Settlement
from billing.errors import BrokenInvariantError, NotFoundError
from billing.ids import new_id
from billing.postgres.database import Database

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Opening:
    """A call to be opened with its hold; amounts in nano units of the wallet's currency and of USD."""

    call_id: UUID
    user_id: UUID
    wallet_id: UUID
    key_id: UUID | None
    model: str
    stream: bool
    price_id: UUID
    fx_quote_id: UUID
    hold_nano: int
    hold_nanousd: int


@dataclass(frozen=True, slots=True)
class Extension:
    """A call's hold, to be raised to these absolute amounts."""

    call_id: UUID
    hold_nano: int
    hold_nanousd: int


class Ledger:
    """Runs the posting functions.

    Args:
        database: where the truth is.
        worker_id: whose calls are opened.
        settler: the same, by a role that may settle; ``database``, without one.
        hold: keep a connection for what is posted, and one for settlements, beside the pools.
    """

    def __init__(
        self, database: Database, *, worker_id: UUID, settler: Database | None = None, hold: bool = False
    ) -> None:
        settler = settler or database
        self._opener = database.hold() if hold else database
        self._settler = settler.hold() if hold else settler
        self._worker_id = worker_id

    async def open_calls(self, batch: Sequence[Opening]) -> list[str]:
        """Open calls in one commit.

        Returns:
            a verdict per call, in order: ``opened``, ``insufficient_funds``, ``cap_exceeded``, ``wallet_frozen``, or the
            state of a call that ended already.

        Raises:
            PostgresUnavailableError: whether it was committed is unknown; repeat it.
        """
        columns = (
            [item.call_id for item in batch],
            [item.user_id for item in batch],
            [item.wallet_id for item in batch],
            [item.key_id for item in batch],
            [item.model for item in batch],
            [item.stream for item in batch],
            [item.price_id for item in batch],
            [item.fx_quote_id for item in batch],
            [item.hold_nano for item in batch],
            [item.hold_nanousd for item in batch],
        )
        rows = await self._opener.fetch(
            "SELECT call_id, verdict FROM open_batch($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
            self._worker_id,
            *columns,
        )
        return _in_order([item.call_id for item in batch], {row["call_id"]: row["verdict"] for row in rows})

    async def extend_calls(self, batch: Sequence[Extension]) -> list[str]:
        """Raise holds in one commit.

        Returns:
            a verdict per call, in order: ``extended``, ``insufficient_funds``, ``cap_exceeded``, or the call's state.

        Raises:
            PostgresUnavailableError: whether it was committed is unknown; repeat it.
        """
        rows = await self._opener.fetch(
            "SELECT call_id, verdict FROM extend_batch($1, $2, $3)",
            [item.call_id for item in batch],
            [item.hold_nano for item in batch],
            [item.hold_nanousd for item in batch],
        )
        return _in_order([item.call_id for item in batch], {row["call_id"]: row["verdict"] for row in rows})

    async def note_calls(self, ids: Mapping[UUID, str]) -> set[UUID]:
        """Write the provider's ids of open calls' answers, where there is none; return the calls that have theirs now.

        Rows that somebody else has locked are left out: it waits for nobody, so that nobody waits for it in a circle.

        Raises:
            PostgresUnavailableError: whether it was committed is unknown; repeat it.
        """
        rows = await self._opener.fetch(
            "SELECT id FROM note_generations($1, $2) AS noted (id)",
            list(ids.keys()),
            list(ids.values()),
        )
        return {row["id"] for row in rows}

    async def settle_calls(self, batch: Sequence[Ending]) -> list[Settlement]:
        """End calls in one commit, once each, whoever tries; how each stands afterwards, in order.

        Raises:
            PostgresUnavailableError: whether it was committed is unknown; repeat it.
            BrokenInvariantError: a call was never opened.
        """
        usage = [item.usage for item in batch]
        fine = [item for item in batch if item.is_fine]
        columns: tuple[list[Any], ...] = (
            [item.call_id for item in batch],
            [item.state for item in batch],
            [item.outcome for item in batch],
            [item.accuracy for item in batch],
            [item.source for item in batch],
            [item.generation_id for item in batch],
            [item.cost_nanousd for item in batch],
            [item.provider_cost_nanousd for item in batch],
            [item.charge_nano for item in batch],
            [item.spread_nano for item in batch],
            [item.house_nanousd for item in batch],
            [item.prompt_tokens for item in usage],
            [item.completion_tokens for item in usage],
            [item.cached_read_tokens for item in usage],
            [item.cached_write_tokens for item in usage],
            [item.reasoning_tokens for item in usage],
            [item.first_byte_ms for item in batch],
            [item.duration_ms for item in batch],
            [item.call_id for item in fine],
            [item.exact_attousd for item in fine],
            [item.usage.images for item in fine],
            [item.usage.audio_tokens for item in fine],
        )
        rows = await self._settler.fetch(
            "SELECT call_id, won, state, charge_nano, hold_nano, posted_nano, available_nano"
            " FROM settle_batch($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16,"
            " $17, $18, $19, $20, $21, $22, $23)",
            new_id(),
            *columns,
        )
        return _in_order([item.call_id for item in batch], {row["call_id"]: Settlement(*row) for row in rows})

    async def read_mirror(self, user_id: UUID, moment: datetime) -> dict[str, str]:
        """Read what a user's calls are admitted by, in one snapshot: the fields of their mirror (``billing/holds/holds.py``).

        Args:
            user_id: whose.
            moment: which the windows of caps shall contain.

        Raises:
            NotFoundError: there is no such user, or they have no wallet.
            PostgresUnavailableError: Postgres is away.
        """
        rows = await self._opener.fetch("SELECT field, value FROM read_mirror($1, $2)", user_id, moment)
        if not rows:
            raise NotFoundError(f"user {user_id} has no wallet")
        return {row["field"]: row["value"] for row in rows}


def _in_order(ids: Sequence[UUID], found: dict[UUID, T]) -> list[T]:
    missing = [call_id for call_id in ids if call_id not in found]
    if missing:
        raise BrokenInvariantError(f"Postgres does not know call {missing[0]} ({len(missing)} of {len(ids)})")
    return [found[call_id] for call_id in ids]
