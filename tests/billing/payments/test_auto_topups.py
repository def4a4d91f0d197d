"""Wallets that top themselves up, in Postgres: once at a time, once in a while, by what their owner said last."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest

from billing.books.opening_balance import record_openings
from billing.errors import InputError, NotFoundError, RateLimitError
from billing.money import NANO
from billing.payments.auto_topups import AutoTopup, AutoTopups
from billing.payments.intents import Intents
from billing.payments.payment import Intent, Payment, SavedMethod
from billing.payments.payments import Payments
from billing.postgres.database import Database
from scripts.office import Office
from tests.support.books import check_books
from tests.support.payers import make_payer

CARD = SavedMethod("cus_1", "pm_1", "visa …4242")


@dataclasses.dataclass(frozen=True)
class Purse:
    """A wallet in dollars with 5 in it, and the rooms by their own roles."""

    office: Office
    intents: Intents
    payments: Payments
    autos: AutoTopups
    owner: UUID
    wallet_id: UUID

    async def wish(self, **more: Any) -> Intent:
        return await self.intents.create(
            self.owner,
            self.wallet_id,
            "stripe",
            **{
                "amount_nano": 20 * NANO,
                "currency": "USD",
                "expires_after_s": 3600,
                "poll_after_s": 30,
                "live_max": 20,
                **more,
            },
        )

    async def save(self, method: SavedMethod | None = CARD) -> Intent:
        """Top up 20 with a card that may be kept."""
        intent = await self.wish(saves_method=True)
        await self.payments.apply(paid(intent))
        assert await self.payments.note_method(intent.id, method)
        return intent

    async def switch_on(self, **changes: Any) -> None:
        wanted = AutoTopup(enabled=True, threshold_nano=100 * NANO, amount_nano=50 * NANO, pause_s=3600)
        await self.autos.set(self.owner, self.wallet_id, dataclasses.replace(wanted, **changes))

    async def begin(self) -> list[Intent]:
        return await self.payments.begin_auto_topups(expires_after_s=3600)

    async def do(self, statement: str, *values: object) -> None:
        async with self.office.database.transaction() as connection:
            await connection.execute(statement, *values)

    async def let_it_pause(self) -> None:
        await self.do("UPDATE auto_topups SET last_at = last_at - interval '1 hour'")


def paid(intent: Intent, **changes: Any) -> Payment:
    made = Payment(
        provider="stripe",
        id=f"pi_{intent.id.hex}",
        reference=intent.reference,
        state="succeeded",
        amount_nano=intent.amount_nano,
        currency="USD",
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture
async def purse(office: Office) -> AsyncIterator[Purse]:
    await record_openings(office.database, office.upstream)
    payer = await make_payer(office, amount="5")
    webhook = Database(office.settings.postgres, name="webhook", role="webhook")
    people = Database(office.settings.postgres, name="people", role="api")
    yield Purse(
        office, Intents(people), Payments(webhook), AutoTopups(people), payer.user_id, payer.wallet_id
    )
    await check_books(office)
    await webhook.close()
    await people.close()


async def test_off_until_its_owner_says_so(purse: Purse) -> None:
    shown = await purse.autos.get(purse.owner, purse.wallet_id)
    assert (shown.enabled, shown.method, shown.threshold_nano) == (False, None, None)
    with pytest.raises(InputError, match="nothing is kept to pay with"):
        await purse.switch_on()
    await purse.save()
    assert (await purse.autos.get(purse.owner, purse.wallet_id)).method == "visa …4242"
    assert await purse.begin() == [], "a card is kept, and nobody said that it shall be charged"


async def test_below_the_threshold_it_begins_once_whoever_looks(purse: Purse) -> None:
    await purse.save()
    await purse.switch_on()
    begun = [item for made in await asyncio.gather(*(purse.begin() for _ in range(10))) for item in made]
    assert len(begun) == 1
    (intent,) = begun
    assert (intent.kind, intent.state, intent.amount_nano) == ("auto", "creating", 50 * NANO)
    assert (intent.provider_id, intent.method_id) == ("cus_1", "pm_1")
    await purse.let_it_pause()
    assert await purse.begin() == [], "one is under way"
    assert (await purse.payments.apply(paid(intent))).credit == "credited"
    await purse.let_it_pause()
    (second,) = await purse.begin()
    await purse.payments.apply(paid(second))
    await purse.let_it_pause()
    assert await purse.begin() == [], "125 are above the threshold"


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE auto_topups SET last_at = now() - interval '59 minutes'",
        "UPDATE auto_topups SET threshold_nano = 25000000000",  # 25, which is what is there
        "UPDATE auto_topups SET enabled = false",
        "UPDATE wallets SET status = 'frozen', frozen_by = 'operator'",
        "UPDATE users SET status = 'disabled'",
        "DELETE FROM payment_methods",
    ],
)
async def test_when_it_does_not_begin(purse: Purse, change: str) -> None:
    await purse.save()
    await purse.switch_on()
    await purse.do(change)
    assert await purse.begin() == []


async def test_the_third_failure_in_a_row_switches_it_off(purse: Purse) -> None:
    await purse.save()
    await purse.switch_on()
    for failures in (1, 2, 3):
        (intent,) = await purse.begin()
        await purse.payments.end_intent(intent.id, "failed", "card_declined")
        await purse.payments.end_intent(intent.id, "failed", "card_declined")
        shown = await purse.autos.get(purse.owner, purse.wallet_id)
        assert (shown.failures, shown.enabled) == (failures, failures < 3)
        await purse.let_it_pause()
    assert "three in a row" in shown.note
    assert await purse.begin() == []
    async with purse.office.database.connection() as connection:
        told = await connection.fetch("SELECT body FROM events WHERE kind = 'auto_topup.failed'")
    assert len(told) == 3
    await purse.switch_on()
    assert (await purse.autos.get(purse.owner, purse.wallet_id)).failures == 0


async def test_a_paid_one_counts_anew(purse: Purse) -> None:
    await purse.save()
    await purse.switch_on(threshold_nano=1000 * NANO)
    for fails in (True, True, False, True, True):
        (intent,) = await purse.begin()
        if fails:
            await purse.payments.end_intent(intent.id, "failed", "card_declined")
        else:
            await purse.payments.apply(paid(intent))
        await purse.let_it_pause()
    shown = await purse.autos.get(purse.owner, purse.wallet_id)
    assert (shown.failures, shown.enabled) == (2, True)


async def test_what_is_switched_off_is_not_charged(purse: Purse) -> None:
    await purse.save()
    await purse.switch_on()
    (first,) = await purse.begin()
    await purse.switch_on(enabled=False)
    assert (await purse.intents.get(purse.owner, first.id)).state == "failed"
    await purse.switch_on()
    await purse.let_it_pause()
    (second,) = await purse.begin()
    assert await purse.autos.forget_method(purse.owner, purse.wallet_id)
    assert not await purse.autos.forget_method(purse.owner, purse.wallet_id)
    assert (await purse.intents.get(purse.owner, second.id)).state == "failed"
    shown = await purse.autos.get(purse.owner, purse.wallet_id)
    assert (shown.enabled, shown.method, shown.note) == (False, None, "the means of payment was removed")
    # What was charged before is the payer's all the same.
    assert (await purse.payments.apply(paid(second))).credit == "credited"


async def test_a_means_of_payment_is_noted_once_and_only_of_what_was_paid(purse: Purse) -> None:
    intent = await purse.wish(saves_method=True)
    assert not await purse.payments.note_method(intent.id, CARD)
    await purse.payments.apply(paid(intent))
    taken = await purse.payments.take_intents(pause_s=30, late_s=60)
    assert [(item.id, item.state, item.method_due) for item in taken] == [(intent.id, "paid", True)]
    assert await purse.payments.note_method(intent.id, None), "the payer would not have it kept"
    assert not await purse.payments.note_method(intent.id, CARD)
    plain = await purse.wish()
    await purse.payments.apply(paid(plain))
    assert not await purse.payments.note_method(plain.id, CARD)
    assert (await purse.autos.get(purse.owner, purse.wallet_id)).method is None


async def test_ones_own_only(purse: Purse) -> None:
    await purse.save()
    stranger = await make_payer(purse.office, amount="0")
    with pytest.raises(NotFoundError):
        await purse.autos.get(stranger.user_id, purse.wallet_id)
    with pytest.raises(NotFoundError):
        await purse.autos.forget_method(stranger.user_id, purse.wallet_id)
    with pytest.raises(NotFoundError):
        await purse.autos.set(
            stranger.user_id,
            purse.wallet_id,
            AutoTopup(enabled=True, threshold_nano=1, amount_nano=1, pause_s=60),
        )


async def test_no_more_wait_to_be_paid_than_the_limit(purse: Purse) -> None:
    first = await purse.wish(live_max=2, key="one")
    await purse.wish(live_max=2)
    with pytest.raises(RateLimitError, match="2 top-ups wait"):
        await purse.wish(live_max=2)
    assert (await purse.wish(live_max=2, key="one")).id == first.id
    await purse.payments.end_intent(first.id, "expired", "nobody paid")
    await purse.wish(live_max=2)


@pytest.mark.parametrize("word", ["off", "forget"])
async def test_switching_off_while_one_fails_is_no_deadlock(purse: Purse, word: str) -> None:
    """The end of an intent has the intent, and then wants the settings; so has whoever switches off."""
    await purse.save()
    await purse.switch_on()
    (intent,) = await purse.begin()

    async def switch_off() -> None:
        if word == "off":
            await purse.switch_on(enabled=False)
        else:
            await purse.autos.forget_method(purse.owner, purse.wallet_id)

    async with purse.office.database.connection() as observer, purse.office.database.transaction() as ending:
        await ending.execute("SELECT FROM payment_intents WHERE id = $1 FOR UPDATE", intent.id)
        switching = asyncio.create_task(switch_off())
        async with asyncio.timeout(30):
            while not await observer.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                await asyncio.sleep(0.01)
        assert await ending.fetchval("SELECT end_intent($1, 'failed', 'declined')", intent.id)
    await switching
    assert not (await purse.autos.get(purse.owner, purse.wallet_id)).enabled
