"""Who may use ``/admin``."""

from aiohttp import web

from billing.actor import acting
from billing.errors import InvalidKeyError, NotPermittedError
from proxy.http.request_facts import call_id_of
from proxy.identity.authenticate import IDENTITY, bears, count_failure
from proxy.openapi.answer_types import Handler
from proxy.operator.requests import services_of


@web.middleware
async def guard_admin(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let nobody to ``/admin`` without the operator's token, whatever is asked there; who comes in acts as the admin.

    Raises:
        NotPermittedError: there is no such token.
        InvalidKeyError: it is another.
    """
    if not _is_guarded(request):
        return await handler(request)
    services = services_of(request)
    token = services.settings.admin.token.get_secret_value()
    if not token:
        raise NotPermittedError("There is no operator's API here: TUMA_ADMIN__TOKEN is not set.")
    if not bears(request, token):
        await count_failure(request, request.app[IDENTITY])
        raise InvalidKeyError("The operator's token is not valid.")
    with acting("admin", str(call_id_of(request))):
        return await handler(request)


def _is_guarded(request: web.Request) -> bool:
    """Whether the path, or the route that was found for it, is the operator's; it takes only one of the two."""
    resource = request.match_info.route.resource
    paths = (request.path, "" if resource is None else resource.canonical)
    return any(_is_admins(path) for path in paths)


def _is_admins(path: str) -> bool:
    """Whether a path is the operator's."""
    return path == "/admin" or path.startswith("/admin/")
