"""The ``tuma`` command."""

import sys
from typing import Any

import click

from billing.errors import TumaError
from billing.postgres.migrate import load_migrations
from billing.postgres.migrate import migrate as run_migrations
from config.logging import configure_logging
from config.settings import SettingsError, load_settings
from scripts.bench.command import bench
from scripts.cli.books import books, reconcile, revenue, sweep
from scripts.cli.calls import calls
from scripts.cli.doctor import examine
from scripts.cli.fx import fx
from scripts.cli.keys import keys
from scripts.cli.models import models
from scripts.cli.monitoring import alerts, audit, log_level
from scripts.cli.payments import payments
from scripts.cli.usage import show_usage, usage_options
from scripts.cli.users import users
from scripts.cli.wallets import wallets
from scripts.cli.watch import watch
from scripts.command import office_command, run_command
from scripts.office import Office
from scripts.programs.serve import run_server


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.pass_context
def main(context: click.Context, *, as_json: bool) -> None:
    """Tuma: an OpenAI-compatible reverse proxy that meters money."""
    context.obj = as_json


for command in (users, wallets, keys, models, fx, calls, payments, books, audit, alerts, watch, bench):
    main.add_command(command)


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
    """Bring the database's schema and its functions up to this version."""
    before, after = await run_migrations(office.database)
    applied = sum(item.number > before for item in load_migrations())
    return {"version_before": before, "version": after, "applied": applied}


office_command(main, "usage")(usage_options(show_usage))
office_command(main, "sweep")(sweep)
office_command(main, "reconcile")(reconcile)
office_command(main, "revenue")(revenue)
office_command(main, "log-level")(log_level)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.pass_context
def doctor(context: click.Context, *, as_json: bool) -> None:
    """Say in words what is missing or wrong in the settings, and how to mend it."""
    run_command(examine, as_json=as_json or bool(context.find_root().obj))
