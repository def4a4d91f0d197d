"""Simulated Stripe, spoken to as curl would: forms, keys that are sent again, pages of lists, ``expand``."""

import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from scripts.sim.payments.server import SimulatedPayments


class Merchant:
    """Whoever has the secret key."""

    def __init__(self, psp: SimulatedPayments, client: aiohttp.ClientSession) -> None:
        self.psp = psp
        self._client = client
        self.headers: dict[str, str] = {"Authorization": f"Bearer {psp.secrets.stripe_key}"}
        self.replayed = False

    async def ask(self, verb: str, path: str, form: dict[str, Any] | None = None, *, key: str = "") -> Any:
        headers = {**self.headers, **({"Idempotency-Key": key} if key else {})}
        sent = {"data" if verb == "POST" else "params": form or {}}
        url = f"{self.psp.stripe_url}/v1{path}"
        async with self._client.request(verb, url, headers=headers, **sent) as answer:  # type: ignore[arg-type]
            self.replayed = answer.headers.get("Idempotent-Replayed") == "true"
            return answer.status, await answer.json()

    async def open_session(self, **changes: Any) -> Any:
        status, made = await self.ask("POST", "/checkout/sessions", session_form(**changes))
        assert status == 200, made
        return made


def session_form(**changes: Any) -> dict[str, Any]:
    return {
        "mode": "payment",
        "success_url": "https://shop.example/{CHECKOUT_SESSION_ID}",
        "client_reference_id": "order 1",
        "line_items[0][quantity]": "1",
        "line_items[0][price_data][currency]": "usd",
        "line_items[0][price_data][unit_amount]": "500",
        "line_items[0][price_data][product_data][name]": "Credit",
        "payment_intent_data[metadata][reference]": "order 1",
        **changes,
    }


@pytest.fixture
async def merchant() -> AsyncIterator[Merchant]:
    async with SimulatedPayments() as psp, aiohttp.ClientSession() as client:
        yield Merchant(psp, client)


async def test_a_key_that_comes_again_has_the_same_answer(merchant: Merchant) -> None:
    form = session_form()
    first = await merchant.ask("POST", "/checkout/sessions", form, key="one")
    replayed = [merchant.replayed]
    assert await merchant.ask("POST", "/checkout/sessions", form, key="one") == first
    replayed.append(merchant.replayed)
    assert replayed == [False, True]
    status, answer = await merchant.ask(
        "POST", "/checkout/sessions", session_form(cancel_url="https://x"), key="one"
    )
    assert (status, answer["error"]["type"]) == (400, "idempotency_error")
    assert len(merchant.psp.books.checkouts) == 1
    await merchant.ask("POST", "/checkout/sessions", form)
    await merchant.ask("POST", "/checkout/sessions", form)
    assert len(merchant.psp.books.checkouts) == 3, "without a key each is another"


async def test_what_was_not_understood_may_come_again_under_its_key(merchant: Merchant) -> None:
    status, answer = await merchant.ask("POST", "/checkout/sessions", session_form(mode="setup"), key="one")
    assert (status, answer["error"]["param"]) == (400, "mode")
    status, _ = await merchant.ask("POST", "/checkout/sessions", session_form(), key="one")
    assert (status, merchant.replayed) == (200, False)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"success_url": ""}, "success_url"),
        ({"expires_at": str(int(time.time()) + 60)}, "at least 30 minutes"),
        ({"expires_at": str(int(time.time()) + 90_000)}, "at most 24 hours"),
        ({"expires_at": "soon"}, "Invalid integer"),
        ({"customer": "cus_unknown"}, "No such customer"),
        ({"customer": "cus_1", "customer_email": "a@b.example"}, "only specify one"),
        ({"payment_method_types[0]": "card"}, "allowed_payment_method_types"),
        ({"line_items[0][price_data][unit_amount]": "5.00"}, "Invalid integer"),
        ({"line_items[0][price_data][currency]": "dollars"}, "Invalid currency"),
        (
            {"line_items[0][price_data][currency]": "ugx", "line_items[0][price_data][unit_amount]": "150"},
            "100",
        ),
        ({"expand[0]": "nothing"}, "cannot be expanded"),
        ({"line_items[0": "1"}, "Invalid parameter name"),
    ],
)
async def test_sessions_that_stripe_refuses(merchant: Merchant, changes: dict[str, str], part: str) -> None:
    status, answer = await merchant.ask("POST", "/checkout/sessions", session_form(**changes))
    assert status == 400
    assert part in answer["error"]["message"]


async def test_lists_come_in_pages(merchant: Merchant) -> None:
    made = [(await merchant.open_session())["id"] for _ in range(5)]
    found: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    pages = []
    while True:
        _, listed = await merchant.ask("GET", "/checkout/sessions", query)
        pages.append(len(listed["data"]))
        found += [row["id"] for row in listed["data"]]
        if not listed["has_more"]:
            break
        query["starting_after"] = found[-1]
    assert (found, pages) == (made[::-1], [2, 2, 1])
    late = {"created[gte]": int(time.time()) + 60}
    assert (await merchant.ask("GET", "/checkout/sessions", late))[1]["data"] == []
    for wrong in ({"limit": 0}, {"limit": 101}, {"starting_after": "cs_unknown"}):
        assert (await merchant.ask("GET", "/checkout/sessions", wrong))[0] == 400


async def test_objects_stand_in_the_place_of_their_ids(merchant: Merchant) -> None:
    session = await merchant.open_session()
    payment = merchant.psp.till.pay(merchant.psp.till.find_checkout(session["id"]))
    path, deep = f"/checkout/sessions/{session['id']}", "payment_intent.latest_charge.balance_transaction"
    _, plain = await merchant.ask("GET", path)
    assert (plain["payment_intent"], plain["payment_status"], plain["url"]) == (payment.id, "paid", None)
    _, shown = await merchant.ask("GET", path, {"expand[]": deep})
    charge = shown["payment_intent"]["latest_charge"]
    assert charge["balance_transaction"]["fee"] == payment.fee_minor
    assert charge["payment_intent"] == payment.id
    _, listed = await merchant.ask("GET", "/charges", {"expand[0]": "data.balance_transaction"})
    assert listed["data"][0]["balance_transaction"]["net"] == payment.amount_minor - payment.fee_minor


async def test_who_may_ask(merchant: Merchant) -> None:
    merchant.headers = {"Authorization": aiohttp.encode_basic_auth(merchant.psp.secrets.stripe_key, "")}
    assert (await merchant.ask("GET", "/events"))[0] == 200
    merchant.headers = {"Authorization": "Bearer sk_test_other"}
    status, answer = await merchant.ask("GET", "/events")
    assert (status, answer["error"]["type"]) == (401, "invalid_request_error")
    merchant.headers = {}
    assert (await merchant.ask("GET", "/events"))[0] == 401


async def test_what_there_is_not(merchant: Merchant) -> None:
    for kind in (
        "checkout/sessions",
        "payment_intents",
        "charges",
        "balance_transactions",
        "refunds",
        "disputes",
        "customers",
        "payment_methods",
        "events",
    ):
        status, answer = await merchant.ask("GET", f"/{kind}/none")
        assert (status, answer["error"]["code"]) == (404, "resource_missing"), kind
    status, answer = await merchant.ask("POST", "/refunds", {"payment_intent": "pi_none"})
    assert (status, answer["error"]["code"]) == (400, "resource_missing")


async def test_every_event_is_told_and_can_be_asked_for(merchant: Merchant) -> None:
    till = merchant.psp.till
    session = await merchant.open_session()
    checkout = till.find_checkout(session["id"])
    till.decline(checkout)
    payment = till.pay(checkout)
    assert len(merchant.psp.books.payments) == 1, "a session has one payment intent, whatever was tried"
    refund = till.begin_refund(payment, 100)
    till.end_refund(refund)
    till.end_refund(refund, failed=True)
    dispute = till.dispute(payment, 100, inquiry=True)
    till.remind(dispute)
    till.end_inquiry(dispute, disputed=True)
    till.remind(dispute)
    till.win(dispute)
    till.expire(till.find_checkout((await merchant.open_session())["id"]))
    _, listed = await merchant.ask("GET", "/events", {"limit": 100})
    kinds = [(row["type"], row["data"]["object"].get("status")) for row in reversed(listed["data"])]
    assert kinds == [
        ("payment_intent.payment_failed", "requires_payment_method"),
        ("charge.failed", "failed"),
        ("payment_intent.succeeded", "succeeded"),
        ("charge.succeeded", "succeeded"),
        ("checkout.session.completed", "complete"),
        ("refund.created", "pending"),
        ("charge.refunded", "succeeded"),
        ("refund.updated", "succeeded"),
        ("refund.failed", "failed"),
        ("charge.dispute.created", "warning_needs_response"),
        ("charge.dispute.updated", "warning_under_review"),
        ("charge.dispute.updated", "needs_response"),
        ("charge.dispute.funds_withdrawn", "needs_response"),
        ("charge.dispute.updated", "under_review"),
        ("charge.dispute.closed", "won"),
        ("charge.dispute.funds_reinstated", "won"),
        ("checkout.session.expired", "expired"),
    ]
    event = listed["data"][0]
    assert (await merchant.ask("GET", f"/events/{event['id']}"))[1] == event
    assert (event["object"], event["livemode"]) == ("event", False)
    _, some = await merchant.ask(
        "GET", "/events", {"types[0]": "refund.failed", "types[1]": "refund.created"}
    )
    assert [row["type"] for row in some["data"]] == ["refund.failed", "refund.created"]
