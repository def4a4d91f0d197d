"""Caps: limits on spending per call, day, week, month or in total, on a wallet, a key or a user.

They are set here; ``reserve.lua`` and ``open_batch`` keep them. The user sets limits, the operator sets ceilings; the
lower of the two counts. A wallet's and a key's caps count charges in the wallet's currency, a user's the USD cost that
their wallets paid for. Windows follow the user's clock: an IANA time zone, and the day that weeks start with.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, get_args
from uuid import UUID

import asyncpg
from pydantic import Field
from typing_extensions import TypedDict

from billing.errors import InputError, NotFoundError
from billing.money import AMOUNT_MAX_NANO, format_amount
from billing.postgres.database import Database
from billing.shapes import Amount, Moment

Scope = Literal["wallet", "key", "user"]
Period = Literal["call", "day", "week", "month", "total"]
PERIODS = get_args(Period)
_ENDLESS = ("call", "total")


class CapJson(TypedDict):
    """A cap and its present window; major units of ``currency``. The lower of the two limits counts."""

    limit: Amount
    currency: str
    spent: Amount
    held: Amount
    left: Amount
    limit_by_user: Amount | None
    limit_by_operator: Amount | None
    starts_at: Moment | None
    ends_at: Moment | None


CapsByPeriod = Annotated[
    dict[Period, CapJson], Field(description="By period: call, day, week, month, total.")
]


@dataclass(frozen=True, slots=True)
class Cap:
    """A cap and its present window; nano units of ``currency``. ``limit_nano`` is the user's, ``ceiling_nano`` the operator's."""

    scope: str
    scope_id: UUID
    period: Period
    currency: str
    limit_nano: int | None
    ceiling_nano: int | None
    effective_nano: int
    starts_at: datetime
    ends_at: datetime
    held_nano: int
    spent_nano: int

    @property
    def left_nano(self) -> int:
        """What a new call may still hold; below zero when calls cost more than was held for them."""
        return self.effective_nano - self.held_nano - self.spent_nano

    def as_json(self) -> CapJson:
        """Return amounts as decimal strings in major units, moments in ISO 8601."""
        ends = self.period not in _ENDLESS
        return {
            "limit": format_amount(self.effective_nano),
            "currency": self.currency,
            "spent": format_amount(self.spent_nano),
            "held": format_amount(self.held_nano),
            "left": format_amount(self.left_nano),
            "limit_by_user": None if self.limit_nano is None else format_amount(self.limit_nano),
            "limit_by_operator": None if self.ceiling_nano is None else format_amount(self.ceiling_nano),
            "starts_at": self.starts_at.astimezone(UTC).isoformat() if ends else None,
            "ends_at": self.ends_at.astimezone(UTC).isoformat() if ends else None,
        }


@dataclass(frozen=True, slots=True)
class Clock:
    """What a user's windows follow; ``week_starts`` is ISO 8601's number of a day, 1 for Monday."""

    timezone: str
    week_starts: int


class Caps:
    """Sets and shows caps.

    Args:
        database: where they are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def set_caps(
        self, scope: Scope, scope_id: UUID, limits: Mapping[str, int | None], *, owner: UUID | None = None
    ) -> None:
        """Set caps by period, in nano units; None lifts one. Periods that are not named stay as they are.

        What was spent in the present windows counts from the first moment on.

        Args:
            scope: what is bound.
            scope_id: which wallet, key or user.
            limits: by period.
            owner: the user who sets limits for themselves; None for the operator, whose ceilings no user can lift.

        Raises:
            InputError: an unknown period, or an amount out of bounds.
            NotFoundError: there is no such wallet, key or user, or it is another's.
        """
        check_caps(limits)
        values = (scope, scope_id, list(limits.keys()), list(limits.values()))
        try:
            if owner is None:
                async with self._database.transaction() as connection:
                    await connection.execute("SELECT set_caps($1, $2, true, $3, $4)", *values)
            else:
                async with self._database.as_person(owner) as connection:
                    await connection.execute("SELECT own_set_caps($1, $2, $3, $4)", *values)
        except asyncpg.NoDataFoundError:
            raise NotFoundError(f"there is no {scope} {scope_id}") from None

    async def find_caps(self, *scope_ids: UUID, moment: datetime | None = None) -> list[Cap]:
        """Return the caps of wallets, keys and users, each with the window that a moment lies in; now, without one."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                "SELECT * FROM list_caps($1, $2)", list(scope_ids), moment or datetime.now(UTC)
            )
        return _in_order(rows)

    async def find_own_caps(self, owner: UUID, *scope_ids: UUID) -> list[Cap]:
        """Return those of the caps that are a user's own, each with its present window."""
        async with self._database.as_person(owner, readonly=True) as connection:
            rows = await connection.fetch(
                "SELECT * FROM own_caps($1, $2)", list(scope_ids), datetime.now(UTC)
            )
        return _in_order(rows)

    async def set_clock(self, user_id: UUID, *, timezone: str, week_starts: int) -> None:
        """Set the clock that a user's windows follow; what was spent in the new windows counts.

        Raises:
            InputError: no IANA time zone, or no day of ISO 8601.
            NotFoundError: there is no such user.
        """
        if not 1 <= week_starts <= 7:  # noqa: PLR2004 - days of a week
            raise InputError("a week starts with a day from 1 (Monday) to 7 (Sunday)")
        try:
            async with self._database.transaction() as connection:
                await connection.execute("SELECT set_clock($1, $2, $3)", user_id, timezone, week_starts)
        except asyncpg.InvalidParameterValueError:
            raise InputError(f"there is no time zone {timezone!r}: give a name as Africa/Lagos") from None
        except asyncpg.NoDataFoundError:
            raise NotFoundError(f"there is no user {user_id}") from None

    async def get_clock(self, user_id: UUID) -> Clock:
        """Return what a user's windows follow.

        Raises:
            NotFoundError: there is no such user.
        """
        async with self._database.connection() as connection:
            row = await connection.fetchrow("SELECT timezone, week_starts FROM users WHERE id = $1", user_id)
        if row is None:
            raise NotFoundError(f"there is no user {user_id}")
        return Clock(**row)

    async def forget_windows(self, *, older_than_days: int = 40) -> int:
        """Delete what is known of windows long past; what a late settlement needs of them is counted anew."""
        async with self._database.connection() as connection:
            gone: int = await connection.fetchval(
                "SELECT forget_cap_windows(make_interval(days => $1))", older_than_days
            )
        return gone


def _in_order(rows: Iterable[Any]) -> list[Cap]:
    found = [Cap(**row) for row in rows]
    return sorted(found, key=lambda cap: (cap.scope, cap.scope_id, PERIODS.index(cap.period)))


def check_caps(limits: Mapping[str, int | None]) -> None:
    """Refuse limits by period that cannot be set.

    Raises:
        InputError: an unknown period, or an amount out of bounds.
    """
    for period, amount_nano in limits.items():
        if period not in PERIODS:
            raise InputError(f"there is no cap per {period!r}: it is one of {', '.join(PERIODS)}")
        if amount_nano is not None and not 0 <= amount_nano <= AMOUNT_MAX_NANO:
            raise InputError(f"the cap per {period} is out of bounds")


def caps_as_json(caps: Iterable[Cap]) -> dict[Period, CapJson]:
    """Return one scope's caps by period."""
    return {cap.period: cap.as_json() for cap in caps}
