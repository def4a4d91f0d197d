"""Simulated Stripe: https://docs.stripe.com/api, as far as a merchant with Checkout, saved cards, refunds and disputes uses it."""

from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from scripts.sim.payments.books import BooksError, Checkout, Customer, Dispute, Payment, Refund
from scripts.sim.payments.currencies import AmountError, Provider, check_stripe_amount, is_code
from scripts.sim.payments.stripe.objects import StripeVoice, card_error, charge_id, is_saved, transaction_id
from scripts.sim.payments.stripe.protocol import (
    Once,
    StripeRefusal,
    answer,
    expand,
    list_of,
    missing,
    page_of,
    read_form,
    refusal,
    whole,
)
from scripts.sim.payments.till import Till, new_id

_LEAST_S, _MOST_S, _DEFAULT_S = 1_800, 86_400, 86_400
_KINDS = {429: {"code": "rate_limit"}, 401: {}}

_Handler = Callable[[web.Request, dict[str, Any]], dict[str, Any]]


class StripeApi:
    """Stripe's paths.

    Args:
        till: where money moves.
        voice: how it is shown.
        origin: the server's URL without path.
    """

    provider: Provider = "stripe"

    def __init__(self, till: Till, voice: StripeVoice, origin: Callable[[], str]) -> None:
        self.voice = voice
        self._till = till
        self._books = till.books
        self._origin = origin
        self._once = Once()

    def routes(self) -> list[web.RouteDef]:
        """Return its routes."""
        made: list[tuple[str, str, _Handler]] = [
            ("POST", "/checkout/sessions", self._create_session),
            ("GET", "/checkout/sessions", self._sessions),
            ("GET", "/checkout/sessions/{id}", self._session),
            ("POST", "/checkout/sessions/{id}/expire", self._expire_session),
            ("POST", "/payment_intents", self._create_intent),
            ("GET", "/payment_intents", self._intents),
            ("GET", "/payment_intents/{id}", self._intent),
            ("GET", "/charges", self._charges),
            ("GET", "/charges/{id}", self._charge),
            ("GET", "/balance_transactions/{id}", self._balance_transaction),
            ("POST", "/refunds", self._create_refund),
            ("GET", "/refunds", self._refunds),
            ("GET", "/refunds/{id}", self._refund),
            ("GET", "/disputes", self._disputes),
            ("GET", "/disputes/{id}", self._dispute),
            ("POST", "/customers", self._create_customer),
            ("GET", "/customers/{id}", self._customer),
            ("GET", "/payment_methods/{id}", self._method),
            ("GET", "/events", self._events),
            ("GET", "/events/{id}", self._event),
        ]
        return [web.route(verb, f"/stripe/v1{path}", self._served(handler)) for verb, path, handler in made]

    def refusal(self, status: int, message: str) -> web.Response:
        """Return an error as Stripe shows it."""
        kind = {"type": "api_error"} if status >= web.HTTPInternalServerError.status_code else {}
        return refusal(StripeRefusal(status, message, **{**kind, **_KINDS.get(status, {})}))

    def return_url(self, checkout: Checkout, payment: Payment) -> str | None:  # noqa: ARG002 - every provider's
        """Return where the customer goes after paying."""
        url = checkout.success_url
        return None if url is None else url.replace("{CHECKOUT_SESSION_ID}", checkout.id)

    def _served(self, handler: _Handler) -> Callable[[web.Request], Awaitable[web.Response]]:
        """Read the form, answer a repeated request as before, and put objects where ``expand`` says."""

        async def serve(request: web.Request) -> web.Response:
            text = (await request.text()) if request.method == "POST" else request.query_string
            try:
                if request.method == "POST" and (given := self._once.find(request, text)) is not None:
                    return given
                form = read_form(text)
                try:
                    shown = handler(request, form)
                    expand(shown, list_of(form.get("expand")), self._find)
                except (BooksError, AmountError) as error:
                    raise StripeRefusal(400, str(error)) from None
                made = answer(shown)
            except StripeRefusal as error:
                made = refusal(error)
            if request.method == "POST":
                self._once.keep(request, text, made)
            return made

        return serve

    # Checkout sessions

    def _create_session(self, _request: web.Request, form: dict[str, Any]) -> dict[str, Any]:
        if form.get("mode") != "payment":
            raise StripeRefusal(400, "Only mode=payment is simulated.", param="mode")
        if not form.get("success_url"):
            raise StripeRefusal(400, "Missing required param: success_url.", param="success_url")
        if form.get("customer") and (form.get("customer_email") or form.get("customer_creation")):
            raise StripeRefusal(
                400, "You may only specify one of these parameters: customer, customer_email."
            )
        amount, currency = self._line_items(form)
        now_s = self._books.now_s()
        expires_s = whole(form, "expires_at") if "expires_at" in form else now_s + _DEFAULT_S
        if not now_s + _LEAST_S <= expires_s <= now_s + _MOST_S:
            raise StripeRefusal(
                400,
                "The `expires_at` timestamp must be at least 30 minutes and at most 24 hours from"
                " Checkout Session creation.",
                param="expires_at",
            )
        _check_methods(form)
        future = form.get("payment_intent_data", {})
        customer_id, email = self._customer_of(form)
        checkout_id, reference = new_id("cs_test"), str(form.get("client_reference_id") or "")
        checkout = self._books.open_checkout(
            self.provider,
            checkout_id=checkout_id,
            reference=reference or checkout_id,
            amount_minor=amount,
            currency=currency,
            expires_s=expires_s,
            email=email,
            success_url=form["success_url"],
            cancel_url=form.get("cancel_url"),
            metadata=form.get("metadata", {}),
            given={
                "client_reference_id": reference or None,
                "customer_creation": form.get("customer_creation", "if_required"),
                "customer_email": form.get("customer_email"),
                "payment_method_types": list_of(form.get("allowed_payment_method_types")) or ["card"],
                "setup_future_usage": future.get("setup_future_usage"),
                "url": f"{self._origin()}/pay/{checkout_id}",
                "payment": {
                    "customer_id": customer_id,
                    "method_id": new_id("pm"),
                    "metadata": future.get("metadata", {}),
                },
            },
        )
        return self.voice.session(checkout)

    @staticmethod
    def _line_items(form: dict[str, Any]) -> tuple[int, str]:
        total, currencies = 0, set()
        for item in list_of(form.get("line_items")):
            price = item.get("price_data") or {}
            if not (price.get("product_data") or {}).get("name"):
                raise StripeRefusal(
                    400, "Missing required param: line_items[0][price_data][product_data][name]."
                )
            currency = str(price.get("currency", "")).upper()
            if not is_code(currency):
                raise StripeRefusal(400, f"Invalid currency: {currency.lower()}.", param="currency")
            amount = whole(price, "unit_amount")
            check_stripe_amount(amount, currency)
            total += amount * whole(item, "quantity")
            currencies.add(currency)
        if len(currencies) != 1:
            raise StripeRefusal(400, "line_items must be in one currency.", param="line_items")
        return total, currencies.pop()

    def _customer_of(self, form: dict[str, Any]) -> tuple[str | None, str | None]:
        """Return a session's customer and their address."""
        email = form.get("customer_email")
        if customer_id := form.get("customer"):
            return customer_id, self._get_customer(str(customer_id), "customer").email
        if form.get("customer_creation") == "always":
            return self._add_customer({"email": email}).id, email
        return None, email

    def _get_session(self, session_id: str) -> Checkout:
        checkout = self._books.checkouts.get(session_id)
        if checkout is None or checkout.provider != self.provider:
            raise missing("checkout.session", session_id)
        self._till.expire_due(checkout)
        return checkout

    def _session(self, request: web.Request, _form: dict[str, Any]) -> dict[str, Any]:
        return self.voice.session(self._get_session(request.match_info["id"]))

    def _sessions(self, request: web.Request, form: dict[str, Any]) -> dict[str, Any]:
        rows = [self.voice.session(item) for item in self._books.checkouts_of(self.provider)]
        return self._page(request, rows, form, "payment_intent", "customer", "status")

    def _expire_session(self, request: web.Request, _form: dict[str, Any]) -> dict[str, Any]:
        checkout = self._get_session(request.match_info["id"])
        self._till.expire(checkout)
        return self.voice.session(checkout)

    # Payments

    def _create_intent(self, _request: web.Request, form: dict[str, Any]) -> dict[str, Any]:
        """Charge a saved card of a customer who is not there."""
        if form.get("off_session") != "true" or form.get("confirm") != "true":
            raise StripeRefusal(400, "Only off_session=true with confirm=true is simulated.")
        _check_methods(form)
        currency, amount = str(form.get("currency", "")).upper(), whole(form, "amount")
        if not is_code(currency):
            raise StripeRefusal(400, f"Invalid currency: {currency.lower()}.", param="currency")
        check_stripe_amount(amount, currency)
        customer = self._get_customer(str(form.get("customer")), "customer")
        saved = self._saved(str(form.get("payment_method")))
        if saved is None or saved.customer_id != customer.id:
            raise missing("PaymentMethod", str(form.get("payment_method")), "payment_method")
        metadata = form.get("metadata", {})
        payment = self._books.enter_payment(
            self.provider,
            reference=metadata.get("reference", ""),
            amount_minor=amount,
            currency=currency,
            status="pending",
            email=customer.email,
            customer_id=customer.id,
            method_id=saved.method_id,
            metadata=metadata,
        )
        decline = self._till.take_decline()
        if decline is None:
            self._till.settle(payment)
            return self.voice.payment_intent(payment)
        self._till.fail(payment, decline)
        error = {**card_error(payment), "payment_intent": self.voice.payment_intent(payment)}
        raise StripeRefusal(402, error.pop("message"), **error)

    def _saved(self, method_id: str) -> Payment | None:
        for payment in self._books.payments_of(self.provider):
            if payment.method_id == method_id and is_saved(payment, self._books):
                return payment
        return None

    def _get_payment(self, payment_id: str, kind: str, param: str | None = None) -> Payment:
        payment = self._books.payments.get(payment_id)
        if payment is None or payment.provider != self.provider:
            raise missing(kind, payment_id, param)
        return payment

    def _intent(self, request: web.Request, _form: dict[str, Any]) -> dict[str, Any]:
        return self.voice.payment_intent(self._get_payment(request.match_info["id"], "payment_intent"))

    def _intents(self, request: web.Request, form: dict[str, Any]) -> dict[str, Any]:
        rows = [self.voice.payment_intent(item) for item in self._books.payments_of(self.provider)]
        return self._page(request, rows, form, "customer")

    def _charge(self, request: web.Request, _form: dict[str, Any]) -> dict[str, Any]:
        name = request.match_info["id"]
        return self.voice.charge(self._get_payment(name.replace("ch_", "pi_", 1), "charge"))

    def _charges(self, request: web.Request, form: dict[str, Any]) -> dict[str, Any]:
        rows = [self.voice.charge(item) for item in self._books.payments_of(self.provider)]
        return self._page(request, rows, form, "customer", "payment_intent")

    def _balance_transaction(self, request: web.Request, _form: dict[str, Any]) -> dict[str, Any]:
        name = request.match_info["id"]
        payment = self._get_payment(name.replace("txn_", "pi_", 1), "balance_transaction")
        return self.voice.balance_transaction(payment)

    # Refunds and disputes

    def _create_refund(self, _request: web.Request, form: dict[str, Any]) -> dict[str, Any]:
        payment = self._get_payment(str(form.get("payment_intent")), "payment_intent", "payment_intent")
        amount = whole(form, "amount") if "amount" in form else None
        refund = self._till.begin_refund(
            payment, amount, metadata=form.get("metadata", {}), reason=form.get("reason")
        )
        self._till.finish_refund(refund)
        return self.voice.refund(refund, payment)

    def _all_refunds(self) -> list[dict[str, Any]]:
        found = [(item, self._books.payments[item.payment_id]) for item in self._books.refunds.values()]
        return [self.voice.refund(item, paid) for item, paid in found if paid.provider == self.provider]

    def _refunds(self, request: web.Request, form: dict[str, Any]) -> dict[str, Any]:
        return self._page(request, self._all_refunds(), form, "payment_intent", "charge")

    def _refund(self, request: web.Request, _form: dict[str, Any]) -> dict[str, Any]:
        return self._one(self._books.refunds, request.match_info["id"], "refund")

    def _disputes(self, request: web.Request, form: dict[str, Any]) -> dict[str, Any]:
        found = [(item, self._books.payments[item.payment_id]) for item in self._books.disputes.values()]
        rows = [self.voice.dispute(item, paid) for item, paid in found if paid.provider == self.provider]
        return self._page(request, rows, form, "payment_intent", "charge")

    def _dispute(self, request: web.Request, _form: dict[str, Any]) -> dict[str, Any]:
        return self._one(self._books.disputes, request.match_info["id"], "dispute")

    def _one(self, entries: dict[str, Any], entry_id: str, kind: str) -> dict[str, Any]:
        entry: Refund | Dispute | None = entries.get(entry_id)
        if entry is None or self._books.payments[entry.payment_id].provider != self.provider:
            raise missing(kind, entry_id)
        payment = self._books.payments[entry.payment_id]
        return (
            self.voice.refund(entry, payment)
            if isinstance(entry, Refund)
            else self.voice.dispute(entry, payment)
        )

    # Customers and their cards

    def _create_customer(self, _request: web.Request, form: dict[str, Any]) -> dict[str, Any]:
        return _show_customer(self._add_customer(form))

    def _add_customer(self, form: dict[str, Any]) -> Customer:
        customer = Customer(new_id("cus"), self._books.now_s(), form.get("email"), form.get("metadata", {}))
        self._books.customers[customer.id] = customer
        return customer

    def _get_customer(self, customer_id: str, param: str | None = None) -> Customer:
        found = self._books.customers.get(customer_id)
        if found is None:
            raise missing("customer", customer_id, param)
        return found

    def _customer(self, request: web.Request, _form: dict[str, Any]) -> dict[str, Any]:
        return _show_customer(self._get_customer(request.match_info["id"]))

    def _method(self, request: web.Request, _form: dict[str, Any]) -> dict[str, Any]:
        method = self._find_method(request.match_info["id"])
        if method is None:
            raise missing("PaymentMethod", request.match_info["id"])
        return method

    def _find_method(self, method_id: str) -> dict[str, Any] | None:
        paid = self._saved(method_id)
        used = [item for item in self._books.payments_of(self.provider) if item.method_id == method_id]
        return self.voice.method(paid or used[0]) if used else None

    # Events

    def _events(self, request: web.Request, form: dict[str, Any]) -> dict[str, Any]:
        rows = [
            event.payload for event in self._till.webhooks.events.values() if event.provider == self.provider
        ]
        kinds = list_of(form.get("types"))
        return self._page(request, [row for row in rows if not kinds or row["type"] in kinds], form)

    def _event(self, request: web.Request, _form: dict[str, Any]) -> dict[str, Any]:
        event = self._till.webhooks.events.get(request.match_info["id"])
        if event is None or event.provider != self.provider:
            raise missing("event", request.match_info["id"])
        return dict(event.payload)

    # All of them

    def _page(
        self, request: web.Request, rows: list[dict[str, Any]], form: dict[str, Any], *filters: str
    ) -> dict[str, Any]:
        left = [row for row in rows if all(form.get(name, row[name]) == row[name] for name in filters)]
        return page_of(left, form, request.path.removeprefix("/stripe"))

    def _find(self, object_id: str) -> dict[str, Any] | None:
        """Return the object that an id names."""
        kind, _, rest = object_id.partition("_")
        payment = self._books.payments.get(f"pi_{rest}")
        if kind == "cus":
            found = self._books.customers.get(object_id)
            return None if found is None else _show_customer(found)
        if kind == "pm":
            return self._find_method(object_id)
        if payment is None:
            return None
        shown = {
            payment.id: self.voice.payment_intent,
            charge_id(payment): self.voice.charge,
            transaction_id(payment): self.voice.balance_transaction,
        }.get(object_id)
        return None if shown is None else shown(payment)


def _show_customer(customer: Customer) -> dict[str, Any]:
    return {
        "id": customer.id,
        "object": "customer",
        "created": customer.created_s,
        "email": customer.email,
        "livemode": False,
        "metadata": customer.metadata,
    }


def _check_methods(form: dict[str, Any]) -> None:
    """Refuse what API versions from 2026-09-30 on refuse."""
    if "payment_method_types" in form:
        raise StripeRefusal(
            400,
            "payment_method_types is no longer supported; use allowed_payment_method_types.",
            code="payment_method_types_no_longer_supported",
        )
