"""Flutterwave, v3: https://developer.flutterwave.com/v3.0/reference (payments, transactions, refunds, chargebacks). Major units.

It has no idempotency keys. A reference may have several links: the one that is shown last counts. A refund's answer to POST has
``tx_id``, as the request had ``comments``; rows of ``GET /refunds`` are published with ``transaction_id`` and ``comment``, and are
filtered by ``from, to, status, currency, flw_ref, id``. Either name is read, and rows of others are expected in any list.
"""

import dataclasses
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from billing.errors import InputError, PaymentsUnavailableError
from billing.money import AMOUNT_MAX_NANO
from billing.payments.payment import (
    Intent,
    Payment,
    PaymentState,
    Refund,
    Reversal,
    ReversalState,
    parse_reference,
)
from billing.payments.provider_api import Hint, Page, PaymentRefusedError
from billing.payments.units import PaymentProvider, major_units, nano_from_major_units
from proxy.payments.client import PaymentClient, answered, note_of, read_object, reading, refund_id_in, texts

_PAGES_MAX = 500
_PAGES_OF_ONE = (
    5  # of what concerns one payment; where there are more, the list is not filtered as it was asked to be
)
_PAID: dict[str, PaymentState] = {"successful": "succeeded", "failed": "failed"}
_REFUNDED: dict[str, ReversalState] = {"completed": "final", "failed": "undone"}
_DISPUTED: dict[str, ReversalState] = {"won": "undone", "lost": "final", "accepted": "final"}


class FlutterwaveApi:
    """Asks Flutterwave.

    Args:
        client: with its base URL and our secret key.
    """

    provider: PaymentProvider = "flutterwave"
    takes_more = True
    sends_once = False

    def __init__(self, client: PaymentClient) -> None:
        self._client = client

    async def create_page(self, intent: Intent, *, email: str, return_url: str | None) -> Page:
        """Have a link made; see ``PaymentApi``."""
        body: dict[str, Any] = {
            "tx_ref": intent.reference,
            "amount": major_units(intent.amount_nano, intent.currency, self.provider),
            "currency": intent.currency,
            "customer": {"email": email},
            "meta": {"tuma_topup": str(intent.id)},
        }
        if return_url is not None:
            body["redirect_url"] = return_url
        data = await self._ask("POST", "/payments", body=body)
        with reading(self.provider):
            return Page(id=intent.reference, url=str(data["link"]))

    async def find(self, intent: Intent) -> list[Payment]:
        """Verify by reference; see ``PaymentApi``."""
        try:
            row = await self._ask(
                "GET",
                "/transactions/verify_by_reference",
                query={"tx_ref": intent.reference},
                missing=True,
            )
        except PaymentRefusedError:
            return []  # "No transaction was found for this id"
        return [] if row is None else [await self._read(row)]

    async def look(self, txn_id: str) -> Payment | None:
        """Verify a transaction; see ``PaymentApi``."""
        if not (txn_id.isascii() and txn_id.isdigit()):
            return None
        try:
            row = await self._ask("GET", f"/transactions/{txn_id}/verify", missing=True)
        except PaymentRefusedError:
            return None
        return None if row is None else await self._read(row)

    def read_webhook(self, body: bytes) -> Hint:
        """Return what an event is about; see ``PaymentApi``. v3 signs no body, so it says where to look, and nothing else."""
        event = read_object(body)
        data = event.get("data", event)
        if not isinstance(data, dict):
            raise InputError("an event of Flutterwave's has data")
        kind = str(event.get("event", ""))
        if kind.startswith("refund"):
            return Hint(payments=texts(data.get("tx_id") or data.get("transaction_id")))
        if kind.startswith("chargeback"):
            return Hint(payments=texts(data.get("transaction_id")), references=texts(data.get("tx_ref")))
        return Hint(payments=texts(data.get("id")), references=texts(data.get("tx_ref"), data.get("txRef")))

    async def list_recent(self, since: datetime) -> AsyncIterator[str]:
        """List what was paid, refunded or charged back since that day; see ``PaymentApi``."""
        query = {"from": since.astimezone(UTC).date().isoformat()}
        async for row in self._pages("/transactions", {**query, "status": "successful"}):
            if parse_reference(str(row.get("tx_ref"))) is not None:
                for txn_id in texts(row.get("id")):
                    yield txn_id
        async for row in self._pages("/refunds", query):
            for txn_id in texts(row.get("transaction_id") or row.get("tx_id")):
                yield txn_id
        async for row in self._pages("/chargebacks", query):
            for txn_id in texts(row.get("transaction_id")):
                yield txn_id

    async def refund(self, refund: Refund, currency: str) -> Reversal | None:
        """Send a refund; see ``PaymentApi``. The answer has the refund's id (https://developer.flutterwave.com/v3.0/docs/refunds)."""
        body = {
            "amount": major_units(refund.amount_nano, currency, self.provider),
            "comments": note_of(refund.id),
        }
        row = await self._ask("POST", f"/transactions/{refund.provider_txn_id}/refund", body=body)
        return answered(refund, row, _REFUNDED)

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
            return dataclasses.replace(payment, reversals=await self._reversals_of(payment, row))
        except (PaymentsUnavailableError, PaymentRefusedError) as error:
            # The money came, whatever lists of other things say: it is the person's.
            return dataclasses.replace(payment, unread=str(error))

    async def _reversals_of(self, payment: Payment, row: Any) -> list[Reversal]:
        """Return the refunds and chargebacks of a transaction, from lists that may have others in them.

        Raises:
            PaymentsUnavailableError: they cannot be read, or are longer than those of one payment can be.
        """
        with reading(self.provider):
            flw_ref = str(row["flw_ref"])
            query = {"flw_ref": flw_ref}
            refunds = [item async for item in self._pages("/refunds", query, pages_max=_PAGES_OF_ONE)]
            chargebacks = [item async for item in self._pages("/chargebacks", query, pages_max=_PAGES_OF_ONE)]
            return [
                *(
                    self._read_refund(item, payment.currency)
                    for item in refunds
                    if _is_of(item, payment, flw_ref)
                ),
                *(
                    self._read_chargeback(item, payment.currency)
                    for item in chargebacks
                    if item.get("flw_ref") == flw_ref
                ),
            ]

    def _read_transaction(self, row: Any) -> Payment:
        currency, fee = str(row["currency"]), row.get("app_fee")
        state = _PAID.get(str(row["status"]), "pending")
        known = fee is not None and state == "succeeded"
        return Payment(
            provider=self.provider,
            id=str(row["id"]),
            reference=str(row["tx_ref"]),
            state=state,
            amount_nano=nano_from_major_units(row["amount"], currency, self.provider),
            currency=currency,
            fee_nano=_read_fee(fee) if known else None,
            fee_currency=currency if known else None,
        )

    def _read_refund(self, row: Any, currency: str) -> Reversal:
        return Reversal(
            id=str(row["id"]),
            kind="refund",
            amount_nano=nano_from_major_units(row["amount_refunded"], currency, self.provider),
            state=_REFUNDED.get(str(row["status"]).partition("-")[0], "open"),
            ours=refund_id_in(row.get("comment") or row.get("comments")),
        )

    def _read_chargeback(self, row: Any, currency: str) -> Reversal:
        return Reversal(
            id=str(row["id"]),
            kind="dispute",
            amount_nano=nano_from_major_units(row["amount"], currency, self.provider),
            state=_DISPUTED.get(str(row["status"]), "open"),
        )

    async def _pages(
        self, path: str, query: dict[str, str], *, pages_max: int = _PAGES_MAX
    ) -> AsyncIterator[Any]:
        for page in range(1, pages_max + 1):
            answer = await self._client.ask("GET", path, query={**query, "page": str(page)})
            if answer is None:
                return
            with reading(self.provider):
                rows = [dict(row) for row in answer.get("data") or ()]
                info = (answer.get("meta") or {}).get("page_info") or {}
                pages = int(info.get("total_pages") or 0)
            for row in rows:
                yield row
            if page >= pages:
                return
        raise PaymentsUnavailableError(f"Flutterwave lists more than {pages_max} pages of {path}")

    async def _ask(self, method: str, path: str, *, missing: bool = False, **more: Any) -> Any:
        answer = await self._client.ask(method, path, **more)
        if answer is None and missing:
            return None
        if answer is None or answer.get("status") != "success" or answer.get("data") is None:
            raise PaymentsUnavailableError(f"Flutterwave's answer to {method} {path} says nothing")
        return answer["data"]


def _is_of(row: Any, payment: Payment, flw_ref: str) -> bool:
    """Tell whether a refund is of this transaction: by its id, else by the reference that both have."""
    of = row.get("transaction_id") or row.get("tx_id")
    return str(of) == payment.id if of is not None else row.get("flw_ref") == flw_ref


def _read_fee(fee: Any) -> int | None:
    """Return a fee in nano units: a fact, which may be finer than its currency (RWF 140.7). None where it cannot be read."""
    try:
        nano = Decimal(str(fee)).scaleb(9)
        return int(nano) if 0 <= nano <= AMOUNT_MAX_NANO and nano == int(nano) else None
    except (ArithmeticError, ValueError):
        return None
