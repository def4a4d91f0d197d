"""``POST /webhooks/{provider}``: what payment providers send. Checked, kept raw and once, answered; looked into afterwards."""

import hashlib
import time
from typing import get_args

import structlog
from aiohttp import web

from billing.errors import InputError, InvalidSignatureError
from billing.payments.units import PaymentProvider
from proxy.http.body import read_body
from proxy.http.errors import BodyTooLargeError
from proxy.http.typed_answer import JsonAnswer, answer
from proxy.payments.signatures import is_signed
from proxy.public.answers import ReceivedJson
from proxy.services.public import PUBLIC

_log = structlog.get_logger("tuma.payments")
_KEY_LENGTH_MAX = 255  # of an event's id


async def receive_webhook(request: web.Request) -> JsonAnswer[ReceivedJson]:
    """Take in an event of a payment provider; 200 means that it is kept, not that it was believed."""
    services = request.app[PUBLIC]
    settings = services.settings
    provider = _provider_of(request.match_info["provider"])
    limits = settings.limits.model_copy(update={"body_bytes": settings.payments.webhook_bytes})
    body = await read_body(request, limits)
    if len(body) > settings.payments.webhook_bytes:
        raise BodyTooLargeError(f"The body is larger than {settings.payments.webhook_bytes} bytes.")
    secret = {
        "stripe": settings.stripe.webhook_secret,
        "paystack": settings.paystack.secret_key,
        "flutterwave": settings.flutterwave.webhook_secret,
    }[provider].get_secret_value()
    if not is_signed(provider, body, request.headers, secret, now_s=time.time()):
        services.metrics.meters.webhooks.add(1, provider, "refused")
        _log.warning("webhook.refused", provider=provider, secret_set=bool(secret))
        raise InvalidSignatureError("This is not signed by the payment provider.")
    try:
        text = body.decode()
        key = services.payments.api_of(provider).read_webhook(body).key
    except (UnicodeDecodeError, InputError) as error:
        raise InputError(f"this is no event of {provider}: {error}") from None
    if not 0 < len(key) <= _KEY_LENGTH_MAX:
        key = hashlib.sha256(body).hexdigest()
    new = await services.payments.payments.receive(provider, key, text)
    if new:
        services.payments.ring()
    return answer(request, {"received": True})


def _provider_of(name: str) -> PaymentProvider:
    for provider in get_args(PaymentProvider):
        if name == provider:
            return provider  # type: ignore[no-any-return]
    raise web.HTTPNotFound
