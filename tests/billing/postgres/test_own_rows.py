"""What a person may read and change in Postgres: their own, however they are signed in."""

from typing import Any
from uuid import UUID

import asyncpg
import pytest

from billing.identity.key import Owner
from billing.identity.keys import Keys
from billing.postgres.database import Database
from billing.postgres.migrate import migrate
from billing.postgres.roles import (
    PERSONAL,
    role_name,
)
from billing.wallets.caps import Caps
from config.settings import Settings
from scripts.office import Office
from tests.billing.postgres.people import connected, furnish_two
from tests.support.payers import Payer


def by_setting(user_id: UUID) -> str:
    return f"SELECT set_config('app.user_id', '{user_id}', true)"


def by_claims(user_id: UUID) -> str:
    return f"""SELECT set_config('request.jwt.claims', '{{"sub": "{user_id}"}}', true)"""


def by_claim(user_id: UUID) -> str:
    return f"SELECT set_config('request.jwt.claim.sub', '{user_id}', true)"


# Of each table that a person may read, the column that says whose a row is.
OWNED = {
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


@pytest.mark.parametrize("sign_in", [by_setting, by_claims, by_claim])
async def test_a_person_sees_their_own_rows(settings: Settings, office: Office, sign_in: Any) -> None:
    ada, bob = await furnish_two(office)
    assert OWNED.keys() == PERSONAL.keys() - {"models", "model_prices", "fx_quotes"}
    async with connected(settings, "api") as connection:
        for me, other in ((ada, bob), (bob, ada)):
            async with connection.transaction():
                await connection.execute(sign_in(me.user_id))
                await reads_own_rows_alone(connection, me)
                await changes_nothing_of(connection, other, me)
        for function in (
            "own_keys(NULL, NULL, true, NULL, 1)",
            "own_caps('{}', now())",
            "own_revoke_key(gen_random_uuid(), NULL)",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.fetch(f"SELECT * FROM {function}")
    await Caps(office.database).find_own_caps(ada.user_id, ada.wallet_id)


async def reads_own_rows_alone(connection: Any, me: Payer) -> None:
    """Something of every table, all of it theirs; no secret and no cost of the house."""
    calls = {row["id"] for row in await connection.fetch("SELECT id FROM calls")}
    assert len(calls) == 1
    for table, column in OWNED.items():
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


async def changes_nothing_of(connection: Any, other: Payer, me: Payer) -> None:
    """What is another's is not found by the functions of people, nor is what only an operator may set."""
    assert not await connection.fetch("SELECT * FROM own_keys($1, NULL, true, NULL, 100)", other.key_id)
    assert not await connection.fetch("SELECT * FROM own_caps($1, now())", [other.wallet_id])
    new_key = "SELECT own_create_key(gen_random_uuid(), $1, 9, '', '', 'x', '', NULL, NULL, NULL, true, NULL, NULL, NULL, '{}', '{}')"
    new_intent = (
        "SELECT own_create_intent(gen_random_uuid(), $1, 'stripe', 'USD', 1, NULL, '1 h', '1 s', false, 9)"
    )
    for statement, subject in (
        ("SELECT own_revoke_key($1, NULL)", other.key_id),
        ("SELECT own_rotate_key($1, NULL, 'h', 'x', 'p', '0')", other.key_id),
        ("SELECT own_set_caps('wallet', $1, '{day}', '{1}')", other.wallet_id),
        ("SELECT own_set_caps('key', $1, '{day}', '{1}')", other.key_id),
        (new_intent, other.wallet_id),
        ("SELECT own_set_auto_topup($1, true, 1, 1, '1 h')", other.wallet_id),
        ("SELECT own_forget_method($1)", other.wallet_id),
        ("SELECT own_set_caps('user', $1, '{day}', '{1}')", me.user_id),
        (new_key, other.wallet_id),
    ):
        with pytest.raises(asyncpg.NoDataFoundError):
            async with connection.transaction():
                await connection.fetchval(statement, subject)


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
