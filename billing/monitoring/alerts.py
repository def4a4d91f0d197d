"""What an operator is told of: conditions from their beginning to their end, and messages until somebody takes them.

One process among all evaluates (``billing/postgres/turns.py``); what it found and what is to be told of it are committed together, so a
process that dies loses neither. Every worker delivers what is due, at least once: the receiver knows a repeat by its id.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, Protocol
from uuid import UUID

import structlog
from typing_extensions import TypedDict

from billing.errors import AlertNotTakenError, InputError, TumaError
from billing.ids import new_id
from billing.monitoring.conditions import Condition, Severity, find_conditions
from billing.postgres.database import Database
from billing.shapes import Id, Moment
from config.settings import Settings

_log = structlog.get_logger("tuma.alerts")
_LOCK = 0x616C6572  # "aler"
_TOGETHER = 8  # messages on their way at once, of one worker
_SHOWN = 100
_ERROR_MAX = 300
_Kind = Literal["alert.firing", "alert.reminder", "alert.resolved", "alert.test", "user.event"]


class Messenger(Protocol):
    """Who carries messages to the operator."""

    async def send(self, message_id: UUID, body: bytes) -> None:
        """Hand a message over.

        Raises:
            AlertNotTakenError: it was not acknowledged; the reason shows nothing of the address.
        """


@dataclass(slots=True)
class Evaluation:
    """What one look at the conditions changed."""

    fired: int = 0
    reminded: int = 0
    resolved: int = 0
    events: int = 0


class Alerts:
    """Keeps alerts and their messages.

    Args:
        database: as the keeper, or the owner.
        settings: thresholds and paces.
        messenger: None where nobody is to be told.
    """

    def __init__(self, database: Database, settings: Settings, messenger: Messenger | None) -> None:
        self._database = database
        self._all = settings
        self._settings = settings.alerts
        self._messenger = messenger
        self._rung = asyncio.Event()

    async def evaluate(self) -> Evaluation:
        """Look at every condition once, and write down what began, lasts and ended, with what is to be told of it.

        Raises:
            PostgresUnavailableError: nothing was changed.
        """
        done = Evaluation()
        async with self._database.transaction() as connection:
            await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
            found = {(item.kind, item.subject): item for item in await find_conditions(connection, self._all)}
            rows = await connection.fetch(
                "SELECT *, told_at < now() - make_interval(secs => $1) AS due,"
                " seen_at <= now() - make_interval(secs => $2) AS over FROM alerts WHERE state = 'firing'",
                self._settings.remind_s,
                self._settings.quiet_s,
            )
            lasting = {(row["kind"], row["subject"]): row for row in rows}
            for place, condition in found.items():
                if place in lasting:
                    done.reminded += await self._go_on(connection, lasting[place], condition)
                else:
                    await self._fire(connection, condition)
                    done.fired += 1
            for place, row in lasting.items():
                if place not in found and row["over"]:
                    await self._resolve(connection, row)
                    done.resolved += 1
            if self._messenger is not None:
                done.events = await self._tell_events(connection)
        if done != Evaluation():
            self._rung.set()
        return done

    async def _fire(self, connection: Any, condition: Condition) -> None:
        row = await connection.fetchrow(
            "INSERT INTO alerts (id, kind, subject, severity, summary, detail) VALUES ($1, $2, $3, $4, $5, $6) RETURNING *",
            *(new_id(), condition.kind, condition.subject, condition.severity, condition.summary),
            json.dumps(condition.detail),
        )
        _log.error("alert.fired", kind=condition.kind, subject=condition.subject, summary=condition.summary)
        if condition.kind == "wallet_low":
            await _tell_owner(connection, condition)
        await self._tell(connection, "alert.firing", row)

    async def _go_on(self, connection: Any, row: Any, condition: Condition) -> bool:
        row = {
            **row,
            "severity": condition.severity,
            "summary": condition.summary,
            "detail": json.dumps(condition.detail),
        }
        await connection.execute(
            "UPDATE alerts SET seen_at = now(), severity = $2, summary = $3, detail = $4 WHERE id = $1",
            *(row["id"], row["severity"], row["summary"], row["detail"]),
        )
        if row["told_at"] is None:  # when it began nobody was to be told
            await self._tell(connection, "alert.firing", row)
        elif row["due"]:
            await self._tell(connection, "alert.reminder", row)
            return self._messenger is not None
        return False

    async def _resolve(self, connection: Any, row: Any) -> None:
        row = await connection.fetchrow(
            "UPDATE alerts SET state = 'resolved', resolved_at = now() WHERE id = $1 RETURNING *", row["id"]
        )
        _log.warning("alert.resolved", kind=row["kind"], subject=row["subject"])
        if row["told_at"] is not None:
            await self._tell(connection, "alert.resolved", row)

    async def _tell(self, connection: Any, kind: _Kind, row: Mapping[str, Any]) -> None:
        if self._messenger is None:
            return
        await self._write(connection, kind, alert_id=row["id"], alert=_alert_json(row))
        await connection.execute("UPDATE alerts SET told_at = now() WHERE id = $1", row["id"])

    async def _tell_events(self, connection: Any) -> int:
        """Pass on what users were told of their caps; each event once."""
        rows = await connection.fetch(
            """
            SELECT e.* FROM events e
            WHERE e.kind = 'cap.spent' AND e.created_at > now() - make_interval(secs => $1)
              AND (e.body->>'percent')::integer >= $2
              AND NOT EXISTS (SELECT FROM alert_messages m WHERE m.event_id = e.id)
            ORDER BY e.id LIMIT $3
            """,
            *(self._settings.events_back_s, self._settings.cap_percent, self._settings.rows),
        )
        for row in rows:
            event = {
                "id": row["id"],
                "kind": row["kind"],
                "user_id": str(row["user_id"]),
                "wallet_id": None if row["wallet_id"] is None else str(row["wallet_id"]),
                "body": json.loads(row["body"]),
                "created_at": row["created_at"].isoformat(),
            }
            await self._write(connection, "user.event", event_id=row["id"], event=event)
        return len(rows)

    async def _write(
        self,
        connection: Any,
        kind: _Kind,
        *,
        alert_id: UUID | None = None,
        event_id: int | None = None,
        **content: Any,
    ) -> UUID:
        """Write a message to be delivered; its body is what every try sends."""
        message_id = new_id()
        body = {
            "id": str(message_id),
            "type": kind,
            "installation": self._settings.name,
            "created_at": datetime.now(UTC).isoformat(),
            **content,
        }
        await connection.execute(
            "INSERT INTO alert_messages (id, alert_id, event_id, body) VALUES ($1, $2, $3, $4)",
            *(message_id, alert_id, event_id, json.dumps(body, ensure_ascii=False)),
        )
        return message_id

    # Delivery

    async def run(self) -> None:
        """Deliver what is due until cancelled."""
        while True:
            self._rung.clear()
            try:
                while await self.deliver():
                    pass
            except TumaError as error:
                _log.warning("alerts.not_delivered", error=str(error))
            try:
                async with asyncio.timeout(self._settings.look_s):
                    await self._rung.wait()
            except TimeoutError:
                pass

    async def deliver(self) -> int:
        """Try every message that is due, some at a time, each alert's in order; return how many were tried.

        Raises:
            PostgresUnavailableError: what was sent meanwhile is sent again.
        """
        if self._messenger is None:
            return 0
        async with self._database.connection() as connection:
            rows = await connection.fetch(_TAKE, _TOGETHER, 2 * self._settings.timeout_s)
        await asyncio.gather(*(self._deliver(row["id"], row["body"], row["tries"]) for row in rows))
        return len(rows)

    async def _deliver(self, message_id: UUID, body: str, tries: int) -> str | None:
        """Try one message; return why it was not taken."""
        assert self._messenger is not None
        try:
            await self._messenger.send(message_id, body.encode())
        except AlertNotTakenError as error:
            why = str(error)[:_ERROR_MAX]
        else:
            async with self._database.connection() as connection:
                await connection.execute(
                    "UPDATE alert_messages SET delivered_at = now(), last_error = '' WHERE id = $1",
                    message_id,
                )
            _log.info("alert.delivered", message_id=str(message_id), tries=tries)
            return None
        pause_s = min(self._settings.pause_s * 2 ** min(tries - 1, 30), self._settings.pause_max_s)
        async with self._database.connection() as connection:
            dropped = await connection.fetchval(
                _FAILED, message_id, why, pause_s, self._settings.drop_after_s
            )
        log = _log.error if dropped else _log.warning
        log(
            "alert.dropped" if dropped else "alert.not_taken",
            message_id=str(message_id),
            tries=tries,
            error=why,
        )
        return why

    async def send_test(self) -> dict[str, Any]:
        """Send a message that says it is a test, now; one that is not taken is tried again by a running server.

        Raises:
            InputError: nobody is to be told.
        """
        if self._messenger is None:
            raise InputError("TUMA_ALERTS__URL is not set: there is nobody to tell")
        async with self._database.transaction() as connection:
            message_id = await self._write(
                connection, "alert.test", summary="This is a test: alerts of Tuma arrive here."
            )
            row = await connection.fetchrow(
                "UPDATE alert_messages SET tries = 1, next_at = now() + make_interval(secs => $2) WHERE id = $1"
                " RETURNING id, body, tries",
                *(message_id, 2 * self._settings.timeout_s),
            )
        why = await self._deliver(row["id"], row["body"], row["tries"])
        return {"ok": why is None, "id": str(message_id), "delivered": why is None, "error": why}


# Each to one process, which has it for a while; of an alert the oldest alone, so that its end does not overtake its beginning.
_TAKE = """
    UPDATE alert_messages m SET tries = m.tries + 1, next_at = now() + make_interval(secs => $2)
    FROM (SELECT d.id FROM alert_messages d
          WHERE d.next_at <= now() AND d.delivered_at IS NULL AND d.dropped_at IS NULL
            AND NOT EXISTS (SELECT FROM alert_messages e WHERE e.alert_id = d.alert_id AND e.id < d.id
                            AND e.delivered_at IS NULL AND e.dropped_at IS NULL)
          ORDER BY d.next_at LIMIT $1 FOR UPDATE SKIP LOCKED) due
    WHERE m.id = due.id RETURNING m.id, m.body, m.tries
"""
_FAILED = """
    UPDATE alert_messages SET last_error = $2, next_at = now() + make_interval(secs => $3),
           dropped_at = CASE WHEN created_at < now() - make_interval(secs => $4) THEN now() END
    WHERE id = $1 AND delivered_at IS NULL RETURNING dropped_at IS NOT NULL
"""


class _AlertFields(TypedDict):
    id: Id
    kind: str
    subject: str
    severity: Severity
    state: Literal["firing", "resolved"]
    summary: str
    detail: dict[str, Any]
    started_at: Moment
    resolved_at: Moment | None


class AlertJson(_AlertFields):
    """A condition, from its beginning to its end, and when the operator was told; ``detail``: figures, by its kind."""

    told_at: Moment | None


class UndeliveredJson(TypedDict):
    """A message that nobody took yet, and how often it was tried."""

    id: Id
    alert_id: Id | None
    created_at: Moment
    tries: int
    next_at: Moment
    last_error: str


class AlertsJson(TypedDict):
    """Alerts that last and the latest that ended, and the messages that nobody took yet."""

    object: Literal["list"]
    data: list[AlertJson]
    undelivered: list[UndeliveredJson]


async def describe_alerts(database: Database) -> AlertsJson:
    """Return the alerts that last and the latest that ended, and the messages that nobody took yet."""
    async with database.transaction(isolation="repeatable_read", readonly=True) as connection:
        rows = await connection.fetch(
            "(SELECT * FROM alerts WHERE state = 'firing' ORDER BY id DESC LIMIT $1) UNION ALL"
            " (SELECT * FROM alerts WHERE state = 'resolved' ORDER BY id DESC LIMIT $1)",
            _SHOWN,
        )
        waiting = await connection.fetch(
            "SELECT id, alert_id, created_at, tries, next_at, last_error FROM alert_messages"
            " WHERE delivered_at IS NULL AND dropped_at IS NULL ORDER BY id LIMIT $1",
            _SHOWN,
        )
    return {
        "object": "list",
        "data": [{**_alert_json(row), "told_at": _text(row["told_at"])} for row in rows],
        "undelivered": [
            {
                "id": str(row["id"]),
                "alert_id": None if row["alert_id"] is None else str(row["alert_id"]),
                "created_at": row["created_at"].isoformat(),
                "tries": row["tries"],
                "next_at": row["next_at"].isoformat(),
                "last_error": row["last_error"],
            }
            for row in waiting
        ],
    }


def describe_in_words(alerts: AlertsJson) -> str:
    """Write what ``describe_alerts`` returned as lines."""
    lines = [
        f"{item['state']:<8} {item['severity']:<8} {item['kind']:<20} since {item['started_at']}  {item['summary']}"
        for item in alerts["data"]
    ]
    lines += [
        f"not delivered: {item['id']}, tried {item['tries']} times: {item['last_error']}"
        for item in alerts["undelivered"]
    ]
    return "\n".join(lines) or "There are no alerts."


async def _tell_owner(connection: Any, condition: Condition) -> None:
    """Tell a wallet's owner what they asked to be told."""
    event_id = await connection.fetchval(
        "INSERT INTO events (user_id, wallet_id, kind, body) VALUES ($1, $2, 'wallet.low', $3) RETURNING id",
        UUID(condition.detail["user_id"]),
        UUID(condition.subject),
        json.dumps({name: condition.detail[name] for name in ("balance", "low", "currency")}),
    )
    await connection.execute(
        "SELECT pg_notify('tuma', $1)", f"event:{condition.detail['user_id']}:{event_id}"
    )


def _alert_json(row: Mapping[str, Any]) -> _AlertFields:
    return {
        "id": str(row["id"]),
        "kind": row["kind"],
        "subject": row["subject"],
        "severity": row["severity"],
        "state": row["state"],
        "summary": row["summary"],
        "detail": json.loads(row["detail"]),
        "started_at": row["started_at"].isoformat(),
        "resolved_at": _text(row["resolved_at"]),
    }


def _text(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat()
