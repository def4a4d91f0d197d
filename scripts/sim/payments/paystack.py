"""Simulated Paystack: https://paystack.com/docs/api (transactions, refunds, disputes) and its events. Whole subunits."""

import json
import secrets
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from scripts.sim.exact_json import dumps
from scripts.sim.payments.books import Books, BooksError, Checkout, Dispute, Payment, Refund
from scripts.sim.payments.currencies import PAYSTACK, Provider
from scripts.sim.payments.till import Till, Told

_PER_PAGE = 50
_PAYMENT = {"succeeded": "success", "failed": "failed", "pending": "pending"}
_REFUND = {"succeeded": "processed", "failed": "failed", "pending": "pending"}
_REMINDED = "charge.dispute.remind"


class PaystackVoice:
    """How Paystack tells what happened.

    Args:
        books: for what was asked of a payment.
    """

    def __init__(self, books: Books) -> None:
        self._books = books

    def of_expiry(self, checkout: Checkout) -> list[Told]:  # noqa: ARG002 - every provider's
        """Paystack tells nothing of a page that nobody paid."""
        return []

    def of_payment(self, payment: Payment) -> list[Told]:
        """Tell of a payment that came; of others Paystack says nothing."""
        if payment.status != "succeeded":
            return []
        return [_told("charge.success", self.transaction(payment))]

    def of_balance(self, payment: Payment) -> list[Told]:  # noqa: ARG002 - every provider's
        """Paystack tells nothing of it."""
        return []

    def of_refund(self, refund: Refund, payment: Payment) -> list[Told]:
        """Tell of a refund that began, arrived or failed."""
        state = _REFUND[refund.status]
        data = {
            "status": state,
            "transaction_reference": payment.reference,
            "refund_reference": refund.id,
            "amount": str(refund.amount_minor),
            "currency": payment.currency,
            "customer": {"email": payment.email},
            "integration": 1,
            "domain": "test",
        }
        return [_told(f"refund.{state}", data)]

    def of_dispute(self, dispute: Dispute, payment: Payment) -> list[Told]:
        """Tell of a dispute: opened, reminded of, or resolved."""
        kind = "charge.dispute.resolve"
        if dispute.status == "open":
            kind = _REMINDED if dispute.reminders else "charge.dispute.create"
        return [_told(kind, self.dispute(dispute, payment))]

    def transaction(self, payment: Payment) -> dict[str, Any]:
        """Return a transaction as the API shows it."""
        asked = self._books.checkouts.get(payment.checkout_id or "")
        return {
            "id": payment.number,
            "domain": "test",
            "status": _PAYMENT[payment.status],
            "reference": payment.reference,
            "amount": payment.amount_minor,
            "requested_amount": payment.amount_minor if asked is None else asked.amount_minor,
            "currency": payment.currency,
            "fees": payment.fee_minor if payment.status == "succeeded" else None,
            "gateway_response": payment.failure or "Successful",
            "channel": "card",
            "paid_at": None if payment.paid_s is None else _time(payment.paid_s),
            "created_at": _time(payment.created_s),
            "metadata": payment.metadata or ({} if asked is None else asked.metadata),
            "customer": {"id": payment.number, "email": payment.email},
            "authorization": {},
        }

    def dispute(self, dispute: Dispute, payment: Payment) -> dict[str, Any]:
        """Return a dispute as the API shows it."""
        resolution = {"open": None, "won": "declined", "lost": "merchant-accepted"}[dispute.status]
        return {
            "id": dispute.number,
            "refund_amount": dispute.amount_minor,
            "currency": payment.currency,
            "status": "awaiting-merchant-feedback" if dispute.status == "open" else "resolved",
            "resolution": resolution,
            "domain": "test",
            "category": "chargeback",
            "transaction": self.transaction(payment),
            "createdAt": _time(dispute.created_s),
        }

    def refund(self, refund: Refund, payment: Payment) -> dict[str, Any]:
        """Return a refund as the API shows it."""
        return {
            "id": refund.number,
            "integration": 1,
            "domain": "test",
            "transaction": payment.number,
            "amount": refund.amount_minor,
            "currency": payment.currency,
            "status": _REFUND[refund.status],
            "merchant_note": refund.reason,
            "createdAt": _time(refund.created_s),
        }


class PaystackApi:
    """Paystack's paths.

    Args:
        till: where money moves.
        voice: how it is shown.
        origin: the server's URL without path.
    """

    provider: Provider = "paystack"

    def __init__(self, till: Till, voice: PaystackVoice, origin: Callable[[], str]) -> None:
        self.voice = voice
        self._till = till
        self._books = till.books
        self._origin = origin

    def routes(self) -> list[web.RouteDef]:
        """Return its routes."""
        made: list[tuple[str, str, Callable[[web.Request], Awaitable[web.Response]]]] = [
            ("POST", "/transaction/initialize", self._initialize),
            ("GET", "/transaction/verify/{reference}", self._verify),
            ("GET", "/transaction/{id}", self._transaction),
            ("GET", "/transaction", self._transactions),
            ("POST", "/refund", self._refund),
            ("GET", "/refund", self._refunds),
            ("GET", "/refund/{id}", self._one_refund),
            ("GET", "/dispute", self._disputes),
            ("GET", "/dispute/{id}", self._one_dispute),
        ]
        return [web.route(verb, f"/paystack{path}", handler) for verb, path, handler in made]

    def refusal(self, status: int, message: str) -> web.Response:
        """Return an error as Paystack shows it."""
        return _answer({"status": False, "message": message}, status)

    def return_url(self, checkout: Checkout, payment: Payment) -> str | None:  # noqa: ARG002 - every provider's
        """Return where the customer goes after paying."""
        if checkout.success_url is None:
            return None
        joint = "&" if "?" in checkout.success_url else "?"
        return f"{checkout.success_url}{joint}trxref={checkout.reference}&reference={checkout.reference}"

    async def _initialize(self, request: web.Request) -> web.Response:
        asked = await _body(request)
        email, reference = asked.get("email"), asked.get("reference") or secrets.token_hex(8)
        currency = asked.get("currency", "NGN")
        if not isinstance(email, str) or "@" not in email:
            return self.refusal(400, "Invalid Email Address Passed")
        if currency not in PAYSTACK:
            return self.refusal(400, "Currency not supported by merchant")
        if any(item.reference == reference for item in self._books.checkouts_of(self.provider)):
            return self.refusal(400, "Duplicate Transaction Reference")
        try:
            amount = int(str(asked.get("amount")))
        except ValueError:
            return self.refusal(400, "Invalid Amount Sent")
        metadata = asked.get("metadata") or {}
        checkout = self._books.open_checkout(
            self.provider,
            checkout_id=f"ps_{secrets.token_hex(8)}",
            reference=reference,
            amount_minor=amount,
            currency=currency,
            email=email,
            success_url=asked.get("callback_url"),
            metadata=json.loads(metadata) if isinstance(metadata, str) else metadata,
        )
        data = {
            "authorization_url": f"{self._origin()}/pay/{checkout.id}",
            "access_code": checkout.id,
            "reference": reference,
        }
        return _data(data, "Authorization URL created")

    async def _verify(self, request: web.Request) -> web.Response:
        reference = request.match_info["reference"]
        found = [item for item in self._books.checkouts_of(self.provider) if item.reference == reference]
        if not found:
            return self.refusal(400, "Transaction reference not found.")
        payment = self._books.settled_of(found[0])
        if payment is None:
            unpaid = {
                "id": 1,
                "status": "abandoned",
                "reference": reference,
                "amount": found[0].amount_minor,
                "requested_amount": found[0].amount_minor,
                "currency": found[0].currency,
                "fees": None,
                "paid_at": None,
            }
            return _data(unpaid, "Verification successful")
        return _data(self.voice.transaction(payment), "Verification successful")

    async def _transaction(self, request: web.Request) -> web.Response:
        payment = self._books.find_by_number(self.provider, request.match_info["id"])
        if payment is None:
            return self.refusal(404, "Transaction not found")
        return _data(self.voice.transaction(payment), "Transaction retrieved")

    async def _transactions(self, request: web.Request) -> web.Response:
        wanted = request.query.get("status")
        rows = [self.voice.transaction(item) for item in self._books.payments_of(self.provider)]
        return self._page(
            request, [row for row in rows if wanted in (None, row["status"])], time="created_at"
        )

    async def _refund(self, request: web.Request) -> web.Response:
        asked = await _body(request)
        try:
            payment = self._till.find_payment(str(asked.get("transaction")))
            refund = self._till.begin_refund(payment, asked.get("amount"), reason=asked.get("merchant_note"))
        except BooksError as error:
            return self.refusal(400, str(error))
        shown = {**self.voice.refund(refund, payment), "transaction": self.voice.transaction(payment)}
        self._till.finish_refund(refund)
        return _data(shown, "Refund has been queued for processing")

    async def _refunds(self, request: web.Request) -> web.Response:
        return self._page(request, [shown for _, shown in self._all_refunds()], time="createdAt")

    def _all_refunds(self) -> list[tuple[Refund, dict[str, Any]]]:
        found = [(item, self._books.payments[item.payment_id]) for item in self._books.refunds.values()]
        return [
            (item, self.voice.refund(item, paid)) for item, paid in found if paid.provider == self.provider
        ]

    async def _one_refund(self, request: web.Request) -> web.Response:
        for _, shown in self._all_refunds():
            if str(shown["id"]) == request.match_info["id"]:
                return _data(shown, "Refund retrieved")
        return self.refusal(404, "Refund not found")

    def _all_disputes(self) -> list[dict[str, Any]]:
        found = [(item, self._books.payments[item.payment_id]) for item in self._books.disputes.values()]
        return [self.voice.dispute(item, paid) for item, paid in found if paid.provider == self.provider]

    async def _disputes(self, request: web.Request) -> web.Response:
        return self._page(request, self._all_disputes(), time="createdAt")

    async def _one_dispute(self, request: web.Request) -> web.Response:
        for shown in self._all_disputes():
            if str(shown["id"]) == request.match_info["id"]:
                return _data(shown, "Dispute retrieved")
        return self.refusal(404, "Dispute not found")

    def _page(self, request: web.Request, rows: list[dict[str, Any]], *, time: str) -> web.Response:
        """Answer with a page, newest first, of what the query's ``from`` and ``transaction`` leave."""
        since, of = request.query.get("from", ""), request.query.get("transaction")
        left = [row for row in reversed(rows) if row[time] >= since[:19]]
        if of is not None:
            left = [
                row
                for row in left
                if str(
                    row["transaction"]["id"] if isinstance(row["transaction"], dict) else row["transaction"]
                )
                == of
            ]
        size, page = int(request.query.get("perPage", _PER_PAGE)), int(request.query.get("page", 1))
        meta = {"total": len(left), "perPage": size, "page": page, "pageCount": -(-len(left) // size)}
        return _answer(
            {
                "status": True,
                "message": "Retrieved",
                "data": left[(page - 1) * size : page * size],
                "meta": meta,
            }
        )


def _told(kind: str, data: dict[str, Any]) -> Told:
    return Told(kind, {"event": kind, "data": data})


def _time(moment_s: int) -> str:
    return datetime.fromtimestamp(moment_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _data(data: dict[str, Any], message: str) -> web.Response:
    return _answer({"status": True, "message": message, "data": data})


def _answer(body: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(status=status, text=dumps(body), content_type="application/json")


async def _body(request: web.Request) -> dict[str, Any]:
    try:
        found = json.loads(await request.read())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
