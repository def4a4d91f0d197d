"""``tuma users``: people, their limits, caps and clocks."""

from typing import Any

import click

from billing.wallets.caps import Caps
from scripts.cli.wallets import cap_options, set_and_show_caps
from scripts.command import office_command
from scripts.office import Office


@click.group()
def users() -> None:
    """People."""


@office_command(users, "create")
@click.option("--email", required=True)
@click.option("--subject", default=None, help="`sub` of the tokens that they sign in with.")
async def users_create(office: Office, *, email: str, subject: str | None) -> dict[str, Any]:
    """Register a person."""
    user_id = await office.wallets.create_user(email, subject=subject)
    return {**(await office.wallets.describe_user(user_id)).as_json()}


@office_command(users, "show")
@click.argument("user")
async def users_show(office: Office, *, user: str) -> dict[str, Any]:
    """Show a person and their wallets."""
    user_id = await office.wallets.get_user(user)
    found = await office.wallets.find_wallets(user_id=user_id)
    shown = (await office.wallets.describe_user(user_id)).as_json()
    return {**shown, "wallets": [wallet.as_json() for wallet in found]}


@office_command(users, "limits")
@click.argument("user")
@click.option("--rpm", type=int, default=None, help="Requests per minute over all keys; 0 lifts it.")
@click.option("--tpm", type=int, default=None, help="Tokens per minute; 0 lifts it.")
@click.option("--max-parallel", type=int, default=None, help="Calls at a time; 0 lifts it.")
async def users_limits(
    office: Office, *, user: str, rpm: int | None, tpm: int | None, max_parallel: int | None
) -> dict[str, Any]:
    """Show or set the limits over all keys of a person."""
    user_id = await office.wallets.get_user(user)
    changed = await office.wallets.set_user(
        user_id, requests_per_min=rpm, tokens_per_min=tpm, calls_in_flight=max_parallel
    )
    return {**changed.as_json()}


@office_command(users, "disable")
@click.argument("user")
async def users_disable(office: Office, *, user: str) -> dict[str, Any]:
    """Refuse a person's keys and tokens, on every worker."""
    changed = await office.wallets.set_user(await office.wallets.get_user(user), status="disabled")
    return {**changed.as_json()}


@office_command(users, "enable")
@click.argument("user")
async def users_enable(office: Office, *, user: str) -> dict[str, Any]:
    """Let a person in again."""
    changed = await office.wallets.set_user(await office.wallets.get_user(user), status="active")
    return {**changed.as_json()}


@office_command(users, "caps")
@click.argument("user")
@cap_options
async def users_caps(office: Office, *, user: str, **options: str | None) -> dict[str, Any]:
    """Show or set the caps of a user, over all wallets, in USD of cost."""
    user_id = await office.wallets.get_user(user)
    caps = await set_and_show_caps(office, "user", user_id, options)
    await office.cool_user(user_id)
    return {"id": str(user_id), "currency": "USD", "caps": caps}


@office_command(users, "clock")
@click.argument("user")
@click.option("--timezone", default=None, help="IANA name, as Africa/Lagos.")
@click.option("--week-starts", type=int, default=None, help="1 for Monday to 7 for Sunday.")
async def users_clock(
    office: Office, *, user: str, timezone: str | None, week_starts: int | None
) -> dict[str, Any]:
    """Show or set the clock that the windows of a user's caps follow."""
    user_id = await office.wallets.get_user(user)
    room = Caps(office.database)
    clock = await room.get_clock(user_id)
    if timezone is not None or week_starts is not None:
        await room.set_clock(
            user_id, timezone=timezone or clock.timezone, week_starts=week_starts or clock.week_starts
        )
        await office.cool_user(user_id)
        clock = await room.get_clock(user_id)
    return {"id": str(user_id), "timezone": clock.timezone, "week_starts": clock.week_starts}
