"""Who may do what in Postgres, tried as each role, on every table and view, and through every function."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import aiohttp
import asyncpg
import pytest

from billing.errors import InputError
from billing.identity.key import KeyRules, Owner
from billing.identity.keys import Keys
from billing.ids import new_id
from billing.money import NANO
from billing.postgres.database import Database
from billing.postgres.migrate import migrate, require_current
from billing.postgres.roles import (
    FUNCTIONS,
    HELPERS,
    KEPT,
    LOGINS,
    PERSONAL,
    ROLES,
    Role,
    login_of,
    role_name,
)
from billing.wallets.caps import Caps
from config.settings import Settings
from proxy.routines import make_routines
from scripts.office import Office, open_office
from scripts.programs.embedded import EmbeddedPostgres
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, sync_models
from tests.support.running import Running, run_proxy
from tests.support.servers import OwnPostgres
from tests.support.settings import make_settings

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


@asynccontextmanager
async def connected(settings: Settings, role: Role | None) -> AsyncIterator[Any]:
    postgres = settings.postgres
    login = {"dsn": postgres.dsn.get_secret_value()} if role is None else login_of(postgres, role)
    connection = await asyncpg.connect(**login)
    try:
        yield connection
    finally:
        await connection.close()


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


async def furnish_two(office: Office) -> tuple[Payer, Payer]:
    """Two people with something of everything that a person has."""
    payers = (await make_payer(office), await make_payer(office))
    room = Keys(office.database, office.settings.auth, office.settings.limits)
    for payer in payers:
        await Caps(office.database).set_caps("wallet", payer.wallet_id, {"day": NANO})
        await room.create(payer.wallet_id, KeyRules(name="second"))
        call = new_id()
        async with office.database.connection() as connection:
            await connection.execute(
                "INSERT INTO calls (id, user_id, wallet_id, key_id, worker_id, model, stream, price_id, fx_quote_id, currency,"
                " hold_nano, hold_nanousd, available_after_nano, state, ended_at, cost_nanousd, charge_nano)"
                " VALUES ($1, $2, $3, $4, $1, 'm', false, $1, $1, 'USD', 0, 0, 0, 'void', now(), 0, 0)",
                *(call, payer.user_id, payer.wallet_id, payer.key_id),
            )
            await connection.execute(
                "INSERT INTO usage (call_id, source, prompt_tokens, completion_tokens) VALUES ($1, 'counted', 1, 1)",
                call,
            )
            await connection.execute("SELECT add_usage(ARRAY[$1::uuid], 1)", call)
            await connection.execute(
                "INSERT INTO events (user_id, wallet_id, kind, body) VALUES ($1, $2, 'test', '{}')",
                *(payer.user_id, payer.wallet_id),
            )
            await connection.execute(
                "INSERT INTO cap_windows (scope_id, period, starts_at, ends_at, user_id, held_nano, spent_nano)"
                " VALUES ($2, 'week', now(), now(), $1, 0, 0)",
                *(payer.user_id, payer.wallet_id),
            )
            await connection.execute(
                "INSERT INTO payment_intents (id, wallet_id, user_id, kind, provider, currency, amount_nano, expires_at)"
                " VALUES ($1, $2, $3, 'topup', 'stripe', 'USD', 1, now())",
                *(call, payer.wallet_id, payer.user_id),
            )
            await connection.execute(
                "INSERT INTO payment_credits (provider, provider_txn_id, wallet_id, currency, paid_nano, credited_nano, state,"
                " tx_id) VALUES ('stripe', $1, $2, 'USD', 1, 1, 'credited', $3)",
                *(str(call), payer.wallet_id, call),
            )
            await connection.execute(
                "INSERT INTO payment_reversals (id, provider, provider_txn_id, kind, state, amount_nano, suspense_nano, tx_id)"
                " VALUES ($1, 'stripe', $2, 'refund', 'final', 1, 0, $1)",
                *(call, str(call)),
            )
            await connection.execute(
                "INSERT INTO payment_methods (wallet_id, provider, customer_id, method_id, label)"
                " VALUES ($1, 'stripe', 'cus_1', 'pm_1', 'visa')",
                payer.wallet_id,
            )
            await connection.execute(
                "INSERT INTO auto_topups (wallet_id, enabled, threshold_nano, amount_nano, pause)"
                " VALUES ($1, true, 1, 1, '1 hour')",
                payer.wallet_id,
            )
    return payers


def by_setting(user_id: UUID) -> str:
    return f"SELECT set_config('app.user_id', '{user_id}', true)"


def by_claims(user_id: UUID) -> str:
    return f"""SELECT set_config('request.jwt.claims', '{{"sub": "{user_id}"}}', true)"""


def by_claim(user_id: UUID) -> str:
    return f"SELECT set_config('request.jwt.claim.sub', '{user_id}', true)"


@pytest.mark.parametrize("sign_in", [by_setting, by_claims, by_claim])
async def test_a_person_sees_their_own_rows(settings: Settings, office: Office, sign_in: Any) -> None:
    ada, bob = await furnish_two(office)
    owned = {
        "users": "id",
        "wallets": "user_id",
        "calls": "user_id",
        "spending_caps": "user_id",
        "cap_windows": "user_id",
        "events": "user_id",
        "api_keys": "wallet_id",
        "journal_tx": "wallet_id",
        "journal_entry": "wallet_id",
        "transactions": "wallet_id",
        "usage": "call_id",
        "usage_rollup": "wallet_id",
        "payment_intents": "wallet_id",
        "payment_credits": "wallet_id",
        "payment_reversals": "id",
        "payment_methods": "wallet_id",
        "auto_topups": "wallet_id",
    }
    assert owned.keys() == PERSONAL.keys() - {"models", "model_prices", "fx_quotes"}
    async with connected(settings, "api") as connection:
        for me, other in ((ada, bob), (bob, ada)):
            async with connection.transaction():
                await connection.execute(sign_in(me.user_id))
                calls = {row["id"] for row in await connection.fetch("SELECT id FROM calls")}
                assert len(calls) == 1
                for table, column in owned.items():
                    found = {row[column] for row in await connection.fetch(f"SELECT {column} FROM {table}")}
                    assert found, table
                    assert found <= {me.user_id, me.wallet_id, *calls}, table
                for columns in ("*", "secret_hmac", "provider_cost_nanousd"):
                    table = "calls" if columns == "provider_cost_nanousd" else "api_keys"
                    with pytest.raises(asyncpg.InsufficientPrivilegeError):
                        async with connection.transaction():
                            await connection.fetch(f"SELECT {columns} FROM {table}")
                mine = await connection.fetch("SELECT * FROM own_keys(NULL, NULL, true, NULL, 100)")
                assert {row["wallet_id"] for row in mine} == {me.wallet_id}
                assert not await connection.fetch(
                    "SELECT * FROM own_keys($1, NULL, true, NULL, 100)", other.key_id
                )
                assert not await connection.fetch("SELECT * FROM own_caps($1, now())", [other.wallet_id])
                new_key = "SELECT own_create_key(gen_random_uuid(), $1, 9, '', '', 'x', '', NULL, NULL, NULL, true, NULL, NULL, NULL, '{}', '{}')"
                for statement, *args in (
                    ("SELECT own_revoke_key($1, NULL)", other.key_id),
                    ("SELECT own_rotate_key($1, NULL, 'h', 'x', 'p', '0')", other.key_id),
                    ("SELECT own_set_caps('wallet', $1, '{day}', '{1}')", other.wallet_id),
                    ("SELECT own_set_caps('key', $1, '{day}', '{1}')", other.key_id),
                    (
                        "SELECT own_create_intent(gen_random_uuid(), $1, 'stripe', 'USD', 1, NULL, '1 h', '1 s', false, 9)",
                        other.wallet_id,
                    ),
                    ("SELECT own_set_auto_topup($1, true, 1, 1, '1 h')", other.wallet_id),
                    ("SELECT own_forget_method($1)", other.wallet_id),
                    ("SELECT own_set_caps('user', $1, '{day}', '{1}')", me.user_id),
                    (
                        new_key,
                        other.wallet_id,
                    ),
                ):
                    with pytest.raises(asyncpg.NoDataFoundError):
                        async with connection.transaction():
                            await connection.fetchval(statement, *args)
        for function in (
            "own_keys(NULL, NULL, true, NULL, 1)",
            "own_caps('{}', now())",
            "own_revoke_key(gen_random_uuid(), NULL)",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.fetch(f"SELECT * FROM {function}")
    await Caps(office.database).find_own_caps(ada.user_id, ada.wallet_id)


async def test_a_claim_wins_over_a_setting(settings: Settings, office: Office) -> None:
    """On Supabase nobody becomes another by a setting."""
    ada, bob = await furnish_two(office)
    async with connected(settings, "api") as connection, connection.transaction():
        await connection.execute(by_claims(ada.user_id))
        await connection.execute(by_setting(bob.user_id))
        assert [row["id"] for row in await connection.fetch("SELECT id FROM users")] == [ada.user_id]


async def test_who_is_signed_in_ends_with_the_transaction(settings: Settings, office: Office) -> None:
    ada, _ = await furnish_two(office)
    database = Database(settings.postgres, role="api", connections_max=1)
    try:
        async with database.as_person(ada.user_id) as connection:
            assert await connection.fetchval("SELECT count(*) FROM users") == 1
        async with database.connection() as connection:
            assert await connection.fetchval("SELECT count(*) FROM users") == 0
    finally:
        await database.close()


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


async def test_the_owner_of_a_key_is_no_argument(settings: Settings, office: Office) -> None:
    """Even the operator's own room, told to act for a person, reaches that person's keys alone."""
    ada, bob = await furnish_two(office)
    api = Database(settings.postgres, role="api", connections_max=2)
    room = Keys(office.database, settings.auth, settings.limits, people=api)
    try:
        found = await room.find_keys(owner=Owner(ada.user_id))
        assert {key.user_id for key in found} == {ada.user_id}
        assert not await room.find_keys(owner=Owner(ada.user_id), key_id=bob.key_id)
    finally:
        await api.close()
    assert role_name(settings.postgres, "api") == "tuma_api"


async def test_the_role_of_supabase_reads_as_a_person(office: Office) -> None:
    """Whom Supabase's API lets in as ``authenticated``, by the claims that it sets; ``anon`` sees nothing."""
    ada, _ = await furnish_two(office)
    async with office.database.connection() as connection:
        await connection.execute("CREATE ROLE authenticated NOLOGIN; CREATE ROLE anon NOLOGIN")
        try:
            # As Supabase's default privileges do.
            await connection.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO anon, authenticated")
            await connection.execute("GRANT ALL ON ALL FUNCTIONS IN SCHEMA public TO anon, authenticated")
            await migrate(office.database)
            async with connection.transaction():
                await connection.execute("SET LOCAL ROLE authenticated")
                assert not await connection.fetch("SELECT id FROM wallets")
                await connection.execute(by_claims(ada.user_id))
                for table, column in (("users", "id"), ("wallets", "user_id"), ("calls", "user_id")):
                    found = await connection.fetch(f"SELECT {column} FROM {table}")
                    assert {row[column] for row in found} == {ada.user_id}
            for role in ("anon", "authenticated"):
                for statement in (
                    "SELECT secret_hmac FROM api_keys",
                    "UPDATE wallets SET posted_nano = 1",
                    "SELECT grant_credit(gen_random_uuid(), gen_random_uuid(), 1, '', '', ''::bytea)",
                    "SELECT * FROM audit_log",
                    *(["SELECT id FROM wallets"] if role == "anon" else []),
                ):
                    with pytest.raises(asyncpg.InsufficientPrivilegeError):
                        async with connection.transaction():
                            await connection.execute(f"SET LOCAL ROLE {role}")
                            await connection.execute(statement)
        finally:
            await connection.execute("DROP OWNED BY authenticated, anon; DROP ROLE authenticated, anon")
