"""Paystack: https://paystack.com/docs/api (transactions, refunds, disputes). Amounts are whole subunits.

It has no idempotency keys. A reference is taken once, so a page whose answer was lost needs another; a refund is looked for,
by the note that it was sent with, before it is sent again.
"""

import dataclasses
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from billing.errors import InputError, PaymentsUnavailableError
from billing.payments.payment import (
    Intent,
    Payment,
    PaymentState,
    Refund,
    Reversal,
    ReversalState,
    parse_reference,
)
from billing.payments.provider_api import Hint, Page, PaymentRefusedError, ReferenceUsedError
from billing.payments.units import PaymentProvider, minor_units, nano_from_minor_units
from proxy.payments.client import PaymentClient, answered, note_of, read_object, reading, refund_id_in, texts

_PER_PAGE = 100
_PAGES_MAX = 50
_PAID: dict[str, PaymentState] = {"success": "succeeded", "reversed": "succeeded", "failed": "failed"}
_REFUNDED: dict[str, ReversalState] = {"processed": "final", "failed": "undone"}


class PaystackApi:
    """Asks Paystack.

    Args:
        client: with its base URL and our secret key.
    """

    provider: PaymentProvider = "paystack"
    takes_more = True
    sends_once = False

    def __init__(self, client: PaymentClient) -> None:
        self._client = client

    async def create_page(self, intent: Intent, *, email: str, return_url: str | None) -> Page:
        """Initialize a transaction; see ``PaymentApi``."""
        body: dict[str, Any] = {
            "email": email,
            "amount": str(minor_units(intent.amount_nano, intent.currency, self.provider)),
            "currency": intent.currency,
            "reference": intent.reference,
            "metadata": {"tuma_topup": str(intent.id)},
        }
        if return_url is not None:
            body["callback_url"] = return_url
        try:
            data = await self._ask("POST", "/transaction/initialize", body=body)
        except PaymentRefusedError as error:
            if "duplicate" in str(error).lower():
                raise ReferenceUsedError(str(error)) from None
            raise
        with reading(self.provider):
            return Page(id=str(data["reference"]), url=str(data["authorization_url"]))

    async def find(self, intent: Intent) -> list[Payment]:
        """Verify by reference, of the last attempt and those before it; see ``PaymentApi``."""
        found = []
        for attempt in range(1, intent.attempt + 1):
            reference = f"tuma_{intent.id.hex}" + (f"_{attempt}" if attempt > 1 else "")
            row = await self._verify(reference)
            if row is not None:
                found.append(await self._read(row))
        return found

    async def _verify(self, reference: str) -> Any:
        try:
            return await self._ask("GET", f"/transaction/verify/{reference}", missing=True)
        except PaymentRefusedError:
            return None  # "Transaction reference not found."

    async def look(self, txn_id: str) -> Payment | None:
        """Fetch a transaction; see ``PaymentApi``."""
        if not (txn_id.isascii() and txn_id.isdigit()):
            return None
        try:
            row = await self._ask("GET", f"/transaction/{txn_id}", missing=True)
        except PaymentRefusedError:
            return None
        return None if row is None else await self._read(row)

    def read_webhook(self, body: bytes) -> Hint:
        """Return what an event is about; see ``PaymentApi``."""
        data = read_object(body).get("data")
        if not isinstance(data, dict):
            raise InputError("an event of Paystack's has data")
        paid = data.get("transaction")
        if isinstance(paid, dict):  # a dispute
            return Hint(payments=texts(paid.get("id")), references=texts(paid.get("reference")))
        if "transaction_reference" in data:  # a refund
            return Hint(references=texts(data["transaction_reference"]))
        return Hint(payments=texts(data.get("id")), references=texts(data.get("reference")))

    async def list_recent(self, since: datetime) -> AsyncIterator[str]:
        """List what was paid, refunded or disputed since then; see ``PaymentApi``."""
        moment = since.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        async for row in self._pages("/transaction", {"from": moment, "status": "success"}):
            if parse_reference(str(row.get("reference"))) is not None:
                for txn_id in texts(row.get("id")):
                    yield txn_id
        for path in ("/refund", "/dispute"):
            async for row in self._pages(path, {"from": moment}):
                paid = row.get("transaction")
                for txn_id in texts(paid.get("id") if isinstance(paid, dict) else paid):
                    yield txn_id

    async def refund(self, refund: Refund, currency: str) -> Reversal | None:
        """Send a refund; see ``PaymentApi``. The answer has the refund's id (https://paystack.com/docs/api/refund/#create)."""
        body = {
            "transaction": int(refund.provider_txn_id),
            "amount": minor_units(refund.amount_nano, currency, self.provider),
            "currency": currency,
            "merchant_note": note_of(refund.id),
        }
        return answered(refund, await self._ask("POST", "/refund", body=body), _REFUNDED)

    async def close(self) -> None:
        """Close its connections."""
        await self._client.close()

    async def _read(self, row: Any) -> Payment:
        """Read a transaction with what became of it."""
        with reading(self.provider):
            payment = self._read_transaction(row)
            if payment.state != "succeeded":
                return payment
        try:
            return dataclasses.replace(payment, reversals=await self._reversals_of(payment))
        except (PaymentsUnavailableError, PaymentRefusedError) as error:
            # The money came, whatever lists of other things say: it is the person's.
            return dataclasses.replace(payment, unread=str(error))

    async def _reversals_of(self, payment: Payment) -> list[Reversal]:
        """Return the refunds and disputes of a transaction.

        Raises:
            PaymentsUnavailableError: they cannot be read.
        """
        with reading(self.provider):
            refunds = await self._refunds_of(payment.id)
            disputes = await self._list("/dispute", transaction=payment.id)
            # A dispute that we lose is paid out by a refund that names it: the same money.
            counted = {item["id"] for item in disputes}
            refunds = [item for item in refunds if item.get("dispute") not in counted]
            reversals = [self._read_refund(item, payment.currency) for item in refunds]
            reversals += [self._read_dispute(item, payment) for item in disputes]
            return reversals

    def _read_transaction(self, row: Any) -> Payment:
        currency, fees = str(row["currency"]), row.get("fees")
        return Payment(
            provider=self.provider,
            id=str(row["id"]),
            reference=str(row["reference"]),
            state=_PAID.get(str(row["status"]), "pending"),
            amount_nano=nano_from_minor_units(row["amount"], currency, self.provider),
            currency=currency,
            fee_nano=None if fees is None else nano_from_minor_units(fees, currency, self.provider),
            fee_currency=None if fees is None else currency,
        )

    async def _refunds_of(self, txn_id: str) -> list[Any]:
        return await self._list("/refund", transaction=txn_id)

    async def _list(self, path: str, *, transaction: str) -> list[Any]:
        found = []
        async for row in self._pages(path, {"transaction": transaction}):
            paid = row.get("transaction")
            if texts(paid.get("id") if isinstance(paid, dict) else paid) == [transaction]:
                found.append(row)
        return found

    def _read_refund(self, row: Any, currency: str) -> Reversal:
        return Reversal(
            id=str(row["id"]),
            kind="refund",
            amount_nano=nano_from_minor_units(int(row["amount"]), currency, self.provider),
            state=_REFUNDED.get(str(row["status"]), "open"),
            ours=refund_id_in(row.get("merchant_note")),
        )

    def _read_dispute(self, row: Any, payment: Payment) -> Reversal:
        state: ReversalState = "open"
        if row.get("status") == "resolved":
            state = "undone" if row.get("resolution") == "declined" else "final"
        amount = row.get("refund_amount")
        return Reversal(
            id=str(row["id"]),
            kind="dispute",
            amount_nano=payment.amount_nano
            if not amount
            else nano_from_minor_units(int(amount), payment.currency, self.provider),
            state=state,
        )

    async def _pages(self, path: str, query: dict[str, str]) -> AsyncIterator[Any]:
        for page in range(1, _PAGES_MAX + 1):
            asked = {**query, "perPage": str(_PER_PAGE), "page": str(page)}
            rows = await self._ask("GET", path, query=asked)
            for row in rows:
                yield row
            if len(rows) < _PER_PAGE:
                return
        raise PaymentsUnavailableError(f"Paystack lists more than {_PAGES_MAX * _PER_PAGE} rows of {path}")

    async def _ask(self, method: str, path: str, *, missing: bool = False, **more: Any) -> Any:
        answer = await self._client.ask(method, path, **more)
        if answer is None and missing:
            return None
        if answer is None or answer.get("status") is not True or answer.get("data") is None:
            raise PaymentsUnavailableError(f"Paystack's answer to {method} {path} says nothing")
        return answer["data"]
