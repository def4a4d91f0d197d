"""The commands for people, their wallets and their keys."""

from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from typing import Any
from uuid import UUID

import click

from billing.errors import InputError
from billing.identity.caller import Network
from billing.identity.key import KeyRules
from billing.identity.keys import PAGE_MAX, Keys
from billing.ids import parse_id
from billing.money import parse_amount
from billing.wallets.caps import PERIODS, Caps, Scope, caps_as_json
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
    return (await office.wallets.describe_user(user_id)).as_json()


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
    return changed.as_json()


@office_command(users, "disable")
@click.argument("user")
async def users_disable(office: Office, *, user: str) -> dict[str, Any]:
    """Refuse a person's keys and tokens, on every worker."""
    changed = await office.wallets.set_user(await office.wallets.get_user(user), status="disabled")
    return changed.as_json()


@office_command(users, "enable")
@click.argument("user")
async def users_enable(office: Office, *, user: str) -> dict[str, Any]:
    """Let a person in again."""
    changed = await office.wallets.set_user(await office.wallets.get_user(user), status="active")
    return changed.as_json()


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


def _read_caps(options: dict[str, str | None]) -> dict[str, int | None]:
    return {
        name.removeprefix("cap_"): None if value == "none" else parse_amount(value)
        for name, value in options.items()
        if value is not None
    }


async def _set_and_show_caps(
    office: Office, scope: Scope, scope_id: UUID, options: dict[str, str | None]
) -> dict[str, Any]:
    room = Caps(office.database)
    limits = _read_caps(options)
    if limits:
        await room.set_caps(scope, scope_id, limits)
    return caps_as_json(await room.find_caps(scope_id))


@office_command(wallets, "caps")
@click.argument("wallet")
@cap_options
async def wallets_caps(office: Office, *, wallet: str, **options: str | None) -> dict[str, Any]:
    """Show a wallet's caps, or set them as the operator: the user may set lower ones, never lift these."""
    found = await office.wallets.get_wallet(parse_id(wallet, "wallet"))
    caps = await _set_and_show_caps(office, "wallet", found.id, options)
    await office.cool(found.id)
    return {"id": wallet, "currency": found.currency, "caps": caps}


@office_command(users, "caps")
@click.argument("user")
@cap_options
async def users_caps(office: Office, *, user: str, **options: str | None) -> dict[str, Any]:
    """Show or set the caps of a user, over all wallets, in USD of cost."""
    user_id = await office.wallets.get_user(user)
    caps = await _set_and_show_caps(office, "user", user_id, options)
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


@click.group()
def keys() -> None:
    """API keys."""


def _keys(office: Office) -> Keys:
    return Keys(office.database, office.settings.auth, office.settings.limits)


def rule_options(command: Any) -> Any:
    """Give a command the options that say what bounds a key."""
    options = (
        click.option("--name", default="", help="To know it by."),
        click.option("--expires", default=None, help="A moment in ISO 8601, or a span as 12h or 90d."),
        click.option(
            "--model",
            "models",
            multiple=True,
            help="A model that it may call, or 'openai/*'; may be repeated.",
        ),
        click.option(
            "--network",
            "networks",
            multiple=True,
            help="Where it may be used from, as 10.0.0.0/8; may be repeated.",
        ),
        click.option("--manage/--no-manage", default=None, help="Whether it may manage keys and caps."),
        click.option("--rpm", type=int, default=None, help="Requests per minute."),
        click.option("--tpm", type=int, default=None, help="Tokens per minute."),
        click.option("--max-parallel", type=int, default=None, help="Calls at a time."),
    )
    for option in reversed(options):
        command = option(command)
    return cap_options(command)


@office_command(keys, "create")
@click.option("--wallet", required=True, help="The wallet that pays.")
@rule_options
async def keys_create(
    office: Office,
    *,
    wallet: str,
    name: str,
    expires: str | None,
    models: tuple[str, ...],
    networks: tuple[str, ...],
    manage: bool | None,
    rpm: int | None,
    tpm: int | None,
    max_parallel: int | None,
    **caps: str | None,
) -> dict[str, Any]:
    """Make a key; its secret is shown now and never again."""
    rules = KeyRules(
        name=name,
        expires_at=None if expires is None else _read_expiry(expires),
        models=models or None,
        networks=[_read_network(network) for network in networks] or None,
        manages=manage,
        requests_per_min=rpm,
        tokens_per_min=tpm,
        calls_in_flight=max_parallel,
        caps={period: amount for period, amount in _read_caps(caps).items() if amount is not None},
    )
    room = _keys(office)
    made = await room.create(parse_id(wallet, "wallet"), rules)
    return {**await _show_key(office, room, made.id), "secret": made.secret}


@office_command(keys, "list")
@click.option("--wallet", default=None, help="Of this wallet only.")
@click.option("--user", default=None, help="Of this user only: id or e-mail address.")
@click.option("--revoked", is_flag=True, help="Revoked ones, too.")
@click.option("--after", default=None, help="The last key of the page before.")
@click.option("--limit", type=click.IntRange(1, PAGE_MAX), default=PAGE_MAX)
async def keys_list(
    office: Office, *, wallet: str | None, user: str | None, revoked: bool, after: str | None, limit: int
) -> dict[str, Any]:
    """List keys by age: what they are bound by, and when they were last used."""
    if wallet is not None:
        await office.wallets.get_wallet(parse_id(wallet, "wallet"))
    room = _keys(office)
    page = await room.find_keys(
        user_id=None if user is None else await office.wallets.get_user(user),
        wallet_id=None if wallet is None else parse_id(wallet, "wallet"),
        revoked=revoked,
        after=None if after is None else parse_id(after, "key"),
        limit=limit,
    )
    return {"keys": [{**key.as_json(), "current_pepper": key.pepper == room.pepper} for key in page]}


@office_command(keys, "caps")
@click.argument("key_id")
@cap_options
async def keys_caps(office: Office, *, key_id: str, **options: str | None) -> dict[str, Any]:
    """Show a key's caps, or set them as the operator."""
    found = await _keys(office).get_key(parse_id(key_id, "key"))
    caps = await _set_and_show_caps(office, "key", found.id, options)
    await office.cool(found.wallet_id)
    return {"id": key_id, "currency": found.currency, "caps": caps}


@office_command(keys, "rotate")
@click.argument("key_id")
@click.option(
    "--overlap",
    type=float,
    default=None,
    help="Seconds that the secret before stays good; 0 ends it at once.",
)
async def keys_rotate(office: Office, *, key_id: str, overlap: float | None) -> dict[str, Any]:
    """Give a key another secret, shown now and never again; its caps, limits and history stay."""
    room = _keys(office)
    made = await room.rotate(parse_id(key_id, "key"), overlap_s=overlap)
    return {**await _show_key(office, room, made.id), "secret": made.secret}


@office_command(keys, "revoke")
@click.argument("key_id")
async def keys_revoke(office: Office, *, key_id: str) -> dict[str, Any]:
    """Revoke a key, on every worker."""
    await _keys(office).revoke(parse_id(key_id, "key"))
    return {"id": key_id, "revoked": True}


async def _show_key(office: Office, room: Keys, key_id: UUID) -> dict[str, Any]:
    key = await room.get_key(key_id)
    caps = await Caps(office.database).find_caps(key_id)
    return {**key.as_json(), "currency": key.currency, "caps": caps_as_json(caps)}


def _read_expiry(text: str) -> datetime:
    unit = {"m": "minutes", "h": "hours", "d": "days"}.get(text[-1:])
    try:
        if unit is not None:
            return datetime.now(UTC) + timedelta(**{unit: int(text[:-1])})
        moment = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise InputError(
            f"{text!r} is neither a moment as 2027-01-31T00:00:00Z nor a span as 12h or 90d"
        ) from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _read_network(text: str) -> Network:
    try:
        return ip_network(text)
    except ValueError as error:
        raise InputError(f"--network: {error}") from None
