"""The audit log's own proof, and its readable form (``audit.sql``).

Every row has a line: its fields as one JSON object, stored as text. Rows are sealed in blocks, in the order of their ids. A
block holds the SHA-256 of each line, and its digest is the SHA-256 of

    the digest of the block before (nothing, for the first) + b"<number> <microseconds since 1970> " + those hashes

so that anybody can recompute the chain from the stored bytes. It cannot show that its own end was cut off: for that, the
head (``NUMBER:DIGEST``) is logged whenever a block is sealed, and ``verify`` compares with one that was noted elsewhere.
"""

import contextlib
import json
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, NotRequired, cast
from uuid import UUID

import asyncpg
import structlog
from typing_extensions import TypedDict

from billing.errors import InputError
from billing.postgres.database import Database
from billing.shapes import Id, Moment

_LEAF = 32  # bytes of a SHA-256
_ROWS = 1_000  # that are read at a time, and listed at most
_BLOCKS = 20  # that are read at a time, of 1,000 rows at most
_BEFORE_ALL = -(2**63)
_PROBLEMS_MAX = 100
_TRIES = 3  # each waits for a quarter of a second, as seal_audit does, and keeps new writers waiting
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_HEAD = re.compile(r"([1-9][0-9]{0,17}):([0-9a-f]{64})")
_FIELDS = (
    "id, at, actor, db_role, action, subject, subject_id, user_id, wallet_id, request_id,"
    " before::text AS before, after::text AS after"
)
_log = structlog.get_logger("tuma.audit")


@dataclass(frozen=True, slots=True)
class Head:
    """The newest block; written as ``NUMBER:DIGEST``."""

    number: int
    digest: bytes

    def __str__(self) -> str:
        return f"{self.number}:{self.digest.hex()}"


class ProblemJson(TypedDict):
    """What is not as it was sealed, and where, as far as that is known."""

    block: NotRequired[int]
    row: NotRequired[int]
    problem: str


class VerdictJson(TypedDict):
    """What a verification found: numbers of rows and blocks; ``head`` is to be noted elsewhere, as ``NUMBER:DIGEST``."""

    ok: bool
    rows: int
    blocks: int
    unsealed: int
    head: str | None
    problems: list[ProblemJson]


class AuditRowJson(TypedDict):
    """What was done, by whom, to what; ``before`` and ``after`` are rows, in which numbers with decimals are strings."""

    id: int
    at: Moment
    actor: str
    db_role: str
    action: str
    subject: str
    subject_id: str
    user_id: Id | None
    wallet_id: Id | None
    request_id: str | None
    before: dict[str, Any] | None
    after: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Problem:
    """What is not as it was sealed: the block or the row, None where it is neither."""

    what: str
    block: int | None = None
    row: int | None = None

    def as_json(self) -> ProblemJson:
        """Return what is known of it."""
        places = {"block": self.block, "row": self.row}
        known = {name: place for name, place in places.items() if place is not None}
        return cast("ProblemJson", {**known, "problem": self.what})


@dataclass(slots=True)
class Verdict:
    """What a verification found; ``rows`` counts all, ``unsealed`` those of no block yet."""

    rows: int = 0
    blocks: int = 0
    unsealed: int = 0
    head: Head | None = None
    problems: list[Problem] = field(default_factory=list)
    unlisted: int = 0
    last_id: int = _BEFORE_ALL  # of the head

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def add(self, what: str, *, block: int | None = None, row: int | None = None) -> None:
        """Note a problem; beyond a bound they are only counted."""
        if len(self.problems) < _PROBLEMS_MAX:
            self.problems.append(Problem(what, block, row))
        else:
            self.unlisted += 1

    def as_json(self) -> VerdictJson:
        """Return the contract's shape; the head is to be noted elsewhere."""
        problems = [problem.as_json() for problem in self.problems]
        if self.unlisted:
            problems.append({"problem": f"{self.unlisted} more"})
        return {
            "ok": self.ok,
            "rows": self.rows,
            "blocks": self.blocks,
            "unsealed": self.unsealed,
            "head": None if self.head is None else str(self.head),
            "problems": problems,
        }


class Audit:
    """Seals, verifies and lists the audit log.

    Args:
        database: where it is.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def seal(self) -> int:
        """Seal all rows that are committed; returns in how many blocks.

        A transaction that writes rows for long keeps it from sealing: then the next turn does.

        Raises:
            PostgresUnavailableError: Postgres is away; what was sealed stays so.
        """
        sealed = 0
        tries = _TRIES
        while tries:
            try:
                async with self._database.connection() as connection:
                    block = await connection.fetchrow("SELECT * FROM seal_audit()")
            except asyncpg.LockNotAvailableError:
                tries -= 1
                continue
            if block is None:
                return sealed
            sealed += 1
            _log.info(
                "audit.sealed", number=block["number"], digest=block["digest"].hex(), rows=block["rows"]
            )
        _log.warning("audit.busy", blocks=sealed)
        return sealed

    async def verify(self, *, expect: str | None = None) -> Verdict:
        """Recompute every block from the stored lines, and compare every row with its line.

        Reads one snapshot as a stream and blocks nobody. If all is well, the rows that were of no block are sealed.

        Args:
            expect: a head that was noted elsewhere, as ``NUMBER:DIGEST``; it must still be in the chain.

        Raises:
            InputError: ``expect`` is not of that form.
            PostgresUnavailableError: Postgres is away.
        """
        expected = None if expect is None else _parse_head(expect)
        verdict = Verdict()
        await self._verify_on(verdict, expected)
        if expected is not None and (verdict.head is None or verdict.head.number < expected.number):
            verdict.add(f"the chain ends before block {expected.number}, which was noted elsewhere")
        if verdict.ok and verdict.unsealed:
            with contextlib.suppress(asyncpg.InsufficientPrivilegeError):  # of who may only read
                await self.seal()
                await self._verify_on(verdict, None)
        return verdict

    async def _verify_on(self, verdict: Verdict, expected: Head | None) -> None:
        """Verify what comes after the verdict's head."""
        verdict.rows -= verdict.unsealed
        verdict.unsealed = 0
        number = 0 if verdict.head is None else verdict.head.number
        async with (
            self._database.session() as connection,  # what a cursor prepares stays with its connection
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            rows = _Rows(connection, after_id=verdict.last_id)
            blocks = "SELECT * FROM audit_blocks WHERE number > $1 ORDER BY number"
            async for block in connection.cursor(blocks, number, prefetch=_BLOCKS):
                await _verify_block(verdict, block, rows)
                if (
                    expected is not None
                    and expected.number == block["number"]
                    and expected.digest != block["digest"]
                ):
                    verdict.add("its digest is not the one that was noted elsewhere", block=expected.number)
            async for row in rows.up_to(None):
                verdict.rows += 1
                verdict.unsealed += 1
                if (off := _compare(row)) is not None:
                    verdict.add(off, row=row["id"])

    async def list_rows(
        self,
        *,
        wallet_id: UUID | None = None,
        user_id: UUID | None = None,
        actor: str | None = None,
        since: datetime | None = None,
        limit: int = 50,
    ) -> list[AuditRowJson]:
        """Return the newest rows that match all of the arguments, the oldest of them first.

        Numbers with decimals are strings.

        Raises:
            InputError: the limit is out of bounds.
        """
        if not 1 <= limit <= _ROWS:
            raise InputError(f"the limit must be between 1 and {_ROWS}")
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                f"SELECT {_FIELDS} FROM audit_log WHERE ($1::uuid IS NULL OR wallet_id = $1)"  # noqa: S608 - column names of this module
                " AND ($2::uuid IS NULL OR user_id = $2) AND ($3::text IS NULL OR actor = $3)"
                " AND ($4::timestamptz IS NULL OR at >= $4) ORDER BY id DESC LIMIT $5",
                wallet_id,
                user_id,
                actor,
                since,
                limit,
            )
        return [_as_json(row) for row in reversed(rows)]


def _parse_head(text: str) -> Head:
    found = _HEAD.fullmatch(text.strip().lower())
    if found is None:
        raise InputError(f"{text!r} is not NUMBER:DIGEST, as `tuma audit verify` prints the head")
    return Head(int(found[1]), bytes.fromhex(found[2]))


class _Rows:
    """The rows in the order of their ids, each seen once, in batches.

    Args:
        connection: in a transaction.
        after_id: where to begin.
    """

    def __init__(self, connection: Any, *, after_id: int) -> None:
        query = f"SELECT {_FIELDS}, line FROM audit_log WHERE id > $1 ORDER BY id"  # noqa: S608 - column names of this module
        self._cursor = aiter(connection.cursor(query, after_id, prefetch=_ROWS))
        self._next: Any = None

    async def up_to(self, last_id: int | None) -> AsyncIterator[Any]:
        """Go on up to an id, or to the end."""
        while True:
            row = self._next or await anext(self._cursor, None)
            self._next = None
            if row is None:
                return
            if last_id is not None and row["id"] > last_id:
                self._next = row
                return
            yield row


async def _verify_block(verdict: Verdict, block: Any, rows: _Rows) -> None:
    """Verify a block and the rows of its range; it becomes the verdict's head."""
    number, ids, leaves = block["number"], block["ids"], block["leaves"]
    head = verdict.head or Head(0, b"")
    missing = number - head.number - 1
    if missing:
        verdict.add(f"{missing} blocks before it were removed", block=number)
    elif block["previous"] != head.digest:
        verdict.add("it does not follow the block before it", block=number)
    if block["digest"] != _digest(block):
        verdict.add("its digest is not that of what it holds", block=number)
    if not ids or ids != sorted(set(ids)) or ids[0] <= verdict.last_id or len(leaves) != _LEAF * len(ids):
        verdict.add("its list of rows was altered", block=number)

    sealed = {row_id: leaves[_LEAF * i : _LEAF * (i + 1)] for i, row_id in enumerate(ids)}
    last_id = max(ids, default=verdict.last_id)
    seen = set()
    async for row in rows.up_to(last_id):
        verdict.rows += 1
        row_id = row["id"]
        seen.add(row_id)
        if missing and row_id not in sealed:
            continue  # of a block that was removed
        if (off := _compare_sealed(row, sealed)) is not None:
            verdict.add(off, block=number, row=row_id)
    for row_id in sealed.keys() - seen:
        verdict.add("it was removed", block=number, row=row_id)
    verdict.blocks += 1
    verdict.head = Head(number, block["digest"])
    verdict.last_id = last_id


def _digest(block: Any) -> bytes:
    sealed_us = (block["sealed_at"] - _EPOCH) // timedelta(microseconds=1)
    header = f"{block['number']} {sealed_us} ".encode()
    return sha256(block["previous"] + header + block["leaves"]).digest()


def _compare_sealed(row: Any, sealed: dict[int, bytes]) -> str | None:
    """Say how a row differs from what was sealed."""
    leaf = sha256(row["line"].encode()).digest()
    if row["id"] not in sealed:
        return "it was not there when the block was sealed"
    if leaf != sealed[row["id"]]:
        others = [other for other, theirs in sealed.items() if theirs == leaf]
        return f"it holds what was sealed as row {others[0]}" if others else "its line was altered"
    return _compare(row)


def _compare(row: Any) -> str | None:
    """Say in which columns a row differs from its line."""
    try:
        line = _parse(row["line"])
    except ValueError:
        return "its line is not JSON"
    if not isinstance(line, dict):
        return "its line is no object"
    fields = {name: _as_parsed(value) for name, value in row.items() if name != "line"}
    for name in ("before", "after"):
        fields[name] = row[name] and _parse(row[name])
    names = sorted(
        name
        for name in line.keys() | fields.keys()
        if name not in line or name not in fields or line[name] != fields[name]
    )
    return f"it differs from its line in {', '.join(names)}" if names else None


def _parse(text: str) -> Any:
    return json.loads(text, parse_int=_number, parse_float=_number)


def _number(text: str) -> tuple[str]:
    """Keep a number as it is written: 1 is neither true nor 1.0, and nothing is rounded."""
    return (text,)


def _as_parsed(value: object) -> object:
    """Return a column's value as it comes out of a line."""
    match value:
        case int():
            return _number(str(value))
        case datetime():
            return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        case UUID():
            return str(value)
        case _:
            return value


def _as_json(row: Any) -> AuditRowJson:
    return {
        "id": row["id"],
        "at": row["at"].astimezone(UTC).isoformat(),
        "actor": row["actor"],
        "db_role": row["db_role"],
        "action": row["action"],
        "subject": row["subject"],
        "subject_id": row["subject_id"],
        "user_id": None if row["user_id"] is None else str(row["user_id"]),
        "wallet_id": None if row["wallet_id"] is None else str(row["wallet_id"]),
        "request_id": row["request_id"],
        "before": row["before"] and json.loads(row["before"], parse_float=str),
        "after": row["after"] and json.loads(row["after"], parse_float=str),
    }


def describe_row(row: Mapping[str, Any]) -> str:
    """Return a listed row as a line of text: what changed, or else what it is now."""
    before, after = row["before"] or {}, row["after"] or {}
    if row["action"] == "changed":
        names = [name for name in after if before.get(name) != after[name]]
        what = ", ".join(f"{name} {_short(before.get(name))} → {_short(after[name])}" for name in names)
    else:
        what = ", ".join(
            f"{name} {_short(value)}" for name, value in (after or before).items() if value is not None
        )
    request = f" [{row['request_id']}]" if row["request_id"] else ""
    subject = f"{row['subject']} {row['subject_id']}".strip()
    return f"{row['id']}  {row['at'][:19]}Z  {row['actor']}{request}  {row['action']} {subject}: {what}"


def _short(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
