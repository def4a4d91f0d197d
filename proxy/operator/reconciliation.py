"""What we have consumed of the provider's quota, and how our bill compares with the provider's."""

from aiohttp import web

from billing.books.answers import QuotaJson, ReconciliationJson, ReconciliationsJson
from billing.books.provider_account import describe_quota, describe_reconciliations
from proxy.http.typed_answer import JsonAnswer, answer
from proxy.operator.requests import services_of


async def get_quota(request: web.Request) -> JsonAnswer[QuotaJson]:
    """The shadow ledger's sums, and what is left of the provider's quota."""
    return answer(request, await describe_quota(services_of(request).database))


async def list_reconciliations(request: web.Request) -> JsonAnswer[ReconciliationsJson]:
    """The latest reconciliations and what they found."""
    return answer(request, await describe_reconciliations(services_of(request).database))


async def reconcile(request: web.Request) -> JsonAnswer[ReconciliationJson]:
    """Reconcile with the provider now, as a running server does by itself every hour."""
    return answer(request, (await services_of(request).reconciler.run()).as_json())
