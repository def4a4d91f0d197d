"""A wallet's transactions as its owner reads them: pages with the running balance, and months.

They are in the order of their ids, newest first: a charge stands where its call arrived, everything else where it was posted.
The balance beside each is that of the sequence: what was posted up to it.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, get_args
from uuid import UUID
from zoneinfo import ZoneInfo

from typing_extensions import TypedDict

from billing.errors import InputError, NotFoundError
from billing.money import format_amount, format_usd
from billing.postgres.database import Database
from billing.postgres.replica import Late
from billing.shapes import Amount, Id, Moment

Kind = Literal["settlement", "grant", "topup", "refund", "correction", "reversal", "dispute"]
KINDS = get_args(Kind)
PAGE_MAX = 1_000
_YEARS = range(2020, 2200)

_ROWS = """
        SELECT e.tx_id, e.amount_nano, e.currency, t.kind, t.call_id, t.memo, t.created_at
        FROM journal_entry e JOIN journal_tx t ON t.id = e.tx_id
        WHERE e.wallet_id = $1 AND ($2::uuid IS NULL OR e.tx_id < $2) AND ($3::text[] IS NULL OR t.kind = ANY ($3))
          AND ($4::timestamptz IS NULL OR e.tx_id >= uuid_floor($4)) AND ($5::timestamptz IS NULL OR e.tx_id < uuid_floor($5))
        ORDER BY e.tx_id DESC LIMIT $6
"""
_COLUMNS = (
    "p.tx_id AS id, p.kind, p.amount_nano, p.currency, p.call_id, c.model, c.cost_nanousd, u.prompt_tokens,"
    " u.completion_tokens, p.memo, p.created_at"
)
_CALLS = "LEFT JOIN calls c ON c.id = p.call_id LEFT JOIN usage u ON u.call_id = p.call_id AND p.kind = 'settlement'"
# The page is found first; then the wallet's newer entries are added up once, as far as the page reaches.
_PAGE = f"""
    WITH page AS ({_ROWS}), run AS (
        SELECT e.tx_id, sum(e.amount_nano) OVER (ORDER BY e.tx_id DESC ROWS UNBOUNDED PRECEDING) - e.amount_nano AS newer_nano
        FROM journal_entry e WHERE e.wallet_id = $1 AND e.tx_id >= (SELECT p.tx_id FROM page p ORDER BY p.tx_id LIMIT 1)
    )
    SELECT {_COLUMNS}, (w.posted_nano - r.newer_nano)::bigint AS balance_nano
    FROM page p JOIN run r ON r.tx_id = p.tx_id JOIN wallets w ON w.id = $1 {_CALLS} ORDER BY p.tx_id DESC
"""  # noqa: S608 - column names of this module
# A page that follows another: its balances follow from that one's.
_NEXT = f"WITH page AS ({_ROWS}) SELECT {_COLUMNS} FROM page p {_CALLS} ORDER BY p.tx_id DESC"  # noqa: S608 - the same
_MONTH = """
    SELECT w.currency, u.timezone, u.email,
           (w.posted_nano - coalesce((SELECT sum(e.amount_nano) FROM journal_entry e
                                      WHERE e.wallet_id = w.id AND e.tx_id >= uuid_floor($2)), 0))::bigint AS opening_nano,
           (w.posted_nano - coalesce((SELECT sum(e.amount_nano) FROM journal_entry e
                                      WHERE e.wallet_id = w.id AND e.tx_id >= uuid_floor($3)), 0))::bigint AS closing_nano
    FROM wallets w JOIN users u ON u.id = w.user_id WHERE w.id = $1
"""
_DAYS = """
    SELECT (uuid_moment(e.tx_id) AT TIME ZONE $4)::date AS day, t.kind, c.model, count(*) AS rows,
           sum(e.amount_nano)::bigint AS amount_nano
    FROM journal_entry e JOIN journal_tx t ON t.id = e.tx_id LEFT JOIN calls c ON c.id = t.call_id
    WHERE e.wallet_id = $1 AND e.tx_id >= uuid_floor($2) AND e.tx_id < uuid_floor($3)
    GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
"""


class TransactionJson(TypedDict):
    """What came into a wallet or went out of it; major units of its currency, a charge is negative. ``balance``: after it."""

    object: Literal["transaction"]
    id: Id
    kind: Kind
    amount: Amount
    currency: str
    balance: Amount
    call_id: Id | None
    model: str | None
    cost_usd: Amount | None
    tokens_prompt: int | None
    tokens_completion: int | None
    description: str
    created_at: Moment


@dataclass(frozen=True, slots=True)
class Transaction:
    """One line; nano units of the wallet's currency, a charge is negative. ``balance_nano`` is that after it."""

    id: UUID
    kind: Kind
    amount_nano: int
    currency: str
    balance_nano: int
    call_id: UUID | None
    model: str | None
    cost_nanousd: int | None
    prompt_tokens: int | None
    completion_tokens: int | None
    memo: str
    created_at: datetime

    def as_json(self) -> TransactionJson:
        """Return amounts as decimal strings in major units."""
        return {
            "object": "transaction",
            "id": str(self.id),
            "kind": self.kind,
            "amount": format_amount(self.amount_nano),
            "currency": self.currency,
            "balance": format_amount(self.balance_nano),
            "call_id": None if self.call_id is None else str(self.call_id),
            "model": self.model,
            "cost_usd": None if self.cost_nanousd is None else format_usd(self.cost_nanousd),
            "tokens_prompt": self.prompt_tokens,
            "tokens_completion": self.completion_tokens,
            "description": self.memo,
            "created_at": self.created_at.astimezone(UTC).isoformat(),
        }


@dataclass(frozen=True, slots=True)
class Filter:
    """Which transactions: of these kinds, from one moment on, before another; None for all."""

    kinds: Sequence[str] | None = None
    since: datetime | None = None
    until: datetime | None = None

    def __post_init__(self) -> None:
        for kind in self.kinds or ():
            if kind not in KINDS:
                raise InputError(f"there is no kind {kind[:40]!r}: it is one of {', '.join(KINDS)}")


@dataclass(frozen=True, slots=True)
class Line:
    """The sum of a day's transactions of one kind, for charges by model; nano units."""

    day: str
    kind: str
    model: str | None
    rows: int
    amount_nano: int


@dataclass(frozen=True, slots=True)
class Month:
    """A wallet's month on its owner's clock: opening balance, lines by day, closing balance; nano units.

    ``as_of``: by a replica, which knows it so far.
    """

    name: str
    currency: str
    timezone: str
    email: str | None
    starts_at: datetime
    ends_at: datetime
    opening_nano: int
    closing_nano: int
    lines: Sequence[Line]
    as_of: datetime | None = None


class Statements:
    """Reads a person's own transactions.

    Args:
        database: by the role that reads as a person.
        late: by the same role, for months; the database, without one.
    """

    def __init__(self, database: Database, late: Late | None = None) -> None:
        self._database = database
        self._late = late or Late(database)

    async def find_email(self, owner: UUID) -> str | None:
        """Return a person's address, if it is known."""
        async with self._database.as_person(owner, readonly=True) as connection:
            found: str | None = await connection.fetchval("SELECT email FROM users WHERE id = $1", owner)
        return found

    async def list_page(
        self, owner: UUID, wallet_id: UUID, wanted: Filter, *, after: UUID | None = None, limit: int
    ) -> list[Transaction]:
        """Return transactions of a user's wallet, newest first, at most ``limit`` of them, after the one named."""
        rows = await self._fetch(_PAGE, owner, wallet_id, wanted, after=after, limit=limit)
        return [Transaction(**row) for row in rows]

    async def _fetch(
        self, query: str, owner: UUID, wallet_id: UUID, wanted: Filter, *, after: UUID | None, limit: int
    ) -> list[Any]:
        kinds = None if wanted.kinds is None else list(wanted.kinds)
        async with self._database.as_person(owner, readonly=True) as connection:
            return list(
                await connection.fetch(
                    query, wallet_id, after, kinds, wanted.since, wanted.until, min(limit, PAGE_MAX)
                )
            )

    async def read_all(
        self, owner: UUID, wallet_id: UUID, wanted: Filter
    ) -> AsyncIterator[list[Transaction]]:
        """Read all transactions, newest first, a page at a time."""
        page = await self.list_page(owner, wallet_id, wanted, limit=PAGE_MAX)
        while page:
            yield page
            last = page[-1]
            if wanted.kinds is not None:  # there are others in between
                page = await self.list_page(owner, wallet_id, wanted, after=last.id, limit=PAGE_MAX)
                continue
            rows = await self._fetch(_NEXT, owner, wallet_id, wanted, after=last.id, limit=PAGE_MAX)
            page, balance_nano = [], last.balance_nano - last.amount_nano
            for row in rows:
                page.append(Transaction(**row, balance_nano=balance_nano))
                balance_nano -= row["amount_nano"]

    async def read_month(self, owner: UUID, wallet_id: UUID, month: str) -> Month:
        """Return a month, given as ``2026-11``, on the owner's clock.

        Raises:
            InputError: it is no month.
            NotFoundError: the wallet is not theirs.
        """

        async def read(connection: Any, as_of: datetime | None) -> Month:
            zone = await connection.fetchval("SELECT timezone FROM users WHERE id = $1", owner)
            starts_at, ends_at = bounds_of(month, zone or "UTC")
            head = await connection.fetchrow(_MONTH, wallet_id, starts_at, ends_at)
            if head is None:
                raise NotFoundError(f"there is no wallet {wallet_id}")
            rows = await connection.fetch(_DAYS, wallet_id, starts_at, ends_at, zone)
            lines = [
                Line(str(row["day"]), row["kind"], row["model"], row["rows"], row["amount_nano"])
                for row in rows
            ]
            return Month(name=month, starts_at=starts_at, ends_at=ends_at, lines=lines, as_of=as_of, **head)

        return await self._late.read(read, owner=owner)


def bounds_of(month: str, zone: str) -> tuple[datetime, datetime]:
    """Return the first moment of a month on a zone's clocks, and that of the next.

    Raises:
        InputError: it is not written as ``2026-11``.
    """
    year, _, number = month.partition("-")
    digits = month.isascii() and year.isdigit() and number.isdigit() and (len(year), len(number)) == (4, 2)
    if not digits or int(year) not in _YEARS or not 1 <= int(number) <= 12:  # noqa: PLR2004 - months
        raise InputError(f"{month[:20]!r} is no month: write it as 2026-11")
    first = datetime(int(year), int(number), 1, tzinfo=ZoneInfo(zone))
    over = int(number) == 12  # noqa: PLR2004 - months
    following = datetime(int(year) + over, 1 if over else int(number) + 1, 1, tzinfo=ZoneInfo(zone))
    return first.astimezone(UTC), following.astimezone(UTC)
