"""``/v1/wallet/topups``: a person pays money into their wallet."""

from uuid import UUID

from aiohttp import web

from billing.errors import InputError
from billing.identity.caller import Caller
from billing.ids import parse_id
from billing.money import format_amount, get_currency
from billing.payments.payment import Intent
from billing.payments.topup_limits import check_topup
from proxy.account.answers import TopupJson
from proxy.account.forms import TopupForm
from proxy.account.requests import enter, enter_as_owner
from proxy.http.errors import BadRequestError
from proxy.http.forms import read_form
from proxy.http.typed_answer import JsonAnswer, answer
from proxy.identity.authenticate import acting_as
from proxy.services.account import AccountServices

_KEY_LENGTH_MAX = 200


async def create_topup(request: web.Request) -> JsonAnswer[TopupJson]:
    """Begin a top-up, and say where it is paid. A repeat with the same `Idempotency-Key` returns the first."""
    services, caller, _ = await enter_as_owner(request)
    form = await read_form(request, TopupForm, services.settings.limits)
    body = await make_topup(request, services, caller, form)
    return answer(request, body, 201)


async def make_topup(
    request: web.Request, services: AccountServices, caller: Caller, form: TopupForm
) -> TopupJson:
    """Begin a top-up as a caller who may (``owner_of``), once per ``Idempotency-Key``."""
    key = request.headers.get("Idempotency-Key")
    if key is not None and not 0 < len(key) <= _KEY_LENGTH_MAX:
        raise BadRequestError(f"'Idempotency-Key' must have 1 to {_KEY_LENGTH_MAX} characters.")
    with acting_as(request):
        return topup_as_json(await begin_topup(services, caller, form, key=key))


async def begin_topup(
    services: AccountServices, caller: Caller, form: TopupForm, *, key: str | None
) -> Intent:
    """Note the wish, then ask the provider for a page: a crash in between leaves an intent that the same key finds.

    Raises:
        InputError: the amount, the currency or the provider will not do.
        PaymentsUnavailableError: the provider does not answer; the same may be asked again.
    """
    worker, settings = services.payments, services.settings.payments
    worker.api_of(form.provider)
    if form.save_method:
        worker.saver_of(form.provider)
    currency = form.currency or caller.currency
    if currency != caller.currency:
        raise InputError(f"this wallet is in {caller.currency}, not {get_currency(currency).code}")
    check_topup(form.amount, currency, settings)
    email = form.email or await services.statements.find_email(caller.user_id)
    if not email:
        raise BadRequestError(f"{form.provider} needs the payer's 'email'.", param="email")
    intent = await services.intents.create(
        caller.user_id,
        caller.wallet_id,
        form.provider,
        amount_nano=form.amount,
        currency=currency,
        key=key,
        saves_method=form.save_method,
        expires_after_s=settings.expires_s,
        poll_after_s=settings.poll_s,
        live_max=settings.pending_max,
    )
    return await worker.open_page(intent, email=email, return_url=form.return_url)


async def get_topup(request: web.Request) -> JsonAnswer[TopupJson]:
    """How a top-up stands. While it waits for its money, the payment provider is asked: about once a second at most."""
    services, caller = await enter(request)
    body = await describe_topup(services, caller, parse_id(request.match_info["topup"], "top-up"))
    return answer(request, body)


async def describe_topup(services: AccountServices, caller: Caller, intent_id: UUID) -> TopupJson:
    """Return a top-up that the caller may see, after a question to its provider where the turn for one has come."""
    found = await services.intents.get(caller.user_id, intent_id, wallet_id=_wallet_of(caller))
    if await services.status_checks.look(found):
        found = await services.intents.get(caller.user_id, intent_id, wallet_id=_wallet_of(caller))
    return topup_as_json(found)


def _wallet_of(caller: Caller) -> UUID | None:
    """A key sees its wallet's top-ups alone; somebody who signed in, all of theirs."""
    return None if caller.key_id is None else caller.wallet_id


def topup_as_json(intent: Intent) -> TopupJson:
    """Return amounts as decimal strings in major units."""
    return {
        "object": "topup",
        "id": str(intent.id),
        "wallet_id": str(intent.wallet_id),
        "provider": intent.provider,
        "amount": format_amount(intent.amount_nano),
        "currency": intent.currency,
        "state": intent.state,
        "url": intent.url,
        "reference": intent.reference,
        "note": intent.note,
        "created_at": intent.created_at.isoformat(),
        "expires_at": intent.expires_at.isoformat(),
        "ended_at": None if intent.ended_at is None else intent.ended_at.isoformat(),
    }
