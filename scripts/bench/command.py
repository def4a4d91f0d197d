"""``tuma bench``, the command."""

import asyncio
import ipaddress
import os
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from billing.errors import InputError
from scripts.bench.books import BenchError
from scripts.bench.reports.plot import draw
from scripts.bench.reports.record import (
    PAGE,
    PLOT,
    RECORD,
    compare_ratios,
    is_unsure,
    read_record,
    write_page,
    write_record,
)
from scripts.bench.reports.report import as_json as result_json
from scripts.bench.reports.report import in_words
from scripts.bench.results import Options, Result
from scripts.bench.run import run
from scripts.bench.scenarios import EXTRA, NAMES, SCENARIOS, WAITING, choose
from scripts.bench.stand import Side
from scripts.command import run_command
from scripts.programs.embedded import EmbeddedError

_ROUNDS, _QUICK_ROUNDS, _CHECK_ROUNDS = 11, 2, 6
_JUDGED = frozenset({WAITING, *(scenario.name for scenario in SCENARIOS if not scenario.half)})
_STOPPED = 130
_WORKERS_MAX = 64


@click.command()
@click.option("--quick", is_flag=True, help="Fewer rounds: under a minute.")
@click.option(
    "--rounds",
    type=click.IntRange(1, 100),
    default=None,
    help="11; with --quick 2 (paced streams 1), with --check at least 6.",
)
@click.option("--only", multiple=True, metavar="NAME", help=f"Repeat for more: {', '.join(NAMES)}.")
@click.option(
    "--all", "everything", is_flag=True, help=f"Also {', '.join(EXTRA)}, which are left out otherwise."
)
@click.option("--workers", default="1,2", metavar="N,N…", show_default=True, help="What `workers` compares.")
@click.option(
    "--wallets", type=click.IntRange(1, 10_000_000), default=100_000, show_default=True, help="In `big`."
)
@click.option(
    "--calls",
    type=click.IntRange(1, 100_000_000),
    default=10_000_000,
    show_default=True,
    help="Ended ones, in `big`.",
)
@click.option(
    "--share", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Of each scenario's calls."
)
@click.option("--peer", "peers", multiple=True, metavar="NAME=URL,KEY", help="A gateway on this machine.")
@click.option(
    "--upstream-port",
    type=click.IntRange(0, 65_535),
    default=0,
    help="Of the simulated provider, where a peer has to forward to.",
)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw CPU per call as SVG.")
@click.option("--check", is_flag=True, help="Exit 1 where a ratio is 15 % worse than the recorded one.")
@click.option(
    "--record", is_flag=True, help="Write docs/benchmarks.json; with --all, all of docs/benchmarks.*."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.pass_context
def bench(
    context: click.Context,
    *,
    quick: bool,
    rounds: int | None,
    only: tuple[str, ...],
    everything: bool,
    workers: str,
    wallets: int,
    calls: int,
    share: float,
    peers: tuple[str, ...],
    upstream_port: int,
    plot: Path | None,
    check: bool,
    record: bool,
    as_json: bool,
) -> None:
    """Measure what metering costs, beside a proxy that does not meter; exits 1 if the books lost a nano."""
    # Its servers are its own, and set as they are delivered.
    for name in [name for name in os.environ if name.startswith(("TUMA_", "OTEL_"))]:
        del os.environ[name]

    async def work() -> dict[str, Any]:
        _stop_on_sigterm()
        recorded = read_record(RECORD) if check else {}
        chosen = choose(only, everything=everything)
        options = Options(
            chosen & _JUDGED if check else chosen,
            rounds or (_CHECK_ROUNDS if check else _QUICK_ROUNDS if quick else _ROUNDS),
            quick=quick,
            share=share,
            peers=read_peers(peers),
            upstream_port=upstream_port,
            unsure=partial(is_unsure, recorded) if check else None,
            workers=read_workers(workers),
            wallets=wallets,
            filled=calls,
        )
        try:
            result = await run(options, lambda line: click.echo(line, err=True))
        except EmbeddedError as error:
            raise BenchError(str(error)) from error
        compared = compare_ratios(recorded, result.scenarios) if check else []
        _keep(result, plot=plot, record=record, everything=everything)
        found = result_json(result, compared)
        return found if as_json else {"report": in_words(result, compared), "ok": found["ok"]}

    as_json = as_json or bool(context.find_root().obj)
    try:
        run_command(work, as_json=as_json)
    except (KeyboardInterrupt, asyncio.CancelledError):
        click.echo("tuma bench: stopped, and so is all that it had started", err=True)
        sys.exit(_STOPPED)


def _keep(result: Result, *, plot: Path | None, record: bool, everything: bool) -> None:
    if plot is not None:
        plot.write_text(draw(result.scenarios), encoding="utf-8")
    if record:
        at = datetime.now(UTC).date().isoformat()
        write_record(RECORD, result, at=at, anew=everything)
        if everything:
            write_page(PAGE, in_words(result, []), at=at)
            PLOT.write_text(draw(result.scenarios), encoding="utf-8")


def _stop_on_sigterm() -> None:
    """Have SIGTERM end everything in order, as Ctrl-C does."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


def read_workers(text: str) -> tuple[int, ...]:
    """Read numbers of workers.

    Raises:
        InputError: it is something else.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and 0 < int(part) <= _WORKERS_MAX for part in parts):
        raise InputError(f"--workers is written as 1,2,4, not {text!r}")
    return tuple(dict.fromkeys(map(int, parts)))


def read_peers(texts: Sequence[str]) -> tuple[Side, ...]:
    """Read ``name=url,key``.

    Raises:
        InputError: one is none of that form, or is not on this machine: load is for one's own servers.
    """
    return tuple(map(_read_peer, texts))


def _read_peer(text: str) -> Side:
    name, _, rest = text.partition("=")
    url, _, key = rest.rpartition(",")
    parts = urlsplit(url)
    if not (name and key) or parts.scheme not in ("http", "https") or name in ("floor", "tuma"):
        raise InputError(f"a peer is written as name=http://127.0.0.1:PORT/v1,KEY, not {name!r}=…")
    if parts.hostname != "localhost" and not _is_loopback(parts.hostname or ""):
        raise InputError(
            f"the peer {name!r} is not on this machine: only loopback addresses are put under load"
        )
    return Side(name, url.rstrip("/"), (key,))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
