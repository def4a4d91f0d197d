"""Stripe is asked by its own package, over a real socket: each thing once, exactly, and nothing is told that need not be."""

import dataclasses
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import stripe
from stripe import _telemetry_id

from billing.errors import InputError, PaymentsUnavailableError
from billing.ids import new_id
from billing.money import NANO
from billing.payments.payment import Refund
from billing.payments.provider_api import PaymentRefusedError, ReferenceUsedError, SavedMethodApi
from proxy.payments.stripe import _takes_money
from scripts.sim.payments.faults import Fault
from scripts.sim.payments.server import SimulatedPayments
from scripts.sim.payments.stripe.objects import Settlement
from tests.unit.payments.stripe_client import EMAIL, KEY, Canned, Counter, charge_of, make_api, wish


@pytest.fixture
async def counter() -> AsyncIterator[Counter]:
    async with SimulatedPayments() as psp:
        made = Counter(psp)
        yield made
        await made.api.close()


# Pages


async def test_a_page_whose_answer_was_lost_is_the_same_again(counter: Counter) -> None:
    intent = wish()
    counter.psp.faults.tell(Fault("stripe", "lost", times=1))
    with pytest.raises(PaymentsUnavailableError):
        await counter.api.create_page(intent, email=EMAIL, return_url=None)
    pages = [await counter.api.create_page(intent, email=EMAIL, return_url=None) for _ in range(2)]
    (checkout,) = counter.psp.books.checkouts.values()
    assert {page.id for page in pages} == {checkout.id}
    assert (checkout.reference, checkout.amount_minor, checkout.currency) == (intent.reference, 5000, "USD")
    assert (checkout.email, checkout.success_url) == (EMAIL, "https://shop.example/done")
    assert abs(checkout.expires_s - intent.expires_at.timestamp()) <= 1


async def test_a_page_that_was_asked_for_otherwise_takes_another_reference(counter: Counter) -> None:
    intent = wish()
    await counter.api.create_page(intent, email=EMAIL, return_url=None)
    with pytest.raises(ReferenceUsedError):
        await counter.api.create_page(intent, email=EMAIL, return_url="https://elsewhere.example")
    again = dataclasses.replace(intent, attempt=2)
    page = await counter.api.create_page(again, email=EMAIL, return_url="https://elsewhere.example")
    assert counter.psp.books.checkouts[page.id].success_url == "https://elsewhere.example"


@pytest.mark.parametrize("lasts_s", [1_800, 3_600, 86_400])
@pytest.mark.parametrize("age_s", [0, 500, 1_799, 3_599, 86_399])
async def test_a_page_is_open_for_as_long_as_stripe_lets_it(
    counter: Counter, lasts_s: float, age_s: float
) -> None:
    begun = datetime.now(UTC) - timedelta(seconds=age_s)
    intent = wish(created_at=begun, expires_at=begun + timedelta(seconds=lasts_s))
    _, checkout = await counter.open_page(intent)  # Stripe refuses less than 30 minutes and more than a day
    if age_s <= lasts_s - 2_000:
        assert abs(checkout.expires_s - min(intent.expires_at.timestamp(), begun.timestamp() + 86_280)) <= 1


@pytest.mark.parametrize(
    ("currency", "amount", "minor"),
    [("USD", "12.34", 1234), ("JPY", "1500", 1500), ("UGX", "5000", 500000), ("KWD", "1.23", 1230)],
)
async def test_amounts_are_in_stripes_units(counter: Counter, currency: str, amount: str, minor: int) -> None:
    amount_nano = int(Decimal(amount) * NANO)
    intent, checkout = await counter.open_page(wish(currency=currency, amount_nano=amount_nano))
    assert checkout.amount_minor == minor
    counter.psp.till.pay(checkout)
    payment = await counter.look(intent)
    assert (payment.state, payment.amount_nano, payment.currency) == ("succeeded", amount_nano, currency)
    assert payment.fee_currency == currency


async def test_how_a_page_goes_on(counter: Counter) -> None:
    till = counter.psp.till
    intent, checkout = await counter.open_page(wish())
    assert await counter.api.find(wish()) == [], "nothing is known of an intent without a page"
    seen = [await counter.look(intent)]
    till.decline(checkout)
    seen.append(await counter.look(intent))
    till.pay(checkout, pending=True)
    seen.append(await counter.look(intent))
    till.settle(counter.psp.books.payments[checkout.payment_ids[0]])
    seen.append(await counter.look(intent))
    assert [item.state for item in seen] == ["pending", "pending", "pending", "succeeded"]
    assert seen[-1].id == checkout.payment_ids[0]

    intent, checkout = await counter.open_page(wish())
    payment = till.pay(checkout, pending=True)
    till.fail(payment)
    assert (await counter.look(intent)).state == "failed"

    for declined in (False, True):
        intent, checkout = await counter.open_page(wish())
        if declined:
            till.decline(checkout)
        till.expire(checkout)
        found = await counter.look(intent)
        assert (found.state, found.id, found.reference) == ("expired", checkout.id, intent.reference)


# What became of the money


async def test_the_fee_is_in_the_currency_that_is_settled_in(counter: Counter) -> None:
    counter.psp.stripe.settlement = Settlement("USD", Decimal("0.00065"))
    intent, checkout = await counter.open_page(wish(currency="NGN", amount_nano=100_000 * NANO))
    counter.psp.till.pay(checkout)
    payment = await counter.look(intent)
    assert (payment.amount_nano, payment.currency) == (100_000 * NANO, "NGN")
    # 65 dollars, of which 2.9 % and 30 cents are kept.
    assert (payment.fee_nano, payment.fee_currency) == (2_190_000_000, "USD")


async def test_a_fee_that_is_not_known_yet(counter: Counter) -> None:
    counter.psp.stripe.balances_wait = True
    intent, checkout = await counter.open_page(wish())
    counter.psp.till.pay(checkout)
    payment = await counter.look(intent)
    assert (payment.state, payment.fee_nano, payment.fee_currency) == ("succeeded", None, None)


async def test_disputes(counter: Counter) -> None:
    till = counter.psp.till
    intent, checkout = await counter.open_page(wish())
    paid = till.pay(checkout)

    async def states() -> list[tuple[str, int, str]]:
        found = (await counter.look(intent)).reversals
        return [(item.kind, item.amount_nano // NANO, item.state) for item in found]

    dropped = till.dispute(paid, 3000, inquiry=True)
    assert await states() == [], "an inquiry takes no money"
    till.remind(dropped)
    assert await states() == []
    till.end_inquiry(dropped, disputed=False)
    assert await states() == []
    asked = till.dispute(paid, 1000, inquiry=True)
    till.end_inquiry(asked, disputed=True)
    assert await states() == [("dispute", 10, "open")]
    till.remind(asked)
    assert await states() == [("dispute", 10, "open")]
    till.win(asked)
    assert await states() == [("dispute", 10, "undone")]
    till.lose(till.dispute(paid, 2000))
    assert sorted(await states()) == [("dispute", 10, "undone"), ("dispute", 20, "final")]


async def test_refunds_once_each(counter: Counter) -> None:
    intent, checkout = await counter.open_page(wish())
    paid = counter.psp.till.pay(checkout)
    counter.psp.till.refunds_wait = True
    refund = Refund(new_id(), "stripe", paid.id, 20 * NANO, "requested")
    counter.psp.faults.tell(Fault("stripe", "lost", times=1))
    with pytest.raises(PaymentsUnavailableError):
        await counter.api.refund(refund, "USD")
    await counter.api.refund(refund, "USD")
    (item,) = (await counter.look(intent)).reversals
    assert (item.amount_nano, item.state, item.ours) == (20 * NANO, "open", refund.id)
    (sent,) = counter.psp.books.refunds.values()
    counter.psp.till.end_refund(sent)
    assert [item.state for item in (await counter.look(intent)).reversals] == ["final"]
    counter.psp.till.end_refund(sent, failed=True)
    assert [item.state for item in (await counter.look(intent)).reversals] == ["undone"]
    with pytest.raises(PaymentRefusedError, match="of this payment 5000 is left"):
        await counter.api.refund(Refund(new_id(), "stripe", paid.id, 60 * NANO, "requested"), "USD")


async def test_more_rows_than_fit_on_a_page(counter: Counter) -> None:
    intent, checkout = await counter.open_page(wish())
    paid = counter.psp.till.pay(checkout)
    for _ in range(205):
        counter.psp.till.refund(paid, 1)
    payment = await counter.look(intent)
    assert len({item.id for item in payment.reversals}) == 205
    assert counter.http.asked.count("GET /refunds") == 3


async def test_what_is_nobodys_top_up(counter: Counter) -> None:
    books, till = counter.psp.books, counter.psp.till
    given = {
        "client_reference_id": "order 1",
        "customer_creation": "if_required",
        "customer_email": None,
        "payment_method_types": ["card"],
        "setup_future_usage": None,
        "url": "x",
        "payment": {"customer_id": None, "method_id": "pm_1", "metadata": {"reference": "order 1"}},
    }
    other = books.open_checkout(
        "stripe", checkout_id="cs_other", reference="order 1", amount_minor=5, currency="SLE", given=given
    )
    paid = till.pay(other)
    for txn_id in ("cs_other", paid.id, "pi_unknown", "cs_unknown", "ch_1", "", "pi_../../refunds", "pi_ü"):
        assert await counter.api.look(txn_id) is None, txn_id
    till.dispute(paid)
    listed = [txn_id async for txn_id in counter.api.list_recent(datetime.now(UTC) - timedelta(days=1))]
    assert set(listed) == {paid.id}, "of a dispute it must be asked whose it is"


async def test_what_happened_of_late(counter: Counter) -> None:
    since = datetime.now(UTC) - timedelta(minutes=1)
    paid = []
    for _ in range(3):
        _, checkout = await counter.open_page(wish())
        paid.append(counter.psp.till.pay(checkout))
    for _ in range(120):
        counter.psp.till.refund(paid[0], 1)
    counter.psp.till.dispute(paid[1])
    counter.psp.till.tell_balance(paid[1])
    assert {txn_id async for txn_id in counter.api.list_recent(since)} == {item.id for item in paid}
    assert counter.http.asked.count("GET /events") >= 4
    later = datetime.now(UTC) + timedelta(minutes=1)
    assert [txn_id async for txn_id in counter.api.list_recent(later)] == []


# Cards that were saved


async def test_only_a_card_that_its_owner_let_us_keep(counter: Counter) -> None:
    assert isinstance(counter.api, SavedMethodApi)
    method = await counter.save()
    assert method.label == "visa …4242"
    customer = counter.psp.books.checkouts[next(iter(counter.psp.books.checkouts))].given["payment"]
    assert customer["customer_id"] == method.customer_id
    intent, checkout = await counter.open_page(wish())
    counter.psp.till.pay(checkout)
    assert await counter.api.find_method((await counter.look(intent)).id) is None
    assert await counter.api.find_method("pi_unknown") is None
    _, checkout = await counter.open_page(wish(method_due=True))
    late = counter.psp.till.pay(checkout, pending=True)
    assert await counter.api.find_method(late.id) is None, "it was not paid"


async def test_every_part_of_a_saved_card_must_agree(counter: Counter) -> None:
    method = await counter.save()
    (paid,) = counter.psp.books.payments.values()
    card = counter.psp.stripe.method(paid)
    row = {**counter.psp.stripe.payment_intent(paid), "payment_method": card}
    assert await make_api(Canned(200, row)).find_method(paid.id) == method
    wrongs: list[dict[str, Any]] = [
        {"setup_future_usage": None},
        {"setup_future_usage": "on_session"},
        {"status": "processing"},
        {"customer": None},
        {"payment_method": None},
        {"payment_method": {**card, "customer": None}},
        {"payment_method": {**card, "customer": "cus_other"}},
        {"payment_method": {**card, "type": "sepa_debit"}},
    ]
    for wrong in wrongs:
        assert await make_api(Canned(200, {**row, **wrong})).find_method(paid.id) is None, wrong


async def test_a_page_that_saves_is_the_same_again(counter: Counter) -> None:
    intent = wish(method_due=True)
    for path in ("customers", "sessions"):
        counter.psp.faults.tell(Fault("stripe", "lost", times=1, path=path))
        with pytest.raises(PaymentsUnavailableError):
            await counter.api.create_page(intent, email=EMAIL, return_url=None)
    await counter.api.create_page(intent, email=EMAIL, return_url=None)
    (checkout,) = counter.psp.books.checkouts.values()
    assert checkout.given["payment_method_types"] == ["card"]
    assert checkout.given["setup_future_usage"] == "off_session"


async def test_a_card_is_charged_once(counter: Counter) -> None:
    method = await counter.save()
    intent = charge_of(method)
    assert await counter.api.find(intent) == []
    counter.psp.faults.tell(Fault("stripe", "lost", times=1))
    with pytest.raises(PaymentsUnavailableError):
        await counter.api.charge(intent, method)
    assert (await counter.look(intent)).state == "succeeded", "it was charged, though its answer was lost"
    for _ in range(3):
        await counter.api.charge(intent, method)
    charged = [item for item in counter.psp.books.payments.values() if item.checkout_id is None]
    assert [(item.reference, item.amount_minor) for item in charged] == [(intent.reference, 5000)]
    assert (await counter.look(intent)).id == charged[0].id


@pytest.mark.parametrize("code", ["card_declined", "insufficient_funds", "authentication_required"])
async def test_a_card_that_is_declined(counter: Counter, code: str) -> None:
    method = await counter.save()
    intent = charge_of(method)
    counter.psp.till.decline_next(code)
    said = "generic_decline" if code == "card_declined" else code
    for _ in range(2):  # the second is the first one's answer again
        with pytest.raises(PaymentRefusedError, match=rf"stripe refuses: Your card .* \({said}\)$"):
            await counter.api.charge(intent, method)
    assert (await counter.look(intent)).state == "failed"
    assert len([item for item in counter.psp.books.payments.values() if item.checkout_id is None]) == 1


async def test_a_charge_among_many_of_its_customer(counter: Counter) -> None:
    method = await counter.save()
    intent = charge_of(method)
    await counter.api.charge(intent, method)
    for _ in range(150):
        await counter.api.charge(charge_of(method), method)
    assert (await counter.look(intent)).reference == intent.reference


async def test_a_card_that_is_not_there(counter: Counter) -> None:
    method = await counter.save()
    for wrong in (
        dataclasses.replace(method, method_id="pm_unknown"),
        dataclasses.replace(method, customer_id="cus_unknown"),
    ):
        with pytest.raises(PaymentRefusedError, match="No such"):
            await counter.api.charge(charge_of(wrong), wrong)


# What it answers, and what is sent


@pytest.mark.parametrize(
    ("status", "raw", "expected"),
    [
        (200, b"<html>", PaymentsUnavailableError),
        (200, b"[]", PaymentsUnavailableError),
        (200, b"null", PaymentsUnavailableError),
        (200, b"{}", PaymentsUnavailableError),
        (302, b"{}", PaymentsUnavailableError),
        (400, b"<html>", PaymentsUnavailableError),
        (400, {"error": {"type": "invalid_request_error", "message": "too small"}}, PaymentRefusedError),
        (400, {"error": {"type": "idempotency_error", "message": "used"}}, ReferenceUsedError),
        (400, {"error": {"code": "rate_limit", "message": "slow"}}, PaymentsUnavailableError),
        (401, {"error": {"message": f"Invalid API Key: {KEY}"}}, PaymentsUnavailableError),
        (403, {"error": {"message": "no"}}, PaymentsUnavailableError),
        (
            409,
            {"error": {"type": "idempotency_error", "code": "idempotency_key_in_use"}},
            PaymentsUnavailableError,
        ),
        (429, {"error": {"message": "slow"}}, PaymentsUnavailableError),
        (500, {"error": {"type": "api_error", "message": f"{KEY}"}}, PaymentsUnavailableError),
        (503, b"", PaymentsUnavailableError),
    ],
)
async def test_answers_are_judged(status: int, raw: Any, expected: type[Exception]) -> None:
    api = make_api(Canned(status, raw))
    with pytest.raises(expected) as raised:
        await api.create_page(wish(), email=EMAIL, return_url=None)
    assert type(raised.value) is expected
    assert KEY not in str(raised.value)


async def test_what_cannot_be_read_is_not_known(counter: Counter) -> None:
    _, checkout = await counter.open_page(wish())
    counter.psp.till.pay(checkout)
    voice = counter.psp.stripe
    paid = counter.psp.books.payments[checkout.payment_ids[0]]
    row = {**voice.payment_intent(paid), "latest_charge": None}
    broken: list[dict[str, Any]] = [row]
    row = {**row, "latest_charge": {**voice.charge(paid), "balance_transaction": None}}
    amounts: list[Any] = ["many", None, -1, True, [], "5e3", 5.5]
    currencies: list[Any] = ["dollars", "", None, "zzz", 5]
    broken += [{**row, "amount_received": amount} for amount in amounts]
    broken += [{**row, "currency": currency} for currency in currencies]
    broken += [
        {key: value for key, value in row.items() if key != name}
        for name in ("id", "status", "currency", "amount_received", "latest_charge")
    ]
    whole = await make_api(Canned(200, row)).look(paid.id)
    assert whole is not None
    assert (whole.state, whole.amount_nano) == ("succeeded", 50 * NANO)
    for answer in broken:
        with pytest.raises(PaymentsUnavailableError):
            await make_api(Canned(200, answer)).look(paid.id)


async def test_a_prevented_dispute_takes_only_what_it_withdrew(counter: Counter) -> None:
    intent, checkout = await counter.open_page(wish())
    paid = counter.psp.till.pay(checkout)
    shown = counter.psp.stripe.dispute(counter.psp.till.dispute(paid), paid)
    payment = dataclasses.replace(await counter.look(intent), reversals=())
    assert _takes_money(shown)
    assert _takes_money({**shown, "status": "prevented"})
    assert not _takes_money({**shown, "status": "prevented", "balance_transactions": []})
    read = counter.api._read_dispute(
        {**shown, "status": "prevented", "currency": "eur", "amount": 1}, payment
    )
    assert (read.state, read.amount_nano) == ("final", payment.amount_nano), "another currency: all of it"
    read = counter.api._read_dispute({**shown, "amount": 9_999_999}, payment)
    assert read.amount_nano == payment.amount_nano


async def test_nothing_is_told_of_this_machine(
    counter: Counter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(_telemetry_id, "_loaded", False)
    monkeypatch.setattr(_telemetry_id, "_cached_id", None)
    monkeypatch.setattr(stripe, "enable_telemetry", True)
    counter.api = make_api(counter.http, counter.psp.stripe_url)
    await counter.open_page(wish())
    await counter.open_page(wish())
    assert not list(tmp_path.iterdir())  # noqa: ASYNC240 - nobody waits
    names = {name.lower() for headers in counter.http.headers for name in headers}
    assert names == {"authorization", "content-type", "idempotency-key", "stripe-version"}
    assert stripe.api_key is None


def event(kind: str, about: Any, **changes: Any) -> bytes:
    made = {"id": "evt_1", "object": "event", "type": kind, "data": {"object": about}, **changes}
    return json.dumps(made).encode()


@pytest.mark.parametrize(
    ("kind", "about", "payments"),
    [
        ("checkout.session.completed", {"id": "cs_1", "payment_intent": "pi_1"}, ["cs_1"]),
        ("checkout.session.expired", {"id": "cs_1", "payment_intent": None}, ["cs_1"]),
        ("payment_intent.succeeded", {"id": "pi_1"}, ["pi_1"]),
        ("charge.updated", {"id": "ch_1", "payment_intent": "pi_1"}, ["pi_1"]),
        ("charge.dispute.created", {"id": "dp_1", "payment_intent": "pi_1"}, ["pi_1"]),
        ("refund.failed", {"id": "re_1", "payment_intent": "pi_1"}, ["pi_1"]),
        ("refund.failed", {"id": "re_1", "payment_intent": None}, []),
        ("customer.created", {"id": "cus_1"}, []),
        ("payment_intent.succeeded", {"id": 5.5}, []),
    ],
)
def test_webhooks_only_say_where_to_look(kind: str, about: Any, payments: list[str]) -> None:
    hint = make_api(Canned(500, b"")).read_webhook(event(kind, about))
    assert (hint.key, list(hint.payments), list(hint.references)) == ("evt_1", payments, [])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 100_000,
        event("x", []),
        event("x", {}, id=5),
        event("x", {}, object="event_notification"),
        event("x", {}, data=None),
    ],
)
def test_webhooks_that_are_none(body: bytes) -> None:
    with pytest.raises(InputError):
        make_api(Canned(500, b"")).read_webhook(body)
