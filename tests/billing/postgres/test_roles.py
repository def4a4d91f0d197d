"""Who may do what in Postgres, tried as each role, on every table and view, and through every function."""

from typing import Any

import aiohttp
import asyncpg
import pytest

from billing.ids import new_id
from billing.postgres.migrate import migrate
from billing.postgres.roles import (
    FUNCTIONS,
    HELPERS,
    KEPT,
    LOGINS,
    PERSONAL,
    ROLES,
    Role,
)
from config.settings import Settings
from proxy.routines import make_routines
from scripts.office import Office
from tests.billing.postgres.people import connected, furnish_two
from tests.support.books import check_books
from tests.support.payers import make_payer
from tests.support.running import Running

# Tables that no person may read. A table that is in neither list is a table nobody has thought about.
HOUSE = {
    "alert_messages": "what the operator is told",
    "alerts": "what the operator is told",
    "audit_blocks": "everybody's doings",
    "audit_log": "everybody's doings",
    "feed_events": "read by the proxy, for whoever may watch the wallet",
    "feeds": "the house's clockwork",
    "late_postings": "proofs of days",
    "posting_keys": "idempotency keys of everybody",
    "provider_openings": "the provider's account",
    "provider_quota": "the provider's account",
    "quota_slabs": "the provider's account",
    "reconciliation_diffs": "the provider's bill",
    "reconciliation_runs": "the provider's bill",
    "routine_turns": "the house's clockwork",
    "schema_functions": "the house's clockwork",
    "schema_migrations": "the house's clockwork",
    "shadow_usd_ledger": "the provider's account",
    "verified_days": "proofs of days",
    "webhook_events": "what payment providers sent, of everybody",
    "verified_wallets": "proofs of days",
    "workers": "the house's clockwork",
    "fx_rates": "where quotes come from; the quotes are what calls are priced with",
}
REFUSED = (
    asyncpg.InsufficientPrivilegeError,
    asyncpg.WrongObjectTypeError,  # of a view
    asyncpg.ObjectNotInPrerequisiteStateError,
)
VERBS = ("SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER")


async def relations_of(connection: Any) -> list[Any]:
    """Every table, partition and view of the schema, whoever made it."""
    return list(
        await connection.fetch(
            "SELECT c.oid, c.relname AS name, c.relkind::text AS kind, c.relispartition AS partition,"
            " c.relrowsecurity AND c.relforcerowsecurity AS secured, pg_get_userbyid(c.relowner) AS owner"
            " FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'f')"
        )
    )


async def test_every_table_is_thought_about(office: Office) -> None:
    async with office.database.connection() as connection:
        relations = await relations_of(connection)
        own = {row["name"] for row in relations if not row["partition"]}
        assert own - PERSONAL.keys() - HOUSE.keys() == set()
        assert not PERSONAL.keys() & HOUSE.keys()
        for row in relations:
            assert row["owner"] == "tuma_owner", row["name"]
            if row["kind"] == "v":
                options = await connection.fetchval(
                    "SELECT reloptions FROM pg_class WHERE oid = $1", row["oid"]
                )
                assert "security_invoker=true" in options, row["name"]
            else:
                assert row["secured"], row["name"]
                policies = await connection.fetchval(
                    "SELECT count(*) FROM pg_policy WHERE polrelid = $1", row["oid"]
                )
                assert policies > 0, row["name"]


async def test_what_each_role_may_do_to_each_table(office: Office) -> None:
    """As Postgres itself says, with what roles and PUBLIC inherit."""
    async with office.database.connection() as connection:
        for row in await relations_of(connection):
            for role in ROLES:
                if role == "owner":
                    continue
                may = {
                    verb
                    for verb in VERBS
                    if await connection.fetchval(
                        "SELECT has_table_privilege($1, $2::oid, $3)", f"tuma_{role}", row["oid"], verb
                    )
                    or (
                        verb in ("SELECT", "INSERT", "UPDATE", "REFERENCES")
                        and await connection.fetchval(
                            "SELECT has_any_column_privilege($1, $2::oid, $3)",
                            f"tuma_{role}",
                            row["oid"],
                            verb,
                        )
                    )
                }
                expected: set[str] = set()
                if not row["partition"]:
                    if role in ("keeper", "operator", "audit") or (role == "api" and row["name"] in PERSONAL):
                        expected = {"SELECT"}
                    if role == "keeper":
                        expected |= {verb for verb in KEPT.get(row["name"], "").split(", ") if verb}
                assert may == expected, (role, row["name"])


async def test_what_each_role_may_call(office: Office) -> None:
    async with office.database.connection() as connection:
        routines = await connection.fetch(
            "SELECT p.oid, p.proname AS name, p.prosecdef AS definer, p.proconfig AS config,"
            " pg_get_userbyid(p.proowner) AS owner FROM pg_proc p WHERE p.pronamespace = 'public'::regnamespace"
        )
        entries = {name for names in FUNCTIONS.values() for name in names}
        assert entries <= {row["name"] for row in routines}
        for row in routines:
            assert row["owner"] == "tuma_owner", row["name"]
            if row["name"] in entries:
                assert row["definer"], row["name"]
            if row["definer"]:
                assert "search_path=public, pg_temp" in (row["config"] or []), row["name"]
            for role in ROLES:
                if role == "owner":
                    continue
                may = await connection.fetchval(
                    "SELECT has_function_privilege($1, $2::oid, 'EXECUTE')", f"tuma_{role}", row["oid"]
                )
                said = row["name"] in FUNCTIONS.get(role, ()) or row["name"] in HELPERS.get(role, ())
                assert may == said, (role, row["name"])


async def test_no_role_is_mighty_or_another(office: Office) -> None:
    async with office.database.connection() as connection:
        names = [f"tuma_{role}" for role in ROLES]
        mighty = await connection.fetch(
            "SELECT rolname FROM pg_roles WHERE rolname = ANY ($1)"
            " AND (rolsuper OR rolbypassrls OR rolcreaterole OR rolcreatedb OR rolreplication)",
            names,
        )
        assert not mighty
        for name in names:
            for other in names:
                if name != other:
                    assert not await connection.fetchval("SELECT pg_has_role($1, $2, 'MEMBER')", name, other)
        logins = await connection.fetch(
            "SELECT rolname FROM pg_roles WHERE rolname = ANY ($1) AND rolcanlogin", names
        )
        assert {row["rolname"] for row in logins} == {f"tuma_{role}" for role in LOGINS}
        kept = await connection.fetch(
            "SELECT rolpassword FROM pg_authid WHERE rolname = ANY ($1) AND rolcanlogin", names
        )
        assert all(row["rolpassword"].startswith("SCRAM-SHA-256$") for row in kept)
        assert len({row["rolpassword"] for row in kept}) == len(LOGINS)


@pytest.mark.parametrize("role", LOGINS)
async def test_each_role_tries_every_table(settings: Settings, office: Office, role: Role) -> None:
    """For real, with the role's own login; and no role becomes another."""
    await furnish_two(office)
    async with office.database.connection() as connection:
        relations = await relations_of(connection)
    async with connected(settings, role) as connection:
        for row in relations:
            name = f'public."{row["name"]}"'
            readable = not row["partition"] and (
                role in ("keeper", "operator") or (role == "api" and row["name"] in PERSONAL)
            )
            if readable:
                found = await connection.fetchval(f"SELECT count(*) FROM {name}")
                if role == "api" and row["name"] not in ("models", "model_prices", "fx_quotes"):
                    assert found == 0, row["name"]  # nobody is signed in
            else:
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await connection.fetchval(f"SELECT count(*) FROM {name}")
            for statement in (
                f"DELETE FROM {name}",
                f"TRUNCATE {name}",
                f"ALTER TABLE {name} DISABLE ROW LEVEL SECURITY",
            ):
                with pytest.raises(REFUSED):
                    await connection.execute(statement)
        for column in ("secret_hmac", "previous_hmac"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.fetch(f"SELECT {column} FROM api_keys")
        for other in (*(f"tuma_{name}" for name in ROLES if name != role), "postgres"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(f'SET ROLE "{other}"')
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("SET SESSION AUTHORIZATION postgres")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("CREATE TABLE public.mine (id int)")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("UPDATE wallets SET posted_nano = 1")
        if role != "operator":
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.fetchval("SELECT grant_credit($1, $1, 1, 'x', 'x', ''::bytea)", new_id())


async def test_the_proxy_runs_as_its_roles(settings: Settings, office: Office, proxy: Running) -> None:
    """With calls, keys and caps under way: every connection of the server is one of the roles'."""
    payer = await make_payer(office)
    head = {"Authorization": f"Bearer {payer.secret}"}
    body = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    async with aiohttp.ClientSession(headers=head) as session:
        for method, path, form in (
            ("POST", "/v1/chat/completions", body),
            ("GET", "/v1/wallet", None),
            ("PUT", "/v1/wallet/caps", {"day": "5"}),
            ("POST", "/v1/keys", {}),
            ("GET", "/v1/keys", None),
            ("GET", "/readyz", None),
        ):
            async with session.request(method, proxy.base_url + path, json=form) as response:
                assert response.status in (200, 201), (path, await response.text())
    await proxy.quiet()
    await proxy.services.keys.note_used()
    for routine in make_routines(proxy.services.runtime):
        await routine._work()
    async with office.database.connection() as connection:
        seen = await connection.fetch(
            "SELECT DISTINCT a.usename, r.rolsuper FROM pg_stat_activity a JOIN pg_roles r ON r.rolname = a.usename"
            " WHERE a.datname = current_database() AND a.application_name LIKE 'tuma serve%'"
        )
    assert {row["usename"] for row in seen} >= {"tuma_proxy", "tuma_settler", "tuma_keeper", "tuma_api"}
    assert {row["usename"] for row in seen} <= {f"tuma_{role}" for role in LOGINS}
    assert not any(row["rolsuper"] for row in seen)
    await check_books(office)


async def test_migrating_again_takes_back_what_was_given(office: Office) -> None:
    async with office.database.connection() as connection:
        await connection.execute(
            "GRANT SELECT, UPDATE ON wallets TO PUBLIC; GRANT SELECT (secret_hmac) ON api_keys TO tuma_api"
        )
        await connection.execute("GRANT EXECUTE ON FUNCTION grant_credit TO tuma_proxy")
        await connection.execute("ALTER TABLE wallets DISABLE ROW LEVEL SECURITY")
        await connection.execute("ALTER FUNCTION open_batch SECURITY INVOKER")
        policy = await connection.fetchval(
            "SELECT polname FROM pg_policy WHERE polrelid = 'calls'::regclass AND 'tuma_api'::regrole = ANY (polroles)"
        )
        await connection.execute(
            f'ALTER POLICY "{policy}" ON calls RENAME TO tuma_older; DROP POLICY tuma_older ON calls'
        )
        await connection.execute("CREATE POLICY tuma_older ON calls FOR SELECT TO tuma_api USING (true)")
    assert await migrate(office.database) == (await version(office), await version(office))
    await test_every_table_is_thought_about(office)
    await test_what_each_role_may_do_to_each_table(office)
    await test_what_each_role_may_call(office)
    async with office.database.connection() as connection:
        names = await connection.fetch("SELECT polname FROM pg_policy WHERE polrelid = 'calls'::regclass")
        assert policy in {row["polname"] for row in names}
        assert "tuma_older" not in {row["polname"] for row in names}


async def version(office: Office) -> int:
    async with office.database.connection() as connection:
        return int(await connection.fetchval("SELECT read_schema()"))
