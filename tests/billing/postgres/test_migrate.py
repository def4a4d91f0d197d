"""`tuma migrate`: from version 18, whose functions stood in migrations; and from one edition of functions to the next.

``version_18.sql.gz`` is a database as the code of commit 4cda135 left it: migrated by it, filled through its office, ledger,
corrections, day book and payment functions (a call is under way, two days are proved, a wallet is capped and one is watched),
without its empty partitions, then ``pg_dump --inserts`` of PostgreSQL 15 (and ``sed '/^\\\\/d'``).
"""

import gzip
import hashlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from billing.calls.ledger import Ledger
from billing.calls.outcome import Ending
from billing.ids import new_id
from billing.monitoring.audit import Audit
from billing.postgres import migrate as migrations
from billing.postgres.database import Database
from billing.postgres.functions import FunctionFile, load_functions
from billing.postgres.migrate import MigrationError, load_migrations, migrate, require_current
from scripts.office import Office, open_office
from tests.billing.calls.test_ledger import books_hold
from tests.support.settings import make_settings

DUMP = Path(__file__).with_name("version_18.sql.gz")
NEWEST = load_migrations()[-1].number
OWNER = "find_owner"
# Everything but the months' partitions, of which there are more or fewer with time.
_OURS = (
    "SELECT c.oid FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace"
    " AND (NOT c.relispartition OR c.relname LIKE '%\\_default%')"
)
_CATALOG = {
    "functions": (
        "SELECT p.oid::regprocedure::text, pg_get_functiondef(p.oid), p.proowner::regrole::text, {acl}"
        " FROM pg_proc p CROSS JOIN LATERAL (SELECT p.proacl AS acl) a"
        " WHERE p.pronamespace IN ('public'::regnamespace, 'auth'::regnamespace)"
    ),
    "relations": (
        "SELECT c.relname::text, c.relkind::text, c.relowner::regrole::text, c.reloptions::text, c.relrowsecurity,"
        " c.relforcerowsecurity, {acl}, CASE WHEN c.relkind = 'v' THEN pg_get_viewdef(c.oid) END,"
        " pg_get_partkeydef(c.oid) FROM pg_class c CROSS JOIN LATERAL (SELECT c.relacl AS acl) a WHERE c.oid IN ({ours})"
    ),
    "columns": (
        "SELECT c.attrelid::regclass::text, row_number() OVER (PARTITION BY c.attrelid ORDER BY c.attnum), c.attname::text,"
        " format_type(c.atttypid, c.atttypmod), c.attnotnull, c.attidentity::text, c.attgenerated::text,"
        " pg_get_expr(d.adbin, d.adrelid), {acl} FROM pg_attribute c"
        " LEFT JOIN pg_attrdef d ON d.adrelid = c.attrelid AND d.adnum = c.attnum"
        " CROSS JOIN LATERAL (SELECT c.attacl AS acl) a"
        " WHERE c.attrelid IN ({ours}) AND c.attnum > 0 AND NOT c.attisdropped"
    ),
    "constraints": (  # but NOT NULL, which is the column's; PostgreSQL 18 names it, and a dump of an older one does not
        "SELECT conrelid::regclass::text, conname::text, pg_get_constraintdef(oid) FROM pg_constraint"
        " WHERE conrelid IN ({ours}) AND contype <> 'n'"
    ),
    "indexes": "SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid IN ({ours})",
    "triggers": (
        "SELECT tgenabled::text, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal AND tgrelid IN ({ours})"
    ),
    "policies": (
        "SELECT tablename::text, policyname::text, roles::text[], cmd, qual, with_check FROM pg_policies"
        " WHERE schemaname = 'public' AND (schemaname || '.' || tablename)::regclass IN ({ours})"
    ),
}
_ACL = "ARRAY(SELECT x.grantee::regrole::text || ' ' || x.privilege_type FROM aclexplode(a.acl) x ORDER BY 1)"


async def read_catalog(connection: Any) -> dict[str, set[tuple[Any, ...]]]:
    """Everything that a database's schema says, but for the months' partitions."""
    found = {}
    for name, query in _CATALOG.items():
        rows = await connection.fetch(query.format(ours=_OURS, acl=_ACL))
        found[name] = {tuple(str(value) for value in row) for row in rows}
        assert len(found[name]) > 20
    return found


async def read_columns(connection: Any) -> dict[str, str]:
    """Return the columns of each table, as SQL."""
    rows = await connection.fetch(
        "SELECT c.relname::text AS name, string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) AS columns"
        " FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
        " WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relnamespace = 'public'::regnamespace"
        " AND c.relname NOT LIKE 'schema\\_%' GROUP BY c.relname"
    )
    return {row["name"]: row["columns"] for row in rows}


async def read_rows(connection: Any, columns: Mapping[str, str]) -> dict[str, tuple[int, str]]:
    """How many rows each table has, and a digest of these columns of theirs."""
    found = {}
    for name, listed in columns.items():
        text = await connection.fetchrow(
            f"SELECT count(*), coalesce(string_agg(t::text, '|' ORDER BY t::text), '') FROM (SELECT {listed} FROM {name}) t"
        )
        found[name] = (text[0], hashlib.sha256(text[1].encode()).hexdigest())
    return found


@pytest.fixture
async def old(postgres: Any, template: str, redis_url: str, sim: Any) -> AsyncIterator[Office]:
    """A database at version 18, on a server that has the roles."""
    admin = await asyncpg.connect(postgres.dsn("postgres"))
    await admin.execute('DROP DATABASE IF EXISTS "test_version_18" WITH (FORCE)')
    await admin.execute('CREATE DATABASE "test_version_18"')
    dsn = postgres.dsn("test_version_18")
    connection = await asyncpg.connect(dsn)
    await connection.execute(gzip.decompress(DUMP.read_bytes()).decode())
    await connection.close()
    settings = make_settings(postgres_dsn=dsn, redis_url=redis_url, upstream_url=sim.base_url)
    async with open_office(settings) as opened:
        yield opened
    await admin.execute('DROP DATABASE "test_version_18" WITH (FORCE)')
    await admin.close()


async def test_version_18_becomes_what_a_new_database_is(old: Office, office: Office) -> None:
    """Same rows, same books, same rights, same catalog."""
    with pytest.raises(MigrationError, match="run `tuma migrate`"):
        await require_current(old.database)
    async with old.database.connection() as connection:
        columns = await read_columns(connection)
        rows = await read_rows(connection, columns)
    assert await migrate(old.database) == (18, NEWEST)
    await require_current(old.database)
    proxy = Database(old.settings.postgres, role="proxy")
    await require_current(proxy)
    await proxy.close()
    async with old.database.connection() as connection:
        assert await read_rows(connection, columns) == rows
    assert sum(count > 0 for count, _ in rows.values()) > 25, "every kind of row is in it"

    async with old.database.connection() as upgraded, office.database.connection() as fresh:
        ours, theirs = await read_catalog(upgraded), await read_catalog(fresh)
    for name, expected in theirs.items():
        assert ours[name] == expected, name

    async with old.database.connection() as connection:
        (call,) = await connection.fetch("SELECT id FROM calls WHERE state = 'open'")
    end = Ending(call["id"], "settled", "completed", cost_nanousd=700, charge_nano=700)
    (settled,) = await Ledger(old.database, worker_id=new_id()).settle_calls([end])
    assert (settled.won, settled.charge_nano) == (True, 700)
    await books_hold(old)
    assert (await Audit(old.database).verify()).ok

    assert await migrate(old.database) == (NEWEST, NEWEST)
    async with old.database.connection() as upgraded:
        assert await upgraded.fetchval("SELECT count(*) FROM schema_functions") == 1
        assert await read_catalog(upgraded) == ours


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("DELETE FROM schema_migrations WHERE number = 18", "at version 17, this Tuma upgrades from 18 on"),
        (
            "UPDATE schema_migrations SET digest = 'x' WHERE number = 18",
            "migration 18 was applied with another text",
        ),
        (
            "INSERT INTO schema_migrations (number, name, digest) VALUES (99, 'later', 'x')",
            "newer than this Tuma's",
        ),
    ],
)
async def test_another_old_schema_is_refused(old: Office, change: str, said: str) -> None:
    async with old.database.connection() as connection:
        await connection.execute(change)
        before = await read_catalog(connection)
    with pytest.raises(MigrationError, match=said):
        await migrate(old.database)
    async with old.database.connection() as connection:
        assert await read_catalog(connection) == before


def changed(files: list[FunctionFile], function: str, old: str, new: str) -> list[FunctionFile]:
    """Return the files of another version: one function has another text."""
    found = []
    for item in files:
        if f"FUNCTION {function}(" in item.sql:
            sql = item.sql.replace(old, new)
            assert sql != item.sql
            found.append(FunctionFile(item.name, sql, hashlib.sha256(sql.encode()).hexdigest()))
        else:
            found.append(item)
    return found


class Versions:
    """This program, and the one after it."""

    def __init__(self, office: Office, patch: pytest.MonkeyPatch) -> None:
        self.office = office
        self._patch = patch
        self.files = load_functions()

    def become(self, files: list[FunctionFile]) -> None:
        self._patch.setattr(migrations, "load_functions", lambda: files)

    def newer(self) -> list[FunctionFile]:
        """A version of which `find_owner` says something else."""
        return changed(self.files, OWNER, "SELECT w.user_id FROM", "SELECT coalesce(w.user_id, w.id) FROM")

    async def text(self, name: str) -> str:
        async with self.office.database.connection() as connection:
            return str(await connection.fetchval("SELECT prosrc FROM pg_proc WHERE proname = $1", name))


@pytest.fixture
def versions(office: Office, monkeypatch: pytest.MonkeyPatch) -> Versions:
    return Versions(office, monkeypatch)


async def test_functions_that_changed_are_applied(office: Office, versions: Versions) -> None:
    """A newer program waits for its functions; who may call them stays as it was."""
    async with office.database.connection() as connection:
        before = await read_catalog(connection)
        text = await connection.fetchval("SELECT pg_get_functiondef('find_intent(uuid)'::regprocedure)")
        await connection.execute(text.replace("WHERE i.id = p_id", "WHERE p_id = i.id"))
    versions.become(versions.newer())
    with pytest.raises(
        MigrationError, match="functions in the schema are older than this Tuma's: run `tuma migrate`"
    ):
        await require_current(office.database)
    assert await migrate(office.database) == (NEWEST, NEWEST)
    await require_current(office.database)
    assert "coalesce" in await versions.text(OWNER)
    assert "WHERE p_id = i.id" in await versions.text("find_intent"), "another file's are left as they are"
    proxy = Database(office.settings.postgres, role="proxy")
    async with proxy.connection() as connection:
        assert await connection.fetchval("SELECT find_owner($1)", UUID(int=1)) is None
    await proxy.close()
    async with office.database.connection() as connection:
        after = await read_catalog(connection)
        rows = await connection.fetch("SELECT edition, number FROM schema_functions ORDER BY edition")
        assert [tuple(row) for row in rows] == [(1, NEWEST), (2, NEWEST)]
    assert len(before["functions"] - after["functions"]) == 2
    assert {name: found for name, found in after.items() if name != "functions"} == {
        name: found for name, found in before.items() if name != "functions"
    }


async def test_an_older_program_runs_on_newer_functions_and_does_not_undo_them(
    office: Office, versions: Versions
) -> None:
    """While workers are replaced one by one, an old one may have to begin once more."""
    versions.become(versions.newer())
    await migrate(office.database)
    versions.become(versions.files)
    await require_current(office.database)
    with pytest.raises(
        MigrationError, match="functions in the schema are newer than this Tuma's: upgrade Tuma"
    ):
        await migrate(office.database)
    assert "coalesce" in await versions.text(OWNER)


async def test_a_function_that_cannot_run_is_not_applied(office: Office, versions: Versions) -> None:
    """Bodies are checked though files come in any order."""
    wrong = changed(
        versions.files, OWNER, "FROM wallets w WHERE w.id = p_wallet", "FROM purses w WHERE w.id = p_wallet"
    )
    versions.become(wrong)
    with pytest.raises(asyncpg.UndefinedTableError, match="purses"):
        await migrate(office.database)
    assert "purses" not in await versions.text(OWNER)
    versions.become(versions.files)
    await require_current(office.database)


async def test_a_new_number_may_return_to_an_earlier_text(
    office: Office, versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions.become(versions.newer())
    await migrate(office.database)
    known = load_migrations()
    later = replace(known[-1], number=NEWEST + 1, name="later", sql="SELECT 1", triggers="")
    monkeypatch.setattr(migrations, "load_migrations", lambda: [*known, later])
    versions.become(versions.files)
    assert await migrate(office.database) == (NEWEST, NEWEST + 1)
    await require_current(office.database)
    assert "coalesce" not in await versions.text(OWNER)
