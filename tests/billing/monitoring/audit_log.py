"""The audit log of a test's database: what is new in it, and a superuser's hand that changes it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from billing.monitoring.audit import Audit, ProblemJson, Verdict
from scripts.office import Office


@dataclass
class Log:
    """The audit log of a database, and what was there when one looked last."""

    office: Office
    audit: Audit = field(init=False)
    seen: int = 0

    def __post_init__(self) -> None:
        self.audit = Audit(self.office.database)

    async def new(self) -> list[dict[str, Any]]:
        """Return the rows since the last look."""
        rows: list[dict[str, Any]] = [
            {**row} for row in await self.audit.list_rows(limit=1000) if row["id"] > self.seen
        ]
        self.seen = max([self.seen, *(row["id"] for row in rows)])
        return rows

    async def one(self, subject: str, action: str) -> dict[str, Any]:
        """Return the row since the last look: there is just one."""
        rows = await self.new()
        assert [(row["subject"], row["action"]) for row in rows] == [(subject, action)]
        return rows[0]

    async def write(self, count: int) -> None:
        """Write some rows."""
        async with self.office.database.transaction() as connection:
            await connection.execute(
                "SELECT write_audit('created', 'test', i::text, NULL, NULL, NULL,"
                " jsonb_build_object('n', i, 'yes', true)) FROM generate_series(1, $1) i",
                count,
            )

    @asynccontextmanager
    async def tampering(self) -> AsyncIterator[Any]:
        """Lend a connection with which a superuser changes what is there; undone afterwards."""
        async with self.office.database.connection() as connection:
            for table in ("audit_log", "audit_blocks"):
                await connection.execute(f"ALTER TABLE {table} DISABLE TRIGGER ALL")
            yield connection
            for table in ("audit_log", "audit_blocks"):
                await connection.execute(f"ALTER TABLE {table} ENABLE TRIGGER ALL")

    async def tamper(self, statement: str) -> list[ProblemJson]:
        """Change something, look what a verification says, and change it back."""
        async with self.tampering() as connection:
            kept = {
                table: await connection.fetch(f"SELECT * FROM {table}")
                for table in ("audit_log", "audit_blocks")
            }
            await connection.execute(statement)
            problems = (await self.audit.verify()).as_json()["problems"]
            for table, rows in kept.items():
                await connection.execute(f"DELETE FROM {table}")
                await connection.copy_records_to_table(table, records=rows)
        verdict = Verdict()
        await self.audit._verify_on(verdict, None)
        assert verdict.ok, "it is as it was"
        return problems
