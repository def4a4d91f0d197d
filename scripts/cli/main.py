"""The ``tuma`` command. What belongs to one command is imported when that is run: most people wait for an import alone."""

import importlib

import click

from scripts.command import office_command

_COMMANDS = {
    "alerts": "scripts.cli.monitoring:alerts",
    "audit": "scripts.cli.monitoring:audit",
    "bench": "scripts.bench.command:bench",
    "books": "scripts.cli.books:books",
    "calls": "scripts.cli.calls:calls",
    "doctor": "scripts.cli.doctor:doctor",
    "fx": "scripts.cli.fx:fx",
    "keys": "scripts.cli.keys:keys",
    "log-level": "scripts.cli.monitoring:log_level",
    "migrate": "scripts.cli.books:migrate",
    "models": "scripts.cli.models:models",
    "payments": "scripts.cli.payments:payments",
    "reconcile": "scripts.cli.books:reconcile",
    "revenue": "scripts.cli.books:revenue",
    "serve": "scripts.programs.serve:serve",
    "sweep": "scripts.cli.books:sweep",
    "usage": "scripts.cli.usage:show_usage",
    "users": "scripts.cli.users:users",
    "wallets": "scripts.cli.wallets:wallets",
    "watch": "scripts.cli.watch:watch",
}


class _CommandsOfRooms(click.Group):
    """Finds a command in its module, under the name by which it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_COMMANDS})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _COMMANDS and cmd_name not in self.commands:
            module, _, name = _COMMANDS[cmd_name].partition(":")
            found = getattr(importlib.import_module(module), name)
            if isinstance(found, click.Command):
                self.add_command(found, cmd_name)
            else:
                office_command(self, cmd_name)(found)
        return super().get_command(ctx, cmd_name)


@click.group(cls=_CommandsOfRooms, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.pass_context
def main(context: click.Context, *, as_json: bool) -> None:
    """Tuma: an OpenAI-compatible reverse proxy that meters money."""
    context.obj = as_json
