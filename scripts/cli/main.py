"""The ``tuma`` command."""

import re
import sys
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any

import click

from billing.books.proof import Books
from billing.books.reconcile import Reconciler
from billing.calls.corrections import Corrections
from billing.calls.sweeper import SweepCounts, Sweeper
from billing.errors import InputError, TumaError
from billing.fx.book import FxBook
from billing.fx.sync import FxFeed
from billing.ids import parse_id
from billing.money import NANO_DECIMALS, format_amount, parse_amount
from billing.monitoring.alerts import Alerts, describe_alerts, describe_in_words
from billing.monitoring.audit import Audit, describe_row
from billing.postgres.migrate import migrate as run_migrations
from billing.postgres.notifications import announce
from billing.pricing.price_book import ModelPrice, PriceBook
from billing.reports.call_view import describe_call
from billing.reports.revenue import describe_revenue
from config.logging import LEVELS, configure_logging
from config.settings import LogLevel, SettingsError, load_settings
from proxy.outbound.alert_webhook import make_messenger
from proxy.outbound.fx_sources import make_sources
from proxy.upstream.price_listing import read_listing
from scripts.bench.command import bench
from scripts.cli.accounts import keys, users, wallets
from scripts.cli.doctor import examine
from scripts.cli.payments import payments
from scripts.cli.serve import run_server
from scripts.cli.usage import show_usage, usage_options
from scripts.cli.watch import watch
from scripts.command import office_command, run_command
from scripts.office import Office


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.pass_context
def main(context: click.Context, *, as_json: bool) -> None:
    """Tuma: an OpenAI-compatible reverse proxy that meters money."""
    context.obj = as_json


for rooms in (users, wallets, keys, payments, watch, bench):
    main.add_command(rooms)


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
@click.option(
    "--good-for", type=float, default=None, help="Seconds until it prices no new calls; left out: for good."
)
@click.option("--pin", is_flag=True, help="Fetched rates do not replace it.")
async def fx_set(
    office: Office,
    *,
    base: str,
    quote: str,
    rate: str,
    markup_bps: int | None,
    good_for: float | None,
    pin: bool,
) -> dict[str, Any]:
    """Set a rate: units of QUOTE for one BASE, as in `tuma fx set USD NGN 1600`."""
    book = FxBook(office.database, office.settings.fx)
    set_to = await book.set_rate(
        base, quote, _rate(rate), markup_bps=markup_bps, good_for_s=good_for, pinned=pin
    )
    return {"id": str(set_to.id), "base": base, "quote": quote, "rate": rate, "markup_bps": set_to.markup_bps}


@office_command(fx, "sync")
async def fx_sync(office: Office) -> dict[str, Any]:
    """Ask the sources for their rates now; exits 1 if one does not answer."""
    settings = office.settings.fx
    return (await FxFeed(office.database, make_sources(settings), settings).sync()).as_json()


@office_command(fx, "accept")
@click.argument("currency")
@click.option("--rate", default=None, help="Only if it is this one.")
async def fx_accept(office: Office, *, currency: str, rate: str | None) -> dict[str, Any]:
    """Quote the rate that waits for an operator's word, as `tuma fx show` names it."""
    book = FxBook(office.database, office.settings.fx)
    taken = await book.accept_rate(currency, expected=None if rate is None else _rate(rate))
    return {
        "id": str(taken.id),
        "base": "USD",
        "quote": currency,
        "rate": f"{taken.rate.normalize():f}",
        "markup_bps": taken.markup_bps,
    }


@office_command(fx, "show")
@click.argument("currency", required=False)
@click.option("--against", default=None, help="The rate against this currency, too.")
async def fx_show(office: Office, *, currency: str | None, against: str | None) -> dict[str, Any]:
    """Show rates: units for one USD, and the inverse; markup, source, age, and what waits for a word."""
    shown = await FxBook(office.database, office.settings.fx).describe(currency, against=against)
    return shown[0] if currency is not None else {"rates": shown}


def _rate(text: str) -> Decimal:
    """Read a rate as `fx show` writes it, with up to 18 decimals."""
    if re.fullmatch(r"[0-9]{1,10}(\.[0-9]{1,18})?", text, re.ASCII) is None:
        raise InputError(f"{text[:40]!r} is not a rate: write it as 1234.56")
    return Decimal(text)


@main.group()
def calls() -> None:
    """Calls."""


@office_command(calls, "show")
@click.argument("call")
async def calls_show(office: Office, *, call: str) -> dict[str, Any]:
    """Show everything known about a call, and how its charge came about."""
    shown = await describe_call(office.database, parse_id(call, "call"))
    return {"report": _write_call(shown), **shown}


def _write_call(shown: dict[str, Any]) -> str:
    """Write a call for people: what it was, how its charge came about, and what was posted."""
    answered = "streamed" if shown["stream"] else "plain"
    by = "" if shown["key_id"] is None else f", key {shown['key_id']}"
    lines = [
        f"Call {shown['id']}: {shown['model']}, {answered}, {shown['state']}",
        f"wallet {shown['wallet_id']}{by}, opened {shown['opened_at']}",
        "",
        *shown["explanation"],
    ]
    if shown["postings"]:
        lines += ["", "Postings:"]
        lines += [
            f"  {row['at']}  {row['kind']:<10} {row['account']:<16} {row['amount']:>24} {row['currency']}  {row['memo']}".rstrip()
            for row in shown["postings"]
        ]
    return "\n".join(lines)


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


@office_command(main, "revenue")
@click.option("--since", type=click.DateTime(), default=None, help="From this moment on, in UTC.")
@click.option("--until", type=click.DateTime(), default=None, help="Before this moment, in UTC.")
async def revenue(office: Office, *, since: datetime | None, until: datetime | None) -> dict[str, Any]:
    """Sum what the house earned and owes, per currency: sales, the markup (fx_spread), fees, losses, suspense, wallets."""
    return await describe_revenue(
        office.late,
        since=None if since is None else since.replace(tzinfo=UTC),
        until=None if until is None else until.replace(tzinfo=UTC),
    )


@main.group()
def alerts() -> None:
    """What operators are told of."""


@office_command(alerts, "list")
async def alerts_list(office: Office) -> dict[str, Any]:
    """List the alerts that last, the latest that ended, and the messages that nobody took yet."""
    shown = await describe_alerts(office.database)
    return {"report": describe_in_words(shown), "alerts": shown["data"], "undelivered": shown["undelivered"]}


@office_command(alerts, "test")
async def alerts_test(office: Office) -> dict[str, Any]:
    """Send a test message to TUMA_ALERTS__URL; exits 1 if it is not taken."""
    settings = office.settings
    return await Alerts(office.database, settings, make_messenger(settings.alerts)).send_test()


@main.group()
def books() -> None:
    """The books."""


@office_command(books, "check")
@click.option("--full", is_flag=True, help="Read also the days that were proved before.")
async def books_check(office: Office, *, full: bool) -> dict[str, Any]:
    """Prove I1 to I8 and the sums of usage; exits 1 with the differences if one does not hold."""
    sweep_settings = office.settings.sweep
    grace_s = office.settings.holds.lease_s + sweep_settings.period_s * 2 + sweep_settings.review_after_s
    found = await Books(office.database, office.holds, office.upstream, sweep_grace_s=grace_s).check(
        full=full
    )
    checks = {name: {"ok": check.ok, "detail": check.detail} for name, check in found.items()}
    return {"ok": all(check.ok for check in found.values()), "checks": checks}


office_command(main, "usage")(usage_options(show_usage))


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


@office_command(main, "log-level")
@click.argument("level", type=click.Choice(LEVELS))
async def log_level(office: Office, *, level: LogLevel) -> dict[str, Any]:
    """Change how much every running server logs, until it is started anew."""
    await announce(office.database, "log", level)
    return {"level": level}


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.pass_context
def doctor(context: click.Context, *, as_json: bool) -> None:
    """Say in words what is missing or wrong in the settings, and how to mend it."""
    run_command(examine, as_json=as_json or bool(context.find_root().obj))


if __name__ == "__main__":
    main()
