"""What payment providers answer is read strictly: where it cannot be, nothing is known, and nothing breaks."""

import json
from typing import Any

import pytest

from billing.errors import InputError, PaymentsUnavailableError
from billing.payments.provider_api import PaymentApi, PaymentRefusedError
from proxy.payments.client import PaymentClient
from proxy.payments.flutterwave import FlutterwaveApi
from proxy.payments.paystack import PaystackApi

PAYSTACK = {
    "id": 4099260516,
    "status": "success",
    "reference": "tuma_" + "ab" * 16,
    "amount": 500000,
    "currency": "NGN",
    "fees": 17500,
}
FLUTTERWAVE = {
    "id": 288200108,
    "status": "successful",
    "tx_ref": "tuma_" + "ab" * 16,
    "flw_ref": "FLW-1",
    "amount": 5000,
    "currency": "NGN",
    "app_fee": 70,
}


class Canned(PaymentClient):
    """Answers with one transaction, and with nothing that was taken back."""

    def __init__(self, row: Any) -> None:
        super().__init__("paystack", "http://127.0.0.1:1", "sk", timeout_s=1)
        self.row = row

    async def ask(self, method: str, path: str, **more: Any) -> Any:  # noqa: ARG002 - as it is asked
        lists = path in ("/refund", "/dispute", "/refunds", "/chargebacks")
        return {
            "status": True if self.row is PAYSTACK or "reference" in self.row else "success",
            "data": [] if lists else self.row,
            "meta": {},
        }


def apis() -> list[tuple[type[PaystackApi | FlutterwaveApi], dict[str, Any]]]:
    return [(PaystackApi, PAYSTACK), (FlutterwaveApi, FLUTTERWAVE)]


@pytest.mark.parametrize(("kind", "row"), apis())
async def test_a_whole_answer_is_read(kind: type[PaystackApi | FlutterwaveApi], row: dict[str, Any]) -> None:
    payment = await kind(Canned(row)).look("1")
    assert payment is not None
    assert (payment.id, payment.state, payment.amount_nano) == (str(row["id"]), "succeeded", 5000 * 10**9)
    assert payment.fee_nano in (175 * 10**9, 70 * 10**9)


@pytest.mark.parametrize(("kind", "row"), apis())
async def test_what_cannot_be_read_is_not_known(
    kind: type[PaystackApi | FlutterwaveApi], row: dict[str, Any]
) -> None:
    api: PaymentApi = kind(Canned(row))
    names = [name for name in row if name not in ("fees", "app_fee", "reference", "flw_ref")]
    broken: list[dict[str, Any]] = [
        {key: value for key, value in row.items() if key != name} for name in names
    ]
    amounts: list[Any] = ["many", None, -1, True, [], "5e3"]
    currencies: list[Any] = ["naira", "", None, "ZZZ"]
    broken += [{**row, "amount": wrong} for wrong in amounts]
    broken += [{**row, "currency": wrong} for wrong in currencies]
    for answer in broken:
        api = kind(Canned(answer))
        with pytest.raises(PaymentsUnavailableError):
            await api.look("1")


@pytest.mark.parametrize(("kind", "row"), apis())
async def test_what_hangs_on_a_payment_does_not_hide_it(
    kind: type[PaystackApi | FlutterwaveApi], row: dict[str, Any]
) -> None:
    class Listless(Canned):
        async def ask(self, method: str, path: str, **more: Any) -> Any:
            if path in ("/refund", "/refunds"):
                raise PaymentsUnavailableError("the list is away")
            return await super().ask(method, path, **more)

    payment = await kind(Listless(row)).look("1")
    assert payment is not None
    assert (payment.state, payment.amount_nano, payment.unread) == (
        "succeeded",
        5000 * 10**9,
        "the list is away",
    )


@pytest.mark.parametrize(
    ("status", "raw", "expected"),
    [
        (200, b"<html>", PaymentsUnavailableError),
        (200, b"[]", PaymentsUnavailableError),
        (200, b"{" * 100_000, PaymentsUnavailableError),
        (302, b"{}", PaymentsUnavailableError),
        (401, b'{"message": "bad key"}', PaymentsUnavailableError),
        (429, b"{}", PaymentsUnavailableError),
        (500, b"{}", PaymentsUnavailableError),
        (400, b'{"message": "too small"}', PaymentRefusedError),
        (400, b"<html>", PaymentsUnavailableError),
    ],
)
def test_answers_are_judged(status: int, raw: bytes, expected: type[Exception]) -> None:
    client = PaymentClient("paystack", "http://127.0.0.1:1", "sk-secret", timeout_s=1)
    with pytest.raises(expected) as raised:
        client._judge(status, raw)
    assert "sk-secret" not in str(raised.value)


class Disputed(Canned):
    """Paystack, when a dispute was accepted: the refund that it made of it names it."""

    async def ask(self, method: str, path: str, **more: Any) -> Any:
        rows = {
            "/dispute": [
                {
                    "id": 7,
                    "transaction": PAYSTACK["id"],
                    "status": "resolved",
                    "resolution": "merchant-accepted",
                }
            ],
            "/refund": [
                {
                    "id": 1,
                    "transaction": PAYSTACK["id"],
                    "dispute": 7,
                    "amount": 500000,
                    "status": "processed",
                },
                {
                    "id": 2,
                    "transaction": PAYSTACK["id"],
                    "dispute": None,
                    "amount": 100,
                    "status": "processed",
                },
                {"id": 3, "transaction": PAYSTACK["id"], "dispute": 8, "amount": 200, "status": "processed"},
            ],
        }
        found = await super().ask(method, path, **more)
        return {**found, "data": rows.get(path, found["data"])}


async def test_a_refund_that_ends_a_dispute_takes_the_money_once() -> None:
    payment = await PaystackApi(Disputed(PAYSTACK)).look("1")
    assert payment is not None
    assert [(item.kind, item.id) for item in payment.reversals] == [
        ("refund", "2"),
        ("refund", "3"),
        ("dispute", "7"),
    ]


def test_webhooks_only_say_where_to_look() -> None:
    paystack, flutterwave = PaystackApi(Canned(PAYSTACK)), FlutterwaveApi(Canned(FLUTTERWAVE))
    hint = paystack.read_webhook(json.dumps({"event": "charge.success", "data": PAYSTACK}).encode())
    assert (hint.payments, hint.references) == (["4099260516"], [PAYSTACK["reference"]])
    hint = flutterwave.read_webhook(json.dumps({"event": "charge.completed", "data": FLUTTERWAVE}).encode())
    assert (hint.payments, hint.references) == (["288200108"], [FLUTTERWAVE["tx_ref"]])
    for body in (b"", b"[]", b"null", b"\xff", b'{"data": []}', b'{"data": 1}', b"[" * 100_000):
        for api in (paystack, flutterwave):
            with pytest.raises(InputError):
                api.read_webhook(body)
    # Ids that are none are passed over, whatever they are.
    odds: list[Any] = [None, True, 1.5, {}, [], ""]
    for odd in odds:
        assert (
            paystack.read_webhook(json.dumps({"data": {"id": odd, "reference": odd}}).encode()).payments == []
        )
