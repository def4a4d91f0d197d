"""The ``tuma`` command."""

import asyncio
import functools
import json
import sys
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any
from uuid import UUID

import click

from billing.audit import Audit, describe_row
from billing.books import Books
from billing.callbook import describe_call
from billing.caps import PERIODS, Caps, Scope, caps_as_json
from billing.corrections import Corrections
from billing.errors import InputError, TumaError
from billing.fxbook import FxBook
from billing.keys import Keys
from billing.migrate import migrate as run_migrations
from billing.money import NANO_DECIMALS, format_amount, parse_amount
from billing.pricebook import ModelPrice, PriceBook
from billing.reconcile import Reconciler
from billing.sweeper import SweepCounts, Sweeper
from billing.wallets import parse_id
from config.logging import configure_logging
from config.settings import SettingsError, load_settings
from proxy.upstream.listing import read_listing
from scripts.doctor import examine
from scripts.office import Office, open_office, run_as_operator
from scripts.serve import run_server

_Command = Callable[..., Coroutine[Any, Any, dict[str, Any]]]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.pass_context
def main(context: click.Context, *, as_json: bool) -> None:
    """Tuma: an OpenAI-compatible reverse proxy that meters money."""
    context.obj = as_json


def _run(work: Callable[[], Coroutine[Any, Any, dict[str, Any]]], *, as_json: bool) -> None:
    try:
        configure_logging(load_settings().log)
        result = asyncio.run(work())
    except (TumaError, SettingsError) as error:
        if as_json:
            click.echo(json.dumps({"error": {"type": type(error).__name__, "message": str(error)}}))
        click.echo(f"tuma: {error}", err=True)
        sys.exit(1)
    if as_json:
        click.echo(json.dumps(result))
    else:
        _print(result)
    if result.get("ok") is False:
        sys.exit(1)


def _print(result: dict[str, Any]) -> None:
    if "report" in result:  # in words already
        click.echo(result["report"])
        return
    for name, value in result.items():
        if isinstance(value, dict):
            for key, inner in value.items():
                click.echo(f"{name} {key:<6} {_text(inner)}")
        elif isinstance(value, list):
            for inner in value:
                click.echo(f"{name:<20} {_text(inner)}")
        else:
            click.echo(f"{name:<20} {_text(value)}")


def _text(value: object) -> str:
    if isinstance(value, dict):
        if {"ok", "detail"} <= value.keys():
            return f"{'ok    ' if value['ok'] else 'NOT OK'} {value.get('name', '')} {value['detail']}"
        return "  ".join(f"{key}={inner}" for key, inner in value.items())
    return "" if value is None else str(value)


def office_command(group: click.Group, name: str) -> Callable[[_Command], _Command]:
    """Make a coroutine ``(office, **options) -> result`` a command with ``--json``."""

    def decorate(work: _Command) -> _Command:
        @functools.wraps(work)
        def command(*, as_json: bool, **options: Any) -> None:
            async def in_office() -> dict[str, Any]:
                async with open_office(load_settings()) as office:
                    return await run_as_operator(office, work(office, **options))

            _run(in_office, as_json=as_json or bool(click.get_current_context().find_root().obj))

        option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
        group.command(name)(option(command))
        return work

    return decorate


@main.command()
def serve() -> None:
    """Serve calls until SIGTERM; prints one line with the address when it accepts them."""
    try:
        settings = load_settings()
        configure_logging(settings.log)
        run_server(settings)
    except (TumaError, SettingsError) as error:
        click.echo(f"tuma: {error}", err=True)
        sys.exit(1)


@office_command(main, "migrate")
async def migrate(office: Office) -> dict[str, Any]:
    """Bring the database's schema up to this version."""
    before, after = await run_migrations(office.database)
    return {"version_before": before, "version": after, "applied": after - before}


@main.group()
def users() -> None:
    """People."""


@office_command(users, "create")
@click.option("--email", required=True)
async def users_create(office: Office, *, email: str) -> dict[str, Any]:
    """Register a person."""
    return {"id": str(await office.wallets.create_user(email)), "email": email}


@main.group()
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
        await room.set_caps(scope, scope_id, limits, by_operator=True)
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


@main.group()
def keys() -> None:
    """API keys."""


def _keys(office: Office) -> Keys:
    return Keys(office.database, office.settings.auth, office.settings.limits)


@office_command(keys, "create")
@click.option("--wallet", required=True, help="The wallet that pays.")
@click.option("--name", default="")
@click.option("--rpm", type=int, default=None, help="Requests per minute.")
@click.option("--tpm", type=int, default=None, help="Tokens per minute.")
@click.option("--max-parallel", type=int, default=None, help="Calls at a time.")
@cap_options
async def keys_create(
    office: Office,
    *,
    wallet: str,
    name: str,
    rpm: int | None,
    tpm: int | None,
    max_parallel: int | None,
    **caps: str | None,
) -> dict[str, Any]:
    """Make a key; its secret is shown now and never again."""
    limits = _read_caps(caps)
    made = await _keys(office).create(
        parse_id(wallet, "wallet"),
        name=name,
        requests_per_min=rpm,
        tokens_per_min=tpm,
        calls_in_flight=max_parallel,
    )
    if limits:
        await Caps(office.database).set_caps("key", made.id, limits, by_operator=True)
    return {"id": str(made.id), "secret": made.secret, "wallet_id": wallet, "name": name}


@office_command(keys, "revoke")
@click.argument("key_id")
async def keys_revoke(office: Office, *, key_id: str) -> dict[str, Any]:
    """Revoke a key, on every worker."""
    await _keys(office).revoke(parse_id(key_id, "key"))
    return {"id": key_id, "revoked": True}


@main.group()
def models() -> None:
    """Models and their prices."""


@office_command(models, "sync")
async def models_sync(office: Office) -> dict[str, Any]:
    """Take over the provider's models and prices."""
    priced, unpriced = read_listing(await office.upstream.list_models())
    changed = await PriceBook(office.database).set_prices(priced, source=office.settings.upstream.kind)
    return {"models": len(priced), "prices_changed": changed, "without_price": unpriced}


@office_command(models, "price")
@click.argument("model")
@click.option("--prompt", required=True, help="USD per million tokens.")
@click.option("--completion", required=True, help="USD per million tokens.")
@click.option("--cached-read", default=None, help="USD per million tokens read from the provider's cache.")
@click.option("--cached-write", default=None, help="USD per million tokens written to it.")
@click.option("--reasoning", default=None, help="USD per million reasoning tokens.")
@click.option("--request", "request_price", default="0", help="USD per request.")
async def models_price(
    office: Office,
    *,
    model: str,
    prompt: str,
    completion: str,
    cached_read: str | None,
    cached_write: str | None,
    reasoning: str | None,
    request_price: str,
) -> dict[str, Any]:
    """Set a model's prices by hand."""
    prices = {
        "prompt_usd": _per_token(prompt),
        "completion_usd": _per_token(completion),
        "cached_read_usd": None if cached_read is None else _per_token(cached_read),
        "cached_write_usd": None if cached_write is None else _per_token(cached_write),
        "reasoning_usd": None if reasoning is None else _per_token(reasoning),
        "image_usd": Decimal(0),
        "audio_usd": None,
        "request_usd": _decimal(request_price),
    }
    book = PriceBook(office.database)
    changed = await book.set_prices([ModelPrice(model, model, None, None, prices)], source="manual")
    return {"model": model, "prompt": prompt, "completion": completion, "changed": bool(changed)}


def _per_token(usd_per_million: str) -> Decimal:
    return _decimal(usd_per_million).scaleb(-6)


def _decimal(text: str) -> Decimal:
    parse_amount(text, decimals=NANO_DECIMALS)  # the same strictness as for amounts
    try:
        return Decimal(text)
    except InvalidOperation:
        raise InputError(f"{text!r} is not a number") from None


@main.group()
def fx() -> None:
    """Exchange rates."""


@office_command(fx, "set")
@click.argument("base")
@click.argument("quote")
@click.argument("rate")
@click.option("--markup-bps", type=int, default=None, help="On top of the rate, in hundredths of a percent.")
async def fx_set(
    office: Office, *, base: str, quote: str, rate: str, markup_bps: int | None
) -> dict[str, Any]:
    """Set a rate: units of QUOTE for one BASE, as in `tuma fx set USD NGN 1600`."""
    book = FxBook(office.database, markup_bps=office.settings.fx.markup_bps)
    set_to = await book.set_rate(base, quote, _decimal(rate), markup_bps=markup_bps)
    return {"id": str(set_to.id), "base": base, "quote": quote, "rate": rate, "markup_bps": set_to.markup_bps}


@main.group()
def calls() -> None:
    """Calls."""


@office_command(calls, "show")
@click.argument("call")
async def calls_show(office: Office, *, call: str) -> dict[str, Any]:
    """Show everything known about a call."""
    return await describe_call(office.database, parse_id(call, "call"))


@office_command(calls, "refund")
@click.argument("call")
@click.option("--amount", default=None, help="In the wallet's currency; all of the charge, when left out.")
@click.option("--reason", required=True, help="Shown to the user.")
@click.option("--key", default=None, help="Idempotency key: a repeat with it posts nothing.")
async def calls_refund(
    office: Office, *, call: str, amount: str | None, reason: str, key: str | None
) -> dict[str, Any]:
    """Give a call's charge back."""
    call_id = parse_id(call, "call")
    policy = office.settings.reconcile
    corrections = Corrections(office.database, charge_estimates_upward=policy.charge_estimates_upward)
    done = await corrections.refund(
        call_id, amount_nano=None if amount is None else parse_amount(amount), reason=reason, key=key
    )
    shown = await describe_call(office.database, call_id)
    await office.cool(parse_id(shown["wallet_id"], "wallet"))
    refunded = format_amount(done.before.charge_nano - done.after.charge_nano)
    return {"transaction_id": None if done.tx_id is None else str(done.tx_id), "refunded": refunded, **shown}


@office_command(main, "reconcile")
async def reconcile(office: Office) -> dict[str, Any]:
    """Compare with the provider's own bill, call by call and in total, and post what differs as corrections."""
    report = await Reconciler(office.database, office.upstream, office.settings.reconcile).run()
    return report.as_json()


@office_command(main, "sweep")
async def sweep(office: Office) -> dict[str, Any]:
    """End the calls whose worker died, by what the provider billed."""
    counts = await Sweeper(office.database, office.holds, office.upstream, office.settings.sweep).sweep()
    return {**(counts or SweepCounts()).as_json(), "busy": counts is None}


@main.group()
def books() -> None:
    """The books."""


@office_command(books, "check")
@click.option("--full", is_flag=True, help="Read also the days that were proved before.")
async def books_check(office: Office, *, full: bool) -> dict[str, Any]:
    """Prove I1 to I8; exits 1 with the differences if one does not hold."""
    sweep_settings = office.settings.sweep
    grace_s = office.settings.holds.lease_s + sweep_settings.period_s * 2 + sweep_settings.review_after_s
    found = await Books(office.database, office.holds, office.upstream, sweep_grace_s=grace_s).check(
        full=full
    )
    checks = {name: {"ok": check.ok, "detail": check.detail} for name, check in found.items()}
    return {"ok": all(check.ok for check in found.values()), "checks": checks}


@main.group()
def audit() -> None:
    """The audit log: who changed money or a permission."""


@office_command(audit, "verify")
@click.option("--expect", default=None, metavar="NUMBER:DIGEST", help="A head that was noted elsewhere.")
async def audit_verify(office: Office, *, expect: str | None) -> dict[str, Any]:
    """Find altered, removed and reordered rows; exits 1 if there are any. Note the head that it prints elsewhere."""
    return (await Audit(office.database).verify(expect=expect)).as_json()


@office_command(audit, "seal")
async def audit_seal(office: Office) -> dict[str, Any]:
    """Seal what is not sealed yet; a running server does so every few seconds."""
    return {"blocks": await Audit(office.database).seal()}


@office_command(audit, "list")
@click.option("--wallet", default=None)
@click.option("--user", default=None, help="Id or e-mail address.")
@click.option("--actor", default=None, help="As operator:NAME, user:ID, key:ID, system.")
@click.option("--since", type=click.DateTime(), default=None, help="In UTC.")
@click.option("--limit", type=int, default=50, show_default=True)
async def audit_list(
    office: Office,
    *,
    wallet: str | None,
    user: str | None,
    actor: str | None,
    since: datetime | None,
    limit: int,
) -> dict[str, Any]:
    """List what was changed, the newest last."""
    rows = await Audit(office.database).list_rows(
        wallet_id=None if wallet is None else parse_id(wallet, "wallet"),
        user_id=None if user is None else await office.wallets.get_user(user),
        actor=actor,
        since=None if since is None else since.replace(tzinfo=UTC),
        limit=limit,
    )
    return {"report": "\n".join(map(describe_row, rows)), "rows": rows}


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.pass_context
def doctor(context: click.Context, *, as_json: bool) -> None:
    """Say in words what is missing or wrong in the settings, and how to mend it."""
    _run(examine, as_json=as_json or bool(context.find_root().obj))


if __name__ == "__main__":
    main()
