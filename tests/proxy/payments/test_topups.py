"""A person pays into their wallet: over real sockets, against simulated providers with books of their own."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from billing.books.opening_balance import record_openings
from billing.payments.refunds import Refunds
from config.settings import Settings
from scripts.office import Office
from scripts.sim.payments.currencies import PROVIDERS, Provider
from scripts.sim.payments.faults import Fault
from tests.support.payers import make_payer, sync_models
from tests.support.running import run_proxy
from tests.support.shop import Shop, open_shop

OFFERED = PROVIDERS


@pytest.fixture
async def shop(settings: Settings, office: Office) -> AsyncIterator[Shop]:
    async with open_shop(settings, office) as opened:
        yield opened


@pytest.mark.parametrize("provider", OFFERED)
async def test_a_top_up_from_the_page_to_the_wallet(shop: Shop, provider: Provider) -> None:
    topup = await shop.begin(provider)
    async with shop.client.get(topup["url"]) as page:
        assert "5000 NGN" in await page.text()
    async with shop.client.post(topup["url"], data={"do": "pay"}) as page:
        assert page.status == 200
    await shop.quiet()
    assert await shop.balance() == "5000"
    found = await shop.see(topup)
    assert (found["state"], found["amount"], found["currency"]) == ("paid", "5000", "NGN")
    _, listed = await shop.ask("GET", "/v1/wallet/transactions")
    assert [(row["kind"], row["amount"], row["balance"]) for row in listed["data"]] == [
        ("topup", "5000", "5000")
    ]
    await shop.agree()


@pytest.mark.parametrize("provider", OFFERED)
async def test_one_event_a_hundred_times_at_once(shop: Shop, provider: Provider) -> None:
    topup = await shop.begin(provider)
    shop.psp.webhooks.hold()
    shop.psp.till.pay(shop.checkout(topup))
    event = shop.last_event()
    statuses = await shop.psp.webhooks.deliver(event.id, times=100)
    assert set(statuses) == {200}
    await shop.quiet()
    assert await shop.balance() == "5000"
    await shop.agree()


@pytest.mark.parametrize("provider", OFFERED)
async def test_refund_and_dispute(shop: Shop, provider: Provider) -> None:
    topup = await shop.begin(provider)
    payment = shop.psp.till.pay(shop.checkout(topup))
    await shop.quiet()
    shop.psp.till.refund(payment, 100000)
    await shop.quiet()
    assert await shop.balance() == "4000"
    dispute = shop.psp.till.dispute(payment)
    await shop.quiet()
    _, wallet = await shop.ask("GET", "/v1/wallet")
    assert (wallet["posted"], wallet["status"]) == ("0", "frozen")
    await shop.agree()
    shop.psp.till.win(dispute)
    await shop.quiet()
    _, wallet = await shop.ask("GET", "/v1/wallet")
    assert (wallet["posted"], wallet["status"]) == ("4000", "active")
    await shop.agree()


@pytest.mark.parametrize("provider", OFFERED)
@pytest.mark.parametrize("lost", [False, True])
async def test_our_own_refund(shop: Shop, provider: Provider, lost: bool) -> None:
    topup = await shop.begin(provider)
    payment = shop.psp.till.pay(shop.checkout(topup))
    await shop.quiet()
    if lost:  # the refund is made, and its answer is lost
        shop.psp.faults.tell(Fault(provider, "lost", times=1, path="refund", method="POST"))
        shop.psp.webhooks.hold()
    refunds = Refunds(shop.office.database)
    txn_id = payment.id if provider == "stripe" else str(payment.number)
    await refunds.begin(provider, txn_id, amount_nano=2000 * 10**9, reason="they asked")
    async with asyncio.timeout(20):
        while not shop.psp.books.refunds or await reversal_state(shop) == "requested":
            await due(shop)
            await asyncio.sleep(0.05)
    assert len(shop.psp.books.refunds) == 1
    assert await shop.balance() == "3000"
    await shop.agree()


@pytest.mark.parametrize("provider", ["paystack", "flutterwave"])
async def test_a_refund_is_sent_once_though_nobody_hands_its_note_back(
    shop: Shop, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    api: Any = shop.psp.apis[provider]
    voice, shown = api.voice, api.voice.refund
    monkeypatch.setattr(
        voice, "refund", lambda *of: {**shown(*of), "merchant_note": None, "comment": None}, raising=True
    )
    payment = shop.psp.till.pay(shop.checkout(await shop.begin(provider)))
    await shop.quiet()
    shop.psp.webhooks.hold()
    shop.psp.faults.tell(Fault(provider, "lost", times=1, path="refund", method="POST"))
    refunds = Refunds(shop.office.database)
    await refunds.begin(provider, str(payment.number), amount_nano=2000 * 10**9, reason="asked")
    async with asyncio.timeout(20):
        while not shop.psp.books.refunds or await reversal_state(shop) == "requested":
            await due(shop)
            await asyncio.sleep(0.05)
    await due(shop)
    await shop.proxy.services.payments.work()
    assert len(shop.psp.books.refunds) == 1
    assert await shop.balance() == "3000"
    await shop.agree()


async def reversal_state(shop: Shop) -> str:
    async with shop.office.database.connection() as connection:
        return str(await connection.fetchval("SELECT state FROM payment_reversals"))


async def due(shop: Shop) -> None:
    """Let everything be due at once, as if its pauses were over."""
    async with shop.office.database.transaction() as connection:
        await connection.execute("UPDATE webhook_events SET next_at = now() WHERE state = 'new'")
        await connection.execute("UPDATE payment_intents SET poll_at = now() WHERE poll_at IS NOT NULL")
        await connection.execute("UPDATE payment_reversals SET poll_at = now() WHERE poll_at IS NOT NULL")


@pytest.mark.parametrize("provider", OFFERED)
async def test_a_webhook_that_never_comes(shop: Shop, provider: Provider) -> None:
    topup = await shop.begin(provider)
    shop.psp.webhooks.hold()
    shop.psp.till.pay(shop.checkout(topup))
    async with asyncio.timeout(20):
        while await shop.balance() != "5000":  # nobody asks for the top-up, who could make Tuma look
            await due(shop)
            await asyncio.sleep(0.05)
    assert (await shop.see(topup))["state"] == "paid"
    await shop.agree()


async def test_a_payment_that_contradicts_the_books_hides_no_other(shop: Shop) -> None:
    first, second = await shop.begin("paystack"), await shop.begin("flutterwave")
    shop.psp.till.pay(shop.checkout(first))
    await shop.quiet()
    shop.psp.webhooks.hold()
    odd = shop.psp.till.refund(shop.psp.till.find_payment(first["reference"]), 1000_00)
    await shop.proxy.services.payments.sweep()
    assert await shop.balance() == "4000"
    odd.amount_minor += 1  # it was posted otherwise
    shop.psp.till.pay(shop.checkout(second))
    await shop.proxy.services.payments.sweep()
    assert await shop.balance() == "9000"


@pytest.mark.parametrize("provider", OFFERED)
async def test_what_is_forged_is_refused(shop: Shop, provider: Provider) -> None:
    topup = await shop.begin(provider)
    shop.psp.webhooks.hold()
    shop.psp.till.pay(shop.checkout(topup))
    event = shop.last_event()
    assert await shop.psp.webhooks.forge(event.id, "signature") == 401
    assert await shop.psp.webhooks.forge(event.id, "missing") == 401
    if provider != "flutterwave":  # Flutterwave's v3 header signs no body
        assert await shop.psp.webhooks.forge(event.id, "body") == 401
    assert await shop.waiting() == 0
    # Well signed with ten times the amount: kept, looked into, and what the provider's API says is what counts.
    assert await shop.psp.webhooks.forge(event.id, "amount") == 200
    await shop.quiet()
    assert await shop.balance() == "5000"
    await shop.agree()


@pytest.mark.parametrize("provider", OFFERED)
@pytest.mark.parametrize("kind", ["down", "error", "limited", "lost", "error_after"])
async def test_a_provider_that_fails_while_a_page_is_made(shop: Shop, provider: Provider, kind: Any) -> None:
    shop.psp.faults.tell(Fault(provider, kind, times=1, method="POST"))
    body = {"provider": provider, "amount": "5000"}
    once = {"Idempotency-Key": "mine"}
    status, answer = await shop.ask("POST", "/v1/wallet/topups", json=body, headers=once)
    assert (status, answer["error"]["code"]) == (503, "payment_provider_unavailable")
    status, made = await shop.ask("POST", "/v1/wallet/topups", json=body, headers=once)
    assert (status, made["state"]) == (201, "pending")
    status, again = await shop.ask("POST", "/v1/wallet/topups", json=body, headers=once)
    assert again == made
    shop.psp.till.pay(shop.checkout(made))
    await shop.quiet()
    assert await shop.balance() == "5000"
    await shop.agree()


@pytest.mark.parametrize("provider", OFFERED)
@pytest.mark.parametrize("kind", ["down", "lost", "limited"])
async def test_a_provider_that_fails_when_it_is_asked_about_a_payment(
    shop: Shop, provider: Provider, kind: Any
) -> None:
    topup = await shop.begin(provider)
    shop.psp.faults.tell(Fault(provider, kind, times=2, method="GET"))
    shop.psp.till.pay(shop.checkout(topup))
    async with asyncio.timeout(20):
        while await shop.balance() != "5000" or await shop.waiting():
            await due(shop)
            await asyncio.sleep(0.05)
    await shop.agree()


@pytest.mark.parametrize("provider", OFFERED)
async def test_less_more_twice_and_declined(shop: Shop, provider: Provider) -> None:
    less, twice, declined, more = [await shop.begin(provider, "1000") for _ in range(4)]
    shop.psp.till.pay(shop.checkout(less), amount_minor=50000)
    shop.psp.till.pay(shop.checkout(twice))
    await shop.quiet()
    shop.psp.till.pay(shop.checkout(twice))
    shop.psp.till.decline(shop.checkout(declined))
    shop.psp.till.pay(shop.checkout(more), amount_minor=101500)
    await shop.quiet()
    # What was paid above what was asked is the provider's fee, but for Stripe, which takes none of the payer.
    stripe = provider == "stripe"
    assert await shop.balance() == ("1000" if stripe else "2000")
    states = [(await shop.see(item))["state"] for item in (less, twice, declined, more)]
    assert states[:2] == ["review", "paid"]
    assert states[3] == ("review" if stripe else "paid")
    await shop.agree()


async def test_what_cannot_be_topped_up(shop: Shop) -> None:
    for body, part in (
        ({"provider": "paystack", "amount": "0"}, "least"),
        ({"provider": "paystack", "amount": "99.99"}, "least"),
        ({"provider": "paystack", "amount": "5000001"}, "most"),
        ({"provider": "paystack", "amount": "500.001"}, "decimals"),
        ({"provider": "paystack", "amount": 500.5}, "string"),
        ({"provider": "paystack", "amount": "500", "currency": "GHS"}, "this wallet is in NGN"),
        ({"provider": "paystack", "amount": "500", "currency": "ZZZ"}, "ZZZ"),
        ({"provider": "paystack", "amount": "500", "save_method": True}, "only stripe"),
        ({"provider": "flutterwave", "amount": "500", "save_method": True}, "only stripe"),
        ({"provider": "paypal", "amount": "500"}, "provider"),
        ({"provider": "paystack", "amount": "500", "return_url": "javascript:alert(1)"}, "return_url"),
    ):
        status, answer = await shop.ask("POST", "/v1/wallet/topups", json=body)
        assert status == 400, body
        assert part in answer["error"]["message"], (body, answer)
    assert not shop.psp.books.checkouts


async def test_a_provider_that_is_not_set_up(settings: Settings, office: Office) -> None:
    await sync_models(office)
    await record_openings(office.database, office.upstream)
    payer = await make_payer(office, amount="0", currency="NGN")
    async with run_proxy(settings) as proxy, aiohttp.ClientSession() as client:
        for provider in PROVIDERS:
            async with client.post(f"{proxy.base_url}/webhooks/{provider}", data=b"{}") as answer:
                assert answer.status == 401
                assert (await answer.json())["error"]["code"] == "invalid_signature"
        async with client.post(f"{proxy.base_url}/webhooks/paypal", data=b"{}") as answer:
            assert answer.status == 404
        bearer = {"Authorization": f"Bearer {payer.secret}"}
        body = {"provider": "stripe", "amount": "500"}
        url = f"{proxy.base_url}/v1/wallet/topups"
        async with client.post(url, json=body, headers=bearer) as answer:
            assert answer.status == 400
            assert "not set up" in (await answer.json())["error"]["message"]
