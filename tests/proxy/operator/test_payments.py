"""What an operator does with payments, by ``tuma payments`` and under ``/admin/payments``; and what the house earned."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from click.testing import CliRunner

from billing.books.opening_balance import record_openings
from billing.errors import PaymentsUnavailableError
from billing.money import parse_amount
from billing.payments.refunds import Refunds
from config.settings import Settings
from scripts.cli.main import main
from scripts.office import Office
from scripts.sim.payments.faults import Fault
from scripts.sim.payments.server import SimulatedPayments
from tests.proxy.account.test_keys import CHAT
from tests.proxy.operator.test_admin import TOKEN, with_admin
from tests.proxy.payments.test_topups import due
from tests.support.payers import make_payer, set_rate, sync_models
from tests.support.running import run_proxy
from tests.support.shop import Shop


class Counter(Shop):
    """A shop with Paystack alone, and its operator."""

    async def order(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        bearer = {"Authorization": f"Bearer {TOKEN}", **headers}
        async with self.client.request(
            method, f"{self.proxy.base_url}{path}", json=body, headers=bearer
        ) as answer:
            return answer.status, await answer.json()

    async def tuma(self, *words: str) -> tuple[int, dict[str, Any]]:
        settings = self.proxy.services.settings
        environment = {
            "TUMA_POSTGRES__DSN": settings.postgres.dsn.get_secret_value(),
            "TUMA_REDIS__URL": settings.redis.url.get_secret_value(),
            "TUMA_PAYSTACK__SECRET_KEY": self.psp.secrets.paystack_key,
            "TUMA_PAYSTACK__BASE_URL": self.psp.paystack_url,
        }
        result = await asyncio.to_thread(CliRunner().invoke, main, ["--json", *words], env=environment)
        assert self.psp.secrets.paystack_key not in result.output
        return result.exit_code, json.loads(result.stdout)

    async def pay(self, amount: str = "5000", **more: Any) -> Any:
        payment = self.psp.till.pay(self.checkout(await self.begin("paystack", amount)), **more)
        await self.quiet()
        return payment


@pytest.fixture
async def counter(settings: Settings, office: Office) -> AsyncIterator[Counter]:
    await sync_models(office)
    await set_rate(office, "NGN", "1600", markup_bps=250)
    await record_openings(office.database, office.upstream)
    payer = await make_payer(office, amount="0", currency="NGN")
    async with SimulatedPayments() as psp, aiohttp.ClientSession() as client:
        changed = Settings.model_validate(
            {
                **with_admin(settings).model_dump(),
                "paystack": {"secret_key": psp.secrets.paystack_key, "base_url": psp.paystack_url},
                # The worker works when it is woken: what a command does, no server does first.
                "payments": {"look_s": 30, "poll_s": 30, "timeout_s": 2},
            }
        )
        async with run_proxy(changed) as proxy:
            psp.webhooks.to = proxy.base_url
            yield Counter(office, proxy, psp, payer, client)


async def test_a_payment_in_review_is_accepted(counter: Counter) -> None:
    payment = await counter.pay(amount_minor=250_000)
    txn = str(payment.number)
    assert await counter.balance() == "0"
    status, listed = await counter.order("GET", f"/admin/payments?state=review&user={counter.payer.user_id}")
    (row,) = listed["data"]
    assert (status, row["provider_txn_id"], row["state"], row["asked"], row["paid"], row["suspense"]) == (
        *(200, txn, "review", "5000"),
        *("2500", "2500"),
    )
    assert (await counter.tuma("payments", "reviews"))[1]["reviews"][0]["suspense"] == "2500"
    _, events = await counter.order("GET", "/admin/payments/webhooks")
    (event,) = events["data"]
    assert (event["state"], event["deliveries"]) == ("review", 1)
    # The mirror is warm, and follows.
    assert await counter.proxy.services.holds.find_available(*who(counter)) in (None, 0)
    path = f"/admin/payments/paystack/{txn}"
    status, done = await counter.order("POST", f"{path}/accept", {"reason": "half is better than nothing"})
    assert (status, done["accepted"], done["state"], done["suspense"]) == (200, "2500", "resolved", "0")
    status, again = await counter.order("POST", f"{path}/accept", {"reason": "again"})
    assert (status, again["error"]["message"]) == (400, "nothing of this payment is in suspense")
    assert await counter.balance() == "2500"
    status, _ = await counter.order("POST", f"/admin/payments/webhooks/{event['id']}/retry")
    assert status == 200
    await counter.quiet()
    _, shown = await counter.tuma("payments", "show", row["intent_id"])
    assert [item["state"] for item in shown["webhooks"]] == ["done"]
    (shown_payment,) = shown["payments"]
    assert [
        (item["kind"], item["account"], item["amount"])
        for item in shown_payment["postings"]
        if item["kind"] != "payment_fee"
    ] == [
        ("topup", "suspense", "2500"),
        ("topup", "psp_clearing", "-2500"),
        ("topup", "wallet", "2500"),
        ("topup", "suspense", "-2500"),
    ]
    assert (await counter.tuma("payments", "show", "paystack", txn))[1] == shown
    assert (await counter.order("GET", f"/admin/payments/topups/{shown['intent']['reference']}"))[1] == shown
    _, audit = await counter.order("GET", "/admin/audit?actor=admin")
    assert {"payment_credits", "payment_intents"} <= {item["subject"] for item in audit["data"]}
    assert all(item["request_id"] for item in audit["data"])
    await counter.agree()


def who(counter: Counter) -> tuple[Any, Any]:
    return counter.payer.user_id, counter.payer.wallet_id


async def test_a_refund_is_sent_once_however_often_it_is_ordered(counter: Counter) -> None:
    txn = str((await counter.pay()).number)
    words = ("payments", "refund", "paystack", txn, "--amount", "1000", "--reason", "asked", "--key", "k1")
    code, first = await counter.tuma(*words)
    assert (code, first["sent"], first["refunded"], first["reversed"]) == (0, "yes", "1000", "1000")
    code, again = await counter.tuma(*words)
    assert (code, again["id"]) == (0, first["id"])
    assert len(counter.psp.books.refunds) == 1
    code, other = await counter.tuma(*words[:5], "2000", *words[6:])
    assert (code, other["error"]["type"]) == (1, "InputError")
    # Over HTTP the same, sent by the server's own worker; many at once are one.
    path, body = f"/admin/payments/paystack/{txn}/refund", {"amount": "500", "reason": "asked"}
    answers = await asyncio.gather(
        *(counter.order("POST", path, body, **{"Idempotency-Key": "k2"}) for _ in range(8))
    )
    assert {status for status, _ in answers} == {200}
    assert len({answer["id"] for _, answer in answers}) == 1
    async with asyncio.timeout(20):
        while len(counter.psp.books.refunds) < 2:
            await asyncio.sleep(0.05)
    await counter.quiet()
    await due(counter)
    assert await counter.balance() == "3500"
    _, answer = await counter.order("POST", path, {"amount": "3500.01", "reason": "too much"})
    assert answer["error"]["message"] == "of this payment 3500 is left"
    assert len(counter.psp.books.refunds) == 2
    await counter.agree()


async def test_a_refund_that_the_provider_refuses_or_does_not_hear(counter: Counter) -> None:
    payment = await counter.pay()
    txn = str(payment.number)
    counter.psp.webhooks.hold()
    counter.psp.till.refund(payment, 400_000)  # on the provider's page, and nobody told us
    words = ("payments", "refund", "paystack", txn, "--reason", "asked")
    code, refused = await counter.tuma(*words, "--amount", "2000")
    assert (code, refused["refund_state"], refused["refunded"]) == (0, "undone", "0")
    assert refused["sent"].startswith("no: paystack refuses")
    assert await counter.balance() == "1000"
    counter.psp.faults.tell(Fault("paystack", "down", times=1))
    code, later = await counter.tuma(*words, "--amount", "300", "--key", "k")
    assert (code, later["refund_state"]) == (0, "requested")
    assert later["sent"].startswith("not yet: paystack answered with status 503")
    assert await counter.balance() == "700"
    await due(counter)
    assert (await counter.tuma(*words, "--amount", "300", "--key", "k"))[1]["sent"] == "yes"
    assert await counter.balance() == "700"
    await counter.agree()


async def test_who_sends_a_refund_stops_before_another_may_begin(
    counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paystack knows no idempotency keys: two that look, and then send, would send two."""
    txn = str((await counter.pay()).number)
    refund = await Refunds(counter.office.database).begin("paystack", txn, reason="asked")
    worker = counter.proxy.services.payments
    counter.psp.faults.tell(Fault("paystack", "slow", times=1, path="refund", method="GET", delay_s=5))
    monkeypatch.setattr("billing.payments.worker.WORK_MAX_S", 0.2)
    with pytest.raises(PaymentsUnavailableError, match="too long"):
        await worker.send_refund(refund.id)
    monkeypatch.undo()
    assert await worker.send_refund(refund.id) is None  # it is not due yet
    await due(counter)
    assert await worker.send_refund(refund.id) == ""
    assert len(counter.psp.books.refunds) == 1
    await counter.quiet()
    await counter.agree()


async def test_what_is_not_there_and_what_makes_no_sense(counter: Counter) -> None:
    for method, path, body, wanted in (
        ("GET", "/admin/payments/paystack/1", None, (404, "provider")),
        ("GET", "/admin/payments/paypal/1", None, (404, "paypal")),
        ("GET", "/admin/payments/topups/x", None, (404, "top-up")),
        ("GET", "/admin/payments?state=lost", None, (400, "state")),
        ("GET", "/admin/payments?since=soon", None, (400, "since")),
        ("GET", "/admin/payments/webhooks?state=lost", None, (400, "state")),
        ("POST", "/admin/payments/paystack/1/refund", {"reason": "x"}, (404, "payment 1")),
        ("POST", "/admin/payments/stripe/1/refund", {"reason": "x"}, (400, "not set up")),
        ("POST", "/admin/payments/paystack/1/accept", {"reason": ""}, (400, "reason")),
        ("POST", "/admin/payments/paystack/1/refund", {"reason": "x", "amount": 1.5}, (400, "amount")),
        ("POST", f"/admin/payments/webhooks/{counter.payer.user_id}/retry", None, (400, "webhook")),
    ):
        status, answer = await counter.order(method, path, body)
        assert status == wanted[0], (path, answer)
        if wanted[1] != "provider":
            assert wanted[1] in answer["error"]["message"], (path, answer)


async def test_the_markup_is_a_line_of_its_own(counter: Counter) -> None:
    payment = await counter.pay()
    for _ in range(2):
        assert (await counter.ask("POST", "/v1/chat/completions", json=CHAT))[0] == 200
    await counter.proxy.quiet()
    async with counter.office.database.connection() as connection:
        calls = await connection.fetch("SELECT id, cost_nanousd, charge_nano, spread_nano FROM calls")
    naira, dollars = await currencies(counter)
    spread, charged = sum(row["spread_nano"] for row in calls), sum(row["charge_nano"] for row in calls)
    assert parse_amount(naira["fx_spread"]) == spread > 0
    fee = parse_amount(naira["psp_fee"].removeprefix("-"))
    assert naira["psp_fee"].startswith("-")
    assert fee == payment.fee_minor * 10**7
    assert naira["wallets"] == await counter.balance()
    assert parse_amount(naira["wallets"]) == 5000 * 10**9 - charged
    assert signed(naira["earned"]) == spread - fee
    cost = sum(row["cost_nanousd"] for row in calls)
    assert (signed(dollars["revenue"]), signed(dollars["provider_cost"])) == (cost, -cost)
    assert dollars["earned"] == "0"
    # A call given back is the house's loss, and earns no markup.
    status, _ = await counter.order("POST", f"/admin/calls/{calls[0]['id']}/refund", {"reason": "sorry"})
    assert status == 200
    naira, dollars = await currencies(counter)
    assert parse_amount(naira["fx_spread"]) == calls[1]["spread_nano"]
    assert signed(dollars["earned"]) == signed(dollars["house_loss"]) == -calls[0]["cost_nanousd"]
    _, later = await counter.order("GET", "/admin/revenue?since=2999-01-01")
    _, before = await counter.order("GET", "/admin/revenue?until=1969-01-01T00:00:00Z")
    assert later["currencies"] == before["currencies"] == []
    assert (await counter.order("GET", "/admin/revenue?since=0001-01-01"))[1]["currencies"] == [
        naira,
        dollars,
    ]
    await counter.agree()


def signed(amount: str) -> int:
    return -parse_amount(amount[1:]) if amount.startswith("-") else parse_amount(amount)


async def currencies(counter: Counter) -> list[dict[str, Any]]:
    """Naira and dollars, as the command and HTTP tell; every currency sums to zero, line by line."""
    _, told = await counter.order("GET", "/admin/revenue")
    assert (await counter.tuma("revenue"))[1]["currencies"] == told["currencies"]
    for row in told["currencies"]:
        lines = {name: row[name] for name in row.keys() - {"currency", "earned", "others", "sum"}}
        assert sum(map(signed, [*lines.values(), *row["others"].values()])) == 0
        assert row["sum"] == "0"
    assert [row["currency"] for row in told["currencies"]] == ["NGN", "USD"]
    return list(told["currencies"])
