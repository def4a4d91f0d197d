"""Who comes back from a payment page sees at once that it was paid, and cannot make Tuma ask too often or wait too long."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from config.settings import Settings
from scripts.office import Office
from scripts.sim.payments.currencies import PROVIDERS, Provider
from scripts.sim.payments.faults import Fault
from tests.support.running import Running, run_proxy
from tests.support.shop import Shop, open_shop

_MANY = 1_000


@pytest.fixture
async def shop(settings: Settings, office: Office) -> AsyncIterator[Shop]:
    # Nobody but those who wait makes Tuma ask, here neither.
    async with open_shop(settings, office, poll_s=3600) as opened:
        yield opened


def count_questions(shop: Shop, provider: Provider) -> Fault:
    """Return a fault that does nothing but count down with every question."""
    counter = Fault(provider, "slow", times=_MANY, method="GET")
    shop.psp.faults.tell(counter)
    return counter


def asked(counter: Fault) -> int:
    return _MANY - (counter.times or 0)


def with_payments(shop: Shop, **changes: Any) -> Settings:
    settings = shop.proxy.services.settings
    # Nobody but those who wait makes Tuma ask.
    payments = {"look_s": 3600, "poll_s": 3600, **changes}
    return settings.model_copy(update={"payments": settings.payments.model_copy(update=payments)})


async def see(shop: Shop, proxy: Running, topup: dict[str, Any]) -> str:
    url = f"{proxy.base_url}/v1/wallet/topups/{topup['id']}"
    async with shop.client.get(url, headers={"Authorization": f"Bearer {shop.payer.secret}"}) as answer:
        found = await answer.json()
        assert answer.status == 200, found
        return str(found["state"])


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_who_waits_sees_a_payment_of_which_no_webhook_told(shop: Shop, provider: Provider) -> None:
    shop.psp.webhooks.hold()
    topup = await shop.begin(provider)
    async with run_proxy(with_payments(shop)) as proxy:
        assert await see(shop, proxy, topup) == "pending"
        shop.psp.till.pay(shop.checkout(topup))
        async with asyncio.timeout(20):
            while await see(shop, proxy, topup) != "paid":
                await asyncio.sleep(0.05)
    assert await shop.balance() == "5000"
    await shop.agree()


async def test_many_who_wait_ask_once_over_all_workers(shop: Shop) -> None:
    topup = await shop.begin("paystack")
    counter = count_questions(shop, "paystack")
    settings = with_payments(shop, waiting_pause_s=3600)
    async with run_proxy(settings) as one, run_proxy(settings) as other:
        before = asked(counter)
        states = await asyncio.gather(*(see(shop, proxy, topup) for proxy in (one, other) for _ in range(20)))
        assert set(states) == {"pending"}
        assert asked(counter) - before == 1


async def test_what_has_ended_is_not_asked_about(shop: Shop) -> None:
    topup = await shop.begin("paystack")
    shop.psp.till.pay(shop.checkout(topup))
    await shop.quiet()
    counter = count_questions(shop, "paystack")
    async with run_proxy(with_payments(shop, waiting_pause_s=0.001)) as proxy:
        for _ in range(3):
            assert await see(shop, proxy, topup) == "paid"
    assert asked(counter) == 0


async def test_a_provider_that_does_not_answer_holds_nobody_up_for_long(shop: Shop) -> None:
    topup = await shop.begin("paystack")
    shop.psp.faults.tell(Fault("paystack", "slow", method="GET", delay_s=3600))
    async with run_proxy(with_payments(shop, waiting_s=0.2, timeout_s=3600)) as proxy, asyncio.timeout(60):
        assert await see(shop, proxy, topup) == "pending"
        assert proxy.services.status_checks._asking == 0


async def test_few_questions_wait_at_once(shop: Shop) -> None:
    topups = [await shop.begin("paystack") for _ in range(3)]
    shop.psp.faults.tell(Fault("paystack", "slow", method="GET", delay_s=3600))
    async with asyncio.timeout(60):
        async with run_proxy(with_payments(shop, waiting_s=3600, waiting_max=2, timeout_s=3600)) as proxy:
            waiting = [asyncio.create_task(see(shop, proxy, topup)) for topup in topups[:2]]
            while proxy.services.status_checks._asking < 2:
                await asyncio.sleep(0.01)
            assert await see(shop, proxy, topups[2]) == "pending"
            assert proxy.services.status_checks._asking == 2
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_provider_that_is_away_is_no_error_of_whoever_waits(shop: Shop) -> None:
    topup = await shop.begin("paystack")
    shop.psp.faults.tell(Fault("paystack", "down", method="GET"))
    async with run_proxy(with_payments(shop)) as proxy:
        assert await see(shop, proxy, topup) == "pending"
