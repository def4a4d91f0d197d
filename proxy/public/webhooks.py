"""``POST /webhooks/{provider}``: what payment providers send. Checked, kept raw and once, answered; looked into afterwards."""

import hashlib
import math
import time
from collections import OrderedDict
from typing import get_args

import structlog
from aiohttp import web

from billing.errors import InputError, InvalidSignatureError
from billing.payments.units import PaymentProvider
from config.settings import Settings
from proxy.http.body import read_body
from proxy.http.client_address import client_address, network_of
from proxy.http.typed_answer import JsonAnswer, answer
from proxy.payments.signatures import is_signed
from proxy.public.answers import ReceivedJson
from proxy.services.public import PUBLIC

_log = structlog.get_logger("tuma.payments")
_BURST_S = 60.0  # refusals that follow each other closer than this are told of once
_KEY_LENGTH_MAX = 255  # of an event's id


async def receive_webhook(request: web.Request) -> JsonAnswer[ReceivedJson]:
    """Take in an event of a payment provider; 200 means that it is kept, not that it was believed."""
    services = request.app[PUBLIC]
    settings = services.settings
    provider = _provider_of(request.match_info["provider"])
    limits = settings.limits.model_copy(update={"body_bytes": settings.payments.webhook_bytes})
    network = network_of(client_address(request, settings.auth.trusted_networks))
    async with services.unsigned.lane(network):
        body = await read_body(request, limits)
        secret = _secret_of(provider, settings)
        signed = is_signed(provider, body, request.headers, secret, now_s=time.time())
    if not signed:
        services.metrics.meters.webhooks.add(1, provider, "refused")
        request.app[BURSTS].note(provider, network, secret_set=bool(secret))
        await services.unsigned.count(network)
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


def _secret_of(provider: PaymentProvider, settings: Settings) -> str:
    return {
        "stripe": settings.stripe.webhook_secret,
        "paystack": settings.paystack.secret_key,
        "flutterwave": settings.flutterwave.webhook_secret,
    }[provider].get_secret_value()


class RefusalBursts:
    """Tells of refused webhooks once per burst: the first at once, how many came after it with the next line."""

    def __init__(self, *, pause_s: float = _BURST_S, remembered: int = 10_000) -> None:
        self._pause_s = pause_s
        self._remembered = remembered
        self._bursts: OrderedDict[str, tuple[float, int]] = (
            OrderedDict()
        )  # when it was told of, and how many since

    def note(self, provider: str, network: str, *, secret_set: bool) -> None:
        """Note one refusal."""
        now = time.monotonic()
        told_s, since = self._bursts.get(network, (-math.inf, 0))
        if now < told_s + self._pause_s:
            self._bursts[network] = (told_s, since + 1)
            return
        _log.warning(
            "webhook.refused", provider=provider, network=network, secret_set=secret_set, since_the_last=since
        )
        self._bursts[network] = (now, 0)
        self._bursts.move_to_end(network)
        if len(self._bursts) > self._remembered:
            self._bursts.popitem(last=False)


BURSTS = web.AppKey("bursts of refused webhooks", RefusalBursts)


def _provider_of(name: str) -> PaymentProvider:
    for provider in get_args(PaymentProvider):
        if name == provider:
            return provider  # type: ignore[no-any-return]
    raise web.HTTPNotFound
