"""Stripe: https://docs.stripe.com/api (checkout sessions, payment intents, refunds, disputes, events), by its own package.

A top-up is a Checkout Session; what is paid with it is its PaymentIntent, whose id is the payment's. Whole minor units. Stripe
keeps the answer to an idempotency key for a day at least: a page or a charge that is asked for again is the same one.
"""

import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import stripe

from billing.errors import InputError, PaymentsUnavailableError
from billing.money import format_amount
from billing.payments.payment import (
    Intent,
    Payment,
    Refund,
    Reversal,
    ReversalState,
    SavedMethod,
    parse_reference,
)
from billing.payments.provider_api import Hint, Page, PaymentRefusedError, ReferenceUsedError
from billing.payments.units import PaymentProvider, minor_units, nano_from_minor_units
from proxy.payments.client import MESSAGE_MAX, BoundedHttp, read_object, reading, texts

if TYPE_CHECKING:
    from stripe.params import DisputeListParams, EventListParams, PaymentIntentListParams, RefundListParams
    from stripe.params.checkout import SessionCreateParams

_PER_PAGE = 100
_PAGES_MAX = 50
_ID_LENGTH_MAX = 255
_NOT_FOUND = 404
_CHARGED = "latest_charge.balance_transaction"
_SENT = frozenset({"authorization", "content-type", "idempotency-key", "stripe-version"})
# A page must stay open for 30 minutes to 24 hours from when it is made; some of it is left for clocks and slow answers.
_OPEN_LEAST, _OPEN_MOST = timedelta(minutes=31), timedelta(hours=23, minutes=58)
_OPEN_WANTED = timedelta(minutes=40)
_CLOCKS = timedelta(hours=1)
_REFUNDED: dict[str, ReversalState] = {"succeeded": "final", "failed": "undone", "canceled": "undone"}
_DISPUTED: dict[str, ReversalState] = {"won": "undone", "lost": "final", "prevented": "final"}
_TOLD = (
    "payment_intent.succeeded",
    "charge.updated",
    "charge.refunded",
    "refund.created",
    "refund.updated",
    "refund.failed",
    "charge.dispute.created",
    "charge.dispute.updated",
    "charge.dispute.closed",
    "charge.dispute.funds_withdrawn",
    "charge.dispute.funds_reinstated",
)


class StripeApi:
    """Asks Stripe.

    Args:
        http: to it.
        secret_key: in no message.
        base_url: without ``/v1``.
        return_url: where a payer goes who named no other place: Stripe's page needs one.
    """

    provider: PaymentProvider = "stripe"
    takes_more = False
    sends_once = True  # by its idempotency key

    def __init__(self, http: BoundedHttp, secret_key: str, *, base_url: str, return_url: str) -> None:
        # The one switch that the package has: it would note an id of this machine in the home folder, and send it.
        stripe.enable_telemetry = False
        self._return_url = return_url
        self._http = http
        self._api = stripe.StripeClient(
            secret_key,
            base_addresses={"api": base_url},
            max_network_retries=0,  # who asks has retries of their own
            http_client=_StripeHttp(http),
        ).v1

    async def create_page(self, intent: Intent, *, email: str, return_url: str | None) -> Page:
        """Have a session made; see ``PaymentApi``. Only cards are saved."""
        about, url = _about(intent), return_url or self._return_url
        title = f"Top-up of {format_amount(intent.amount_nano)} {intent.currency}"
        params: SessionCreateParams = {
            "mode": "payment",
            "client_reference_id": intent.reference,
            "expires_at": int(_page_end(intent, datetime.now(UTC)).timestamp()),
            "line_items": [
                {
                    "quantity": 1,
                    "price_data": {
                        "currency": intent.currency.lower(),
                        "unit_amount": minor_units(intent.amount_nano, intent.currency, self.provider),
                        "product_data": {"name": title},
                    },
                }
            ],
            "metadata": about,
            "payment_intent_data": {"metadata": about, "description": title},
            "success_url": url,
            "cancel_url": url,
        }
        try:
            if intent.method_due:
                params["customer"] = await self._make_customer(intent, email)
                params["allowed_payment_method_types"] = ["card"]
                params["payment_intent_data"]["setup_future_usage"] = "off_session"
            else:
                params["customer_email"] = email
            made = await self._ask(
                self._api.checkout.sessions.create_async(params, {"idempotency_key": intent.reference})
            )
        except _KeyUsedError as error:
            raise ReferenceUsedError(str(error)) from None
        with reading(self.provider):
            return Page(id=str(made["id"]), url=str(made["url"]))

    async def _make_customer(self, intent: Intent, email: str) -> str:
        made = await self._ask(
            self._api.customers.create_async(
                {
                    "email": email,
                    "metadata": {"tuma_user": str(intent.user_id), "tuma_wallet": str(intent.wallet_id)},
                },
                {"idempotency_key": f"{intent.reference}_customer"},
            )
        )
        with reading(self.provider):
            return str(made["id"])

    async def find(self, intent: Intent) -> list[Payment]:
        """Retrieve the session that was noted, or list the customer's payments; see ``SavedMethodApi``."""
        if intent.provider_id is None:
            return []
        if intent.kind == "auto":
            row = await self._charge_of(intent, intent.provider_id)
            payment = None if row is None else await self._read(row)
        else:
            payment = await self.look(intent.provider_id)
        return [] if payment is None else [payment]

    async def look(self, txn_id: str) -> Payment | None:
        """Retrieve a payment intent, or the one of a session; see ``PaymentApi``."""
        kind = txn_id.partition("_")[0]
        if not (txn_id.isascii() and txn_id.replace("_", "").isalnum() and len(txn_id) <= _ID_LENGTH_MAX):
            return None
        if kind == "pi":
            row = await self._find(self._api.payment_intents.retrieve_async(txn_id, {"expand": [_CHARGED]}))
            return None if row is None else await self._read(row)
        if kind == "cs":
            row = await self._find(
                self._api.checkout.sessions.retrieve_async(
                    txn_id, {"expand": ["payment_intent", f"payment_intent.{_CHARGED}"]}
                )
            )
            return None if row is None else await self._read_session(row)
        return None

    def read_webhook(self, body: bytes) -> Hint:
        """Return what an event is about; see ``PaymentApi``."""
        event = read_object(body)
        data, kind = event.get("data"), str(event.get("type"))
        about = data.get("object") if isinstance(data, dict) else None
        key = event.get("id")
        if not isinstance(about, dict) or not isinstance(key, str) or event.get("object") != "event":
            raise InputError("an event of Stripe's has an id and an object")
        if kind.startswith(("checkout.session.", "payment_intent.")):
            return Hint(key=key, payments=texts(about.get("id")))
        if kind.startswith(("charge.", "refund.")):  # charges, their refunds and disputes
            return Hint(key=key, payments=texts(about.get("payment_intent")))
        return Hint(key=key)

    async def list_recent(self, since: datetime) -> AsyncIterator[str]:
        """List the payments that anything happened to since then, by Stripe's events of 30 days; see ``PaymentApi``."""
        params: EventListParams = {"created": {"gte": int(since.timestamp())}, "types": list(_TOLD)}
        async for event in self._rows(self._api.events.list_async, params, "events"):
            with reading(self.provider):
                about = event["data"]["object"]
                if event["type"] != "payment_intent.succeeded":
                    found = texts(about["payment_intent"])
                else:
                    found = texts(about["id"] if parse_reference(_reference_of(about)) else None)
            for txn_id in found:
                yield txn_id

    async def refund(self, refund: Refund, currency: str) -> None:
        """Send a refund, once by its idempotency key, and found by its metadata; see ``PaymentApi``."""
        await self._ask(
            self._api.refunds.create_async(
                {
                    "payment_intent": refund.provider_txn_id,
                    "amount": minor_units(refund.amount_nano, currency, self.provider),
                    "metadata": {"tuma_refund": str(refund.id)},
                },
                {"idempotency_key": f"tuma_refund_{refund.id.hex}"},
            )
        )

    # Cards that were saved

    async def find_method(self, txn_id: str) -> SavedMethod | None:
        """Return the card that was saved with a payment; see ``SavedMethodApi``."""
        row = await self._find(
            self._api.payment_intents.retrieve_async(txn_id, {"expand": ["payment_method"]})
        )
        if row is None:
            return None
        with reading(self.provider):
            customer, method = row["customer"], row["payment_method"]
            asked = row["status"] == "succeeded" and row["setup_future_usage"] == "off_session"
            if not (asked and customer and method):
                return None
            if method["customer"] != customer or method["type"] != "card":
                return None
            card = method["card"]
            return SavedMethod(str(customer), str(method["id"]), f"{card['brand']} …{card['last4']}")

    async def charge(self, intent: Intent, method: SavedMethod) -> None:
        """Charge a saved card; see ``SavedMethodApi``. What its owner's bank wants to ask them about is declined."""
        await self._ask(
            self._api.payment_intents.create_async(
                {
                    "amount": minor_units(intent.amount_nano, intent.currency, self.provider),
                    "currency": intent.currency.lower(),
                    "customer": method.customer_id,
                    "payment_method": method.method_id,
                    "allowed_payment_method_types": ["card"],
                    "off_session": True,
                    "confirm": True,
                    "metadata": _about(intent),
                },
                {"idempotency_key": intent.reference},
            )
        )

    async def _charge_of(self, intent: Intent, customer_id: str) -> Any:
        """Return the payment intent of a charge, if it was made."""
        params: PaymentIntentListParams = {
            "customer": customer_id,
            "created": {"gte": int((intent.created_at - _CLOCKS).timestamp())},
            "expand": [f"data.{_CHARGED}"],
        }
        async for row in self._rows(self._api.payment_intents.list_async, params, "payments of one payer"):
            if _reference_of(row) == intent.reference:
                return row
        return None

    async def close(self) -> None:
        """Close its connections."""
        await self._http.close()

    # What it answers

    async def _read_session(self, row: Any) -> Payment | None:
        """Read a session's payment; without one, the session says how it stands."""
        with reading(self.provider):
            reference, paid, status = str(row["client_reference_id"]), row["payment_intent"], row["status"]
            if row["mode"] != "payment" or parse_reference(reference) is None:
                return None
            if paid and status != "expired":
                return await self._read(paid, page_open=status == "open")
            currency = str(row["currency"]).upper()
            return Payment(
                provider=self.provider,
                id=str(row["id"]),
                reference=reference,
                state="expired" if status == "expired" else "pending",
                amount_nano=nano_from_minor_units(row["amount_total"], currency, self.provider),
                currency=currency,
            )

    async def _read(self, row: Any, *, page_open: bool = False) -> Payment | None:
        """Read a payment intent with what became of it; a declined card is no end while the page is open."""
        with reading(self.provider):
            if parse_reference(_reference_of(row)) is None:
                return None
            payment = self._read_intent(row, page_open=page_open)
            if payment.state != "succeeded":
                return payment
            refunds, disputes = await self._refunds_of(payment.id), await self._disputes_of(payment.id)
            reversals = [self._read_refund(item, payment.currency) for item in refunds]
            reversals += [self._read_dispute(item, payment) for item in disputes if _takes_money(item)]
            return dataclasses.replace(payment, reversals=reversals)

    def _read_intent(self, row: Any, *, page_open: bool) -> Payment:
        currency, status = str(row["currency"]).upper(), str(row["status"])
        came = status == "succeeded"
        ended = status == "canceled" or (status == "requires_payment_method" and not page_open)
        moved: Any = row["latest_charge"]["balance_transaction"] if came else None
        fee_currency = str(moved["currency"]).upper() if moved else None
        return Payment(
            provider=self.provider,
            id=str(row["id"]),
            reference=_reference_of(row),
            state="succeeded" if came else "failed" if ended else "pending",
            amount_nano=nano_from_minor_units(
                row["amount_received" if came else "amount"], currency, self.provider
            ),
            currency=currency,
            # For some moments after a card was charged, there is none yet; ``charge.updated`` tells of it.
            fee_nano=nano_from_minor_units(moved["fee"], fee_currency, self.provider)
            if fee_currency
            else None,
            fee_currency=fee_currency,
        )

    def _read_refund(self, row: Any, currency: str) -> Reversal:
        return Reversal(
            id=str(row["id"]),
            kind="refund",
            amount_nano=nano_from_minor_units(row["amount"], currency, self.provider),
            state=_REFUNDED.get(str(row["status"]), "open"),
            ours=_ours(row),
        )

    def _read_dispute(self, row: Any, payment: Payment) -> Reversal:
        """Read a dispute; one in another currency, or of more than was paid, is about all of it."""
        amount_nano = payment.amount_nano
        if str(row["currency"]).upper() == payment.currency:
            told_nano = nano_from_minor_units(row["amount"], payment.currency, self.provider)
            amount_nano = min(amount_nano, told_nano)
        return Reversal(
            id=str(row["id"]),
            kind="dispute",
            amount_nano=amount_nano,
            state=_DISPUTED.get(str(row["status"]), "open"),
        )

    async def _refunds_of(self, txn_id: str) -> list[Any]:
        params: RefundListParams = {"payment_intent": txn_id}
        return [row async for row in self._rows(self._api.refunds.list_async, params, "refunds")]

    async def _disputes_of(self, txn_id: str) -> list[Any]:
        params: DisputeListParams = {"payment_intent": txn_id}
        return [row async for row in self._rows(self._api.disputes.list_async, params, "disputes")]

    async def _rows(
        self, ask: Callable[[Any], Awaitable[stripe.StripeObject]], params: Mapping[str, Any], what: str
    ) -> AsyncIterator[Any]:
        """Return all rows of a list."""
        start: dict[str, str] = {}
        for _ in range(_PAGES_MAX):
            listed = await self._ask(ask({**params, "limit": _PER_PAGE, **start}))
            with reading(self.provider):
                rows, more = list(listed["data"]), listed["has_more"]
                start = {"starting_after": str(rows[-1]["id"])} if more else {}
            for row in rows:
                yield row
            if not more:
                return
        raise PaymentsUnavailableError(f"stripe lists more than {_PAGES_MAX * _PER_PAGE} {what}")

    async def _find(self, call: Awaitable[stripe.StripeObject]) -> Any:
        try:
            return await self._ask(call)
        except _MissingError:
            return None

    async def _ask(self, call: Awaitable[stripe.StripeObject]) -> Any:
        """Return an answer as plain dictionaries.

        Raises:
            PaymentRefusedError: it refuses this.
            PaymentsUnavailableError: no answer, 5xx, 409, 429, 401 or 403 (our key), or none that can be read.
        """
        try:
            answer = await call
        except stripe.IdempotencyError:
            raise _KeyUsedError("stripe has had another request by this reference") from None
        except stripe.CardError as error:
            raise _refused(_details(error)) from None
        except stripe.InvalidRequestError as error:
            if error.http_status == _NOT_FOUND:
                raise _MissingError("stripe has no such thing") from None
            raise _refused(_details(error)) from None
        except stripe.StripeError as error:
            raise PaymentsUnavailableError(f"stripe answered with status {error.http_status}") from None
        if not isinstance(answer, stripe.StripeObject):
            raise PaymentsUnavailableError("stripe's answer says nothing")
        return answer.to_dict()


class _KeyUsedError(PaymentsUnavailableError):
    """An idempotency key was used with other parameters."""


class _MissingError(PaymentRefusedError):
    """There is no such thing."""


class _StripeHttp(stripe.HTTPClient):
    """The package's HTTP, bounded; of what it would tell of this machine, nothing is sent."""

    name = "aiohttp"

    def __init__(self, http: BoundedHttp) -> None:
        super().__init__()
        self._http = http

    async def request_async(
        self, method: str, url: str, headers: Mapping[str, str], post_data: Any = None
    ) -> tuple[bytes, int, Mapping[str, str]]:
        """Send a request; no header of the answer is of use."""
        sent = {name: value for name, value in headers.items() if name.lower() in _SENT}
        status, raw = await self._http.send(method.upper(), url, headers=sent, body=post_data)
        return raw, status, {}


def _page_end(intent: Intent, now: datetime) -> datetime:
    """Return until when a page is open: as long as its intent, within what Stripe allows.

    The same each time, as one key must come with the same parameters; only a page that is made late has another end.
    """
    end = max(intent.expires_at, intent.created_at + _OPEN_WANTED)
    return max(min(end, intent.created_at + _OPEN_MOST), now + _OPEN_LEAST)


def _about(intent: Intent) -> dict[str, str]:
    return {"reference": intent.reference, "tuma_topup": str(intent.id)}


def _reference_of(row: Any) -> str:
    return str((row.get("metadata") or {}).get("reference") or "")


def _takes_money(row: Any) -> bool:
    """An inquiry (``warning_…``) withdraws nothing, nor does a dispute that was prevented before it could."""
    status = str(row["status"])
    return not status.startswith("warning_") and (
        status != "prevented" or bool(row.get("balance_transactions"))
    )


def _details(error: stripe.StripeError) -> Mapping[str, Any]:
    body = error.json_body
    found = body.get("error") if isinstance(body, dict) else None
    return found if isinstance(found, dict) else {}


def _refused(error: Mapping[str, Any]) -> PaymentRefusedError:
    code = error.get("decline_code") or error.get("code")
    said = str(error.get("message") or "it gives no reason")[:MESSAGE_MAX]
    return PaymentRefusedError(f"stripe refuses: {said}" + (f" ({str(code)[:MESSAGE_MAX]})" if code else ""))


def _ours(row: Any) -> UUID | None:
    try:
        return UUID(str((row.get("metadata") or {}).get("tuma_refund")))
    except ValueError:
        return None
