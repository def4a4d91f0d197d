"""Who calls: ``Authorization: Bearer`` with an API key."""

from aiohttp import web

from billing.callers import Caller
from billing.errors import InvalidKeyError, NotPermittedError
from billing.keys import Owner
from proxy.addresses import client_address, network_of
from proxy.context import CALLER
from proxy.services import SERVICES, Services


async def authenticate(request: web.Request) -> Caller:
    """Return the caller, and remember them on the request.

    Raises:
        InvalidKeyError: no key, or one that is not valid.
        AddressNotAllowedError: the key may not be used from where the client is.
        RateLimitError: too many keys that are not valid came from the client's address.
        PostgresUnavailableError: the key is not cached and Postgres is away.
    """
    services = request.app[SERVICES]
    try:
        if services.failures.any_limited:
            async with services.failures.lane(_network_of(request, services)):
                caller = await _recognise(request, services)
        else:
            caller = await _recognise(request, services)
    except InvalidKeyError:
        await services.failures.count(_network_of(request, services))
        raise
    if caller.networks is not None:
        caller.require_address(client_address(request, services.settings.auth.trusted_networks))
    request[CALLER] = caller
    return caller


async def _recognise(request: web.Request, services: Services) -> Caller:
    scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise InvalidKeyError("No API key was given: send it as 'Authorization: Bearer sk-tuma-…'.")
    return await services.keys.authenticate(secret.strip())


def _network_of(request: web.Request, services: Services) -> str:
    return network_of(client_address(request, services.settings.auth.trusted_networks))


def owner_of(caller: Caller) -> Owner:
    """Return what a caller may manage: with a key, what belongs to its wallet; otherwise all that is the user's.

    Raises:
        NotPermittedError: the key is bound, or was made to call models only.
    """
    if not caller.manages:
        raise NotPermittedError("This key may call models, not manage keys or caps.")
    return Owner(caller.user_id, None if caller.key_id is None else caller.wallet_id)
