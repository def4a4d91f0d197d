"""How a handler of a person's own money begins and ends: what it may use, who calls, whether they may change anything."""

from typing import TypeVar

from aiohttp import web

from billing.identity.caller import Caller
from billing.identity.key import Owner
from proxy.http.request_facts import standard_headers
from proxy.http.typed_answer import JsonAnswer
from proxy.identity.authenticate import authenticate, owner_of
from proxy.services.account import ACCOUNT, AccountServices

_Body = TypeVar("_Body")


async def enter(request: web.Request) -> tuple[AccountServices, Caller]:
    """Return what a handler may use, and who calls.

    Raises:
        RefusalError, UnavailableError: see ``authenticate``.
    """
    return request.app[ACCOUNT], await authenticate(request)


async def enter_as_owner(request: web.Request) -> tuple[AccountServices, Caller, Owner]:
    """Return the same for somebody who may manage keys and caps of the wallet that they come with, and changes something.

    Raises:
        NotPermittedError: it is a key that may not.
        RateLimitError: they change too much.
        RefusalError, UnavailableError: see ``authenticate``.
    """
    services, caller = await enter(request)
    owner = owner_of(caller)
    await services.writes.count(caller.user_id)
    return services, caller, owner


def answer_secret(request: web.Request, body: _Body, status: int = 200) -> JsonAnswer[_Body]:
    """Answer with what nobody on the way may keep."""
    headers = {**standard_headers(request), "Cache-Control": "no-store"}
    return JsonAnswer(body, status=status, headers=headers)
