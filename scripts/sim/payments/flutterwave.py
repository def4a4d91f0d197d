"""Simulated Flutterwave, v3, with its events. Major units, as JSON numbers.

Source: https://developer.flutterwave.com/v3.0/reference (payments, transactions, refunds, chargebacks).
"""

import json
import secrets
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from aiohttp import web

from scripts.sim.exact_json import dumps
from scripts.sim.payments.books import Books, BooksError, Checkout, Dispute, Payment, Refund
from scripts.sim.payments.currencies import AmountError, Provider, is_code, to_major, to_minor
from scripts.sim.payments.till import Till, Told

_PAYMENT = {"succeeded": "successful", "failed": "failed", "pending": "pending"}
_REFUND = {"succeeded": "completed", "failed": "failed", "pending": "pending"}
_DISPUTE = {"open": "initiated", "won": "won", "lost": "lost"}
_PER_PAGE = 10


class FlutterwaveVoice:
    """How Flutterwave tells what happened.

    Args:
        books: for what was asked of a payment.
    """

    def __init__(self, books: Books) -> None:
        self._books = books

    def of_expiry(self, checkout: Checkout) -> list[Told]:  # noqa: ARG002 - every provider's
        """Flutterwave tells nothing of a link that nobody paid."""
        return []

    def of_payment(self, payment: Payment) -> list[Told]:
        """Tell of a payment that came or failed."""
        if payment.status == "pending":
            return []
        return [Told("charge.completed", {"event": "charge.completed", "data": self.transaction(payment)})]

    def of_balance(self, payment: Payment) -> list[Told]:  # noqa: ARG002 - every provider's
        """Flutterwave tells nothing of it."""
        return []

    def of_refund(self, refund: Refund, payment: Payment) -> list[Told]:
        """Tell of a refund that ended."""
        if refund.status == "pending":
            return []
        return [
            Told("refund.completed", {"event": "refund.completed", "data": self.sent_refund(refund, payment)})
        ]

    def of_dispute(self, dispute: Dispute, payment: Payment) -> list[Told]:
        """Tell of a chargeback."""
        kind = f"chargeback.{_DISPUTE[dispute.status]}"
        return [Told(kind, {"event": kind, "data": self.chargeback(dispute, payment)})]

    def transaction(self, payment: Payment) -> dict[str, Any]:
        """Return a transaction as the API shows it."""
        asked = self._books.checkouts.get(payment.checkout_id or "")
        amount = self._major(payment.amount_minor, payment)
        fee = self._major(payment.fee_minor, payment)
        return {
            "id": payment.number,
            "tx_ref": payment.reference,
            "flw_ref": f"FLW-{payment.number}",
            "amount": amount,
            "charged_amount": amount,
            "app_fee": fee,
            "merchant_fee": 0,
            "amount_settled": self._major(payment.amount_minor - payment.fee_minor, payment),
            "currency": payment.currency,
            "status": _PAYMENT[payment.status],
            "processor_response": payment.failure or "Approved",
            "payment_type": "card",
            "created_at": _time(payment.created_s),
            "meta": {} if asked is None else asked.metadata,
            "customer": {"id": payment.number, "email": payment.email},
        }

    def refund(self, refund: Refund, payment: Payment) -> dict[str, Any]:
        """Return a refund as lists of refunds show it."""
        return {
            "id": refund.number,
            "account_id": 1,
            "transaction_id": payment.number,
            "flw_ref": f"FLW-{payment.number}",
            "amount_refunded": self._major(refund.amount_minor, payment),
            "status": _REFUND[refund.status],
            "comment": refund.reason,
            "settlement_id": "NEW",
            "meta": "{}",
            "created_at": _time(refund.created_s),
        }

    def sent_refund(self, refund: Refund, payment: Payment) -> dict[str, Any]:
        """Return a refund as the answer to its sending, and its webhook, show it."""
        return {
            "id": refund.number,
            "account_id": 1,
            "tx_id": payment.number,
            "flw_ref": f"FLW-{payment.number}",
            "wallet_id": 1,
            "amount_refunded": self._major(refund.amount_minor, payment),
            "status": _REFUND[refund.status],
            "destination": "payment_source",
            "meta": {"source": "availablebalance"},
            "created_at": _time(refund.created_s),
        }

    def chargeback(self, dispute: Dispute, payment: Payment) -> dict[str, Any]:
        """Return a chargeback as the API shows it."""
        return {
            "id": dispute.number,
            "amount": self._major(dispute.amount_minor, payment),
            "currency": payment.currency,
            "flw_ref": f"FLW-{payment.number}",
            "tx_ref": payment.reference,
            "status": _DISPUTE[dispute.status],
            "stage": "new",
            "created_at": _time(dispute.created_s),
            "transaction_id": payment.number,
        }

    @staticmethod
    def _major(amount_minor: int, payment: Payment) -> Decimal:
        return to_major("flutterwave", amount_minor, payment.currency)


class FlutterwaveApi:
    """Flutterwave's paths.

    Args:
        till: where money moves.
        voice: how it is shown.
        origin: the server's URL without path.
    """

    provider: Provider = "flutterwave"

    def __init__(self, till: Till, voice: FlutterwaveVoice, origin: Callable[[], str]) -> None:
        self.voice = voice
        self._till = till
        self._books = till.books
        self._origin = origin

    def routes(self) -> list[web.RouteDef]:
        """Return its routes."""
        made: list[tuple[str, str, Callable[[web.Request], Awaitable[web.Response]]]] = [
            ("POST", "/payments", self._pay),
            ("GET", "/transactions/verify_by_reference", self._verify_by_reference),
            ("GET", "/transactions/{id}/verify", self._verify),
            ("POST", "/transactions/{id}/refund", self._refund),
            ("GET", "/transactions", self._transactions),
            ("GET", "/refunds", self._refunds),
            ("GET", "/refunds/{id}", self._one_refund),
            ("GET", "/chargebacks", self._chargebacks),
        ]
        return [web.route(verb, f"/flutterwave/v3{path}", handler) for verb, path, handler in made]

    def refusal(self, status: int, message: str) -> web.Response:
        """Return an error as Flutterwave shows it."""
        return _answer({"status": "error", "message": message, "data": None}, status)

    def return_url(self, checkout: Checkout, payment: Payment) -> str | None:
        """Return where the customer goes after paying."""
        if checkout.success_url is None:
            return None
        joint = "&" if "?" in checkout.success_url else "?"
        said = f"status={_PAYMENT[payment.status]}&tx_ref={payment.reference}&transaction_id={payment.number}"
        return f"{checkout.success_url}{joint}{said}"

    async def _pay(self, request: web.Request) -> web.Response:
        try:
            asked = json.loads(await request.read(), parse_float=Decimal)
            customer, currency, reference = asked["customer"], asked.get("currency", "NGN"), asked["tx_ref"]
            if not is_code(currency):
                raise AmountError("currency is invalid")
            checkout = self._books.open_checkout(
                self.provider,
                checkout_id=f"flw_{secrets.token_hex(8)}",
                reference=str(reference),
                amount_minor=to_minor(self.provider, asked["amount"], currency),
                currency=currency,
                email=customer["email"],
                success_url=asked.get("redirect_url"),
                metadata=asked.get("meta") or {},
            )
        except (KeyError, TypeError, ValueError) as error:
            return self.refusal(400, f"{error} is required or wrong")
        link = {"link": f"{self._origin()}/pay/{checkout.id}"}
        return _data(link, "Hosted Link")

    async def _verify(self, request: web.Request) -> web.Response:
        payment = self._books.find_by_number(self.provider, request.match_info["id"])
        if payment is None:
            return self.refusal(400, "No transaction was found for this id")
        return _data(self.voice.transaction(payment), "Transaction fetched successfully")

    async def _verify_by_reference(self, request: web.Request) -> web.Response:
        reference = request.query.get("tx_ref", "")
        found = [item for item in self._books.payments_of(self.provider) if item.reference == reference]
        paid = [item for item in found if item.status == "succeeded"]
        if not found:
            return self.refusal(404, "No transaction was found for this id")
        return _data(self.voice.transaction((paid or found[-1:])[0]), "Transaction fetched successfully")

    async def _refund(self, request: web.Request) -> web.Response:
        payment = self._books.find_by_number(self.provider, request.match_info["id"])
        if payment is None:
            return self.refusal(404, "No transaction was found for this id")
        try:
            asked = json.loads(await request.read() or b"{}", parse_float=Decimal)
            amount = asked.get("amount")
            amount_minor = None if amount is None else to_minor(self.provider, amount, payment.currency)
            refund = self._till.begin_refund(payment, amount_minor, reason=asked.get("comments"))
        except (BooksError, ValueError) as error:
            return self.refusal(400, str(error))
        self._till.finish_refund(refund)
        return _data(self.voice.sent_refund(refund, payment), "Transaction refund initiated")

    async def _transactions(self, request: web.Request) -> web.Response:
        query = request.query
        rows = [
            self.voice.transaction(item)
            for item in reversed(self._books.payments_of(self.provider))
            if query.get("tx_ref") in (None, item.reference)
        ]
        wanted = query.get("status")
        return self._page(request, [row for row in rows if wanted in (None, row["status"])])

    def _all_refunds(self) -> list[dict[str, Any]]:
        found = [(item, self._books.payments[item.payment_id]) for item in self._books.refunds.values()]
        return [self.voice.refund(item, paid) for item, paid in found if paid.provider == self.provider]

    async def _refunds(self, request: web.Request) -> web.Response:
        wanted = request.query.get("flw_ref")
        rows = [row for row in reversed(self._all_refunds()) if wanted in (None, row["flw_ref"])]
        return self._page(request, rows)

    async def _one_refund(self, request: web.Request) -> web.Response:
        for row in self._all_refunds():
            if str(row["id"]) == request.match_info["id"]:
                return _data(row, "Refund fetched")
        return self.refusal(404, "No refund was found")

    async def _chargebacks(self, request: web.Request) -> web.Response:
        found = [(item, self._books.payments[item.payment_id]) for item in self._books.disputes.values()]
        rows = [
            self.voice.chargeback(item, paid)
            for item, paid in reversed(found)
            if paid.provider == self.provider and request.query.get("flw_ref") in (None, f"FLW-{paid.number}")
        ]
        return self._page(request, rows)

    def _page(self, request: web.Request, rows: list[dict[str, Any]]) -> web.Response:
        since = request.query.get("from", "")
        left = [row for row in rows if row["created_at"] >= since]
        page = int(request.query.get("page", 1))
        pages = -(-len(left) // _PER_PAGE)
        info = {"total": len(left), "current_page": page, "total_pages": pages}
        return _answer(
            {
                "status": "success",
                "message": "Fetched",
                "meta": {"page_info": info},
                "data": left[(page - 1) * _PER_PAGE : page * _PER_PAGE],
            }
        )


def _time(moment_s: int) -> str:
    return datetime.fromtimestamp(moment_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _data(data: dict[str, Any], message: str) -> web.Response:
    return _answer({"status": "success", "message": message, "data": data})


def _answer(body: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(status=status, text=dumps(body), content_type="application/json")
