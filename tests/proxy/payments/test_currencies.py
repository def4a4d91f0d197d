"""Every currency goes the whole way: paid in, spent on a call, charged, refunded to the wallet and to the payer."""

import asyncio
import dataclasses
from decimal import Decimal
from typing import Any

from billing.ids import parse_id
from billing.money import get_currency, parse_amount
from billing.payments.refunds import Refunds
from billing.payments.topup_limits import default_limits
from billing.payments.units import UnsupportedCurrencyError, get_payment_unit
from config.settings import Settings
from scripts.office import Office
from scripts.sim.payments.currencies import PROVIDERS, Provider
from tests.support.books import check_books
from tests.support.currencies import RATES
from tests.support.payers import make_payer, set_rate
from tests.support.shop import Shop, open_shop

MARKUP_BPS = 250


def takes(provider: Provider, currency: str) -> bool:
    try:
        get_payment_unit(currency, provider)
    except UnsupportedCurrencyError:
        return False
    return True


async def test_every_currency_by_every_provider_that_takes_it(settings: Settings, office: Office) -> None:
    pairs = [
        (currency, provider)
        for currency in ("USD", *RATES)
        for provider in PROVIDERS
        if takes(provider, currency)
    ]
    assert {currency for currency, _ in pairs} == {"USD", *RATES} == set(default_limits())
    assert {provider for _, provider in pairs} == set(PROVIDERS)
    for currency, rate in RATES.items():
        await set_rate(office, currency, rate, MARKUP_BPS)
    async with open_shop(settings, office) as shop:
        for currency, provider in pairs:
            payer = await make_payer(office, amount="0", currency=currency)
            await go_the_whole_way(dataclasses.replace(shop, payer=payer), provider, currency)
        await shop.agree()


async def go_the_whole_way(shop: Shop, provider: Provider, currency: str) -> None:
    """Pay in, spend, give the charge back, and send a half of what was paid back."""
    whole, finest = parse_amount(default_limits()[currency][1]), 10 ** (9 - get_currency(currency).exponent)
    step_nano = max(get_payment_unit(currency, provider).step_nano, finest)
    amount_nano = whole // 10 // step_nano * step_nano + step_nano  # to the last decimal that there is
    amount = f"{Decimal(amount_nano).scaleb(-9).normalize():f}"
    topup = await shop.begin(provider, amount, currency=currency)
    payment = shop.psp.till.pay(shop.checkout(topup))
    await shop.quiet()
    assert await shop.balance() == amount, (currency, provider)

    body = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "What is money?"}]}
    status, answer = await shop.ask("POST", "/v1/chat/completions", json=body)
    assert status == 200, (currency, answer)
    call = (await shop.ask("GET", "/v1/wallet/transactions"))[1]["data"][0]
    charge, cost = -parse_amount(call["amount"], allow_negative=True), Decimal(call["cost_usd"])
    exact = cost * Decimal(RATES.get(currency, "1")) * (1 if currency == "USD" else Decimal("1.025"))
    assert exact <= Decimal(charge).scaleb(-9) < exact + Decimal("1e-9"), (currency, charge, exact)
    assert parse_amount(await shop.balance()) == amount_nano - charge

    await refund_call(shop, call["call_id"])
    assert await shop.balance() == amount

    back_nano = amount_nano // 2 // step_nano * step_nano
    txn_id = payment.id if provider == "stripe" else str(payment.number)
    refunds = Refunds(shop.office.database)
    await refunds.begin(provider, txn_id, amount_nano=back_nano, reason="they asked")
    shop.proxy.services.payments.ring()
    async with asyncio.timeout(15):
        while not shop.psp.books.refunds_of(payment) or await unsettled(shop):
            await asyncio.sleep(0.02)
    assert shop.psp.books.refunded_minor(payment) * (amount_nano // payment.amount_minor) == back_nano
    assert parse_amount(await shop.balance()) == amount_nano - back_nano
    await check_books(shop.office)


async def refund_call(shop: Shop, call_id: str) -> Any:
    return await shop.proxy.services.operator.corrections.refund(
        parse_id(call_id, "call"), amount_nano=None, reason="not what they wanted", key=None
    )


async def unsettled(shop: Shop) -> int:
    async with shop.office.database.connection() as connection:
        found = await connection.fetchval("SELECT count(*) FROM payment_reversals WHERE state <> 'final'")
    return int(found)
