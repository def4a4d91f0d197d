"""Numbered, forward-only migrations, run one at a time under a lock."""

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from billing.errors import TumaError
from billing.postgres.database import Database
from billing.postgres.roles import apply_access, bound_waits, ensure_roles

_LOCK = 0x54554D41  # "TUMA"


class MigrationError(TumaError):
    """The schema and this version of Tuma do not fit; nothing was changed."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file ``NNNN_name.sql``; ``digest`` is the SHA-256 of its text."""

    number: int
    name: str
    sql: str
    digest: str


def load_migrations() -> list[Migration]:
    """Read the migrations of this version, in order.

    Raises:
        MigrationError: two files share a number, or one is missing.
    """
    found = []
    for entry in sorted(
        files("billing.postgres").joinpath("migrations").iterdir(), key=lambda item: item.name
    ):
        if entry.name.endswith(".sql"):
            text = entry.read_text(encoding="utf-8")
            number, _, name = entry.name.removesuffix(".sql").partition("_")
            found.append(Migration(int(number), name, text, hashlib.sha256(text.encode()).hexdigest()))
    if [item.number for item in found] != list(range(1, len(found) + 1)):
        raise MigrationError("migrations are not numbered 1, 2, 3, …")
    return found


async def schema_version(connection: Any) -> int:
    """Return the number of the newest applied migration, 0 for an empty database."""
    if await connection.fetchval("SELECT to_regclass('schema_migrations')") is None:
        return 0
    if await connection.fetchval("SELECT to_regprocedure('read_schema()')") is not None:
        return int(await connection.fetchval("SELECT read_schema()"))
    return int(await connection.fetchval("SELECT coalesce(max(number), 0) FROM schema_migrations"))


async def migrate(database: Database) -> tuple[int, int]:
    """Bring the schema up to this version; each migration is one transaction.

    Returns:
        the versions before and after; equal when there was nothing to do.

    Raises:
        MigrationError: the schema is newer than this version, or an applied migration's text has changed.
        PostgresUnavailableError: Postgres is away.
    """
    known = load_migrations()
    async with database.session() as connection:
        await connection.execute("SELECT pg_advisory_lock($1)", _LOCK, timeout=120)
        try:
            before = await schema_version(connection)
            await _refuse_misfit(connection, known, before)
            settings = database.settings
            if settings.roles:
                await ensure_roles(connection, settings)
            if settings.pooler != "none":
                await bound_waits(connection, "CURRENT_USER")
            for migration in known[before:]:
                async with connection.transaction():
                    await connection.execute(  # months are made in UTC, whatever the server's zone
                        "SET LOCAL lock_timeout = '10s'; SET LOCAL statement_timeout = '10min'; SET LOCAL TimeZone = 'UTC'"
                    )
                    await connection.execute(
                        "CREATE TABLE IF NOT EXISTS schema_migrations (number integer PRIMARY KEY, name text NOT NULL,"
                        " digest text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
                    )
                    await connection.execute(migration.sql, timeout=600)
                    await connection.execute(
                        "INSERT INTO schema_migrations (number, name, digest) VALUES ($1, $2, $3)",
                        migration.number,
                        migration.name,
                        migration.digest,
                    )
                    if settings.roles and migration is known[-1]:  # nothing is open to others for a moment
                        await apply_access(connection, settings, (item.sql for item in known))
            if settings.roles and before == len(known):
                async with connection.transaction():
                    await apply_access(connection, settings, (item.sql for item in known))
        finally:
            await connection.execute("SELECT pg_advisory_unlock($1)", _LOCK)
    return before, len(known)


async def _refuse_misfit(connection: Any, known: list[Migration], before: int) -> None:
    if before > len(known):
        raise MigrationError(
            f"the schema is at version {before}, newer than this Tuma's {len(known)}: upgrade Tuma, do not downgrade the schema"
        )
    if before:
        rows = await connection.fetch("SELECT number, digest FROM schema_migrations ORDER BY number")
        for row, migration in zip(rows, known, strict=False):
            if row["digest"] != migration.digest:
                raise MigrationError(
                    f"migration {migration.number} was applied with another text than this version's"
                )


async def require_current(database: Database) -> None:
    """Refuse to run on a schema that is not this version's.

    Raises:
        MigrationError: says which way it differs, and the command that mends it.
    """
    wanted = len(load_migrations())
    async with database.connection() as connection:
        found = await schema_version(connection)
    if found < wanted:
        raise MigrationError(
            f"the schema is at version {found}, this Tuma needs {wanted}: run `tuma migrate`"
        )
    if found > wanted:
        raise MigrationError(
            f"the schema is at version {found}, newer than this Tuma's {wanted}: upgrade Tuma"
        )
