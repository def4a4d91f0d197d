"""Everything that moves money, or watches it, at once on a few wallets: no deadlock, and books, sums and feeds right at the end.

Batchers repeat what a deadlock undid, so it would show as slowness, or as an operator's command that failed: here it is an error.
"""

import asyncio
import random
import time
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from billing.books.opening_balance import record_openings
from billing.books.proof import Books
from billing.books.usage_proof import FIRST_ID, LAST_ID, compare_usage
from billing.calls.ledger import Extension, Ledger
from billing.calls.outcome import Ending
from billing.identity.key import KeyRules
from billing.identity.keys import Keys
from billing.ids import new_id
from billing.money import NANO
from scripts.office import Office
from tests.billing.calls.test_ledger import opening
from tests.support.payers import Payer, make_payer

SECONDS = 6.0
TOGETHER = 12
_ADJUST = "SELECT adjust_call($1, $2, 'correction', 'm', $3, '', $4, $5, $6, $6, $6, 0, 0, 'exact', NULL)"
_WISH = (
    "INSERT INTO payment_intents (id, wallet_id, user_id, kind, provider, currency, amount_nano, expires_at)"
    " VALUES ($1, $2, $3, $4, 'stripe', 'USD', $5, now() + interval '1 hour')"
)


class Everything:
    """What is done, by many at once, with what they share."""

    def __init__(self, office: Office, payers: list[Payer]) -> None:
        self.office, self.payers = office, payers
        self.ends_at_s = time.monotonic() + SECONDS
        self.live: list[UUID] = []
        self.ended: list[UUID] = []
        self.intents: list[UUID] = []
        self.paid: list[str] = []
        self.done: dict[str, int] = {}

    async def go(self, number: int) -> None:
        """Do one thing after the other."""
        dice = random.Random(number)
        ledger = Ledger(self.office.database, worker_id=new_id())
        connection = await asyncpg.connect(self.office.settings.postgres.dsn.get_secret_value())
        try:
            while time.monotonic() < self.ends_at_s:
                deed = dice.choice((self.call, self.call, self.call, self.pay, self.govern, self.watch))
                await deed(dice, ledger, connection)
                self.done[deed.__name__] = self.done.get(deed.__name__, 0) + 1
        finally:
            await connection.close()

    async def call(self, dice: random.Random, ledger: Ledger, connection: Any) -> None:
        calls = [opening(payer, 1_000) for payer in dice.sample(self.payers, dice.randrange(1, 5))]
        verdicts = await ledger.open_calls(calls)
        self.live += [call.call_id for call, said in zip(calls, verdicts, strict=True) if said == "opened"]
        some = dice.sample(self.live, min(len(self.live), 5))
        await ledger.extend_calls([Extension(call_id, 2_000, 2_000) for call_id in some])
        await ledger.settle_calls(
            [
                Ending(
                    call_id, "settled", "completed", cost_nanousd=70, provider_cost_nanousd=70, charge_nano=70
                )
                for call_id in some
            ]
        )
        self.live = [call_id for call_id in self.live if call_id not in some]
        self.ended += some
        if self.ended:
            call_id = dice.choice(self.ended)
            row = await connection.fetchrow("SELECT * FROM calls WHERE id = $1", call_id)
            seen = (row["cost_nanousd"], row["charge_nano"])
            await connection.execute(_ADJUST, new_id(), call_id, str(new_id()), *seen, dice.randrange(1, 90))

    async def pay(self, dice: random.Random, _: Ledger, connection: Any) -> None:
        payer, intent, payment = dice.choice(self.payers), new_id(), str(new_id())
        kind = dice.choice(("topup", "auto"))
        await connection.execute(_WISH, intent, payer.wallet_id, payer.user_id, kind, NANO)
        self.intents.append(intent)
        await connection.execute("SELECT end_intent($1, 'failed', 'n')", dice.choice(self.intents))
        await connection.execute(
            "SELECT credit_payment($1, 'stripe', $2, $3, 'USD', $4, false)", new_id(), payment, intent, NANO
        )
        self.paid.append(payment)
        of, what = dice.choice(self.paid), dice.choice(("refund", "dispute"))
        await connection.execute(
            "SELECT reverse_payment($1, $2, 'stripe', $3, $4, $5, NULL, $6, $7)",
            *(new_id(), new_id(), of, what, what + of, dice.choice(("open", "undone")), NANO),
        )

    async def govern(self, dice: random.Random, _: Ledger, connection: Any) -> None:
        payer = dice.choice(self.payers)
        overdraft = dice.choice((0, NANO))
        await connection.execute("SELECT set_wallet($1, 'active', $2, 'x')", payer.wallet_id, overdraft)
        scope = dice.choice((("user", payer.user_id), ("wallet", payer.wallet_id), ("key", payer.key_id)))
        limit = dice.choice((None, 100_000, NANO))
        await connection.execute("SELECT set_caps($1, $2, true, '{day}', ARRAY[$3]::bigint[])", *scope, limit)
        await connection.execute(
            "INSERT INTO events (user_id, wallet_id, kind, body) VALUES ($1, $2, 'wallet.low', '{}')",
            *(payer.user_id, payer.wallet_id),
        )

    async def watch(self, dice: random.Random, _: Ledger, connection: Any) -> None:
        some = [payer.wallet_id for payer in dice.sample(self.payers, dice.randrange(1, len(self.payers)))]
        keep = timedelta(seconds=dice.choice((1.2, 2, 30)))
        await connection.execute("SELECT watch_wallets($1, $2, $3)", some, keep, timedelta(seconds=1))
        await connection.execute("SELECT forget_feeds(interval '3 s', 10000)")


@pytest.fixture
async def payers(office: Office) -> list[Payer]:
    """Three people with two wallets each."""
    await record_openings(office.database, office.upstream)
    found = []
    for _ in range(3):
        payer = await make_payer(office, amount="1000")
        wallet_id = await office.wallets.create_wallet(str(payer.user_id), currency="USD", overdraft_nano=0)
        await office.wallets.credit(wallet_id, 1000 * NANO, reason="test")
        made = await Keys(office.database, office.settings.auth, office.settings.limits).create(
            wallet_id, KeyRules()
        )
        found += [payer, Payer(payer.user_id, wallet_id, made.id, made.secret)]
    return found


async def test_nothing_waits_in_a_circle(office: Office, payers: list[Payer]) -> None:
    everything = Everything(office, payers)
    await asyncio.gather(*(everything.go(number) for number in range(TOGETHER)))
    assert everything.done.keys() == {"call", "pay", "govern", "watch"}
    async with office.database.connection() as connection:
        live = [row["id"] for row in await connection.fetch("SELECT id FROM calls WHERE state = 'open'")]
        await Ledger(office.database, worker_id=new_id()).settle_calls(
            [Ending(call_id, "void", "failed") for call_id in live]
        )
        # Each event begins with the balance that the one before left, and the last one is the wallet's.
        broken = await connection.fetch(
            "SELECT a.wallet_id, a.seq FROM feed_events a JOIN feed_events b ON (b.wallet_id, b.seq) = (a.wallet_id, a.seq + 1)"
            " WHERE (a.posted_nano + b.moved_nano, a.held_nano + b.holds_nano) <> (b.posted_nano, b.held_nano)"
        )
        off = await connection.fetch(
            "SELECT w.id FROM feeds f JOIN wallets w ON w.id = f.wallet_id WHERE f.watched_until > clock_timestamp()"
            " AND (f.posted_nano, f.held_nano, f.overdraft_nano, f.status)"
            " <> (w.posted_nano, w.held_nano, w.overdraft_nano, w.status)"
        )
    assert (broken, off) == ([], [])
    async with office.database.transaction(isolation="repeatable_read", readonly=True) as connection:
        assert await compare_usage(connection, FIRST_ID, LAST_ID) == []
    checks = await Books(office.database, office.holds, office.upstream, sweep_grace_s=60).check()
    for name in ("I1", "I2", "I3", "I4", "I7", "usage"):
        assert checks[name].ok, checks[name].detail
