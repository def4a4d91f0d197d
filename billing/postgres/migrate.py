"""Numbered, forward-only migrations, and the functions of this version; applied by one at a time under a lock.

A number has a file ``NNNN_name.sql`` of tables, indexes and data, and may have ``NNNN_triggers.sql``, of what needs a function.
``tuma migrate`` applies the tables of every missing number, then the functions that are not as they were applied last
(``billing/*/*.sql``), then the triggers, then says who may do what: in one transaction, so that nothing is open to others
for a moment, and no worker ever meets half of it. Why so: docs/decisions/0023-sql-at-home.md.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from billing.errors import TumaError
from billing.postgres.database import Database
from billing.postgres.functions import (
    FunctionFile,
    apply_functions,
    digest_of,
    list_editions,
    load_functions,
)
from billing.postgres.roles import apply_access, bound_waits, ensure_roles

_LOCK = 0x54554D41  # "TUMA"
_TRIGGERS = "triggers"
# The eighteen migrations that became one: a schema to which the last of them was applied is at the same version.
_SQUASHED = {18: "5a40a3c08b21d1ddd9fcbaf03f9e47b0338c3116f63a0a6d75128860c158d463"}


class MigrationError(TumaError):
    """The schema and this version of Tuma do not fit; nothing was changed."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One number; ``digest`` is the SHA-256 of its files' text, ``triggers`` is applied after the functions."""

    number: int
    name: str
    sql: str
    triggers: str
    digest: str


def load_migrations() -> list[Migration]:
    """Read the migrations of this version, in order; the first is the one of a new database.

    Raises:
        MigrationError: two files share a number, or one is missing.
    """
    texts: dict[int, dict[str, str]] = {}
    for entry in files("billing.postgres").joinpath("migrations").iterdir():
        if entry.name.endswith(".sql"):
            number, _, name = entry.name.removesuffix(".sql").partition("_")
            texts.setdefault(int(number), {})[name] = entry.read_text(encoding="utf-8")
    found: list[Migration] = []
    for ordinal, parts in sorted(texts.items()):
        triggers = parts.pop(_TRIGGERS, "")
        if len(parts) != 1 or (found and ordinal != found[-1].number + 1):
            raise MigrationError("migrations are not numbered one after the other")
        name, sql = parts.popitem()
        digest = hashlib.sha256((sql + triggers).encode()).hexdigest()
        found.append(Migration(ordinal, name, sql, triggers, digest))
    return found


async def schema_version(connection: Any) -> int:
    """Return the number of the newest applied migration, 0 for an empty database."""
    if await connection.fetchval("SELECT to_regclass('schema_migrations')") is None:
        return 0
    if await connection.fetchval("SELECT to_regprocedure('read_schema()')") is not None:
        return int(await connection.fetchval("SELECT read_schema()"))
    return int(await connection.fetchval("SELECT coalesce(max(number), 0) FROM schema_migrations"))


async def migrate(database: Database) -> tuple[int, int]:
    """Bring the schema up to this version, in one transaction.

    Returns:
        the versions before and after; equal when there was no number to apply.

    Raises:
        MigrationError: the schema is newer than this version, or older than the first number, or an applied migration's text
            has changed.
        PostgresUnavailableError: Postgres is away.
    """
    known, functions = load_migrations(), load_functions()
    async with database.session() as connection:
        await connection.execute("SELECT pg_advisory_lock($1)", _LOCK, timeout=120)
        try:
            before = await schema_version(connection)
            await _refuse_misfit(connection, known, functions, before)
            settings = database.settings
            if settings.roles:
                await ensure_roles(connection, settings)
            if settings.pooler != "none":
                await bound_waits(connection, "CURRENT_USER")
            async with connection.transaction():
                await connection.execute(  # months are made in UTC, whatever the server's zone
                    "SET LOCAL lock_timeout = '10s'; SET LOCAL statement_timeout = '10min'; SET LOCAL TimeZone = 'UTC'"
                )
                await _apply(
                    connection, [item for item in known if item.number > before], functions, known[-1].number
                )
                if settings.roles:
                    scripts = [*(item.sql for item in known), *(item.sql for item in functions)]
                    await apply_access(connection, settings, scripts)
        finally:
            await connection.execute("SELECT pg_advisory_unlock($1)", _LOCK)
    return before, known[-1].number


async def _apply(
    connection: Any, missing: Sequence[Migration], functions: Sequence[FunctionFile], number: int
) -> None:
    if missing:
        await connection.execute(
            "CREATE TABLE IF NOT EXISTS schema_migrations (number integer PRIMARY KEY, name text NOT NULL,"
            " digest text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
        )
    for migration in missing:
        await connection.execute(migration.sql, timeout=600)
    await apply_functions(connection, number, functions)
    for migration in missing:
        if migration.triggers:
            await connection.execute(migration.triggers, timeout=600)
        await connection.execute(
            "INSERT INTO schema_migrations (number, name, digest) VALUES ($1, $2, $3)",
            migration.number,
            migration.name,
            migration.digest,
        )


async def _refuse_misfit(
    connection: Any, known: Sequence[Migration], functions: Sequence[FunctionFile], before: int
) -> None:
    first, last = known[0].number, known[-1].number
    if before > last:
        raise MigrationError(
            f"the schema is at version {before}, newer than this Tuma's {last}: upgrade Tuma, do not downgrade the schema"
        )
    if 0 < before < first:
        raise MigrationError(
            f"the schema is at version {before}, this Tuma upgrades from {first} on: bring it there with an earlier Tuma"
        )
    if before:
        digests = {item.number: item.digest for item in known}
        for row in await connection.fetch("SELECT number, digest FROM schema_migrations ORDER BY number"):
            number = row["number"]
            if number >= first and row["digest"] not in {digests[number], _SQUASHED.get(number)}:
                raise MigrationError(f"migration {number} was applied with another text than this version's")
    editions = [(item.number, item.digest) for item in await list_editions(connection)]
    if (last, digest_of(functions)) in editions[:-1]:
        raise MigrationError(
            "the functions in the schema are newer than this Tuma's: upgrade Tuma, do not downgrade the schema"
        )


async def require_current(database: Database) -> None:
    """Refuse to run on a schema that is not this version's, or whose functions are older.

    Raises:
        MigrationError: says which way it differs, and the command that mends it.
    """
    async with database.connection() as connection:
        await check_current(connection)


async def check_current(connection: Any) -> int:
    """Do so on a connection.

    Returns:
        the version.

    Raises:
        MigrationError: as above.
    """
    wanted = load_migrations()[-1].number
    found = await schema_version(connection)
    if found < wanted:
        raise MigrationError(
            f"the schema is at version {found}, this Tuma needs {wanted}: run `tuma migrate`"
        )
    if found > wanted:
        raise MigrationError(
            f"the schema is at version {found}, newer than this Tuma's {wanted}: upgrade Tuma"
        )
    # Functions newer than this version's keep its signatures: a worker of an older version may still begin beside newer ones.
    if not await connection.fetchval("SELECT has_functions($1, $2)", wanted, digest_of(load_functions())):
        raise MigrationError("the functions in the schema are older than this Tuma's: run `tuma migrate`")
    return found
