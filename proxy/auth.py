"""Who calls: ``Authorization: Bearer`` with an API key."""

from aiohttp import web

from billing.errors import InvalidKeyError
from billing.keys import Caller
from proxy.context import CALLER
from proxy.services import SERVICES


async def authenticate(request: web.Request) -> Caller:
    """Return the caller, and remember them on the request.

    Raises:
        InvalidKeyError: no key, or one that is not valid.
        PostgresUnavailableError: the key is not cached and Postgres is away.
    """
    scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise InvalidKeyError("No API key was given: send it as 'Authorization: Bearer sk-tuma-…'.")
    caller = await request.app[SERVICES].keys.authenticate(secret.strip())
    request[CALLER] = caller
    return caller
