"""``tuma serve``: one process, or a master that keeps several workers on one socket."""

import asyncio
import contextlib
import os
import select
import signal
import socket
import sys
import time
from types import FrameType

import click
import structlog
import uvloop

from billing.errors import TumaError
from config.logging import configure_logging
from config.secrets import find_secrets, require_long_secrets
from config.settings import Settings, SettingsError, load_settings
from proxy.server import address_of, bind, serve_worker
from proxy.telemetry.shared_counters import SharedCounters, WorkerSlot
from scripts.programs.files import bound_connections, raise_file_limit

_log = structlog.get_logger("tuma.server")
_PARENT_POLL_S = 1.0
_RESTART_PAUSE_S = 0.5
_NO_SLOT = -1
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@click.command()
def serve() -> None:
    """Serve calls until SIGTERM; prints one line with the address when it accepts them."""
    try:
        settings = load_settings()
        configure_logging(settings.log)
        run_server(settings)
    except (TumaError, SettingsError) as error:
        click.echo(f"tuma: {error}", err=True)
        sys.exit(1)


def run_server(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, and print the address once calls are accepted.

    Raises:
        TumaError: a server is away, the schema is not ours, the address is taken, or a setting is missing.
        SettingsError: a secret is too short.
    """
    require_long_secrets(settings)
    configure_logging(settings.log, hide=find_secrets(settings))
    settings = bound_connections(settings, raise_file_limit())
    listener = bind(settings)
    if settings.workers == 1:
        uvloop.run(serve_worker(settings, listener, on_ready=lambda: _announce(listener)))
    else:
        _Master(settings, listener).run()


def _announce(listener: socket.socket) -> None:
    sys.stdout.write(f"tuma: accepting calls on {address_of(listener)}\n")
    sys.stdout.flush()


class _Master:
    """Forks workers that accept on one socket, and starts another when one dies."""

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        self._settings = settings
        self._listener = listener
        self._workers: dict[int, int] = {}  # the slot of each, by its pid
        self._shared = SharedCounters(settings.workers)
        self._stopping = False

    def run(self) -> None:
        for number in _STOP_SIGNALS:
            signal.signal(number, self._stop)
        ready, tell_ready = os.pipe()
        for slot in range(self._settings.workers):
            self._fork(tell_ready, slot)
        self._wait_ready(ready)
        while self._workers:
            with contextlib.suppress(ChildProcessError, InterruptedError):
                pid, status = os.wait()
                slot = self._workers.pop(pid, _NO_SLOT)
                if not self._stopping and slot != _NO_SLOT:
                    _log.error("worker.died", pid=pid, status=status)
                    self._shared.leave(slot)
                    time.sleep(_RESTART_PAUSE_S)
                    self._fork(tell_ready, slot)

    def _wait_ready(self, ready: int) -> None:
        """Announce when every worker accepts; stop all if one cannot start."""
        told = b""
        while len(told) < self._settings.workers and b"-" not in told:
            if select.select([ready], [], [], _PARENT_POLL_S)[0]:
                told += os.read(ready, self._settings.workers)
            elif os.waitpid(-1, os.WNOHANG)[0]:
                told += b"-"  # killed before it could say anything
        if b"-" in told:
            self._stop(signal.SIGTERM, None)
            with contextlib.suppress(ChildProcessError):
                while True:
                    os.wait()
            sys.exit(1)
        _announce(self._listener)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._stopping = True
        for pid in self._workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def _fork(self, tell_ready: int, slot: int) -> None:
        """Start a worker, unless the end was asked for meanwhile: one forked then would never hear of it."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        if self._stopping or (pid := os.fork()):
            if not self._stopping:
                self._workers[pid] = slot
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
            return
        status = 1
        try:
            for number in _STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
            uvloop.run(self._work(os.getppid(), tell_ready, slot))
            status = 0
        except Exception as error:  # noqa: BLE001 - a forked child must not run the parent's code after this
            sys.stderr.write(f"tuma: worker {os.getpid()}: {error}\n")
            os.write(tell_ready, b"-")
        finally:
            os._exit(status)

    async def _work(self, parent: int, tell_ready: int, slot: int) -> None:
        stop = asyncio.Event()
        watch = asyncio.get_running_loop().create_task(_follow_parent(parent, stop))
        try:
            await serve_worker(
                self._settings,
                self._listener,
                on_ready=lambda: _write_all(tell_ready, b"+"),
                stop=stop,
                slot=WorkerSlot(self._shared, slot),
            )
        finally:
            watch.cancel()


def _write_all(descriptor: int, data: bytes) -> None:
    os.write(descriptor, data)


async def _follow_parent(parent: int, stop: asyncio.Event) -> None:
    """Stop in order when the master is gone, so that a new one finds the address free."""
    while os.getppid() == parent:
        await asyncio.sleep(_PARENT_POLL_S)
    stop.set()
