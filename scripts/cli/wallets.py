"""``tuma wallets``: made, credited, frozen, bounded by caps."""

from typing import Any
from uuid import UUID

import click

from billing.identity.keys import PAGE_MAX
from billing.ids import parse_id
from billing.money import parse_amount
from billing.wallets.caps import PERIODS, Caps, Scope, caps_as_json
from scripts.command import office_command
from scripts.office import Office


@click.group()
def wallets() -> None:
    """Wallets: one user's money in one currency."""


@office_command(wallets, "create")
@click.option("--user", required=True, help="Id or e-mail address.")
@click.option("--currency", required=True, help="ISO 4217, as USD or NGN.")
@click.option("--overdraft", default="0", help="How far below zero it may go, in major units.")
async def wallets_create(office: Office, *, user: str, currency: str, overdraft: str) -> dict[str, Any]:
    """Open a wallet."""
    wallet_id = await office.wallets.create_wallet(
        user, currency=currency, overdraft_nano=parse_amount(overdraft)
    )
    return {**(await office.wallets.get_wallet(wallet_id)).as_json()}


@office_command(wallets, "credit")
@click.argument("wallet")
@click.argument("amount")
@click.option("--reason", required=True, help="Shown to the user.")
@click.option("--key", default=None, help="Idempotency key: a repeat with it posts nothing.")
async def wallets_credit(
    office: Office, *, wallet: str, amount: str, reason: str, key: str | None
) -> dict[str, Any]:
    """Put money into a wallet."""
    wallet_id = parse_id(wallet, "wallet")
    credit = await office.wallets.credit(wallet_id, parse_amount(amount), reason=reason, key=key)
    await office.cool(wallet_id)
    return {"transaction_id": str(credit.tx_id), **credit.wallet.as_json()}


@office_command(wallets, "list")
@click.option("--user", default=None, help="Id or e-mail address.")
@click.option("--after", default=None, help="The last wallet of the page before.")
@click.option("--limit", type=click.IntRange(1, PAGE_MAX), default=PAGE_MAX)
async def wallets_list(office: Office, *, user: str | None, after: str | None, limit: int) -> dict[str, Any]:
    """List wallets by age."""
    found = await office.wallets.find_wallets(
        user_id=None if user is None else await office.wallets.get_user(user),
        after=None if after is None else parse_id(after, "wallet"),
        limit=limit,
    )
    return {"wallets": [{**wallet.as_json(), "user_id": str(wallet.user_id)} for wallet in found]}


@office_command(wallets, "freeze")
@click.argument("wallet")
@click.option("--reason", default="", help="For operators and the audit log.")
async def wallets_freeze(office: Office, *, wallet: str, reason: str) -> dict[str, Any]:
    """Freeze a wallet: no call is admitted; those under way are settled."""
    changed = await office.wallets.set_wallet(parse_id(wallet, "wallet"), status="frozen", reason=reason)
    await office.cool_user(changed.user_id)
    return {**changed.as_json()}


@office_command(wallets, "unfreeze")
@click.argument("wallet")
@click.option("--reason", default="", help="For operators and the audit log.")
async def wallets_unfreeze(office: Office, *, wallet: str, reason: str) -> dict[str, Any]:
    """Let a wallet pay again."""
    changed = await office.wallets.set_wallet(parse_id(wallet, "wallet"), status="active", reason=reason)
    await office.cool_user(changed.user_id)
    return {**changed.as_json()}


@office_command(wallets, "overdraft")
@click.argument("wallet")
@click.argument("amount")
async def wallets_overdraft(office: Office, *, wallet: str, amount: str) -> dict[str, Any]:
    """Set how far below zero a wallet may go, in major units."""
    changed = await office.wallets.set_wallet(parse_id(wallet, "wallet"), overdraft_nano=parse_amount(amount))
    await office.cool_user(changed.user_id)
    return {**changed.as_json()}


@office_command(wallets, "show")
@click.argument("wallet")
async def wallets_show(office: Office, *, wallet: str) -> dict[str, Any]:
    """Show a wallet."""
    return {**(await office.wallets.get_wallet(parse_id(wallet, "wallet"))).as_json()}


def cap_options(command: Any) -> Any:
    """Give a command the options ``--cap-call`` to ``--cap-total``; each is also heard without its ``cap-``."""
    for period in reversed(PERIODS):
        help_text = f"Most that may be spent per {period}, in major units; 'none' lifts it."
        if period == "total":
            help_text = "Most that may be spent in total, in major units; 'none' lifts it."
        command = click.option(
            f"--cap-{period}", f"--{period}", f"cap_{period}", default=None, help=help_text
        )(command)
    return command


def read_caps(options: dict[str, str | None]) -> dict[str, int | None]:
    """Read the caps that were given, in nano units; ``none`` takes one away."""
    return {
        name.removeprefix("cap_"): None if value == "none" else parse_amount(value)
        for name, value in options.items()
        if value is not None
    }


async def set_and_show_caps(
    office: Office, scope: Scope, scope_id: UUID, options: dict[str, str | None]
) -> dict[str, Any]:
    """Set the caps that were given, if any; return all that are there."""
    room = Caps(office.database)
    limits = read_caps(options)
    if limits:
        await room.set_caps(scope, scope_id, limits)
    return dict(caps_as_json(await room.find_caps(scope_id)).items())


@office_command(wallets, "caps")
@click.argument("wallet")
@cap_options
async def wallets_caps(office: Office, *, wallet: str, **options: str | None) -> dict[str, Any]:
    """Show a wallet's caps, or set them as the operator: the user may set lower ones, never lift these."""
    found = await office.wallets.get_wallet(parse_id(wallet, "wallet"))
    caps = await set_and_show_caps(office, "wallet", found.id, options)
    await office.cool(found.id)
    return {"id": wallet, "currency": found.currency, "caps": caps}
