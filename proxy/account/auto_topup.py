"""``/v1/wallet/auto-topup``: a wallet that tops itself up from what its owner let us keep."""

from aiohttp import web

from billing.identity.caller import Caller
from billing.payments.auto_topups import AutoTopup
from billing.payments.topup_limits import check_topup
from billing.payments.units import minor_units
from proxy.account.answers import AutoTopupJson
from proxy.account.forms import AutoTopupForm
from proxy.account.requests import enter, enter_as_owner
from proxy.http.errors import BadRequestError
from proxy.http.forms import read_form
from proxy.http.typed_answer import JsonAnswer, answer
from proxy.identity.authenticate import acting_as
from proxy.services.account import AccountServices


async def get_auto_topup(request: web.Request) -> JsonAnswer[AutoTopupJson]:
    """Whether and how the caller's wallet tops itself up, and what is kept to pay with."""
    services, caller = await enter(request)
    return await _show(request, services, caller)


async def put_auto_topup(request: web.Request) -> JsonAnswer[AutoTopupJson]:
    """Let the caller's wallet top itself up below a threshold, or no more; a means of payment must have been saved before."""
    services, caller, _ = await enter_as_owner(request)
    form = await read_form(request, AutoTopupForm, services.settings.limits)
    wanted = await _complete(services, caller, form)
    with acting_as(request):
        await services.auto_topups.set(caller.user_id, caller.wallet_id, wanted)
    return await _show(request, services, caller)


async def _complete(services: AccountServices, caller: Caller, form: AutoTopupForm) -> AutoTopup:
    """Return what is wanted, with what the form does not name as it was.

    Raises:
        InputError: an amount that cannot be topped up, or that the provider cannot take.
        BadRequestError: it is to be on, and an amount was never named; or the pause is too short.
    """
    least_s = int(services.settings.payments.auto_pause_s)
    if form.pause_s is not None and form.pause_s < least_s:
        raise BadRequestError(f"'pause_s' must be at least {least_s}.", param="pause_s")
    before = await services.auto_topups.get(caller.user_id, caller.wallet_id)
    threshold_nano = before.threshold_nano if form.threshold is None else form.threshold
    amount_nano = before.amount_nano if form.amount is None else form.amount
    for name, value in (("threshold", threshold_nano), ("amount", amount_nano)):
        if value is None and form.enabled:
            raise BadRequestError(f"{name!r} is not named, and was not before.", param=name)
    if form.enabled or form.amount is not None:
        assert amount_nano is not None
        check_topup(amount_nano, caller.currency, services.settings.payments)
        if before.provider is not None:
            minor_units(amount_nano, caller.currency, before.provider)
    return AutoTopup(
        enabled=form.enabled,
        threshold_nano=threshold_nano,
        amount_nano=amount_nano,
        pause_s=form.pause_s or before.pause_s or least_s,
    )


async def delete_payment_method(request: web.Request) -> JsonAnswer[AutoTopupJson]:
    """Forget what the caller's wallet pays with; it tops itself up no more."""
    services, caller, _ = await enter_as_owner(request)
    with acting_as(request):
        await services.auto_topups.forget_method(caller.user_id, caller.wallet_id)
    return await _show(request, services, caller)


async def _show(request: web.Request, services: AccountServices, caller: Caller) -> JsonAnswer[AutoTopupJson]:
    found = await services.auto_topups.get(caller.user_id, caller.wallet_id)
    body: AutoTopupJson = {
        "object": "auto_topup",
        "wallet_id": str(caller.wallet_id),
        "currency": caller.currency,
        **found.as_json(),
    }
    return answer(request, body)
