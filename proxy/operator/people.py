"""Users: found, made, limited, disabled."""

from uuid import UUID

from aiohttp import web

from billing.wallets.caps import caps_as_json
from billing.wallets.wallets import UserJson
from proxy.http.forms import read_query
from proxy.http.typed_answer import JsonAnswer, answer
from proxy.operator.answers import UsersJson, UserWithWalletsJson
from proxy.operator.forms import UserChangeForm, UserForm
from proxy.operator.requests import page_of, read_as, read_id, read_page, services_of
from proxy.operator.wallets import _wallet_json


async def list_users(request: web.Request) -> JsonAnswer[UsersJson]:
    """Users by age; ``email``, ``limit`` and ``after`` in the query."""
    limit, after = read_page(request, "user")
    found = await services_of(request).wallets.find_users(
        email=read_query(request, "email"), after=after, limit=limit + 1
    )
    return answer(request, page_of([user.as_json() for user in found], limit))


async def create_user(request: web.Request) -> JsonAnswer[UserJson]:
    """Register a person."""
    form = await read_as(request, UserForm)
    wallets = services_of(request).wallets
    user_id = await wallets.create_user(form.email, subject=form.subject)
    return answer(request, (await wallets.describe_user(user_id)).as_json(), 201)


async def get_user(request: web.Request) -> JsonAnswer[UserWithWalletsJson]:
    """A person, with their wallets and the caps over all of them."""
    return await _show_user(request, read_id(request, "user"))


async def change_user(request: web.Request) -> JsonAnswer[UserWithWalletsJson]:
    """Disable or enable a person, set the limits over all their keys, or the clock that their caps follow."""
    form = await read_as(request, UserChangeForm)
    services, user_id = services_of(request), read_id(request, "user")
    if form.timezone is not None or form.week_starts is not None:
        clock = await services.caps.get_clock(user_id)
        await services.caps.set_clock(
            user_id,
            timezone=form.timezone or clock.timezone,
            week_starts=form.week_starts or clock.week_starts,
        )
    changes = form.model_dump(exclude={"timezone", "week_starts"}, exclude_none=True)
    if changes:
        await services.wallets.set_user(user_id, **changes)
    return await _show_user(request, user_id)


async def _show_user(request: web.Request, user_id: UUID) -> JsonAnswer[UserWithWalletsJson]:
    services = services_of(request)
    user = await services.wallets.describe_user(user_id)
    found = await services.wallets.find_wallets(user_id=user_id)
    body: UserWithWalletsJson = {
        **user.as_json(),
        "wallets": [_wallet_json(wallet) for wallet in found],
        "caps": caps_as_json(await services.caps.find_caps(user_id)),
    }
    return answer(request, body)
