"""Where payments are followed up: webhooks, intents that nobody told of, refunds under way, and what was missed.

Everything ends in the same step: ask the provider for a transaction's whole standing, and apply it (``billing/payments/payments.py``). A crash
anywhere leaves work that is due again: an event that was not ended, an intent or a reversal whose next question comes.

A wallet that tops itself up, and what may interrupt it: before its intent is there, nothing has happened; after that the intent is due
until it has ended. Before it is charged the provider is asked whether it was, and the charge bears the intent's reference as its
idempotency key: asked twice, paid once.

A refund of ours, and what may interrupt it: the money is set aside before the provider is asked. Stripe knows it by a key of ours and
may be asked again. The others know no keys, and their lists may be late, or not what they should be: so it is noted that the refund
is sent before it is, and one whose answer was lost is looked for, and never sent again but by an operator's word.
"""

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Literal
from uuid import UUID

import structlog

from billing.errors import (
    BrokenInvariantError,
    InputError,
    PaymentsUnavailableError,
    TumaError,
    UnavailableError,
)
from billing.meters import Meters
from billing.payments.payment import (
    Applied,
    Intent,
    OpenReversal,
    Payment,
    Refund,
    SavedMethod,
    WebhookEvent,
    parse_reference,
)
from billing.payments.payments import TAKEN, WORK_MAX_S, Payments
from billing.payments.provider_api import (
    Hint,
    NotSentError,
    PaymentApi,
    PaymentRefusedError,
    ReferenceUsedError,
    SavedMethodApi,
)
from billing.payments.units import PaymentProvider
from billing.postgres.database import Database
from config.settings import PaymentSettings

_PAGE_TRIES = 3
_SWEEP_MISSES = 3  # payments about which a provider says nothing; then it is away
_EVENT_TRIES = 8  # with pauses of a minute, two, four…: two hours
_log = structlog.get_logger("tuma.payments")


class PaymentWorker:
    """Looks into payments.

    Args:
        database: by the webhook role.
        apis: those providers that are configured.
        settings: its pace.
        meters: where webhooks are counted.
    """

    def __init__(
        self,
        database: Database,
        apis: Mapping[PaymentProvider, PaymentApi],
        settings: PaymentSettings,
        meters: Meters | None = None,
    ) -> None:
        self.payments = Payments(database, meters)
        self._apis = apis
        self._settings = settings
        self._rung = asyncio.Event()

    @property
    def providers(self) -> Sequence[PaymentProvider]:
        """Those that are configured."""
        return tuple(self._apis)

    def api_of(self, provider: PaymentProvider) -> PaymentApi:
        """Return a provider's.

        Raises:
            InputError: it is not configured.
        """
        found = self._apis.get(provider)
        if found is None:
            named = ", ".join(self._apis) or "none"
            raise InputError(f"payments by {provider} are not set up here; there is: {named}")
        return found

    def saver_of(self, provider: PaymentProvider) -> SavedMethodApi:
        """Return a provider's that can save a means of payment.

        Raises:
            InputError: it is not configured, or cannot.
        """
        found = self.api_of(provider)
        if not isinstance(found, SavedMethodApi):
            raise InputError(f"{provider} saves no means of payment here; only stripe does")
        return found

    async def open_page(self, intent: Intent, *, email: str, return_url: str | None) -> Intent:
        """Have a page made for an intent that has none, and note it.

        Raises:
            PaymentRefusedError: the provider does not take it; the intent has failed.
            PaymentsUnavailableError: nothing is known; the same may be asked again.
        """
        api, left = self.api_of(intent.provider), _PAGE_TRIES
        while intent.state == "creating" and intent.url is None:
            left -= 1
            try:
                page = await api.create_page(intent, email=email, return_url=return_url)
            except ReferenceUsedError as error:
                if not left:
                    raise PaymentsUnavailableError(str(error)) from None
                await self.payments.try_page_again(intent)
            except PaymentRefusedError as error:
                await self.payments.end_intent(intent.id, "failed", str(error))
                raise
            else:
                await self.payments.note_page(intent.id, provider_id=page.id, url=page.url)
            found = await self.payments.find(intent.id)
            if found is None:
                raise BrokenInvariantError(f"the intent {intent.id} is gone")
            intent = found
        return intent

    # Work

    def ring(self) -> None:
        """Say that there is work."""
        self._rung.set()

    async def run(self) -> None:
        """Work until cancelled: when rung, and now and then."""
        while True:
            self._rung.clear()
            try:
                while await self.work() >= TAKEN:
                    pass  # there may be more
            except TumaError as error:
                _log.warning("payments.failed", error=str(error))
            try:
                async with asyncio.timeout(self._settings.look_s):
                    await self._rung.wait()
            except TimeoutError:
                pass

    async def work(self) -> int:
        """Do what is due, and return how much that was.

        Raises:
            PostgresUnavailableError: nothing can be done.
        """
        events = await self.payments.take_events()
        await asyncio.gather(*(self._quietly(self._work_event(event), event.provider) for event in events))
        intents = await self.payments.take_intents(
            pause_s=self._settings.poll_s, late_s=self._settings.late_s
        )
        await asyncio.gather(*(self._quietly(self._work_intent(item), item.provider) for item in intents))
        reversals = await self.payments.take_reversals(pause_s=self._settings.poll_s)
        await asyncio.gather(*(self._quietly(self._work_reversal(item), item.provider) for item in reversals))
        return len(events) + len(intents) + len(reversals)

    async def _quietly(self, work: Awaitable[object], provider: str) -> None:
        """Do a piece of work; where it fails it is due again by itself, as whoever takes it has it for a time."""
        try:
            await work
        except BrokenInvariantError as error:
            _log.error("payments.broken", provider=provider, error=str(error))
        except (UnavailableError, InputError) as error:
            _log.warning("payments.failed", provider=provider, error=str(error), kind=type(error).__name__)

    async def _work_event(self, event: WebhookEvent) -> None:
        api = self._apis.get(event.provider)
        if api is None:
            return  # another worker may know it; it is due again
        try:
            hint = api.read_webhook(event.body.encode())
        except InputError as error:
            await self.payments.end_event(event.id, "ignored", str(error))
            return
        found = await self._find(api, hint.payments, hint.references)
        ours = [payment for payment in found if parse_reference(payment.reference) is not None]
        try:
            applied = [await self.payments.apply(item, takes_more=api.takes_more) for item in ours]
        except BrokenInvariantError as error:
            await self.payments.end_event(event.id, "review", str(error))
            raise
        for payment in ours:
            intent_id = parse_reference(payment.reference)
            if intent_id is not None and payment.state in ("failed", "expired"):
                await self.look_at(
                    intent_id
                )  # which may have ended, unless its payer can still try otherwise
        ended = _end_of(event, hint, found=bool(found), ours=ours, applied=applied)
        if ended is not None:
            await self.payments.end_event(event.id, *ended)

    async def _find(
        self, api: PaymentApi, txn_ids: Sequence[str], references: Sequence[str]
    ) -> list[Payment]:
        found: dict[str, Payment] = {}
        for txn_id in txn_ids:
            payment = await api.look(txn_id)
            if payment is not None:
                found[payment.id] = payment
        if not found:
            for reference in references:
                intent_id = parse_reference(reference)
                intent = None if intent_id is None else await self.payments.find(intent_id)
                if intent is not None and intent.provider == api.provider:
                    found.update({payment.id: payment for payment in await api.find(intent)})
        return list(found.values())

    async def _work_intent(self, intent: Intent) -> None:
        if intent.state == "paid":
            await self._keep_method(intent)
            return
        await self.poll_intent(intent)
        if intent.kind == "auto" and intent.state == "creating":
            await self._charge(intent)

    async def _keep_method(self, intent: Intent) -> None:
        """Note what a paid intent was paid with, where its payer lets us keep that."""
        api = self._apis.get(intent.provider)
        if not isinstance(api, SavedMethodApi):
            return
        for payment in await api.find(intent):
            if payment.state == "succeeded":
                await self.payments.note_method(intent.id, await api.find_method(payment.id))
                return

    async def begin_auto_topups(self) -> int:
        """Begin the top-ups that wallets want by themselves; return how many. Whoever works next charges them."""
        begun = await self.payments.begin_auto_topups(expires_after_s=self._settings.expires_s)
        if begun:
            self.ring()
        return len(begun)

    async def _charge(self, intent: Intent) -> None:
        """Charge what is kept, unless the intent has ended meanwhile: paid already, switched off, too old.

        Raises:
            PaymentsUnavailableError: nothing is known; it is due again.
        """
        api, now = self._apis.get(intent.provider), await self.payments.find(intent.id)
        if not isinstance(api, SavedMethodApi) or now is None or now.state != "creating":
            return
        if now.provider_id is None or now.method_id is None:
            raise BrokenInvariantError(f"the intent {now.id} does not say what it charges")
        try:
            await api.charge(now, SavedMethod(now.provider_id, now.method_id, ""))
        except PaymentRefusedError as error:
            await self.payments.end_intent(now.id, "failed", str(error))
            return
        await self.payments.note_page(now.id, provider_id=now.provider_id, url=None)
        await self.poll_intent(now)

    async def poll_intent(self, intent: Intent) -> list[Applied]:
        """Ask the provider about an intent, and apply what it says.

        Raises:
            PaymentsUnavailableError: nothing is known.
        """
        api = self._apis.get(intent.provider)
        if api is None:
            return []
        found = await api.find(intent)
        applied = [await self.payments.apply(payment, takes_more=api.takes_more) for payment in found]
        if not any(payment.state == "succeeded" for payment in found):
            closed = found and all(payment.state == "expired" for payment in found)
            if closed or datetime.now(UTC) >= intent.expires_at:
                await self.payments.end_intent(intent.id, "expired", "it was not paid in time")
            elif found and all(payment.state == "failed" for payment in found):
                await self.payments.end_intent(intent.id, "failed", "the payment did not succeed")
        return applied

    async def send_refund(self, refund_id: UUID) -> str | None:
        """Have a refund of ours sent now, if no other process is about it: then it does so.

        Returns:
            Why the provider refuses, whereupon the money is the wallet's again; empty where it does not; None where another
            process has it, or the provider is not set up here.

        Raises:
            PaymentsUnavailableError: nothing is known; it is asked again when it is due.
        """
        item = await self.payments.take_reversal(refund_id)
        if item is None or item.provider not in self._apis:
            return None
        return await self._work_reversal(item)

    async def _work_reversal(self, item: OpenReversal) -> str:
        """Bring a reversal forward, as long as it is ours; returns why the provider refuses it, empty where it does not.

        Raises:
            PaymentsUnavailableError: nothing is known, or it took too long: whoever takes it next looks first.
        """
        try:
            async with asyncio.timeout(WORK_MAX_S):
                return await self._bring_forward(item)
        except TimeoutError:
            raise PaymentsUnavailableError(f"{item.provider} takes too long") from None

    async def _bring_forward(self, item: OpenReversal) -> str:
        api = self._apis.get(item.provider)
        payment = None if api is None else await api.look(item.provider_txn_id)
        if api is None or payment is None:
            return ""
        await self.payments.apply(payment, takes_more=api.takes_more)
        if item.state != "requested" or not await self.payments.is_refund_requested(item.id):
            return ""  # it was sent before: found by its id, or by its amount where that is not handed back
        refund = Refund(item.id, item.provider, item.provider_txn_id, item.amount_nano, item.state)
        if not api.sends_once and not await self.payments.begin_sending(item.id):
            raise PaymentsUnavailableError(
                f"the refund {item.id} may have been sent before, and {item.provider} does not list it: look there, and if"
                f" it is not: tuma payments send-again {item.id}"
            )
        try:
            made = await api.refund(refund, payment.currency)
        except PaymentRefusedError as error:
            _log.warning("payments.refund_refused", refund=str(item.id), error=str(error))
            await self.payments.undo_refund(item)
            return str(error)
        except NotSentError:
            await self.payments.was_not_sent(item.id)
            raise
        if made is not None:  # its own answer, before anything else is asked: no list need ever show it
            await self.payments.apply(replace(payment, reversals=[made]), takes_more=api.takes_more)
        payment = await api.look(item.provider_txn_id)
        if payment is not None:
            await self.payments.apply(payment, takes_more=api.takes_more)
        return ""

    async def sweep(self) -> int:
        """Look at everything that was paid or taken back lately, whoever told of it; return how many payments.

        One that contradicts the books, or cannot be read, hides no other.

        Raises:
            PaymentsUnavailableError: a provider does not answer; the others were swept.
        """
        since, seen, away = datetime.now(UTC) - timedelta(seconds=self._settings.sweep_back_s), 0, ""
        for provider, api in self._apis.items():
            misses = 0
            try:
                txn_ids = {txn_id async for txn_id in api.list_recent(since)}
                for txn_id in sorted(txn_ids):
                    try:
                        seen += await self._sweep_one(api, txn_id)
                    except PaymentsUnavailableError as error:
                        misses, away = misses + 1, f"{provider}: {error}"
                        if misses >= _SWEEP_MISSES:
                            break
            except PaymentsUnavailableError as error:
                away = f"{provider}: {error}"
        if away:
            raise PaymentsUnavailableError(away)
        return seen

    async def _sweep_one(self, api: PaymentApi, txn_id: str) -> int:
        payment = await api.look(txn_id)
        if payment is None or parse_reference(payment.reference) is None:
            return 0
        try:
            await self.payments.apply(payment, takes_more=api.takes_more)
        except BrokenInvariantError as error:
            _log.error("payments.broken", provider=api.provider, error=str(error))
        if payment.unread:  # its money is in the books; that what was taken back is not known must show
            raise PaymentsUnavailableError(payment.unread)
        return 1

    async def close(self) -> None:
        """Close the connections to the providers."""
        for api in self._apis.values():
            await api.close()

    async def look_at(self, intent_id: UUID) -> None:
        """Ask about one intent now, unless it was paid; where that fails, it is due again by itself."""
        intent = await self.payments.find(intent_id)
        if intent is not None and intent.state not in ("paid", "creating"):
            await self._quietly(self.poll_intent(intent), intent.provider)


def _end_of(
    event: WebhookEvent, hint: Hint, *, found: bool, ours: Sequence[Payment], applied: Sequence[Applied]
) -> tuple[Literal["done", "ignored", "review"], str] | None:
    """Return how an event ends; None where it is looked into again later."""
    last = event.tries >= _EVENT_TRIES
    unread = next((payment.unread for payment in ours if payment.unread), "")
    if any(item.credit == "review" for item in applied):
        return "review", "the payment does not agree with its intent"
    if unread:  # its money is credited; what was taken back of it is not known
        _log.warning("payments.unread", provider=event.provider, error=unread)
        return ("review", unread) if last else None
    if ours:
        return "done", ""
    if found or not any(parse_reference(item) for item in hint.references):
        return "ignored", "it is about nobody's top-up"
    return ("review", "the provider knows no such payment") if last else None
