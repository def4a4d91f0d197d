"""The live feed in Postgres: what happens to watched wallets, numbered per wallet without a gap, in the order of commits.

Rows are written by triggers, in the transactions that move the money; here they are read. A wallet's numbers follow one
another by 1. Where one is missing, events may be missing too: the wallet was watched by nobody for a while, or they were
removed for their age.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, cast
from uuid import UUID

from pydantic import Field
from typing_extensions import TypedDict

from billing.errors import PostgresUnavailableError
from billing.money import format_amount
from billing.postgres.database import REPEATABLE, Database
from billing.shapes import Amount, Id, Moment
from billing.wallets.wallets import Status
from config.settings import FeedSettings

EventKind = Literal[
    "hold",
    "settlement",
    "grant",
    "topup",
    "refund",
    "correction",
    "reversal",
    "dispute",
    "cap",
    "low",
    "auto_topup",
    "wallet",
]
EventType = Literal[EventKind, "balance", "reset", "end"]
_FORGET_ROWS = 10_000
_LEASE_PER_KEEP = 1.5  # renewed at every quarter: who stays away for `keep_s` misses nothing
_APART = ("cap", "low", "auto_topup")  # told in a member of their own: theirs may have names of the others'
_ID = re.compile(r"([0-9a-f]{8})-([0-9]{1,18})", re.ASCII)


class _Event(TypedDict):
    object: Literal["wallet.event"]
    type: EventType


class WalletEventJson(_Event, total=False):
    """`balance` comes first, `reset` where events are missing, `end` last, with a `reason` and nothing else.

    Each of the others is something that was committed, with the balance after it; major units of the wallet's currency, USD.
    """

    id: Annotated[str, Field(description="For `Last-Event-ID`.")]
    wallet_id: Id
    currency: str
    posted: Amount
    held: Amount
    available: Amount
    overdraft: Amount
    status: Status
    posted_change: Amount
    held_change: Amount
    created_at: Moment
    call_id: Id
    model: str
    state: Literal["settled", "void"]
    outcome: str
    accuracy: Literal["exact", "estimated"]
    cost_usd: Amount
    charge: Amount
    transaction_id: Id
    description: str
    cap: dict[str, Any]
    low: dict[str, Any]
    auto_topup: dict[str, Any]
    reason: str


@dataclass(frozen=True, slots=True)
class Standing:
    """How a wallet stands after the event with the number ``seq``; nano units of its currency."""

    wallet_id: UUID
    currency: str
    seq: int
    posted_nano: int
    held_nano: int
    overdraft_nano: int
    status: Status

    def as_event(self, kind: EventType) -> WalletEventJson:
        """Return an event that tells it; amounts as decimal strings in major units."""
        return {
            "object": "wallet.event",
            "type": kind,
            "id": event_id(self.wallet_id, self.seq),
            "wallet_id": str(self.wallet_id),
            "currency": self.currency,
            "posted": format_amount(self.posted_nano),
            "held": format_amount(self.held_nano),
            "available": format_amount(self.posted_nano + self.overdraft_nano - self.held_nano),
            "overdraft": format_amount(self.overdraft_nano),
            "status": self.status,
        }


@dataclass(frozen=True, slots=True)
class FeedEvent:
    """One event, and how the wallet stood after it. ``moved`` and ``holds``: how its posted and its held amounts changed."""

    kind: EventKind
    moved_nano: int
    holds_nano: int
    after: Standing
    call_id: UUID | None
    body: Mapping[str, Any]
    created_at: datetime

    def as_json(self) -> WalletEventJson:
        """Return what is told of it; amounts as decimal strings in major units, the moment in ISO 8601."""
        told = self.after.as_event(self.kind)
        told["posted_change"] = format_amount(self.moved_nano)
        told["held_change"] = format_amount(self.holds_nano)
        told["created_at"] = self.created_at.astimezone(UTC).isoformat()
        if self.call_id is not None:
            told["call_id"] = str(self.call_id)
        body = {self.kind: self.body} if self.kind in _APART else self.body
        return cast("WalletEventJson", {**told, **body})  # as the triggers have put it together (feed.sql)


@dataclass(frozen=True, slots=True)
class Reading:
    """A wallet's standing, and its events after the number asked for.

    Args:
        whole: none is missing up to the standing, or where there are ``more``, up to the last one here.
        more: there are events after these.
        agrees: the feed says of the wallet what is so; if not, ``Feeds.mend`` it.
    """

    standing: Standing
    events: Sequence[FeedEvent]
    whole: bool
    more: bool
    agrees: bool


@dataclass(slots=True)
class _Found:
    row: Any
    events: list[FeedEvent] = field(default_factory=list)


def event_id(wallet_id: UUID, seq: int) -> str:
    """Return an event's id as clients see it: it tells wallets apart, should one come with another's."""
    return f"{wallet_id.hex[-8:]}-{seq}"


def parse_event_id(wallet_id: UUID, text: str) -> int:
    """Return the number in an event's id; 0, which is nobody's, when it is none of this wallet's."""
    match = _ID.fullmatch(text)
    return int(match[2]) if match is not None and match[1] == wallet_id.hex[-8:] else 0


class Feeds:
    """Reads feeds and keeps wallets watched.

    Args:
        database: by a role that may.
        settings: how long events are kept, and how many are read at once.
    """

    def __init__(self, database: Database, settings: FeedSettings) -> None:
        self._database = database
        self._settings = settings
        self._keep = timedelta(seconds=settings.keep_s * _LEASE_PER_KEEP)
        # No statement of ours takes longer, so no transaction that found a wallet unwatched can outlast it.
        self._sure = timedelta(seconds=2 * database.settings.command_timeout_s)

    @property
    def renew_s(self) -> float:
        """Seconds after which a wallet is to be watched again."""
        return self._settings.keep_s / 4

    async def watch(self, wallet_ids: Collection[UUID]) -> None:
        """Have events of these wallets written from now on.

        Raises:
            PostgresUnavailableError: whether they are is unknown; repeat it.
        """
        await self._watch(wallet_ids, self._sure)

    async def _watch(self, wallet_ids: Collection[UUID], sure: timedelta) -> None:
        try:
            async with self._database.connection() as connection:
                await connection.execute(
                    "SELECT watch_wallets($1, $2, $3)", sorted(wallet_ids), self._keep, sure
                )
        except REPEATABLE as error:
            raise PostgresUnavailableError(f"a wallet is busy: {type(error).__name__}") from error

    async def mend(self, wallet_id: UUID) -> None:
        """Take a wallet's standing anew from the wallet; if the feed does not agree with it, its watchers are told of the gap."""
        await self._watch([wallet_id], 2 * self._keep + self._sure)

    async def read(self, after: Mapping[UUID, int | None]) -> dict[UUID, Reading]:
        """Read the events after these numbers, a page of each wallet's, in one snapshot.

        Args:
            after: by wallet; None for the standing alone.

        Returns:
            by wallet; nothing of a wallet that is not watched.

        Raises:
            PostgresUnavailableError: Postgres is away.
        """
        limit = self._settings.page_events
        try:
            async with self._database.connection() as connection:
                rows = await connection.fetch(
                    "SELECT * FROM read_feeds($1, $2, $3)", list(after.keys()), list(after.values()), limit
                )
        except REPEATABLE as error:
            raise PostgresUnavailableError(f"the feed is busy: {type(error).__name__}") from error
        found: dict[UUID, _Found] = {}
        for row in rows:
            one = found.setdefault(row["wallet_id"], _Found(row))
            if row["event_seq"] is not None:
                one.events.append(_event_of(row))
        return {wallet_id: _reading_of(one, after[wallet_id], limit) for wallet_id, one in found.items()}

    async def forget(self) -> int:
        """Remove events that are older than the settings say; return how many."""
        keep = timedelta(seconds=self._settings.keep_s * _LEASE_PER_KEEP)
        total = 0
        while True:
            async with self._database.connection() as connection:
                gone: int = await connection.fetchval("SELECT forget_feeds($1, $2)", keep, _FORGET_ROWS)
            total += gone
            if gone < _FORGET_ROWS:
                return total


def _reading_of(found: _Found, after: int | None, limit: int) -> Reading:
    row, events = found.row, found.events
    standing = Standing(
        wallet_id=row["wallet_id"],
        currency=row["currency"],
        seq=row["seq"],
        posted_nano=row["posted_nano"],
        held_nano=row["held_nano"],
        overdraft_nano=row["overdraft_nano"],
        status=row["status"],
    )
    more = len(events) == limit and events[-1].after.seq < standing.seq
    if after is None:
        return Reading(standing, events, whole=True, more=False, agrees=row["agrees"])
    wanted = range(after + 1, after + 1 + len(events))
    reaches = more or after + len(events) == standing.seq
    whole = reaches and all(event.after.seq == seq for event, seq in zip(events, wanted, strict=True))
    return Reading(standing, events, whole=whole, more=more, agrees=row["agrees"])


def _event_of(row: Any) -> FeedEvent:
    return FeedEvent(
        kind=row["kind"],
        moved_nano=row["moved_nano"],
        holds_nano=row["holds_nano"],
        after=Standing(
            wallet_id=row["wallet_id"],
            currency=row["currency"],
            seq=row["event_seq"],
            posted_nano=row["event_posted_nano"],
            held_nano=row["event_held_nano"],
            overdraft_nano=row["event_overdraft_nano"],
            status=row["event_status"],
        ),
        call_id=row["call_id"],
        body=json.loads(row["body"]),
        created_at=row["created_at"],
    )
