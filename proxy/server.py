"""Serving: one process that accepts calls, and the master that keeps several of them."""

import asyncio
import gc
import signal
import socket
from collections.abc import Callable

import structlog
from aiohttp import web

from billing.errors import InputError
from config.settings import Settings
from proxy.app import init_app
from proxy.http.connection import ClientRunner, ClientServer
from proxy.public.health import DRAINING
from proxy.services.runtime import RUNTIME
from proxy.telemetry.shared_counters import WorkerSlot

_log = structlog.get_logger("tuma.server")
_BACKLOG = 4096
_POLL_S = 0.02
# Objects made beyond those that were dropped before the youngest are looked at, and how many such looks before an older
# generation is. Calls leave few cycles: what each look goes over is alive, and with Python's own 700 it is looked at twice per call.
_COLLECT_AFTER = (10_000, 20, 20)


def bind(settings: Settings) -> socket.socket:
    """Bind the listening socket; port 0 picks a free one.

    Raises:
        InputError: the address is taken or not ours.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise InputError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from None
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


def address_of(listener: socket.socket) -> str:
    """Return the URL at which a listening socket is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve_worker(
    settings: Settings,
    listener: socket.socket,
    *,
    on_ready: Callable[[], None],
    stop: asyncio.Event | None = None,
    slot: WorkerSlot | None = None,
) -> None:
    """Accept calls on ``listener`` until SIGTERM or SIGINT, then finish: streams within ``shutdown_s``, settlements all.

    Args:
        settings: everything configurable.
        listener: bound and listening; shared between workers.
        on_ready: called once calls are accepted.
        stop: another way to ask for the end.
        slot: of this worker in its master's shared counters; None for a worker that is alone.
    """
    stop = stop or asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    app = init_app(settings, slot)
    runner = ClientRunner(
        app,
        limits=settings.limits,
        shutdown_timeout=1.0,  # by then the answers under way have ended
    )
    await runner.setup()
    try:
        site = web.SockSite(runner, listener)
        await site.start()
        assert isinstance(runner.server, ClientServer)
        app[RUNTIME].tasks.keep(runner.server.drop_slow_clients, name="slow clients")
        _tune_collector()
        on_ready()
        await stop.wait()
        _log.info("server.stopping", calls=len(app[RUNTIME].calls))
        app[DRAINING].set()
        app[RUNTIME].watchers.close()
        await site.stop()
        runner.server.pre_shutdown()  # connections that are kept alive end: idle ones now, others with their answer
        await _drain(app, settings.shutdown_s)
    finally:
        await runner.cleanup()


def _tune_collector() -> None:
    """Let the garbage collector leave alone what a worker keeps for its life: modules, schemas, prices, the vocabulary.

    A collection that goes over them stops every call for a fifth of a second; see ``docs/benchmarks.md``.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT_AFTER)


async def _drain(app: web.Application, timeout_s: float) -> None:
    """Let the calls under way end by themselves, as long as the settings allow; cleanup then cancels the rest."""
    calls = app[RUNTIME].calls
    deadline = asyncio.get_running_loop().time() + timeout_s
    while len(calls) and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(_POLL_S)
