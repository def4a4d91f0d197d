"""How a command of ``tuma`` is made: run in an opened office, its result printed in words or as one JSON object."""

import asyncio
import functools
import json
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import click
from rich.text import Text

from billing.errors import TumaError
from config.logging import configure_logging
from config.secrets import find_secrets
from config.settings import SettingsError, load_settings
from scripts.office import open_office, run_as_operator

_Command = Callable[..., Coroutine[Any, Any, dict[str, Any]]]


def run_command(work: Callable[[], Coroutine[Any, Any, dict[str, Any]]], *, as_json: bool) -> None:
    """Run a command's work, print what it returns, and exit 1 for what it refuses or finds wrong."""
    try:
        settings = load_settings()
        configure_logging(settings.log, hide=find_secrets(settings))
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
        flat = {key: inner for key, inner in value.items() if not isinstance(inner, list)}
        line = "  ".join(
            f"{key}=({_text(inner)})" if isinstance(inner, dict) else f"{key}={inner}"
            for key, inner in flat.items()
        )
        below = (f"\n    {key:<16} {_text(item)}" for key in value if key not in flat for item in value[key])
        return line + "".join(below)
    return "" if value is None else str(value)


def office_command(group: click.Group, name: str) -> Callable[[_Command], _Command]:
    """Make a coroutine ``(office, **options) -> result`` a command with ``--json``."""

    def decorate(work: _Command) -> _Command:
        @functools.wraps(work)
        def command(*, as_json: bool, **options: Any) -> None:
            async def in_office() -> dict[str, Any]:
                async with open_office(load_settings()) as office:
                    return await run_as_operator(office, work(office, **options))

            run_command(in_office, as_json=as_json or bool(click.get_current_context().find_root().obj))

        option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
        group.command(name)(option(command))
        return work

    return decorate


def plain_text(label: str) -> Text:
    """Show what others have named as it is, no markup and no control characters."""
    return Text("".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in label))
