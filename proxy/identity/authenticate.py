"""Who calls: ``Authorization: Bearer`` with an API key, or with the token of somebody who signed in."""

import hashlib
import hmac
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from uuid import UUID

from aiohttp import hdrs, web

from billing.actor import acting
from billing.errors import InvalidKeyError, NotPermittedError
from billing.identity.auth_failures import AuthFailures
from billing.identity.caller import Caller
from billing.identity.key import Owner
from billing.identity.key_secret import PREFIX
from billing.identity.keys import Keys
from billing.identity.sign_ins import People
from billing.ids import parse_id
from config.settings import Settings
from proxy.http.client_address import client_address, network_of
from proxy.http.request_facts import call_id_of, facts_of
from proxy.identity.jwt import JwtVerifier


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells who calls."""

    settings: Settings
    keys: Keys
    tokens: JwtVerifier
    signed_in: People
    failures: AuthFailures


IDENTITY = web.AppKey("identity", Identity)
_TOKEN_DOTS = 2  # of a JWS in compact form, RFC 7515
# A page cannot give a WebSocket headers; what it offers as protocols is sent as one, and is in no URL.
_BEARER_PROTOCOL = "tuma.bearer."
_WALLET_PROTOCOL = "tuma.wallet."


async def authenticate(request: web.Request) -> Caller:
    """Return the caller, and remember them on the request.

    Somebody who signed in and has several wallets names the one that pays in ``x-tuma-wallet``.

    Raises:
        InvalidKeyError: no key or token, or one that is not valid.
        NotPermittedError: the key pays from another wallet than the one named.
        NotFoundError, InsufficientFundsError: the wallet named is not theirs; they have none.
        AddressNotAllowedError: the key may not be used from where the client is.
        RateLimitError: too many keys that are not valid came from the client's address.
        PostgresUnavailableError, JwksUnavailableError: who calls cannot be told just now.
    """
    facts = facts_of(request)
    identity = facts.app[IDENTITY]
    try:
        if identity.failures.any_limited:
            async with identity.failures.lane(_network_of(request, identity)):
                caller = await _recognise(request, identity)
        else:
            caller = await _recognise(request, identity)
    except InvalidKeyError:
        await count_failure(request, identity)
        raise
    _require_address(caller, request, identity)
    facts.caller = caller
    facts.stages.mark("authenticate")
    return caller


async def recognise_again(request: web.Request) -> Caller:
    """Look once more whether the caller of a request that lasts may do what it does; a refusal is nobody's failure.

    Raises:
        RefusalError: they may not, any more.
        UnavailableError: that cannot be told just now.
    """
    identity = request.app[IDENTITY]
    caller = await _recognise(request, identity)
    _require_address(caller, request, identity)
    return caller


def _require_address(caller: Caller, request: web.Request, identity: Identity) -> None:
    if caller.networks is not None:
        caller.require_address(client_address(request, identity.settings.auth.trusted_networks))


async def _recognise(request: web.Request, identity: Identity) -> Caller:
    secret = _read_secret(request)
    if not secret:
        raise InvalidKeyError("No API key was given: send it as 'Authorization: Bearer sk-tuma-…'.")
    wallet_id = _read_wallet(request)
    if identity.tokens.configured and not secret.startswith(PREFIX) and secret.count(".") == _TOKEN_DOTS:
        claims = await identity.tokens.verify(secret)
        caller = await identity.signed_in.sign_in(claims.subject, email=claims.email, wallet_id=wallet_id)
        left_s = (claims.expires_at - datetime.now(UTC)).total_seconds() + identity.settings.auth.leeway_s
        return replace(caller, good_until_s=time.monotonic() + left_s)
    caller = await identity.keys.authenticate(secret)
    if wallet_id not in (None, caller.wallet_id):
        raise NotPermittedError("This key pays from another wallet.")
    return caller


def _read_secret(request: web.Request) -> str:
    scheme, _, secret = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    secret = secret.strip()
    if secret and scheme.lower() == "bearer":
        return secret
    return _find_protocol(request, _BEARER_PROTOCOL) or ""


def _find_protocol(request: web.Request, prefix: str) -> str | None:
    """Return what follows ``prefix`` in a protocol that a WebSocket's client offers."""
    if request.headers.get(hdrs.UPGRADE, "").lower() == "websocket":
        for offered in request.headers.get(hdrs.SEC_WEBSOCKET_PROTOCOL, "").split(","):
            if offered.strip().startswith(prefix):
                return offered.strip().removeprefix(prefix)
    return None


def _read_wallet(request: web.Request) -> UUID | None:
    headers = request.headers
    named = headers.get("x-tuma-wallet")
    if named is None and hdrs.UPGRADE in headers:
        named = _find_protocol(request, _WALLET_PROTOCOL)
    return None if named is None else parse_id(named, "wallet")


def bears(request: web.Request, token: str) -> bool:
    """Whether the request carries a token of ours, which is no caller's key."""
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    # Digests, so that not even the length can be told from the time that a comparison takes.
    same = hmac.compare_digest(_digest(token), _digest(given.strip()))
    return scheme.lower() == "bearer" and same


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


async def count_failure(request: web.Request, identity: Identity) -> None:
    """Count a failed authentication of the client's address.

    Raises:
        RateLimitError: there were too many from there.
    """
    await identity.failures.count(_network_of(request, identity))


def _network_of(request: web.Request, identity: Identity) -> str:
    return network_of(client_address(request, identity.settings.auth.trusted_networks))


def acting_as(request: web.Request) -> AbstractContextManager[None]:
    """Let what is changed inside the block be audited as the caller's doing, with the request's id."""
    caller = facts_of(request).caller
    assert caller is not None, "who calls is asked first"
    who = f"user:{caller.user_id}" if caller.key_id is None else f"key:{caller.key_id}"
    return acting(who, str(call_id_of(request)))


def owner_of(caller: Caller) -> Owner:
    """Return what a caller may manage: with a key, what belongs to its wallet; otherwise all that is the user's.

    Raises:
        NotPermittedError: the key is bound, or was made to call models only.
    """
    if not caller.manages:
        raise NotPermittedError("This key may call models, not manage keys or caps.")
    return Owner(caller.user_id, None if caller.key_id is None else caller.wallet_id)
