"""What was used: calls, tokens, cost and charge by hour, day, week or month, by model and by key, from the sums in ``usage_rollup``.

The sums are kept by quarters of an hour, by when calls arrived. Every zone's clocks differ from UTC by whole quarters, so that
a day on anybody's clock is a sum of quarters, and exact (docs/decisions/0013-usage-rollups.md).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

from billing.errors import InputError, NotFoundError
from billing.money import format_amount, format_usd
from billing.postgres.database import Database
from billing.postgres.replica import Late
from billing.reports.answers import HouseSumsFields, SumsFields, UsageJson

PERIODS = ("hour", "day", "week", "month")
GROUPS = (*PERIODS, "model", "key")
BIN_BOUNDS_MS = (
    100,
    200,
    400,
    800,
    1_600,
    3_200,
    6_400,
    12_800,
    25_600,
    51_200,
    102_400,
)  # as usage_bin has them
_QUARTER_S = 900
_DEFAULT_DAYS = 30
_YEARS = range(2020, 2200)
_NO_KEY = UUID(int=0)
_TIMEOUT_S = 600.0
_MEMORY = (
    "SELECT set_config('work_mem', '32MB', true)"  # groups are kept in memory, rather than all rows sorted
)
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", re.ASCII)

_LOCAL = "(r.quarter AT TIME ZONE $3)"
_PERIOD: Mapping[str, str] = {
    "hour": "date_trunc('hour', r.quarter, $3)",
    "day": f"{_LOCAL}::date",
    "week": f"({_LOCAL}::date - (extract(isodow FROM {_LOCAL})::integer - $4 + 7) % 7)",
    "month": f"date_trunc('month', {_LOCAL})::date",
}
_COUNTS = ("calls", "voids", "exact")
_TOKENS = (
    *("prompt_tokens", "completion_tokens", "cached_read_tokens", "cached_write_tokens", "reasoning_tokens"),
)
_AMOUNTS = ("cost_nanousd", "charge_nano", "spread_nano")
_LATENCIES = ("first_byte_ms", "duration_ms")
_BINS = ("first_byte_bins", "duration_bins")
# Whose sums: of a wallet, of all of a user's, of everybody.
_WALLET, _USER, _ALL = (
    "r.wallet_id = $5",
    "r.wallet_id IN (SELECT o.id FROM wallets o WHERE o.user_id = $5)",
    "$5::uuid IS NULL",
)


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """Which usage: from one moment on, before another, by what.

    Args:
        since: a day on the person's clock, from its midnight on, or a moment on a quarter of an hour; None: 29 days ago.
        until: the same, not included; None: the end of today.
        by: at most one of ``PERIODS``, and ``model`` and ``key``.
        days_max: a longer range is refused.
        rows_max: more rows than that are refused.
    """

    since: date | datetime | None = None
    until: date | datetime | None = None
    by: Sequence[str] = ("day",)
    days_max: int = 400
    rows_max: int = 2_000

    def __post_init__(self) -> None:
        for name in self.by:
            if name not in GROUPS:
                raise InputError(f"usage is summed by {', '.join(GROUPS)}, not by {name[:40]!r}")
        if len(set(self.by)) < len(self.by) or len(set(self.by) & set(PERIODS)) > 1:
            raise InputError(f"usage is summed by one of {', '.join(PERIODS)} at most, and by nothing twice")

    @property
    def period(self) -> str | None:
        """What it is summed by of ``PERIODS``."""
        return next((name for name in self.by if name in PERIODS), None)

    def resolve(self, zone: str, now: datetime) -> tuple[datetime, datetime]:
        """Return the first moment and that after the last, in UTC.

        Raises:
            InputError: they are out of order, too far apart, or cut a quarter of an hour.
        """
        until = self.until or now.astimezone(ZoneInfo(zone)).date() + timedelta(days=1)
        ends_at = _moment(until, zone)
        since = self.since or ends_at.astimezone(ZoneInfo(zone)).date() - timedelta(days=_DEFAULT_DAYS)
        starts_at = _moment(since, zone)
        if starts_at >= ends_at:
            raise InputError("'since' must be before 'until'")
        if ends_at - starts_at > timedelta(days=self.days_max + 1):
            raise InputError(f"usage is shown for {self.days_max} days at once")
        return starts_at, ends_at


def parse_bound(text: str) -> date | datetime:
    """Read a day as ``2026-11-01`` or a moment as ``2026-11-01T12:15:00Z``; one without an offset is in UTC.

    Raises:
        InputError: it is neither.
    """
    try:
        if _DAY.fullmatch(text):
            return date.fromisoformat(text)
        moment = datetime.fromisoformat(text)
        return moment.astimezone(UTC) if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise InputError(
            f"{text[:40]!r} is neither a day as 2026-11-01 nor a moment as 2026-11-01T12:15:00Z"
        ) from None


def _moment(bound: date | datetime, zone: str) -> datetime:
    if bound.year not in _YEARS:
        raise InputError(f"usage is shown for the years {_YEARS[0]} to {_YEARS[-1]}")
    if not isinstance(bound, datetime):
        return datetime(bound.year, bound.month, bound.day, tzinfo=ZoneInfo(zone)).astimezone(UTC)
    if bound.timestamp() % _QUARTER_S:
        raise InputError("usage is kept by quarters of an hour: give a day, or a moment on a quarter")
    return bound.astimezone(UTC)


@dataclass(frozen=True, slots=True)
class Latency:
    """How long calls took: their number, the sum in ms, and how many lie in each bin of ``BIN_BOUNDS_MS`` and beyond."""

    calls: int
    total_ms: int
    bins: tuple[int, ...]

    @property
    def average_ms(self) -> int | None:
        """The average, to the millisecond."""
        return (2 * self.total_ms + self.calls) // (2 * self.calls) if self.calls else None

    def below_ms(self, percent: int) -> int | None:
        """Return a bound that so many percent of the calls were faster than; None where none is known.

        The least such bound of the bins': the percentile itself lies above the half of it.
        """
        wanted, seen = self.calls * percent, 0
        for count, bound_ms in zip(self.bins, BIN_BOUNDS_MS, strict=False):
            seen += count
            if self.calls and seen * 100 >= wanted:
                return bound_ms
        return None


@dataclass(frozen=True, slots=True)
class Sums:
    """What calls sum to; amounts in nano units of the currency and in nano-dollars, ``exact`` of the settled ``calls``.

    ``house_nanousd`` is known to operators alone.
    """

    calls: int = 0
    voids: int = 0
    exact: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_read_tokens: int = 0
    cached_write_tokens: int = 0
    reasoning_tokens: int = 0
    cost_nanousd: int = 0
    charge_nano: int = 0
    spread_nano: int = 0
    house_nanousd: int | None = None
    first_byte_ms: int = 0
    duration_ms: int = 0
    first_byte_bins: tuple[int, ...] = (0,) * (len(BIN_BOUNDS_MS) + 1)
    duration_bins: tuple[int, ...] = (0,) * (len(BIN_BOUNDS_MS) + 1)

    def __add__(self, other: "Sums") -> "Sums":
        added: dict[str, Any] = {}
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if isinstance(mine, tuple):
                added[item.name] = tuple(a + b for a, b in zip(mine, theirs, strict=True))
            elif mine is None or theirs is None:
                added[item.name] = theirs if mine is None else mine
            else:
                added[item.name] = mine + theirs
        return Sums(**added)

    def as_json(self) -> SumsFields:
        """Return amounts as decimal strings in major units, latencies in milliseconds."""
        first = Latency(sum(self.first_byte_bins), self.first_byte_ms, self.first_byte_bins)
        whole = Latency(sum(self.duration_bins), self.duration_ms, self.duration_bins)
        shown: HouseSumsFields = {
            "calls": self.calls,
            "calls_exact": self.exact,
            "calls_estimated": self.calls - self.exact,
            "calls_void": self.voids,
            "tokens_prompt": self.prompt_tokens,
            "tokens_completion": self.completion_tokens,
            "tokens_cached": self.cached_read_tokens,
            "tokens_cache_written": self.cached_write_tokens,
            "tokens_reasoning": self.reasoning_tokens,
            "cost_usd": format_usd(self.cost_nanousd),
            "charge": format_amount(self.charge_nano),
            "markup": format_amount(self.spread_nano),
            "first_byte_average_ms": first.average_ms,
            "first_byte_p50_below_ms": first.below_ms(50),
            "first_byte_p95_below_ms": first.below_ms(95),
            "duration_average_ms": whole.average_ms,
            "duration_p50_below_ms": whole.below_ms(50),
            "duration_p95_below_ms": whole.below_ms(95),
        }
        if self.house_nanousd is not None:  # never in what a person is answered: only operators read it
            shown["house_usd"] = format_usd(self.house_nanousd)
        return shown


@dataclass(frozen=True, slots=True)
class UsageRow:
    """The sums of one group; what it is not grouped by is None, as is the key of calls without one."""

    period: date | datetime | None
    model: str | None
    key_id: UUID | None
    key_name: str | None
    currency: str
    sums: Sums

    def as_json(self) -> UsageJson:
        """Return it by name; an hour is written with the offset of the clock that it is on."""
        return {
            "object": "usage",
            "period": None if self.period is None else self.period.isoformat(),
            "model": self.model,
            "key_id": None if self.key_id is None else str(self.key_id),
            "key_name": self.key_name,
            "currency": self.currency,
            **self.sums.as_json(),
        }


@dataclass(frozen=True, slots=True)
class UsageReport:
    """Rows by period, model and key, the oldest first, and their totals by currency; ``as_of``: by a replica, which knows them so far."""

    starts_at: datetime
    ends_at: datetime
    timezone: str
    week_starts: int
    rows: Sequence[UsageRow]
    totals: Mapping[str, Sums] = field(default_factory=dict)
    as_of: datetime | None = None


class UsageBook:
    """Reads what was used, late.

    Args:
        database: by the role that reads as a person, for ``read_own``; by an operator's, for the others.
    """

    def __init__(self, database: Database | Late) -> None:
        self._late = database if isinstance(database, Late) else Late(database)

    async def read_own(
        self, owner: UUID, wallet_id: UUID, wanted: UsageQuery, *, now: datetime | None = None
    ) -> UsageReport:
        """Return the usage of a person's wallet, on their clock.

        Raises:
            InputError: the range or the number of rows is out of bounds.
            NotFoundError: the wallet is not theirs.
        """

        async def read(connection: Any, as_of: datetime | None) -> UsageReport:
            clock = await _read_clock(
                connection,
                "SELECT u.timezone, u.week_starts, w.currency FROM wallets w JOIN users u ON u.id = w.user_id WHERE w.id = $1",
                wallet_id,
            )
            report = await _read(connection, wanted, clock, _WALLET, wallet_id, now=now)
            totals = report.totals or {clock["currency"]: Sums()}
            return replace(report, totals=totals, as_of=as_of)

        return await self._late.read(read, owner=owner)

    async def read_wallet(self, wallet_id: UUID, wanted: UsageQuery) -> UsageReport:
        """Return the usage of any wallet, on its owner's clock, for an operator."""
        clock = (
            "SELECT u.timezone, u.week_starts FROM wallets w JOIN users u ON u.id = w.user_id WHERE w.id = $1"
        )
        return await self._read_any(clock, _WALLET, wallet_id, wanted)

    async def read_user(self, user_id: UUID, wanted: UsageQuery) -> UsageReport:
        """Return the usage of all wallets of a user, on their clock, for an operator."""
        return await self._read_any(
            "SELECT timezone, week_starts FROM users WHERE id = $1", _USER, user_id, wanted
        )

    async def _read_any(self, clock: str, whose: str, whose_id: UUID, wanted: UsageQuery) -> UsageReport:
        async def read(connection: Any, as_of: datetime | None) -> UsageReport:
            found = await _read_clock(connection, clock, whose_id)
            return replace(await _read(connection, wanted, found, whose, whose_id, house=True), as_of=as_of)

        return await self._late.read(read)

    async def read_all(self, wanted: UsageQuery) -> UsageReport:
        """Return everybody's usage, in UTC, for an operator."""

        async def read(connection: Any, as_of: datetime | None) -> UsageReport:
            clock = {"timezone": "UTC", "week_starts": 1}
            return replace(await _read(connection, wanted, clock, _ALL, None, house=True), as_of=as_of)

        return await self._late.read(read)


async def _read_clock(connection: Any, query: str, whose: UUID) -> Any:
    row = await connection.fetchrow(query, whose)
    if row is None:
        raise NotFoundError(f"there is no wallet or user {whose}")
    return row


async def _read(
    connection: Any,
    wanted: UsageQuery,
    clock: Any,
    whose: str,
    whose_id: UUID | None,
    *,
    house: bool = False,
    now: datetime | None = None,
) -> UsageReport:
    zone = clock["timezone"]
    starts_at, ends_at = wanted.resolve(zone, now or datetime.now(UTC))
    await connection.execute(_MEMORY)
    found = await connection.fetch(
        _query(wanted, whose, house=house),
        starts_at,
        ends_at,
        zone,
        clock["week_starts"],
        whose_id,
        wanted.rows_max + 1,
        timeout=_TIMEOUT_S,
    )
    if len(found) > wanted.rows_max:
        raise InputError(
            f"that is more than {wanted.rows_max} rows: ask for a shorter time, or by less at once"
        )
    rows = [_row(row, zone) for row in found]
    totals: dict[str, Sums] = {}
    for row in rows:
        totals[row.currency] = totals.get(row.currency, Sums()) + row.sums
    return UsageReport(starts_at, ends_at, zone, clock["week_starts"], rows, totals)


def _query(wanted: UsageQuery, whose: str, *, house: bool) -> str:
    period = "NULL::date" if wanted.period is None else _PERIOD[wanted.period]
    model = "r.model" if "model" in wanted.by else "NULL::text"
    key = "r.key_id" if "key" in wanted.by else "NULL::uuid"
    amounts = (*_AMOUNTS, *(("house_nanousd",) if house else ()))
    sums = ", ".join(f"sum(r.{name}) AS {name}" for name in (*_COUNTS, *_TOKENS, *amounts, *_LATENCIES))
    bins = ", ".join(
        f"ARRAY[{', '.join(f'sum(r.{name}[{place}])' for place in range(1, len(BIN_BOUNDS_MS) + 2))}] AS {name}"
        for name in _BINS
    )
    return f"""
        WITH g AS (
            SELECT {period} AS period, {model} AS model, {key} AS key_id, w.currency, {sums}, {bins}
            FROM usage_rollup r JOIN wallets w ON w.id = r.wallet_id
            WHERE r.quarter >= $1 AND r.quarter < $2 AND {whose} AND $3::text IS NOT NULL AND $4::integer IS NOT NULL
            GROUP BY 1, 2, 3, 4
        )
        SELECT g.*, k.name AS key_name FROM g LEFT JOIN api_keys k ON k.id = g.key_id
        ORDER BY g.period, g.model, k.name, g.key_id, g.currency LIMIT $6
    """  # noqa: S608 - column names of this module


def _row(row: Any, zone: str) -> UsageRow:
    period = row["period"]
    if isinstance(period, datetime):
        period = period.astimezone(ZoneInfo(zone))
    values: dict[str, Any] = {
        item.name: int(row[item.name])  # everybody's sums may be more than a bigint holds
        for item in fields(Sums)
        if item.name in row and item.name not in _BINS
    }
    for name in _BINS:
        values[name] = tuple(row[name])
    key_id = None if row["key_id"] == _NO_KEY else row["key_id"]
    return UsageRow(period, row["model"], key_id, row["key_name"], row["currency"], Sums(**values))
