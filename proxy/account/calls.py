"""``/v1/calls``: what a person's calls cost, and how each charge came about."""

from aiohttp import web

from billing.ids import parse_id
from billing.reports.answers import ExplainedCallJson
from billing.reports.call_view import PAGE_MAX, CallFilter
from proxy.account.answers import CallsJson
from proxy.account.requests import enter
from proxy.http.forms import read_limit, read_moment, read_query
from proxy.http.typed_answer import JsonAnswer, answer


async def list_calls(request: web.Request) -> JsonAnswer[CallsJson]:
    """Calls that the wallet paid for and those under way, newest first; a call's id is the `x-request-id` of its answer.

    `model`, `key`, `since` and `until` filter; `limit` and `after` page.
    """
    services, caller = await enter(request)
    limit, after, key = (
        read_limit(request, most=PAGE_MAX),
        read_query(request, "after"),
        read_query(request, "key"),
    )
    found = await services.own_calls.list_page(
        caller.user_id,
        caller.wallet_id,
        CallFilter(
            since=read_moment(request, "since"),
            until=read_moment(request, "until"),
            model=read_query(request, "model"),
            key_id=None if key is None else parse_id(key, "key"),
        ),
        after=None if after is None else parse_id(after, "call"),
        limit=limit + 1,
    )
    page = found[:limit]
    body: CallsJson = {
        "object": "list",
        "data": page,
        "has_more": len(found) > limit,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
    }
    return answer(request, body)


async def get_own_call(request: web.Request) -> JsonAnswer[ExplainedCallJson]:
    """A call of the caller's wallet: tokens, prices, exchange rate, and in words how its charge came about."""
    services, caller = await enter(request)
    call_id = parse_id(request.match_info["call"], "call")
    shown = await services.own_calls.describe(caller.user_id, call_id, wallet_id=caller.wallet_id)
    return answer(request, shown)
