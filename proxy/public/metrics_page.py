"""``GET /metrics``: who may see the numbers. With a token whoever sends it; without one, this machine or named networks."""

from aiohttp import web

from billing.errors import InvalidKeyError, NotPermittedError
from config.settings import MetricSettings, read_networks
from proxy.http.client_address import client_address
from proxy.http.request_facts import standard_headers
from proxy.http.typed_answer import TextAnswer
from proxy.identity.authenticate import IDENTITY, bears, count_failure
from proxy.services.public import PUBLIC

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# What proxies add to a request that they pass on.
_PASSED_ON = ("X-Forwarded-For", "Forwarded", "X-Real-IP", "Via", "X-Forwarded-Host", "X-Forwarded-Proto")


async def show_metrics(request: web.Request) -> TextAnswer:
    """Metrics for Prometheus, of all workers together; money is in them, so not for everybody."""
    services = request.app[PUBLIC]
    settings = services.settings.metrics
    token = settings.token.get_secret_value()
    if token:
        if not bears(request, token):
            await count_failure(request, request.app[IDENTITY])
            raise InvalidKeyError("Metrics are shown to whoever sends TUMA_METRICS__TOKEN.")
    elif not _is_near(request, settings):
        raise NotPermittedError("Metrics are not shown to this address: TUMA_METRICS__NETWORKS, __TOKEN.")
    return TextAnswer(
        body=await services.metrics.render(),
        headers={**standard_headers(request), "Content-Type": _CONTENT_TYPE},
    )


def _is_near(request: web.Request, settings: MetricSettings) -> bool:
    """Whether the client's address may scrape; one that a proxy speaks for, which is not trusted, is not known."""
    trusted = request.app[PUBLIC].settings.auth.trusted_networks
    told = trusted and "X-Forwarded-For" in request.headers
    if not told and any(name in request.headers for name in _PASSED_ON):
        return False
    address = client_address(request, trusted)
    return address is not None and any(address in network for network in read_networks(settings.networks))
