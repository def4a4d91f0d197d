"""The audit log: every change of money or of a permission leaves its row, and no row can be changed without its showing."""

import asyncio
import json
import re
import time
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from hashlib import sha256
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from click.testing import CliRunner

from billing.actor import acting
from billing.books.opening_balance import record_openings
from billing.books.reconcile import Reconciler
from billing.calls.corrections import Corrections
from billing.calls.ledger import Extension, Ledger
from billing.calls.outcome import Ending
from billing.errors import InputError
from billing.fx.book import FxBook
from billing.identity.key import KeyRules
from billing.identity.keys import Keys
from billing.ids import new_id
from billing.monitoring.audit import Audit, ProblemJson, Verdict, describe_row
from billing.pricing.cost import Usage
from billing.pricing.price_book import ModelPrice, PriceBook
from billing.provider.records import Bill
from billing.tasks import TrackedTasks
from billing.wallets.caps import Caps
from config.settings import Settings
from scripts.cli.main import main
from scripts.office import Office, operator_name
from scripts.sim.provider import SimulatedProvider
from tests.billing.calls.test_ledger import opening
from tests.billing.calls.test_sweeper import generate
from tests.support.payers import Payer, make_payer
from tests.support.running import run_proxy

# Every table that is not audited, and why.
UNAUDITED = {
    "alert_messages": "what an operator was told",
    "alerts": "derived from the other tables",
    "audit_blocks": "seals the log",
    "audit_log": "is the log",
    "calls": "a settlement is its own record: append-only in the journal, and counted by the invariants",
    "cap_windows": "counted from calls",
    "events": "what a user was told",
    "feed_events": "what somebody who watches was told",
    "feeds": "counts what somebody who watches was told",
    "fx_rates": "append-only; what calls are priced with is the quote, which is audited",
    "journal_entry": "append-only; in the row of its transaction",
    "late_postings": "derived from postings",
    "models": "names and sizes as the provider lists them; the prices are audited",
    "posting_keys": "written with a posting, which is audited",
    "provider_quota": "what the provider said of its own limit, observed every few seconds",
    "quota_slabs": "moved by calls",
    "reconciliation_diffs": "a report; what it posted is audited",
    "reconciliation_runs": "a report",
    "webhook_events": "a hint; what the provider's API then said is applied, and that is audited",
    "routine_turns": "a clock",
    "schema_functions": "has the digest of each file of functions",
    "schema_migrations": "has the digest of each migration",
    "shadow_usd_ledger": "append-only; corrections are audited with their transaction",
    "usage": "tokens, no money",
    "usage_rollup": "derived from calls, and compared with them",
    "verified_days": "derived from the books",
    "verified_wallets": "derived from the books",
    "workers": "processes",
}
# Columns of audited tables that are not audited, and why.
IDLE = {
    "api_keys.last_used_at": "moved by calls",
    "fx_quotes.confirmed_at": "that the sources still say the same, every hour; the rate and its end are audited",
    "payment_intents.method_due": "until the means of payment is noted, which is audited",
    "payment_intents.poll_at": "when the provider is asked next",
    "payment_intents.polls": "how often it was asked",
    "payment_reversals.poll_at": "when the provider is asked next",
    "payment_reversals.polls": "how often it was asked",
    "spending_caps.effective_nano": "generated from the others, and shown",
    "spending_caps.updated_at": "the row's own time says it",
    "wallets.capped": "follows spending_caps",
    "wallets.held_nano": "moved by calls",
    "wallets.posted_nano": "moved by postings",
}


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


@pytest.fixture
async def log(office: Office) -> Log:
    return Log(office)


async def test_users_and_wallets(log: Log, office: Office) -> None:
    with acting("operator:ann", "req-1"):
        user_id = await office.wallets.create_user("a@example.com")
    row = await log.one("users", "created")
    assert (row["actor"], row["request_id"], row["db_role"]) == ("operator:ann", "req-1", "postgres")
    assert (row["subject_id"], row["user_id"], row["wallet_id"]) == (str(user_id), str(user_id), None)
    assert (row["before"], row["after"]["email"]) == (None, "a@example.com")

    with acting(f"user:{user_id}"):
        wallet_id = await office.wallets.create_wallet(str(user_id), currency="USD", overdraft_nano=5)
    row = await log.one("wallets", "created")
    assert (row["actor"], row["request_id"]) == (f"user:{user_id}", None)
    assert (row["user_id"], row["wallet_id"]) == (str(user_id), str(wallet_id))
    assert row["after"]["overdraft_nano"] == 5
    assert "posted_nano" not in row["after"]

    with acting("payment:stripe"):
        async with office.database.transaction() as connection:
            await connection.execute("UPDATE wallets SET status = 'frozen' WHERE id = $1", wallet_id)
    row = await log.one("wallets", "changed")
    assert (row["actor"], row["before"]["status"], row["after"]["status"]) == (
        "payment:stripe",
        "active",
        "frozen",
    )
    async with office.database.connection() as connection:  # by hand, and in the same session
        await connection.execute("UPDATE wallets SET status = 'frozen' WHERE id = $1", wallet_id)
        assert await log.new() == [], "nothing changed"
        await connection.execute("UPDATE wallets SET overdraft_nano = 7")
        row = await log.one("wallets", "changed")
        assert (row["actor"], row["request_id"]) == ("system", None)
        assert (row["before"]["overdraft_nano"], row["after"]["overdraft_nano"]) == (5, 7)
        await connection.execute("UPDATE users SET status = 'disabled'")
        assert (await log.one("users", "changed"))["after"]["status"] == "disabled"
        await connection.execute("DELETE FROM wallets")
        row = await log.one("wallets", "removed")
        assert (row["before"]["id"], row["after"], row["user_id"]) == (str(wallet_id), None, str(user_id))
        await connection.execute("TRUNCATE users CASCADE")
        assert {(row["subject"], row["action"]) for row in await log.new()} == {
            (table, "truncated")
            for table in (
                *("users", "wallets", "api_keys", "spending_caps"),
                *(
                    "payment_intents",
                    "payment_credits",
                    "payment_reversals",
                    "payment_methods",
                    "auto_topups",
                ),
            )
        }


async def test_a_credit(log: Log, office: Office) -> None:
    payer = await make_payer(office, amount="0")
    await log.new()
    with acting("admin", "req-2"):
        first = await office.wallets.credit(payer.wallet_id, 50, reason="hello", key="k")
        await office.wallets.credit(payer.wallet_id, 50, reason="hello", key="k")
    row = await log.one("journal_tx", "grant")
    assert (row["actor"], row["request_id"], row["subject_id"]) == ("admin", "req-2", str(first.tx_id))
    assert (row["wallet_id"], row["user_id"]) == (str(payer.wallet_id), str(payer.user_id))
    assert row["before"] == {"posted_nano": 0}
    assert (row["after"]["posted_nano"], row["after"]["memo"]) == (50, "hello")
    assert [(entry["account"], entry["amount_nano"]) for entry in row["after"]["entries"]] == [
        ("wallet", 50),
        ("grant", -50),
    ]
    assert describe_row(row).startswith(
        f"{row['id']}  {row['at'][:19]}Z  admin [req-2]  grant journal_tx {first.tx_id}: "
    )


async def settle(office: Office, payer: Payer, cost: int) -> UUID:
    """Open, extend and settle a call as a worker does."""
    ledger = Ledger(office.database, worker_id=new_id())
    call = opening(payer, 10_000)
    assert await ledger.open_calls([call]) == ["opened"]
    assert await ledger.extend_calls([Extension(call.call_id, 20_000, 20_000)]) == ["extended"]
    ending = Ending(
        call.call_id,
        "settled",
        "completed",
        generation_id="g",
        accuracy="estimated",
        cost_nanousd=cost,
        charge_nano=cost,
        usage=Usage(1, 1),
    )
    assert (await ledger.settle_calls([ending]))[0].won
    return call.call_id


async def test_a_settlement_is_not_audited_and_its_repair_is(log: Log, office: Office) -> None:
    payer = await make_payer(office, amount="1")
    await Caps(office.database).set_caps("wallet", payer.wallet_id, {"day": 10**9})
    await log.new()
    call_id = await settle(office, payer, 1000)
    assert await log.new() == []

    corrections = Corrections(office.database, charge_estimates_upward=True)
    await corrections.correct(call_id, Bill("g", Decimal("0.0000013"), Usage()))
    row = await log.one("journal_tx", "correction")
    assert (row["actor"], row["after"]["call_id"]) == ("system", str(call_id))
    assert (row["before"]["posted_nano"], row["after"]["posted_nano"]) == (10**9 - 1000, 10**9 - 1300)
    with acting("operator:ann"):
        await corrections.refund(call_id, amount_nano=300, reason="sorry")
    row = await log.one("journal_tx", "refund")
    assert (row["actor"], row["after"]["memo"]) == ("operator:ann", "sorry")
    assert row["after"]["posted_nano"] - row["before"]["posted_nano"] == 300


async def test_a_loss_of_the_house_and_openings(log: Log, office: Office, sim: SimulatedProvider) -> None:
    await record_openings(office.database, office.upstream)
    assert {(row["subject"], row["action"]) for row in await log.new()} == {("provider_openings", "created")}
    await generate(sim, chunks=3)
    await Reconciler(office.database, office.upstream, office.settings.reconcile).run()
    row = await log.one("journal_tx", "house_loss")
    assert (row["actor"], row["wallet_id"], row["before"]) == ("system", None, None)
    assert len(row["after"]["entries"]) == 4


async def test_caps_and_the_clock(log: Log, office: Office) -> None:
    payer = await make_payer(office)
    caps = Caps(office.database)
    await log.new()
    with acting("operator:ann"):
        await caps.set_caps("key", payer.key_id, {"day": 5})
    row = await log.one("spending_caps", "created")
    assert row["subject_id"] == f"key:{payer.key_id}:day"
    assert (row["actor"], row["wallet_id"], row["user_id"]) == (
        "operator:ann",
        str(payer.wallet_id),
        str(payer.user_id),
    )
    assert (row["after"]["ceiling_nano"], row["after"]["limit_nano"]) == (5, None)
    with acting(f"user:{payer.user_id}"):
        await caps.set_caps("key", payer.key_id, {"day": 3}, owner=payer.user_id)
        row = await log.one("spending_caps", "changed")
        assert (row["actor"], row["before"]["limit_nano"], row["after"]["limit_nano"]) == (
            f"user:{payer.user_id}",
            None,
            3,
        )
        await caps.set_caps("key", payer.key_id, {"day": 3}, owner=payer.user_id)
        assert await log.new() == [], "set to what it was"
    await caps.set_caps("key", payer.key_id, {"day": None})
    row = await log.one("spending_caps", "changed")
    assert (row["before"]["ceiling_nano"], row["after"]["ceiling_nano"]) == (5, None)
    await caps.set_caps("key", payer.key_id, {"day": None}, owner=payer.user_id)
    row = await log.one("spending_caps", "removed")
    assert (row["before"]["limit_nano"], row["after"]) == (3, None)
    await caps.set_caps("wallet", payer.wallet_id, {"total": 3, "week": 9}, owner=payer.user_id)
    assert [row["wallet_id"] for row in await log.new()] == [str(payer.wallet_id)] * 2
    await caps.set_caps("user", payer.user_id, {"total": 3})
    assert (await log.one("spending_caps", "created"))["wallet_id"] is None
    await caps.set_clock(payer.user_id, timezone="Africa/Lagos", week_starts=7)
    row = await log.one("users", "changed")
    assert (row["before"]["timezone"], row["after"]["timezone"]) == ("UTC", "Africa/Lagos")
    assert describe_row(row).endswith("timezone UTC → Africa/Lagos, week_starts 1 → 7")


async def test_keys_without_their_secrets(log: Log, office: Office) -> None:
    payer = await make_payer(office)
    await log.new()
    keys = Keys(office.database, office.settings.auth, office.settings.limits)
    made = await keys.create(payer.wallet_id, KeyRules(name="k", requests_per_min=3))
    row = await log.one("api_keys", "created")
    assert (row["subject_id"], row["wallet_id"], row["user_id"]) == (
        str(made.id),
        str(payer.wallet_id),
        str(payer.user_id),
    )
    assert (row["after"]["secret_hmac"], row["after"]["requests_per_min"]) == ("hidden", 3)
    await keys.revoke(made.id)
    row = await log.one("api_keys", "changed")
    assert row["before"]["revoked_at"] is None
    assert row["after"]["revoked_at"] is not None
    await keys.revoke(made.id)
    assert await log.new() == []
    async with office.database.connection() as connection:
        await connection.execute("UPDATE api_keys SET secret_hmac = '\\xabcdef' WHERE id = $1", made.id)
        row = await log.one("api_keys", "changed")
        assert (row["before"]["secret_hmac"], row["after"]["secret_hmac"]) == ("hidden", "hidden: changed")
        lines = "\n".join(item["line"] for item in await connection.fetch("SELECT line FROM audit_log"))
    digest = keys._digests(made.secret)[0].hex()
    for secret in (made.secret, digest, "abcdef"):
        assert secret not in lines


async def test_prices_and_rates(log: Log, office: Office) -> None:
    def price(prompt: str) -> ModelPrice:
        prices = dict.fromkeys(("prompt_usd", "completion_usd"), Decimal(prompt))
        return ModelPrice(
            "m", "m", None, None, {**prices, "image_usd": Decimal(0), "request_usd": Decimal(0)}
        )

    book = PriceBook(office.database)
    with acting("operator:ann"):
        await book.set_prices([price("0.000001")], source="manual")
    row = await log.one("model_prices", "created")
    assert (row["actor"], row["after"]["prompt_usd"]) == ("operator:ann", "0.000001000000000000")
    await book.set_prices([price("0.000001")], source="manual")
    assert await log.new() == []
    await book.set_prices([price("0.000002")], source="manual")
    assert [row["action"] for row in await log.new()] == ["changed", "created"], "one closed, one new"

    rates = FxBook(office.database, office.settings.fx)
    await rates.set_rate("USD", "NGN", Decimal(1600), markup_bps=25)
    row = await log.one("fx_quotes", "created")
    assert (row["after"]["currency"], row["after"]["markup_bps"]) == ("NGN", 25)
    await rates.set_rate("USD", "NGN", Decimal(1700))
    assert [(row["subject"], row["action"]) for row in await log.new()] == [
        ("fx_quotes", "changed"),
        ("fx_quotes", "created"),
    ]


async def test_what_is_rolled_back_leaves_no_row(log: Log, office: Office) -> None:
    await make_payer(office)
    before = await log.new()
    with pytest.raises(InputError):
        async with office.database.transaction() as connection:
            await connection.execute("UPDATE users SET status = 'disabled'")
            raise InputError("no")
    assert await log.new() == []
    assert before
    verdict = await log.audit.verify()
    assert (verdict.ok, verdict.rows, verdict.unsealed) == (True, len(before), 0)


async def test_who_acts_is_said_for_a_block_and_a_task(log: Log, office: Office) -> None:
    for wrong in ("", "ann", "operator:", "operator", "user: ", f"operator:{'x' * 300}"):
        with pytest.raises(ValueError, match="is not an actor"), acting(wrong):
            pass

    async def change(status: str) -> None:
        async with office.database.transaction() as connection:
            await connection.execute("UPDATE users SET status = $1", status)

    await office.wallets.create_user("b@example.com")
    await log.new()
    tasks = TrackedTasks()

    async def as_actor(name: str) -> None:
        with acting(f"operator:{name}"):
            await asyncio.sleep(0)
            await office.wallets.create_user(f"{name}@example.com")

    await asyncio.gather(as_actor("ann"), as_actor("bob"))
    assert {row["actor"]: row["after"]["email"] for row in await log.new()} == {
        "operator:ann": "ann@example.com",
        "operator:bob": "bob@example.com",
    }
    with acting("operator:ann"):
        await tasks.start(change("disabled"), name="a task of the house")
    assert {row["actor"] for row in await log.new()} == {"system"}


async def test_rows_are_never_rewritten(log: Log, office: Office) -> None:
    await make_payer(office)
    await log.audit.seal()
    async with office.database.connection() as connection:
        for mode in ("origin", "replica"):
            await connection.execute(f"SET session_replication_role = {mode}")
            for table in ("audit_log", "audit_blocks"):
                for statement in (
                    f"DELETE FROM {table}",
                    f"TRUNCATE {table}",
                    f"DELETE FROM {table} WHERE false",
                    f"UPDATE {table} SET {'actor' if table == 'audit_log' else 'digest'} = '' WHERE false",
                ):
                    with pytest.raises(asyncpg.RestrictViolationError):
                        await connection.execute(statement)
        await connection.execute("RESET session_replication_role")
        granted = await connection.fetch(
            "SELECT c.relname FROM pg_class c, LATERAL aclexplode(c.relacl) a"
            " WHERE c.relname IN ('audit_log', 'audit_blocks') AND a.grantee <> c.relowner"
        )
        assert granted == [], "nobody but the owner has any right"
        open_to_all = await connection.fetch(
            "SELECT proname FROM pg_proc WHERE proname IN"
            " ('write_audit', 'seal_audit', 'audit_change', 'audit_posting')"
            " AND (proacl IS NULL OR EXISTS (SELECT FROM aclexplode(proacl) a WHERE a.grantee = 0))"
        )
        assert open_to_all == []


@pytest.mark.calendar
async def test_the_books_are_not_truncated(office: Office) -> None:
    async with office.database.connection() as connection:
        await connection.execute("SELECT ensure_partitions(5)")
        tables = [
            row["relname"]
            for row in await connection.fetch(
                "SELECT relname FROM pg_class WHERE relkind IN ('r', 'p') AND relname ~ '^journal_(tx|entry)'"
            )
        ]
        assert len(tables) >= 2 * (1 + 1 + 7)
        for table in (*tables, "shadow_usd_ledger", "fx_rates, fx_quotes, calls"):
            with pytest.raises(asyncpg.RestrictViolationError, match="TRUNCATE refused"):
                await connection.execute(f"TRUNCATE {table}")
        # docs/archiving.md: what is detached can be dropped.
        for parent in ("journal_entry", "journal_tx"):
            month = max(name for name in tables if name.startswith(f"{parent}_2"))
            await connection.execute(f"ALTER TABLE {parent} DETACH PARTITION {month}")
            await connection.execute(f"DROP TABLE {month}")


async def test_every_table_is_audited_or_says_why_not(office: Office) -> None:
    async with office.database.connection() as connection:
        tables = await connection.fetch(
            "SELECT c.oid, c.relname FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p')"
            " AND NOT c.relispartition"
        )
        audited = {
            row["relname"]: row
            for row in await connection.fetch(
                "SELECT c.relname, t.tgtype, ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = c.oid"
                " AND a.attnum = ANY (t.tgattr::int2[])) AS watched,"
                " ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0"
                " AND NOT a.attisdropped) AS columns,"
                " ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0"
                " AND a.atttypid = 'bytea'::regtype) AS blobs"
                " FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid"
                " JOIN pg_proc p ON p.oid = t.tgfoid WHERE p.proname = 'audit_change' AND t.tgtype & 1 = 1"
            )
        }
        triggers = await connection.fetchval(
            "SELECT count(*) FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid WHERE p.proname = 'audit_change'"
            " AND t.tgenabled = 'O'"
        )
    names = {row["relname"] for row in tables}
    assert audited.keys() | {"journal_tx"} == names - UNAUDITED.keys(), "a table without a decision"
    assert UNAUDITED.keys() <= names
    assert triggers == 2 * len(audited), "of rows, and of truncation"
    idle = {
        f"{name}.{column}"
        for name, row in audited.items()
        for column in set(row["columns"]) - set(row["watched"])
    }
    assert idle <= IDLE.keys(), "a column without a decision: call audit_table again"
    for name, row in audited.items():
        assert row["tgtype"] == 1 | 4 | 8 | 16, f"{name}: after each inserted, deleted or updated row"
        for blob in row["blobs"]:
            assert re.search("hmac|secret", blob), (
                f"{name}.{blob} might be a secret: hide_secrets does not know it"
            )


def recompute(rows: list[Any], blocks: list[Any]) -> str:
    """What an outsider does with the stored bytes alone, as docs/security.md says."""
    digest = b""
    lines = {row["id"]: row["line"] for row in rows}
    for block in blocks:
        header = f"{block['number']} {round(block['sealed_at'].timestamp() * 1_000_000)} "
        leaves = b"".join(sha256(lines.pop(row_id).encode()).digest() for row_id in block["ids"])
        digest = sha256(digest + header.encode() + leaves).digest()
    assert not lines
    return f"{blocks[-1]['number']}:{digest.hex()}"


async def test_an_outsider_recomputes_the_chain(log: Log, office: Office) -> None:
    await make_payer(office)
    assert (await log.audit.verify()).blocks == 1
    await log.write(2500)
    assert await log.audit.seal() == 3
    assert await log.audit.seal() == 0
    verdict = await log.audit.verify()
    async with office.database.connection() as connection:
        rows = await connection.fetch("SELECT id, line FROM audit_log")
        blocks = await connection.fetch("SELECT * FROM audit_blocks ORDER BY number")
    assert verdict.as_json() == {
        "ok": True,
        "rows": len(rows),
        "blocks": 4,
        "unsealed": 0,
        "head": recompute(rows, blocks),
        "problems": [],
    }
    line = json.loads(rows[0]["line"])
    assert list(line)[:4] == ["id", "at", "actor", "db_role"]


async def sealed_twice(log: Log) -> None:
    """Rows 1 to 5 and 6 to 10, in two blocks; and 11 to 13, in none."""
    for count in (5, 5):
        await log.write(count)
        await log.audit.seal()
    await log.write(3)


CHANGES = {
    "id": "id + 1000",
    "at": "at + interval '1 microsecond'",
    "actor": "'operator:eve'",
    "db_role": "'eve'",
    "action": "'changed'",
    "subject": "'wallets'",
    "subject_id": "subject_id || '0'",
    "user_id": "'00000000-0000-0000-0000-000000000000'",
    "wallet_id": "'00000000-0000-0000-0000-000000000000'",
    "request_id": "'r'",
    "before": "'{}'",
    "after": "after || '{\"yes\": 1}'",
    "line": "line || ' '",
}


async def test_each_altered_column_is_found(log: Log, office: Office) -> None:
    await sealed_twice(log)
    async with office.database.connection() as connection:
        columns = await connection.fetch(
            "SELECT attname FROM pg_attribute WHERE attrelid = 'audit_log'::regclass AND attnum > 0"
        )
    assert {row["attname"] for row in columns} == CHANGES.keys()
    for column, value in CHANGES.items():
        problems = await log.tamper(f"UPDATE audit_log SET {column} = {value} WHERE id = 7")
        row = 1007 if column == "id" else 7
        assert row in {problem.get("row") for problem in problems}, column
        if column not in ("id", "line"):
            assert problems == [{"block": 2, "row": 7, "problem": f"it differs from its line in {column}"}]
            problems = await log.tamper(f"UPDATE audit_log SET {column} = {value} WHERE id = 12")
            assert problems == [{"row": 12, "problem": f"it differs from its line in {column}"}], (
                "sealed or not"
            )


async def test_what_is_altered_in_both_removed_inserted_or_swapped_is_found(log: Log) -> None:
    await sealed_twice(log)
    altered = [{"block": 2, "row": 7, "problem": "its line was altered"}]
    both = "UPDATE audit_log SET actor = 'admin', line = replace(line, 'system', 'admin') WHERE id = 7"
    assert await log.tamper(both) == altered
    for line in ("'[]'", "'{'", "'null'"):
        assert await log.tamper(f"UPDATE audit_log SET line = {line} WHERE id = 7") == altered
        assert len(await log.tamper(f"UPDATE audit_log SET line = {line} WHERE id = 12")) == 1
    for row, block in ((1, 1), (7, 2), (10, 2)):
        assert await log.tamper(f"DELETE FROM audit_log WHERE id = {row}") == [
            {"block": block, "row": row, "problem": "it was removed"}
        ]
    swap = """
    UPDATE audit_log SET id = -id WHERE id IN (7, 8);
    UPDATE audit_log SET id = 15 + id WHERE id IN (-7, -8);
    """
    assert await log.tamper(swap) == [
        {"block": 2, "row": 7, "problem": "it holds what was sealed as row 8"},
        {"block": 2, "row": 8, "problem": "it holds what was sealed as row 7"},
    ]
    for inserted in (0, -5):
        insert = f"""
        INSERT INTO audit_log SELECT {inserted}, at, actor, db_role, action, subject, subject_id, user_id, wallet_id, request_id,
               before, after, replace(line, '"id" : 7', '"id" : {inserted}') FROM audit_log WHERE id = 7
        """
        assert await log.tamper(insert) == [
            {"block": 1, "row": inserted, "problem": "it was not there when the block was sealed"}
        ]


async def test_an_altered_chain_is_found(log: Log) -> None:
    await sealed_twice(log)
    assert [
        problem["block"] for problem in await log.tamper("DELETE FROM audit_blocks WHERE number = 1")
    ] == [2]
    for change in (
        "previous = sha256('')",
        "previous = ''",
        "ids = ids[1:4]",
        "ids = ids || 99::bigint",
        "ids = ARRAY[7, 6, 8, 9, 10]::bigint[]",
        "ids = '{}'",
        "leaves = leaves || sha256('')",
        "leaves = ''",
        "sealed_at = sealed_at + interval '1 microsecond'",
        "digest = sha256('')",
        "number = 3",
    ):
        problems = await log.tamper(f"UPDATE audit_blocks SET {change} WHERE number = 2")
        assert problems, change
        assert problems[0]["block"] in (2, 3), change
    # One who recomputes a block cannot recompute what was noted of the next.
    forged = "UPDATE audit_blocks SET digest = sha256('forged') WHERE number = 1"
    assert {"block": 2, "problem": "it does not follow the block before it"} in await log.tamper(forged)


async def test_a_cut_tail_shows_against_a_noted_head(log: Log, office: Office) -> None:
    await sealed_twice(log)
    heads = [str((await log.audit.verify()).head)]
    await log.write(1)
    heads.append(str((await log.audit.verify()).head))
    assert [head.partition(":")[0] for head in heads] == ["3", "4"]
    for head in heads:
        assert (await log.audit.verify(expect=head)).ok
    async with log.tampering() as connection:
        await connection.execute(
            "DELETE FROM audit_blocks WHERE number = 4; DELETE FROM audit_log WHERE id = 14"
        )
    assert (await log.audit.verify()).ok, "the chain alone cannot show it"
    assert (await log.audit.verify(expect=heads[0])).ok
    assert (await log.audit.verify(expect=heads[1])).as_json()["problems"] == [
        {"problem": "the chain ends before block 4, which was noted elsewhere"}
    ]
    await log.write(1)
    assert (await log.audit.verify()).ok
    assert (await log.audit.verify(expect=heads[1])).as_json()["problems"] == [
        {"block": 4, "problem": "its digest is not the one that was noted elsewhere"}
    ]
    for wrong in ("", "4", "4:abc", f"0:{'0' * 64}", f"x:{'0' * 64}"):
        with pytest.raises(InputError):
            await log.audit.verify(expect=wrong)

    await log.write(1)
    async with log.tampering() as connection:
        await connection.execute("DELETE FROM audit_log WHERE id = 2")
    verdict = await log.audit.verify()
    assert (verdict.ok, verdict.unsealed, verdict.blocks) == (False, 1, 4), "what is wrong is not sealed over"


async def test_a_row_that_commits_late_is_sealed_late(log: Log, dsn: str) -> None:
    """Number 1 is drawn before number 2, and committed after it: no block may pass it by."""
    slow, fast = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
    write = "SELECT write_audit('created', 'test', '', NULL, NULL, NULL, NULL)"
    try:
        transaction = slow.transaction()
        await transaction.start()
        await slow.execute(write)
        await fast.execute(write)
        began = time.monotonic()
        assert await log.audit.seal() == 0, "it waits, a bounded time"
        assert 0.25 <= time.monotonic() - began < 3
        sealing = asyncio.create_task(log.audit.seal())
        await asyncio.sleep(0.1)
        await transaction.commit()
        assert await sealing == 1
    finally:
        await slow.close()
        await fast.close()
    verdict = await log.audit.verify()
    assert (verdict.ok, verdict.rows, verdict.blocks) == (True, 2, 1)
    async with log.office.database.transaction(isolation="repeatable_read") as connection:
        with pytest.raises(asyncpg.InvalidTransactionStateError):  # its snapshot is older than the lock
            await connection.execute("SELECT seal_audit()")


async def test_writers_and_sealers_at_once(log: Log, dsn: str) -> None:
    async def write(number: int) -> None:
        connection = await asyncpg.connect(dsn)
        for turn in range(25):
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute("SELECT write_audit('created', 'test', '', NULL, NULL, NULL, NULL)")
            await asyncio.sleep(0.001 * ((turn + number) % 3))
            await (transaction.rollback() if (turn + number) % 5 == 0 else transaction.commit())
        await connection.close()

    async def seal() -> int:
        sealed = 0
        for _ in range(15):
            sealed += await log.audit.seal()
            await asyncio.sleep(0.002)
        return sealed

    done = await asyncio.gather(*(write(number) for number in range(6)), seal(), seal())
    verdict = await log.audit.verify()
    assert verdict.ok, verdict.as_json()
    assert (verdict.rows, verdict.unsealed) == (120, 0)
    assert verdict.blocks >= sum(count or 0 for count in done) > 2


async def test_a_running_server_seals(log: Log, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.routines._SEAL_PERIOD_S", 0.1)
    await log.write(3)
    async with run_proxy(settings), asyncio.timeout(10):
        async with log.office.database.connection() as connection:
            while not await connection.fetchval("SELECT count(*) FROM audit_blocks"):
                await asyncio.sleep(0.05)
    assert (await log.audit.verify()).unsealed == 0


async def test_who_may_only_read_verifies_all_the_same(log: Log, office: Office, dsn: str) -> None:
    await log.write(3)
    async with office.database.connection() as connection:
        await connection.execute(
            "DROP ROLE IF EXISTS test_auditor; CREATE ROLE test_auditor LOGIN;"
            " GRANT tuma_audit TO test_auditor"
        )
        try:
            await connection.execute("SET ROLE test_auditor")
            for statement in (
                "SELECT write_audit('', '', '', NULL, NULL, NULL, NULL)",
                "SELECT seal_audit()",
            ):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await connection.execute(statement)
            reader = Reader(connection)
            verdict = await Audit(reader).verify()  # type: ignore[arg-type]
            assert (verdict.ok, verdict.unsealed, verdict.head) == (True, 3, None)
        finally:
            await connection.execute("RESET ROLE; DROP OWNED BY test_auditor; DROP ROLE test_auditor")


class Reader:
    """A database of one connection."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Any]:
        yield self._connection

    session = connection


async def test_many_rows_are_verified_in_little_memory(log: Log) -> None:
    rows = 20_000  # five times as many take five times as long, and no more memory
    began = time.monotonic()
    await log.write(rows)
    written_s = time.monotonic() - began
    began = time.monotonic()
    assert await log.audit.seal() == rows // 1000
    sealed_s = time.monotonic() - began
    began = time.monotonic()
    verdict = await log.audit.verify()
    verified_s = time.monotonic() - began
    assert (verdict.ok, verdict.rows) == (True, rows)
    print(
        f"{rows} rows: written in {written_s:.1f} s, sealed in {sealed_s:.1f}, verified in {verified_s:.1f}"
    )
    tracemalloc.start()
    again = Verdict()
    async with asyncio.timeout(60):
        await log.audit._verify_on(again, None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"peak {peak / 2**20:.1f} MiB")
    assert peak < 8 * 2**20

    async with log.tampering() as connection:
        await connection.execute("UPDATE audit_log SET actor = 'admin'")
    problems = (await log.audit.verify()).as_json()["problems"]
    assert len(problems) == 101, "what is wrong is listed up to a bound"
    assert problems[-1] == {"problem": f"{rows - 100} more"}


async def test_lists_by_wallet_user_actor_and_time(log: Log, office: Office) -> None:
    first, second = await make_payer(office), await make_payer(office)
    with acting("operator:ann"):
        await office.wallets.credit(first.wallet_id, 5, reason="r")
    rows = await log.audit.list_rows(wallet_id=first.wallet_id)
    assert [row["action"] for row in rows] == ["created", "grant", "created", "grant"]
    assert {row["user_id"] for row in await log.audit.list_rows(user_id=second.user_id)} == {
        str(second.user_id)
    }
    assert [row["id"] for row in await log.audit.list_rows(actor="operator:ann")] == [rows[-1]["id"]]
    assert await log.audit.list_rows(limit=1) == rows[-1:]
    with pytest.raises(InputError):
        await log.audit.list_rows(limit=0)


async def test_the_command(log: Log, office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUMA_POSTGRES__DSN", office.settings.postgres.dsn.get_secret_value())
    monkeypatch.setenv("TUMA_REDIS__URL", office.settings.redis.url.get_secret_value())
    monkeypatch.setenv("TUMA_UPSTREAM__API_KEY", "sk-sim")

    async def run(*words: str) -> tuple[int, Any]:
        done = await asyncio.to_thread(CliRunner().invoke, main, [*words, "--json"])
        return done.exit_code, json.loads(done.stdout)

    assert (await run("users", "create", "--email", "cli@example.com"))[0] == 0
    async with office.database.connection() as connection:
        assert await connection.fetchval("SELECT ids FROM audit_blocks") == [1], "sealed at once"
    code, listed = await run("audit", "list", "--user", "cli@example.com", "--since", "2020-01-01")
    assert code == 0
    assert [row["actor"] for row in listed["rows"]] == [f"operator:{operator_name()}"]
    assert "created users" in listed["report"]
    code, found = await run("audit", "verify")
    assert (code, found["ok"], found["rows"], found["blocks"], found["unsealed"]) == (0, True, 1, 1, 0)
    assert await run("audit", "seal") == (0, {"blocks": 0})
    assert (await run("audit", "verify", "--expect", found["head"]))[0] == 0
    async with log.tampering() as connection:
        await connection.execute("UPDATE audit_log SET actor = 'system'")
    code, found = await run("audit", "verify")
    assert (code, found["ok"]) == (1, False)
    assert found["problems"] == [{"block": 1, "row": 1, "problem": "it differs from its line in actor"}]
