"""Money from people, in Postgres: credited once, reversed once, and whatever differs lies in suspense."""

import asyncio
import dataclasses
import itertools
import random
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest

from billing.books.opening_balance import record_openings
from billing.errors import (
    BrokenInvariantError,
    InputError,
    InsufficientFundsError,
    NotFoundError,
    RateLimitError,
)
from billing.money import NANO
from billing.payments.intents import Intents
from billing.payments.payment import Intent, Payment, Reversal, parse_reference
from billing.payments.payments import Payments
from billing.payments.refunds import Refunds
from billing.payments.reviews import Reviews
from billing.payments.units import PaymentProvider
from billing.payments.views import PaymentFilter, PaymentViews
from billing.postgres.database import Database
from scripts.office import Office
from tests.support.books import check_books
from tests.support.payers import make_payer


@dataclasses.dataclass(frozen=True)
class Rig:
    """The rooms by their own roles, and one payer with an empty wallet in naira."""

    office: Office
    intents: Intents
    payments: Payments
    refunds: Refunds
    reviews: Reviews
    owner: UUID
    wallet_id: UUID

    async def wish(self, amount: int = 5000, provider: PaymentProvider = "paystack", **more: Any) -> Intent:
        return await self.intents.create(
            self.owner,
            self.wallet_id,
            provider,
            amount_nano=amount * NANO,
            currency="NGN",
            expires_after_s=3600,
            poll_after_s=30,
            **{"live_max": 20, **more},
        )

    async def posted(self) -> int:
        wallet = await self.office.wallets.get_wallet(self.wallet_id)
        return int(wallet.posted_nano) // NANO

    async def status(self) -> str:
        return str((await self.office.wallets.get_wallet(self.wallet_id)).status)

    async def suspense(self) -> int:
        async with self.office.database.connection() as connection:
            total = await connection.fetchval(
                "SELECT coalesce(sum(amount_nano), 0) FROM journal_entry WHERE account = 'suspense'"
            )
        return int(total) // NANO

    async def check(self) -> None:
        await check_books(self.office)


@pytest.fixture
async def rig(office: Office) -> AsyncIterator[Rig]:
    await record_openings(office.database, office.upstream)
    payer = await make_payer(office, amount="0", currency="NGN")
    pools = [Database(office.settings.postgres, role=role) for role in ("api", "webhook", "operator")]
    yield Rig(
        office,
        Intents(pools[0]),
        Payments(pools[1]),
        Refunds(pools[2]),
        Reviews(pools[2]),
        payer.user_id,
        payer.wallet_id,
    )
    for pool in pools:
        await pool.close()


def paid(intent: Intent, amount: int = 5000, **changes: Any) -> Payment:
    made = Payment(
        provider=intent.provider,
        id="4099260516",
        reference=intent.reference,
        state="succeeded",
        amount_nano=amount * NANO,
        currency="NGN",
    )
    return dataclasses.replace(made, **changes)


def refund(amount: int, state: Any = "final", name: str = "re_1", **more: Any) -> Reversal:
    return Reversal(name, "refund", amount * NANO, state, **more)


def dispute(amount: int, state: Any, name: str = "dp_1") -> Reversal:
    return Reversal(name, "dispute", amount * NANO, state)


async def test_a_payment_is_credited_once_whoever_says_so(rig: Rig) -> None:
    payment = paid(await rig.wish(), fee_nano=175 * NANO, fee_currency="NGN")
    applied = await asyncio.gather(*(rig.payments.apply(payment) for _ in range(100)))
    assert sorted(item.credit for item in applied).count("credited") == 1
    assert {item.credit for item in applied} == {"credited", "known"}
    assert await rig.posted() == 5000
    async with rig.office.database.connection() as connection:
        fees = await connection.fetch(
            "SELECT account, amount_nano FROM journal_entry WHERE account LIKE 'psp%' ORDER BY account, amount_nano"
        )
    assert [(row["account"], row["amount_nano"] // NANO) for row in fees] == [
        ("psp_clearing", -5000),
        ("psp_clearing", 175),
        ("psp_fee", -175),
    ]
    await rig.check()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"amount_nano": 4999 * NANO}, "less was paid than asked"),
        ({"amount_nano": 5001 * NANO}, "more was paid than asked"),
        ({"currency": "GHS"}, "paid in GHS, not NGN"),
        ({"provider": "stripe"}, "it was asked for at paystack"),
        ({"reference": f"tuma_{'0' * 32}"}, "nobody asked for this payment"),
    ],
)
async def test_what_differs_lies_in_suspense(rig: Rig, change: dict[str, Any], why: str) -> None:
    payment = paid(await rig.wish(), **change)
    assert (await rig.payments.apply(payment)).credit == "review"
    assert (await rig.payments.apply(payment)).credit == "known"
    assert await rig.posted() == 0
    assert await rig.suspense() == payment.amount_nano // NANO
    reviews = await rig.reviews.list_waiting()
    assert [row["note"] for row in reviews] == [why]
    async with rig.office.database.connection() as connection:
        audited = await connection.fetchval(
            "SELECT count(*) FROM audit_log WHERE subject = 'payment_credits' AND actor = $1",
            f"payment:{payment.provider}",
        )
    assert audited == 1
    await rig.check()


async def test_what_was_sent_back_waits_for_no_decision(rig: Rig) -> None:
    await rig.payments.apply(paid(await rig.wish(), 4000))
    views = PaymentViews(rig.office.database)
    (row,) = await views.list_reviews()
    assert (row["paid"], row["suspense"]) == ("4000", "4000")
    await rig.refunds.begin("paystack", "4099260516", amount_nano=1000 * NANO, reason="a part")
    (row,) = await views.list_reviews()
    assert row["suspense"] == "3000"
    rest = await rig.refunds.begin("paystack", "4099260516", reason="the rest")
    assert await views.list_reviews() == []
    (payment,) = await views.list_payments(PaymentFilter(state="returned"), limit=10)
    assert (payment["suspense"], payment["reversed"], await rig.suspense()) == ("0", "4000", 0)
    assert "0 payments in review" in (await check_books(rig.office))["I5"].detail
    await rig.payments.apply(paid(await rig.wish(), 4000, reversals=[refund(3000, "undone", ours=rest.id)]))
    (row,) = await views.list_reviews()
    assert (row["suspense"], await rig.suspense()) == ("3000", 3000)
    assert "1 payments in review" in (await check_books(rig.office))["I5"].detail


async def test_more_than_asked_at_a_provider_that_adds_its_fee(rig: Rig) -> None:
    intent = await rig.wish()
    assert (await rig.payments.apply(paid(intent, 5075), takes_more=True)).credit == "credited"
    assert (await rig.posted(), await rig.suspense()) == (5000, 75)
    # What was paid too much goes back first.
    await rig.payments.apply(paid(intent, 5075, reversals=[refund(100)]), takes_more=True)
    assert (await rig.posted(), await rig.suspense()) == (4975, 0)
    await rig.check()


async def test_paid_twice(rig: Rig) -> None:
    intent = await rig.wish()
    assert (await rig.payments.apply(paid(intent))).credit == "credited"
    assert (await rig.payments.apply(paid(intent, id="4099260517"))).credit == "review"
    assert (await rig.posted(), await rig.suspense()) == (5000, 5000)
    assert (await rig.intents.get(rig.owner, intent.id)).state == "paid"
    assert await rig.reviews.accept("paystack", "4099260517", reason="they meant it") == "5000"
    with pytest.raises(InputError, match="nothing of this payment"):
        await rig.reviews.accept("paystack", "4099260517", reason="again")
    assert (await rig.posted(), await rig.suspense()) == (10_000, 0)
    await rig.check()


async def test_a_part_and_then_the_whole(rig: Rig) -> None:
    intent = await rig.wish()
    await rig.payments.apply(paid(intent, 2000))
    assert (await rig.intents.get(rig.owner, intent.id)).state == "review"
    assert (await rig.payments.apply(paid(intent, id="4099260517"))).credit == "credited"
    assert (await rig.intents.get(rig.owner, intent.id)).state == "paid"
    assert (await rig.posted(), await rig.suspense()) == (5000, 2000)
    await rig.check()


@pytest.mark.parametrize("state", ["failed", "expired"])
async def test_money_that_comes_after_the_end_is_credited(rig: Rig, state: Any) -> None:
    intent = await rig.wish()
    await rig.payments.end_intent(intent.id, state, "nobody paid")
    assert (await rig.intents.get(rig.owner, intent.id)).state == state
    assert (await rig.payments.apply(paid(intent))).credit == "credited"
    assert (await rig.intents.get(rig.owner, intent.id)).state == "paid"
    await rig.payments.end_intent(intent.id, "expired", "too late to say so")
    assert (await rig.intents.get(rig.owner, intent.id)).state == "paid"
    await rig.check()


async def test_no_money_no_credit(rig: Rig) -> None:
    intent = await rig.wish()
    for state in ("pending", "failed"):
        assert (await rig.payments.apply(paid(intent, state=state))).credit == "none"
    assert await rig.posted() == 0


async def test_a_refund_may_take_a_wallet_below_zero_and_come_back(rig: Rig) -> None:
    intent = await rig.wish()
    await rig.payments.apply(paid(intent))
    async with rig.office.database.transaction() as connection:
        assert await connection.fetchval("SELECT set_wallet($1, NULL, NULL, NULL)", rig.wallet_id)
    both = [refund(4000, "open"), refund(1000, "final", "re_2")]
    applied = await rig.payments.apply(paid(intent, reversals=both))
    assert list(applied.reversals) == ["posted", "posted"]
    assert await rig.posted() == 0
    await rig.payments.apply(paid(intent, reversals=[*both, refund(500, "final", "re_3")]))
    assert await rig.posted() == -500
    applied = await rig.payments.apply(paid(intent, reversals=[refund(4000, "undone")]))
    assert list(applied.reversals) == ["undone"]
    # An answer that is older than that changes nothing.
    applied = await rig.payments.apply(paid(intent, reversals=both))
    assert list(applied.reversals) == ["known", "known"]
    assert await rig.posted() == 3500
    await rig.check()


async def test_what_comes_back_after_the_rest_was_accepted_waits_for_a_decision(rig: Rig) -> None:
    await rig.payments.apply(paid(await rig.wish(), 4000))
    part = await rig.refunds.begin("paystack", "4099260516", amount_nano=1000 * NANO, reason="a part")
    await rig.reviews.accept("paystack", "4099260516", reason="the rest is theirs")
    assert await rig.reviews.list_waiting() == []
    await rig.payments.apply(paid(await rig.wish(), 4000, reversals=[refund(1000, "undone", ours=part.id)]))
    assert (await rig.posted(), await rig.suspense()) == (3000, 1000)
    assert [row["suspense_nano"] // NANO for row in await rig.reviews.list_waiting()] == [1000]
    await rig.reviews.accept("paystack", "4099260516", reason="so is that")
    assert (await rig.posted(), await rig.reviews.list_waiting()) == (4000, [])
    await rig.check()


async def test_a_dispute_freezes_and_a_won_one_lets_go(rig: Rig) -> None:
    intent = await rig.wish()
    await rig.payments.apply(paid(intent, reversals=[dispute(5000, "open")]))
    assert (await rig.posted(), await rig.status()) == (0, "frozen")
    await rig.payments.apply(paid(intent, reversals=[dispute(5000, "undone")]))
    assert (await rig.posted(), await rig.status()) == (5000, "active")
    await rig.payments.apply(paid(intent, reversals=[dispute(5000, "open")]))
    assert (await rig.posted(), await rig.status()) == (5000, "active")
    await rig.check()


async def test_a_lost_dispute_stays_frozen(rig: Rig) -> None:
    intent = await rig.wish()
    await rig.payments.apply(paid(intent, reversals=[dispute(5000, "open")]))
    await rig.payments.apply(paid(intent, reversals=[dispute(5000, "final")]))
    assert (await rig.posted(), await rig.status()) == (0, "frozen")
    await rig.check()


async def test_a_dispute_that_is_lost_before_it_is_seen_freezes_too(rig: Rig) -> None:
    intent = await rig.wish()
    await rig.payments.apply(paid(intent, reversals=[dispute(5000, "final")]))
    assert (await rig.posted(), await rig.status()) == (0, "frozen")
    await rig.office.wallets.set_wallet(rig.wallet_id, status="active", reason="they paid")
    await rig.payments.apply(paid(intent, reversals=[dispute(5000, "final")]))
    assert await rig.status() == "active"


async def test_an_operators_freeze_outlives_a_dispute(rig: Rig) -> None:
    intent = await rig.wish()
    await rig.payments.apply(paid(intent, reversals=[dispute(5000, "open")]))
    await rig.office.wallets.set_wallet(rig.wallet_id, status="frozen", reason="they know why")
    await rig.payments.apply(paid(intent, reversals=[dispute(5000, "undone")]))
    assert (await rig.posted(), await rig.status()) == (5000, "frozen")


async def test_a_dispute_about_money_in_suspense_freezes_its_wallet_too(rig: Rig) -> None:
    intent = await rig.wish()
    await rig.payments.apply(paid(intent, 100, reversals=[dispute(100, "open")]))
    assert (await rig.posted(), await rig.suspense(), await rig.status()) == (0, 0, "frozen")
    await rig.check()


async def test_a_dispute_follows_money_that_another_wallet_is_given(rig: Rig) -> None:
    intent = await rig.wish()
    await rig.payments.apply(paid(intent, 4000, reversals=[dispute(1000, "open")]))
    assert await rig.status() == "frozen"
    other = await make_payer(rig.office, amount="0", currency="NGN")
    await rig.reviews.accept("paystack", "4099260516", wallet_id=other.wallet_id, reason="theirs")
    assert await rig.status() == "active"
    assert (await rig.office.wallets.get_wallet(other.wallet_id)).status == "frozen"
    await rig.payments.apply(paid(intent, 4000, reversals=[dispute(1000, "undone")]))
    assert (await rig.office.wallets.get_wallet(other.wallet_id)).status == "active"


async def test_a_reversal_that_changes_its_amount_stops_loudly(rig: Rig) -> None:
    intent = await rig.wish()
    await rig.payments.apply(paid(intent, reversals=[refund(1000, "open")]))
    with pytest.raises(BrokenInvariantError, match="re_1"):
        await rig.payments.apply(paid(intent, reversals=[refund(1001, "final")]))
    assert await rig.posted() == 4000
    await rig.check()


async def test_our_refund_is_set_aside_first_and_found_again(rig: Rig) -> None:
    intent = await rig.wish()
    await rig.payments.apply(paid(intent))
    begun = await rig.refunds.begin("paystack", "4099260516", amount_nano=2000 * NANO, reason="asked")
    assert (await rig.posted(), begun.state) == (3000, "requested")
    # Whether the provider hands our id back or not, it is that one.
    for told in (refund(2000, "open", ours=begun.id), refund(2000, "final")):
        applied = await rig.payments.apply(paid(intent, reversals=[told]))
        assert list(applied.reversals) == ["noted"]
    assert await rig.posted() == 3000
    rest = await rig.refunds.begin("paystack", "4099260516", reason="all of it")
    assert (rest.amount_nano, await rig.posted()) == (3000 * NANO, 0)
    applied = await rig.payments.apply(paid(intent, reversals=[refund(3000, "undone", "re_2")]))
    assert list(applied.reversals) == ["undone"]
    assert await rig.posted() == 3000
    await rig.check()


async def test_a_refund_is_once_per_key_and_sent_by_one_process(rig: Rig) -> None:
    await rig.payments.apply(paid(await rig.wish()))
    await rig.payments.apply(paid(await rig.wish(), id="4099260517"))

    async def order(txn_id: str = "4099260516", amount: int = 1000, key: str | None = "k") -> UUID:
        begun = await rig.refunds.begin(
            "paystack", txn_id, amount_nano=amount * NANO, reason="asked", key=key
        )
        return begun.id

    begun = await asyncio.gather(*(order() for _ in range(20)))
    assert len(set(begun)) == 1
    assert await rig.posted() == 9000
    for other in (order(amount=2000), order("4099260517")):
        with pytest.raises(InputError, match="another input"):
            await other
    assert await order(key=None) not in begun
    assert await rig.posted() == 8000
    taken = await asyncio.gather(*(rig.payments.take_reversal(begun[0]) for _ in range(10)))
    (item,) = [item for item in taken if item is not None]
    assert (item.id, item.state, item.amount_nano) == (begun[0], "requested", 1000 * NANO)
    assert begun[0] not in [item.id for item in await rig.payments.take_reversals(pause_s=30)]
    await rig.check()


async def test_what_cannot_be_refunded(rig: Rig) -> None:
    with pytest.raises(NotFoundError):
        await rig.refunds.begin("paystack", "4099260516", reason="nothing there")
    await rig.payments.apply(paid(await rig.wish()))
    for amount_nano in (5001 * NANO, 0, -NANO, 1):
        with pytest.raises(InputError):
            await rig.refunds.begin(
                "paystack", "4099260516", amount_nano=amount_nano, reason="too much, or too fine"
            )
    other = await rig.wish(100)
    await rig.payments.apply(paid(other, 100, id="4099260517", reversals=[refund(100)]))
    await rig.payments.apply(paid(other, 100, id="4099260517", reversals=[refund(4000, name="re_9")]))
    assert await rig.posted() == 1000
    with pytest.raises(InsufficientFundsError):
        await rig.refunds.begin("paystack", "4099260516", reason="spent")
    assert await rig.posted() == 1000
    await rig.refunds.begin("paystack", "4099260516", reason="all the same", below_zero=True)
    assert await rig.posted() == -4000
    await rig.check()


async def test_an_intent_is_repeated_by_its_key_and_refused_with_another_input(rig: Rig) -> None:
    first = await rig.wish(key="once")
    assert (await rig.wish(key="once")).id == first.id
    assert (await rig.wish()).id != first.id
    with pytest.raises(InputError, match="another input"):
        await rig.wish(5001, key="once")
    with pytest.raises(InputError, match="another input"):
        await rig.wish(key="once", provider="flutterwave")


async def test_no_more_wait_to_be_paid_however_many_ask_at_once(rig: Rig) -> None:
    asked = await asyncio.gather(*(rig.wish(live_max=3) for _ in range(12)), return_exceptions=True)
    assert sum(isinstance(item, Intent) for item in asked) == 3
    assert sum(isinstance(item, RateLimitError) for item in asked) == 9


async def test_intents_are_ones_own(rig: Rig) -> None:
    intent = await rig.wish()
    stranger = await make_payer(rig.office, amount="0", currency="NGN")
    with pytest.raises(NotFoundError):
        await rig.intents.get(stranger.user_id, intent.id)
    with pytest.raises(NotFoundError):
        await dataclasses.replace(rig, owner=stranger.user_id).wish()
    with pytest.raises(InputError, match="this wallet is in NGN"):
        await rig.intents.create(
            rig.owner,
            rig.wallet_id,
            "paystack",
            amount_nano=NANO,
            currency="GHS",
            expires_after_s=1,
            poll_after_s=1,
            live_max=20,
        )


async def test_a_webhook_is_kept_once_and_comes_again_until_it_is_ended(rig: Rig) -> None:
    kept = await asyncio.gather(
        *(rig.payments.receive("stripe", "evt_1", '{"id": "evt_1"}') for _ in range(100))
    )
    assert kept.count(True) == 1
    assert await rig.payments.receive("paystack", "evt_1", "{}")
    taken = await rig.payments.take_events()
    assert [event.body for event in taken] == ['{"id": "evt_1"}', "{}"]
    assert await rig.payments.take_events() == []
    await rig.payments.end_event(taken[0].id, "done")
    async with rig.office.database.transaction() as connection:  # as if the lease had run out
        await connection.execute("UPDATE webhook_events SET next_at = now()")
    assert [event.id for event in await rig.payments.take_events()] == [taken[1].id]


async def test_intents_are_asked_about_until_they_are_paid(rig: Rig) -> None:
    first, second = await rig.wish(), await rig.wish()
    assert await rig.payments.take_intents(pause_s=30, late_s=60) == []
    async with rig.office.database.transaction() as connection:
        await connection.execute("UPDATE payment_intents SET poll_at = now()")
    assert {item.id for item in await rig.payments.take_intents(pause_s=30, late_s=60)} == {
        first.id,
        second.id,
    }
    assert await rig.payments.take_intents(pause_s=30, late_s=60) == []
    await rig.payments.apply(paid(first))
    async with rig.office.database.transaction() as connection:
        await connection.execute("UPDATE payment_intents SET poll_at = now() WHERE poll_at IS NOT NULL")
    assert [item.id for item in await rig.payments.take_intents(pause_s=30, late_s=60)] == [second.id]


def test_references() -> None:
    assert parse_reference("tuma_" + "ab" * 16) == UUID("ab" * 16)
    assert parse_reference("tuma_" + "ab" * 16 + "_2") == UUID("ab" * 16)
    for other in (
        "",
        "tuma_",
        "order-17",
        "tuma_" + "AB" * 16,
        "tuma_" + "ab" * 16 + "_",
        " tuma_" + "ab" * 16,
    ):
        assert parse_reference(other) is None


@pytest.mark.parametrize("seed", range(6))
async def test_any_order_of_standings_ends_with_the_same_books(rig: Rig, seed: int) -> None:
    """Standings as a provider goes through them, applied in any order, repeated and at once, end as the last one says."""
    dice = random.Random(seed)
    intent = await rig.wish()
    history = [
        paid(intent, state="pending"),
        paid(intent),
        paid(intent, reversals=[refund(1000, "open")]),
        paid(intent, reversals=[refund(1000, "final"), dispute(2000, "open")]),
        paid(intent, reversals=[refund(1000, "final"), dispute(2000, "undone"), refund(500, "open", "re_2")]),
        paid(
            intent, reversals=[refund(1000, "final"), dispute(2000, "undone"), refund(500, "undone", "re_2")]
        ),
    ]
    told = list(itertools.chain(*([item] * dice.randint(1, 4) for item in history)))
    dice.shuffle(told)
    if dice.random() < 0.5:
        await asyncio.gather(*(rig.payments.apply(item) for item in told))
    else:
        for item in told:
            await rig.payments.apply(item)
    await rig.payments.apply(history[-1])
    assert (await rig.posted(), await rig.status()) == (4000, "active")
    await rig.check()
