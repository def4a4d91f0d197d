"""``tuma keys``: made, bound, rotated, revoked."""

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
from billing.wallets.caps import Caps, caps_as_json
from scripts.cli.wallets import cap_options, read_caps, set_and_show_caps
from scripts.command import office_command
from scripts.office import Office


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
        caps={period: amount for period, amount in read_caps(caps).items() if amount is not None},
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
    caps = await set_and_show_caps(office, "key", found.id, options)
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
