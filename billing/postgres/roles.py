"""Who may do what in Postgres: roles, grants, and row-level security, set anew by every ``tuma migrate``.

* ``owner`` (no login) owns every table and function. The functions that others may call run as it.
* ``proxy`` authenticates, opens, extends; ``settler`` settles. They may call functions, and nothing else.
* ``keeper`` does what one process among all does in the background: the sweeper, reconciliation, proofs of days.
* ``api`` reads as the person that the transaction names, by policies, and calls functions that ask who that is.
* ``webhook`` takes in what payment providers send and applies what they say was paid: functions, and nothing else.
* ``operator`` serves ``/admin``: reads everything but secrets, writes by functions.
* ``audit`` (no login; grant it to whoever audits) reads everything but secrets.

No role but the owner may write a table of money, and none may delete. On Supabase its role ``authenticated`` reads as
``api`` does.
"""

import base64
import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import asyncpg

from billing.errors import InputError
from config.settings import PostgresSettings

Role = Literal["proxy", "settler", "keeper", "api", "webhook", "operator"]
LOGINS: tuple[Role, ...] = ("proxy", "settler", "keeper", "api", "webhook", "operator")
ROLES = ("owner", *LOGINS, "audit")
_SUPABASE = ("anon", "authenticated", "service_role")
_SCRAM_ROUNDS = 4096
LOCK_TIMEOUT = "5s"  # how long a statement waits for a lock
_TRIES = 5

# Functions by role; each runs as the owner.
FUNCTIONS: Mapping[str, tuple[str, ...]] = {
    "proxy": (
        "extend_batch",
        "find_ended",
        "find_key",
        "find_owner",
        "has_functions",
        "lease_quota",
        "list_fx_quotes",
        "list_price_extras",
        "list_prices",
        "note_generations",
        "note_keys_used",
        "note_refusals",
        "open_batch",
        "pause_provider",
        "read_feeds",
        "read_mirror",
        "read_pause",
        "read_schema",
        "register_worker",
        "rehash_key",
        "renew_worker",
        "return_slab",
        "sign_in",
        "sign_off_worker",
        "watch_wallets",
    ),
    "settler": ("settle_batch",),
    "keeper": (
        "adjust_call",
        "book_loss",
        "confirm_fx",
        "ensure_partitions",
        "forget_cap_windows",
        "forget_feeds",
        "last_rate",
        "list_fx_quotes",
        "lock_fx",
        "note_generations",
        "open_batch",
        "quote_fx",
        "read_mirror",
        "record_rates",
        "return_slabs",
        "seal_audit",
        "settle_batch",
        "take_turn",
    ),
    "api": (
        "own_caps",
        "own_create_intent",
        "own_create_key",
        "own_forget_method",
        "own_keys",
        "own_revoke_key",
        "own_rotate_key",
        "own_set_auto_topup",
        "own_set_caps",
        "own_set_low",
    ),
    "webhook": (
        "begin_auto_topup",
        "begin_sending",
        "credit_payment",
        "end_intent",
        "end_webhook",
        "find_auto_topups",
        "find_intent",
        "is_refund_requested",
        "note_method",
        "note_page",
        "note_payment_fee",
        "receive_webhook",
        "reverse_payment",
        "take_intents",
        "take_reversal",
        "take_reversals",
        "take_webhooks",
        "try_page_again",
        "was_not_sent",
    ),
    "operator": (
        "accept_payment",
        "adjust_call",
        "create_key",
        "create_user",
        "create_wallet",
        "end_review",
        "grant_credit",
        "list_caps",
        "list_keys",
        "refund_payment",
        "retry_webhook",
        "revoke_key",
        "rotate_key",
        "seal_audit",
        "send_again",
        "set_caps",
        "set_clock",
        "set_user",
        "set_wallet",
    ),
}
# Helpers without side effects, which run as whoever calls them.
HELPERS: Mapping[str, tuple[str, ...]] = {
    "keeper": ("usage_quarter", "uuid_floor", "uuid_moment"),
    "api": ("current_person", "uuid_floor", "uuid_moment"),
    "operator": ("uuid_floor", "uuid_moment"),
    "audit": ("usage_quarter", "uuid_floor", "uuid_moment"),
}
# What a person may read, and which rows: {me} is who they are.
PERSONAL: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "users": ("id = {me}", ("id", "email", "status", "timezone", "week_starts", "created_at")),
    "wallets": (
        "user_id = {me}",
        (
            *(
                "id",
                "user_id",
                "currency",
                "posted_nano",
                "held_nano",
                "overdraft_nano",
                "status",
                "created_at",
            ),
            "low_nano",
        ),
    ),
    "api_keys": (
        "wallet_id IN (SELECT w.id FROM wallets w WHERE w.user_id = {me})",
        (
            *("id", "wallet_id", "name", "hint", "created_at", "rotated_at", "previous_until", "expires_at"),
            *("revoked_at", "last_used_at", "models", "networks", "manages"),
            *("requests_per_min", "tokens_per_min", "calls_in_flight"),
        ),
    ),
    "calls": (
        "user_id = {me}",
        (
            *(
                "id",
                "user_id",
                "wallet_id",
                "key_id",
                "model",
                "stream",
                "price_id",
                "fx_quote_id",
                "currency",
            ),
            *(
                "hold_nano",
                "state",
                "opened_at",
                "ended_at",
                "outcome",
                "generation_id",
                "accuracy",
                "cost_nanousd",
                "charge_nano",
            ),
        ),
    ),
    # By each call's own row: a list of all calls of a person would be made for every page that they read.
    "usage": ("EXISTS (SELECT FROM calls c WHERE c.id = usage.call_id AND c.user_id = {me})", ()),
    "usage_rollup": (
        "wallet_id IN (SELECT w.id FROM wallets w WHERE w.user_id = {me})",
        (
            *("wallet_id", "quarter", "model", "key_id", "calls", "voids", "exact", "prompt_tokens"),
            *("completion_tokens", "cached_read_tokens", "cached_write_tokens", "reasoning_tokens"),
            *("cost_nanousd", "charge_nano", "spread_nano", "first_byte_ms", "duration_ms"),
            *("first_byte_bins", "duration_bins"),
        ),
    ),
    "journal_tx": ("wallet_id IN (SELECT w.id FROM wallets w WHERE w.user_id = {me})", ()),
    "journal_entry": ("wallet_id IN (SELECT w.id FROM wallets w WHERE w.user_id = {me})", ()),
    "spending_caps": ("user_id = {me}", ()),
    "cap_windows": ("user_id = {me}", ()),
    "events": ("user_id = {me}", ()),
    "payment_intents": (
        "user_id = {me}",
        (
            *(
                "id",
                "wallet_id",
                "user_id",
                "kind",
                "provider",
                "currency",
                "amount_nano",
                "state",
                "url",
                "note",
            ),
            *("attempt", "idempotency_key", "created_at", "expires_at", "ended_at", "method_due"),
        ),
    ),
    "payment_methods": (
        "wallet_id IN (SELECT w.id FROM wallets w WHERE w.user_id = {me})",
        ("wallet_id", "provider", "label", "created_at"),
    ),
    "auto_topups": ("wallet_id IN (SELECT w.id FROM wallets w WHERE w.user_id = {me})", ()),
    "payment_credits": ("wallet_id IN (SELECT w.id FROM wallets w WHERE w.user_id = {me})", ()),
    "payment_reversals": (
        (
            "(provider, provider_txn_id) IN (SELECT c.provider, c.provider_txn_id FROM payment_credits c"
            " JOIN wallets w ON w.id = c.wallet_id WHERE w.user_id = {me})"
        ),
        (
            *("id", "provider", "provider_txn_id", "kind", "state", "amount_nano", "suspense_nano", "tx_id"),
            *("undo_tx_id", "created_at", "ended_at"),
        ),
    ),
    "models": ("true", ()),
    "model_prices": ("true", ()),
    "fx_quotes": ("true", ()),
    "transactions": ("", ()),  # a view: it reads as whoever asks
}
SECRET_COLUMNS: Mapping[str, tuple[str, ...]] = {"api_keys": ("secret_hmac", "previous_hmac", "pepper")}
# What the keeper writes by itself: none of it is money.
KEPT: Mapping[str, str] = {
    "alert_messages": "INSERT, UPDATE",
    "alerts": "INSERT, UPDATE",
    "events": "INSERT",
    "provider_openings": "INSERT",
    "provider_quota": "UPDATE",
    "reconciliation_diffs": "INSERT",
    "reconciliation_runs": "INSERT, UPDATE",
    "verified_days": "INSERT",
    "verified_wallets": "INSERT, UPDATE",
}
_ME = "(SELECT current_person())"  # a subquery is asked once, not for each row


def role_name(settings: PostgresSettings, role: str) -> str:
    """Return what a role is called in the server, where roles belong to all databases."""
    return f"{settings.role_prefix}_{role}"


def login_of(settings: PostgresSettings, role: Role) -> dict[str, str]:
    """Return how to log in as a role: a DSN, and where it is the owner's DSN the user and password in its place."""
    own: str = getattr(settings, f"{role}_dsn").get_secret_value()
    if own:
        return {"dsn": own}
    dsn = settings.dsn.get_secret_value()
    if not settings.roles:
        return {"dsn": dsn}
    login = {"dsn": dsn, "user": role_name(settings, role)}
    password = _password_of(settings, role)
    return {**login, "password": password} if password else login


def login_at(settings: PostgresSettings, role: Role | None, dsn: str) -> dict[str, str]:
    """Return how to log in elsewhere than one's own DSN says, as the same user: past a pooler, or on a replica.

    Args:
        settings: who logs in.
        role: as what; None: as the user of the DSN.
        dsn: where to.

    Raises:
        InputError: the role's own DSN names no user: the other's must not be taken in its place.
    """
    login = {"dsn": settings.dsn.get_secret_value()} if role is None else login_of(settings, role)
    if "user" in login:
        return {**login, "dsn": dsn}
    found = urlsplit(login["dsn"])
    if found.username:
        who = {"user": unquote(found.username)}
        return {"dsn": dsn, **who, **({"password": unquote(found.password)} if found.password else {})}
    if role is not None and login["dsn"] != settings.dsn.get_secret_value():
        raise InputError(f"TUMA_POSTGRES__{role.upper()}_DSN names no user: postgresql://user:password@…")
    return {"dsn": dsn}


def _password_of(settings: PostgresSettings, role: str) -> str:
    """Derive a role's password from the one in the DSN: nothing more to keep, and none tells of another."""
    secret = unquote(urlsplit(settings.dsn.get_secret_value()).password or "")
    if not secret:
        return ""  # trust, peer or a certificate; or a role without a password, that can only come in so
    return hmac.digest(
        secret.encode(), f"tuma role {role_name(settings, role)}".encode(), hashlib.sha256
    ).hex()


def _verifier_of(password: str) -> str:
    """Return what Postgres keeps of a password (RFC 5803), so that the password itself is never sent or logged."""
    salt = hashlib.sha256(b"tuma" + password.encode()).digest()[:16]
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, _SCRAM_ROUNDS)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", hashlib.sha256)).digest()
    server = hmac.digest(salted, b"Server Key", hashlib.sha256)
    parts = [base64.b64encode(part).decode() for part in (salt, stored, server)]
    return f"SCRAM-SHA-256${_SCRAM_ROUNDS}:{parts[0]}${parts[1]}:{parts[2]}"


async def ensure_roles(connection: Any, settings: PostgresSettings) -> None:
    """Make the roles, and give those that log in their passwords.

    Raises:
        InputError: this user may not make roles; or one exists that may do more than ours shall.
    """
    try:
        for role in ROLES:
            name = role_name(settings, role)
            if await connection.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", name) is None:
                await _repeatedly(connection, f'CREATE ROLE "{name}" NOLOGIN NOINHERIT')
        for role in LOGINS:
            password = _password_of(settings, role)
            how = f"PASSWORD '{_verifier_of(password)}'" if password else "PASSWORD NULL"
            await _repeatedly(connection, f'ALTER ROLE "{role_name(settings, role)}" LOGIN {how}')
            await bound_waits(connection, f'"{role_name(settings, role)}"')
        if not await connection.fetchval(
            "SELECT pg_has_role(current_user, $1, 'USAGE')", role_name(settings, "owner")
        ):
            await _repeatedly(connection, f'GRANT "{role_name(settings, "owner")}" TO CURRENT_USER')
    except asyncpg.InsufficientPrivilegeError as error:
        raise InputError(
            f"the roles that keep the proxy from more than it needs cannot be made ({error}): let the user of"
            " TUMA_POSTGRES__DSN make roles (ALTER ROLE … CREATEROLE), or set TUMA_POSTGRES__ROLES=false to go without"
        ) from None
    mighty = await connection.fetch(
        "SELECT rolname FROM pg_roles WHERE rolname = ANY ($1)"
        " AND (rolsuper OR rolbypassrls OR rolcreaterole OR rolcreatedb OR rolreplication)",
        [role_name(settings, role) for role in ROLES],
    )
    if mighty:
        raise InputError(
            f"the role {mighty[0]['rolname']} may do more than it shall: give Tuma roles of its own with"
            " TUMA_POSTGRES__ROLE_PREFIX"
        )


async def bound_waits(connection: Any, who: str) -> None:
    """Bound how long a role waits for a lock in this database: through a pooler no session can say so for itself."""
    database = await connection.fetchval("SELECT quote_ident(current_database())")
    await _repeatedly(
        connection, f"ALTER ROLE {who} IN DATABASE {database} SET lock_timeout = '{LOCK_TIMEOUT}'"
    )


async def _repeatedly(connection: Any, statement: str) -> None:
    """Change a role though another database's `tuma migrate` does so at the same time: roles belong to all of them."""
    for attempt in range(1, _TRIES + 1):
        try:
            async with connection.transaction():
                await connection.execute(statement)
        except (asyncpg.DuplicateObjectError, asyncpg.UniqueViolationError):
            return
        except asyncpg.InternalServerError:  # "tuple concurrently updated"
            if attempt == _TRIES:
                raise
        else:
            return


async def apply_access(connection: Any, settings: PostgresSettings, scripts: Iterable[str]) -> None:
    """Give everything that ``tuma migrate`` made to the owner, and let each role do what it may; inside a transaction.

    Args:
        connection: of a user who may act as the owner.
        settings: what the roles are called.
        scripts: the texts of the migrations and of the functions, which tell what is Tuma's in the schema.
    """
    names = {role: f'"{role_name(settings, role)}"' for role in ROLES}
    made = "\n".join(scripts)
    tables = {"schema_migrations", *re.findall(r"^CREATE (?:TABLE|VIEW|SEQUENCE) (\w+)", made, re.MULTILINE)}
    functions = set(re.findall(r"^CREATE (?:OR REPLACE )?FUNCTION (\w+)\(", made, re.MULTILINE))
    schema = await connection.fetchval("SELECT current_schema()")
    everything = await connection.fetch(_RELATIONS, schema, sorted(tables))
    relations = [row for row in everything if row["kind"] != "S"]
    routines = await connection.fetch(_ROUTINES, schema, sorted(functions))
    readers = [names["api"]]
    others = [
        row["rolname"]
        for row in await connection.fetch("SELECT rolname FROM pg_roles WHERE rolname = ANY ($1)", _SUPABASE)
    ]
    if "authenticated" in others:
        readers.append("authenticated")
    everybody = ", ".join(["PUBLIC", *others, *(names[role] for role in ROLES if role != "owner")])
    statements = [
        f'GRANT USAGE, CREATE ON SCHEMA "{schema}" TO {names["owner"]}',
        f'GRANT USAGE ON SCHEMA "{schema}" TO {", ".join([*readers, *(names[role] for role in ROLES)])}',
        *_own(everything, routines, names["owner"]),
        *_grant_functions(routines, names, everybody, readers, schema),
        *_grant_tables(relations, names, everybody, readers),
        *await _set_policies(connection, relations, names, readers),
    ]
    await connection.execute(";\n".join(statements))
    if await connection.fetchval(
        "SELECT pg_has_role(current_user, nspowner, 'USAGE') FROM pg_namespace WHERE nspname = 'auth'"
    ):
        await connection.execute(f"GRANT USAGE ON SCHEMA auth TO {names['owner']}, {', '.join(readers)}")


_KINDS = {"v": "VIEW", "S": "SEQUENCE"}
# Tables and views of ours, with the partitions of tables; what is an extension's is not ours.
_RELATIONS = """
    WITH RECURSIVE ours AS (
        SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = $1 AND c.relname = ANY ($2) AND c.relkind IN ('r', 'p', 'v', 'S')
        UNION SELECT i.inhrelid FROM pg_inherits i JOIN ours ON ours.oid = i.inhparent
    )
    SELECT c.oid::regclass::text AS name, c.relname, c.relkind::text AS kind, pg_get_userbyid(c.relowner) AS owner,
           c.relrowsecurity AND c.relforcerowsecurity AS secured, c.relispartition AS partition,
           coalesce('security_invoker=true' = ANY (c.reloptions), false) AS invoker,
           ARRAY(SELECT a.attname::text FROM pg_attribute a
                 WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum) AS columns
    FROM ours JOIN pg_class c ON c.oid = ours.oid ORDER BY c.oid
"""
_ROUTINES = """
    SELECT p.oid::regprocedure::text AS signature, p.proname AS name, pg_get_userbyid(p.proowner) AS owner,
           p.prosecdef AND p.proconfig IS NOT NULL AS defined, p.prorettype = 'trigger'::regtype AS is_trigger
    FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = $1 AND p.proname = ANY ($2) ORDER BY p.oid
"""


def _own(relations: Sequence[Any], routines: Sequence[Any], owner: str) -> list[str]:
    """Hand over what is not the owner's yet; each takes a lock, so what is stays untouched."""
    statements = [
        f"ALTER {_KINDS.get(row['kind'], 'TABLE')} {row['name']} OWNER TO {owner}"
        for row in relations
        if f'"{row["owner"]}"' != owner
    ]
    statements += [
        f"ALTER FUNCTION {row['signature']} OWNER TO {owner}"
        for row in routines
        if f'"{row["owner"]}"' != owner
    ]
    return statements


def _grant_functions(
    routines: Sequence[Any],
    names: Mapping[str, str],
    everybody: str,
    readers: Sequence[str],
    schema: str,
) -> list[str]:
    entries = {name for granted in FUNCTIONS.values() for name in granted}
    statements = [f"REVOKE ALL ON FUNCTION {row['signature']} FROM {everybody}" for row in routines]
    for row in routines:
        if row["name"] in entries and not row["defined"]:
            statements.append(
                f'ALTER FUNCTION {row["signature"]} SECURITY DEFINER SET search_path = "{schema}", pg_temp'
            )
        statements += [
            f"GRANT EXECUTE ON FUNCTION {row['signature']} TO {names[role]}"
            for granted in (FUNCTIONS, HELPERS)
            for role, mine in granted.items()
            if row["name"] in mine
        ]
        if row["name"] in HELPERS["api"]:
            statements.append(f"GRANT EXECUTE ON FUNCTION {row['signature']} TO {', '.join(readers)}")
    return statements


def _grant_tables(
    relations: Sequence[Any], names: Mapping[str, str], everybody: str, readers: Sequence[str]
) -> list[str]:
    statements = [f"REVOKE ALL ON {row['name']} FROM {everybody}" for row in relations]
    for row in relations:
        if row["partition"]:
            continue  # they are reached through their table
        hidden = SECRET_COLUMNS.get(row["relname"], ())
        open_to_see = [column for column in row["columns"] if column not in hidden]
        statements.append(
            f"GRANT SELECT ({', '.join(open_to_see)}) ON {row['name']}"
            f" TO {names['keeper']}, {names['operator']}, {names['audit']}"
        )
        if row["relname"] in PERSONAL:
            columns = PERSONAL[row["relname"]][1] or open_to_see
            statements.append(f"GRANT SELECT ({', '.join(columns)}) ON {row['name']} TO {', '.join(readers)}")
        if row["relname"] in KEPT:
            statements.append(f"GRANT {KEPT[row['relname']]} ON {row['name']} TO {names['keeper']}")
        if row["kind"] == "v" and not row["invoker"]:
            statements.append(f"ALTER VIEW {row['name']} SET (security_invoker = true)")
    return statements


async def _set_policies(
    connection: Any, relations: Sequence[Any], names: Mapping[str, str], readers: Sequence[str]
) -> list[str]:
    """Secure every table by rows; a policy's name ends with a digest of what it says, so that one that changed is replaced."""
    present: dict[str, set[str]] = {}
    for row in await connection.fetch(
        "SELECT polrelid::regclass::text AS name, polname FROM pg_policy WHERE polname LIKE 'tuma%'"
    ):
        present.setdefault(row["name"], set()).add(row["polname"])
    statements = []
    for row in relations:
        if row["kind"] == "v":
            continue
        if not row["secured"]:
            statements.append(
                f"ALTER TABLE {row['name']} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY"
            )
        wanted = {}
        for clause in _policies_of(row, names, readers):
            wanted[f"tuma_{hashlib.sha256(clause.encode()).hexdigest()[:12]}"] = clause
        found = present.get(row["name"], set())
        statements += [f'DROP POLICY "{name}" ON {row["name"]}' for name in sorted(found - wanted.keys())]
        statements += [
            f'CREATE POLICY "{name}" ON {row["name"]} {clause}'
            for name, clause in wanted.items()
            if name not in found
        ]
    return statements


def _policies_of(row: Any, names: Mapping[str, str], readers: Sequence[str]) -> list[str]:
    policies = [f"TO {names['owner']} USING (true) WITH CHECK (true)"]
    if row["partition"]:
        return policies
    seeing = f"{names['keeper']}, {names['operator']}, {names['audit']}"
    policies.append(f"FOR SELECT TO {seeing} USING (true)")
    if row["relname"] in PERSONAL:
        predicate = PERSONAL[row["relname"]][0].format(me=_ME)
        policies.append(f"FOR SELECT TO {', '.join(readers)} USING ({predicate})")
    for verb in KEPT.get(row["relname"], "").split(", "):
        if verb == "INSERT":
            policies.append(f"FOR INSERT TO {names['keeper']} WITH CHECK (true)")
        elif verb == "UPDATE":
            policies.append(f"FOR UPDATE TO {names['keeper']} USING (true) WITH CHECK (true)")
    return policies
