"""What only Stripe does: cards that are saved and charged again, slow banks, inquiries, fees in another currency, pages that expire."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from decimal import Decimal
from typing import Any

import pytest

from config.settings import Settings
from scripts.office import Office
from scripts.sim.payments.faults import Fault
from scripts.sim.payments.stripe.objects import Settlement
from tests.proxy.payments.test_topups import due
from tests.support.shop import Shop, open_shop


@pytest.fixture
async def shop(settings: Settings, office: Office) -> AsyncIterator[Shop]:
    async with open_shop(settings, office, auto_look_s=0.2) as opened:
        yield opened


async def wait_for(shop: Shop, done: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await done():
            await due(shop)
            await asyncio.sleep(0.05)


async def wait_for_state(shop: Shop, topup: dict[str, Any], state: str) -> dict[str, Any]:
    async def there() -> bool:
        return bool((await shop.see(topup))["state"] == state)

    await wait_for(shop, there)
    return await shop.see(topup)


async def save_card(shop: Shop) -> None:
    """Pay 5000 with a card that may be kept."""
    topup = await shop.begin("stripe", save_method=True)
    shop.psp.till.pay(shop.checkout(topup))
    await wait_for_state(shop, topup, "paid")

    async def kept() -> bool:
        return bool((await shop.ask("GET", "/v1/wallet/auto-topup"))[1]["method"] == "visa …4242")

    await wait_for(shop, kept)


async def switch_on(shop: Shop) -> None:
    wanted = {"enabled": True, "threshold": "6000", "amount": "2000"}
    status, answer = await shop.ask("PUT", "/v1/wallet/auto-topup", json=wanted)
    assert status == 200, answer


async def begun(shop: Shop) -> dict[str, Any]:
    """Return the top-up that the wallet began by itself."""
    found: list[str] = []

    async def there() -> bool:
        last = (await shop.ask("GET", "/v1/wallet/auto-topup"))[1]["last_topup_id"]
        found[:] = [last] if last else []
        return bool(found)

    await wait_for(shop, there)
    return {"id": found[0]}


def charges(shop: Shop) -> list[Any]:
    return [item for item in shop.psp.books.payments.values() if item.checkout_id is None]


async def test_a_bank_that_would_ask_the_owner(shop: Shop) -> None:
    await save_card(shop)
    shop.psp.till.decline_next("authentication_required")
    await switch_on(shop)
    found = await wait_for_state(shop, await begun(shop), "failed")
    assert found["note"].startswith("stripe refuses: Your card")
    assert found["note"].endswith("(authentication_required)")
    assert await shop.balance() == "5000"
    await shop.agree()


async def test_a_declined_charge_whose_answer_was_lost(shop: Shop) -> None:
    await save_card(shop)
    shop.psp.webhooks.hold()
    shop.psp.till.decline_next()
    shop.psp.faults.tell(Fault("stripe", "lost", times=1, path="payment_intents", method="POST"))
    await switch_on(shop)
    await wait_for_state(shop, await begun(shop), "failed")
    assert [item.status for item in charges(shop)] == ["failed"]
    assert await shop.balance() == "5000"
    await shop.agree()


async def test_a_slow_bank(shop: Shop) -> None:
    good, bad = await shop.begin("stripe"), await shop.begin("stripe")
    for topup in (good, bad):
        async with shop.client.post(topup["url"], data={"do": "pending"}) as page:
            assert page.status == 200
    await shop.quiet()
    assert [(await shop.see(item))["state"] for item in (good, bad)] == ["pending", "pending"]
    assert await shop.balance() == "0"
    shop.psp.till.settle(shop.psp.till.find_payment(good["reference"]))
    shop.psp.till.fail(shop.psp.till.find_payment(bad["reference"]))
    await shop.quiet()
    assert [(await shop.see(item))["state"] for item in (good, bad)] == ["paid", "failed"]
    assert await shop.balance() == "5000"
    await shop.agree()


async def test_a_declined_card_and_then_another(shop: Shop) -> None:
    topup = await shop.begin("stripe")
    shop.psp.till.decline(shop.checkout(topup))
    await shop.quiet()
    assert (await shop.see(topup))["state"] == "pending", "the page is open yet"
    shop.psp.till.pay(shop.checkout(topup))
    await shop.quiet()
    assert ((await shop.see(topup))["state"], await shop.balance()) == ("paid", "5000")
    await shop.agree()


@pytest.mark.parametrize("told", [True, False])
async def test_a_page_that_expires(shop: Shop, told: bool) -> None:
    topup = await shop.begin("stripe")
    if not told:
        shop.psp.webhooks.hold()
    shop.psp.till.expire(shop.checkout(topup))
    if told:
        await shop.quiet()
        assert (await shop.see(topup))["state"] == "expired"
    found = await wait_for_state(shop, topup, "expired")
    assert found["note"] == "it was not paid in time"
    assert await shop.balance() == "0"


async def test_an_inquiry_takes_nothing_and_a_dispute_does(shop: Shop) -> None:
    topup = await shop.begin("stripe")
    payment = shop.psp.till.pay(shop.checkout(topup))
    await shop.quiet()

    async def wallet() -> tuple[str, str]:
        await shop.quiet()
        await shop.agree()
        _, found = await shop.ask("GET", "/v1/wallet")
        return found["posted"], found["status"]

    dropped = shop.psp.till.dispute(payment, inquiry=True)
    assert await wallet() == ("5000", "active")
    shop.psp.till.remind(dropped)
    shop.psp.till.end_inquiry(dropped, disputed=False)
    assert await wallet() == ("5000", "active")
    dispute = shop.psp.till.dispute(payment, 200000, inquiry=True)
    assert await wallet() == ("5000", "active")
    shop.psp.till.end_inquiry(dispute, disputed=True)
    assert await wallet() == ("3000", "frozen")
    shop.psp.till.remind(dispute)
    assert await wallet() == ("3000", "frozen")
    shop.psp.till.lose(dispute)
    assert await wallet() == ("3000", "frozen")


async def test_a_fee_that_comes_late_and_in_dollars(shop: Shop) -> None:
    shop.psp.stripe.settlement = Settlement("USD", Decimal("0.00065"))
    shop.psp.stripe.balances_wait = True
    topup = await shop.begin("stripe", "100000")
    payment = shop.psp.till.pay(shop.checkout(topup))
    await shop.quiet()
    assert (await shop.balance(), await fee(shop)) == ("100000", (None, None))
    shop.psp.stripe.balances_wait = False
    shop.psp.till.tell_balance(payment)
    await shop.quiet()
    assert await fee(shop) == (2_190_000_000, "USD")
    await shop.agree()


async def fee(shop: Shop) -> tuple[int | None, str | None]:
    async with shop.office.database.connection() as connection:
        row = await connection.fetchrow("SELECT fee_nano, fee_currency FROM payment_credits")
    return row["fee_nano"], row["fee_currency"]


async def test_what_webhooks_missed_is_swept(shop: Shop) -> None:
    topup = await shop.begin("stripe")
    shop.psp.webhooks.hold()
    payment = shop.psp.till.pay(shop.checkout(topup))
    await wait_for_state(shop, topup, "paid")
    shop.psp.till.refund(payment, 100000)
    dispute = shop.psp.till.dispute(payment, 50000)
    await shop.proxy.services.payments.sweep()
    assert await shop.balance() == "3500"
    shop.psp.till.win(dispute)
    await shop.proxy.services.payments.sweep()
    assert await shop.balance() == "4000"
    await shop.agree()
