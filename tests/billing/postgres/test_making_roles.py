"""Roles are made by whoever owns the database, superuser or not; one that may do too much, or is not there, is refused."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import asyncpg
import pytest

from billing.errors import InputError
from billing.postgres.database import Database
from billing.postgres.migrate import migrate, require_current
from billing.postgres.roles import (
    ROLES,
)
from config.settings import Settings
from scripts.office import Office, open_office
from scripts.programs.embedded import EmbeddedPostgres
from tests.support.books import check_books
from tests.support.payers import make_payer, sync_models
from tests.support.running import run_proxy
from tests.support.servers import OwnPostgres
from tests.support.settings import make_settings


@pytest.fixture
async def empty(postgres: EmbeddedPostgres | OwnPostgres) -> AsyncIterator[str]:
    """A database whose owner is no superuser, but may make roles; its DSN."""
    admin = await asyncpg.connect(postgres.dsn("postgres"))
    await admin.execute('DROP DATABASE IF EXISTS "test_built" WITH (FORCE)')
    await admin.execute(
        "DROP ROLE IF EXISTS builder; CREATE ROLE builder LOGIN CREATEROLE PASSWORD 'a password'"
    )
    await admin.execute('CREATE DATABASE "test_built" OWNER builder')
    host = postgres.dsn("test_built").rpartition("@")[2]
    yield f"postgresql://builder:a%20password@{host}"
    await admin.execute('DROP DATABASE IF EXISTS "test_built" WITH (FORCE)')
    for role in ROLES:
        await admin.execute(f'DROP ROLE IF EXISTS "built_{role}"')
    await admin.execute("DROP ROLE builder")
    await admin.close()


async def test_an_owner_that_is_no_superuser(empty: str, redis_url: str, sim: Any) -> None:
    """As on most hosted servers: it makes the roles, and the house runs."""
    settings = make_settings(
        postgres_dsn=empty,
        redis_url=redis_url,
        upstream_url=sim.base_url,
        postgres={"role_prefix": "built", "dsn": empty},
    )
    async with open_office(settings) as office:
        await migrate(office.database)
        await migrate(office.database)
        async with (
            office.database.connection() as connection
        ):  # as if another version had applied all of them
            await connection.execute("UPDATE schema_functions SET digest = 'another', files = '{}'")
        await migrate(office.database)
        await sync_models(office)
        payer = await make_payer(office)
        async with run_proxy(settings) as running:
            head = {"Authorization": f"Bearer {payer.secret}"}
            body = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "hi"}]}
            async with aiohttp.ClientSession(headers=head) as session:
                async with session.post(f"{running.base_url}/v1/chat/completions", json=body) as response:
                    assert response.status == 200, await response.text()
                async with session.get(f"{running.base_url}/v1/wallet") as response:
                    assert response.status == 200
            await running.quiet()
        await check_books(office)


async def test_an_owner_that_may_make_no_roles(empty: str, postgres: Any, redis_url: str) -> None:
    settings = make_settings(postgres_dsn=empty, redis_url=redis_url)
    admin = await asyncpg.connect(postgres.dsn("postgres"))
    await admin.execute("ALTER ROLE builder NOCREATEROLE")
    await admin.close()
    prefixed = settings.postgres.model_copy(update={"role_prefix": "built"})
    database = Database(prefixed)
    with pytest.raises(InputError, match="TUMA_POSTGRES__ROLES=false"):
        await migrate(database)
    await database.close()
    without = settings.postgres.model_copy(update={"roles": False})
    database = Database(without)
    await migrate(database)
    await require_current(database)
    await database.close()
    as_proxy = Database(without, role="proxy")
    async with as_proxy.connection() as connection:
        assert await connection.fetchval("SELECT current_user") == "builder"
        closed = ("audit_change", "audit_posting", "seal_audit", "write_audit")
        rows = await connection.fetch(
            "SELECT has_function_privilege('public', oid, 'EXECUTE') AS open FROM pg_proc WHERE proname = ANY ($1)",
            closed,
        )
        assert [row["open"] for row in rows] == [False] * len(closed), "nobody else writes the audit log"
    await as_proxy.close()


async def test_a_mighty_role_is_refused(settings: Settings, office: Office) -> None:
    async with office.database.connection() as connection:
        await connection.execute("CREATE ROLE strong_proxy SUPERUSER")
    database = Database(settings.postgres.model_copy(update={"role_prefix": "strong"}))
    try:
        with pytest.raises(InputError, match="strong_proxy may do more"):
            await migrate(database)
    finally:
        await database.close()
        async with office.database.connection() as connection:
            for role in ROLES:
                await connection.execute(f'DROP ROLE IF EXISTS "strong_{role}"')


async def test_a_role_that_is_not_there(settings: Settings) -> None:
    database = Database(settings.postgres.model_copy(update={"role_prefix": "nobody"}), role="proxy")
    with pytest.raises(InputError, match="run `tuma migrate`"):
        await require_current(database)
    await database.close()


async def test_migrations_of_several_databases_at_once(postgres: Any, redis_url: str) -> None:
    """Roles belong to the server: two databases' migrations do not trip over each other."""
    admin = await asyncpg.connect(postgres.dsn("postgres"))
    names = [f"test_twin_{number}" for number in range(3)]
    for name in names:
        await admin.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        await admin.execute(f'CREATE DATABASE "{name}"')
    databases = [
        Database(make_settings(postgres_dsn=postgres.dsn(name), redis_url=redis_url).postgres)
        for name in names
    ]
    try:
        done = await asyncio.gather(*(migrate(database) for database in databases))
        assert len({after for _, after in done}) == 1
    finally:
        for database, name in zip(databases, names, strict=True):
            await database.close()
            await admin.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
        await admin.close()
