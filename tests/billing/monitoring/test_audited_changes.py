"""Every change of money or of a permission leaves its row, which says who made it."""

import asyncio
import re
from decimal import Decimal
from uuid import UUID

import pytest

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
from billing.monitoring.audit import describe_row
from billing.pricing.cost import Usage
from billing.pricing.price_book import ModelPrice, PriceBook
from billing.provider.records import Bill
from billing.tasks import TrackedTasks
from billing.wallets.caps import Caps
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.billing.calls.test_ledger import opening
from tests.billing.calls.test_sweeper import generate
from tests.billing.monitoring.audit_log import Log
from tests.support.payers import Payer, make_payer

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
