"""A wallet tops itself up: a card is saved with a payment, and charged when the balance is low; once, whatever fails."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from config.settings import Settings
from scripts.office import Office
from scripts.sim.payments.faults import Fault
from tests.support.shop import Shop, open_shop

ON = {"enabled": True, "threshold": "10000", "amount": "20000"}


@pytest.fixture
async def shop(settings: Settings, office: Office) -> AsyncIterator[Shop]:
    async with open_shop(settings, office, auto_look_s=0.2) as opened:
        yield opened


async def save_card(shop: Shop) -> None:
    topup = await shop.begin("stripe", "5000", save_method=True)
    shop.psp.till.pay(shop.checkout(topup))
    await until(shop, lambda shown: shown["method"] is not None)
    assert await shop.balance() == "5000"


async def until(shop: Shop, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Let time pass until what is shown is so."""
    async with asyncio.timeout(20):
        while True:
            status, shown = await shop.ask("GET", "/v1/wallet/auto-topup")
            assert status == 200
            if done(shown):
                return dict(shown)
            await let_time_pass(shop)


async def let_time_pass(shop: Shop) -> None:
    """Let everything be due, as if its pauses were over."""
    async with shop.office.database.transaction() as connection:
        await connection.execute("UPDATE payment_intents SET poll_at = now() WHERE poll_at IS NOT NULL")
    await asyncio.sleep(0.05)


async def last_topup(shop: Shop, state: str) -> dict[str, Any]:
    """Wait until the last one that happened by itself is in this state."""
    async with asyncio.timeout(20):
        while True:
            shown = await until(shop, lambda found: found["last_topup_id"] is not None)
            found = await shop.see({"id": shown["last_topup_id"]})
            if found["state"] == state:
                return found
            await let_time_pass(shop)


def charges(shop: Shop) -> list[Any]:
    return [item for item in shop.psp.books.payments.values() if item.checkout_id is None]


async def test_below_the_threshold_the_saved_card_is_charged_once(shop: Shop) -> None:
    status, refused = await shop.ask("PUT", "/v1/wallet/auto-topup", json=ON)
    assert (status, "save_method" in refused["error"]["message"]) == (400, True)
    await save_card(shop)
    assert not charges(shop), "off until its owner says so"
    status, shown = await shop.ask("PUT", "/v1/wallet/auto-topup", json=ON)
    assert (status, shown["enabled"], shown["threshold"], shown["amount"]) == (200, True, "10000", "20000")
    assert "4242" in shown["method"]
    await last_topup(shop, "paid")
    assert await shop.balance() == "25000"
    assert [item.amount_minor for item in charges(shop)] == [20000_00]
    await shop.agree()
    _, listed = await shop.ask("GET", "/v1/wallet/transactions")
    assert [row["amount"] for row in listed["data"]] == ["20000", "5000"]


@pytest.mark.parametrize("kind", ["lost", "error_after", "down", "limited"])
async def test_an_answer_that_is_lost_charges_once(shop: Shop, kind: Any) -> None:
    await save_card(shop)
    shop.psp.webhooks.hold()
    shop.psp.faults.tell(Fault("stripe", kind, times=2, path="payment_intents", method="POST"))
    await shop.ask("PUT", "/v1/wallet/auto-topup", json=ON)
    await last_topup(shop, "paid")
    assert await shop.balance() == "25000"
    assert len(charges(shop)) == 1
    await shop.agree()


async def test_a_card_that_is_declined_three_times_switches_it_off(shop: Shop) -> None:
    await save_card(shop)
    shop.psp.till.decline_next("insufficient_funds", times=3)
    await shop.ask("PUT", "/v1/wallet/auto-topup", json=ON)
    for failures in (1, 2, 3):
        shown = await until(shop, lambda found, count=failures: found["failures"] == count)  # type: ignore[misc]
        assert shown["enabled"] == (failures < 3)
        async with shop.office.database.transaction() as connection:  # as if its pause were over
            await connection.execute("UPDATE auto_topups SET last_at = last_at - interval '1 hour'")
    assert "insufficient_funds" in shown["note"]
    assert await shop.balance() == "5000"
    await shop.agree()
    await shop.ask("PUT", "/v1/wallet/auto-topup", json=ON)
    await last_topup(shop, "paid")
    assert await shop.balance() == "25000"


async def test_it_is_switched_off_without_a_word_about_amounts(shop: Shop) -> None:
    status, shown = await shop.ask("PUT", "/v1/wallet/auto-topup", json={"enabled": False})
    assert (status, shown["enabled"], shown["amount"]) == (200, False, None)
    await save_card(shop)
    status, answer = await shop.ask("PUT", "/v1/wallet/auto-topup", json={"enabled": True, "amount": "20000"})
    assert (status, answer["error"]["param"]) == (400, "threshold")
    await shop.ask("PUT", "/v1/wallet/auto-topup", json={**ON, "threshold": "1", "pause_s": 7200})
    status, shown = await shop.ask("PUT", "/v1/wallet/auto-topup", json={"enabled": False})
    assert (shown["enabled"], shown["threshold"], shown["amount"], shown["pause_s"]) == (
        *(False, "1", "20000"),
        7200,
    )
    assert not charges(shop)


async def test_forgotten_is_not_charged(shop: Shop) -> None:
    await save_card(shop)
    status, shown = await shop.ask("DELETE", "/v1/wallet/payment-method")
    assert (status, shown["method"]) == (200, None)
    status, _ = await shop.ask("PUT", "/v1/wallet/auto-topup", json=ON)
    assert status == 400
    assert not charges(shop)


async def test_what_cannot_be_set(shop: Shop) -> None:
    await save_card(shop)
    for change, part in (
        ({"amount": "1"}, "least"),
        ({"amount": "99999999"}, "most"),
        ({"amount": "20000.001"}, "decimals"),
        ({"amount": 20000.5}, "string"),
        ({"threshold": "-1"}, "amount"),
        ({"pause_s": 10}, "pause_s"),
        ({"enabled": "yes"}, "enabled"),
        ({"more": 1}, "more"),
    ):
        status, answer = await shop.ask("PUT", "/v1/wallet/auto-topup", json={**ON, **change})
        assert status == 400, change
        assert part in answer["error"]["message"], (change, answer)
    _, shown = await shop.ask("GET", "/v1/wallet/auto-topup")
    assert (shown["enabled"], shown["threshold"]) == (False, None)


async def test_a_card_is_saved_by_stripe_alone(shop: Shop) -> None:
    for provider in ("paystack", "flutterwave"):
        body = {"provider": provider, "amount": "5000", "save_method": True}
        status, answer = await shop.ask("POST", "/v1/wallet/topups", json=body)
        assert (status, "saves no means of payment" in answer["error"]["message"]) == (400, True)
    assert not shop.psp.books.checkouts
