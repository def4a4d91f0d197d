"""The servers of a campaign: Postgres, two of Redis, the provider, each behind a TCP proxy; and the real `tuma serve`."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
from redis.asyncio import Redis

from config.settings import Settings
from scripts.programs.embedded import EmbeddedPostgres, EmbeddedRedis
from scripts.sim.provider import SimulatedProvider
from tests.support.paths import ROOT
from tests.support.settings import make_settings
from tests.support.tcp_proxy import TcpProxy

_WORKERS = 3
_START_S = 30.0
_STOP_S = 45.0


class Servers:
    """All servers, in a folder of their own.

    Args:
        violations: the broken promises of the campaign; it is added to.
    """

    to_postgres: TcpProxy
    to_redis: TcpProxy
    to_provider: TcpProxy
    settings: Settings

    def __init__(self, violations: list[str]) -> None:
        self._violations = violations
        self.master: subprocess.Popen[str] | None = None
        self.orphans: set[int] = set()
        self.url = ""
        # Linux ends an embedded server with the thread that started it: one thread for all, as long as the campaign.
        self._thread = ThreadPoolExecutor(1)
        self._folder = Path(tempfile.mkdtemp(prefix="tuma-campaign-"))
        self.postgres = EmbeddedPostgres(self._folder / "postgres", fast=True)
        self._redises = [EmbeddedRedis(self._folder / name) for name in ("redis0", "redis1")]
        self._primary = 0
        self.provider = SimulatedProvider()

    @property
    def redis(self) -> EmbeddedRedis:
        """The Redis that is in use."""
        return self._redises[self._primary]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run them, without `tuma serve`; stop them all, with it."""
        try:
            await self._start_servers()
            async with (
                TcpProxy(self.postgres.dsn()) as self.to_postgres,
                TcpProxy(self._redises[0].url) as self.to_redis,
                self.provider,
                TcpProxy(self.provider.base_url) as self.to_provider,
            ):
                self.settings = self._make_settings()
                yield
        finally:
            await self._stop_everything()

    async def in_thread(self, work: Callable[[], object]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _start_servers(self) -> None:
        await self.in_thread(self.postgres.start)
        first, second = self._redises
        await self.in_thread(first.start)
        # One password, as a primary and its replica have.
        second.data_dir.mkdir(parents=True, exist_ok=True)
        password = first.data_dir / "redis.password"
        shutil.copy2(password, second.data_dir / "redis.password")
        await self.in_thread(second.start)

    def _make_settings(self) -> Settings:
        return make_settings(
            postgres_dsn=self.to_postgres.through(self.postgres.dsn()),
            redis_url=self.to_redis.through(self._redises[0].url),
            upstream_url=self.to_provider.through(self.provider.base_url),
        )

    def _environment(self) -> dict[str, str]:
        settings = self.settings
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("TUMA_")},
            "TUMA_PORT": "0",
            "TUMA_WORKERS": str(_WORKERS),
            "TUMA_POSTGRES__DSN": settings.postgres.dsn.get_secret_value(),
            "TUMA_POSTGRES__COMMAND_TIMEOUT_S": "5",
            "TUMA_REDIS__URL": settings.redis.url.get_secret_value(),
            "TUMA_UPSTREAM__BASE_URL": settings.upstream.base_url,
            "TUMA_UPSTREAM__API_KEY": "sk-sim",
            "TUMA_UPSTREAM__EXTRA_MEMBERS": '["sim"]',
            "TUMA_UPSTREAM__GENERATION_WAIT_S": "3",
            "TUMA_AUTH__KEY_PEPPER": settings.auth.key_pepper.get_secret_value(),
            "TUMA_HOLDS__LEASE_S": "3",
            "TUMA_HOLDS__RENEW_S": "0.7",
            "TUMA_HOLDS__NOTE_S": "0.3",
            "TUMA_SWEEP__PERIOD_S": "0.5",
            "TUMA_SWEEP__WORKER_LEASE_S": "3",
            "TUMA_BATCH__OPEN_WAIT_S": "2",
            "TUMA_QUOTA__OBSERVE_S": "2",
            "TUMA_SHUTDOWN_S": "10",
            "TUMA_LOG__LEVEL": "error",
        }

    async def serve(self) -> None:
        """Start the server, again and again until it does, as an init system would."""
        async with asyncio.timeout(_START_S):
            while True:
                process = subprocess.Popen(
                    [sys.executable, "-m", "scripts.cli", "serve"],
                    env=self._environment(),
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    stderr=(self._folder / "serve.log").open("a"),
                    text=True,
                    start_new_session=True,
                )
                assert process.stdout is not None
                line = await asyncio.to_thread(process.stdout.readline)
                if line.startswith("tuma: accepting calls on "):
                    self.master, self.url = process, line.split()[-1]
                    return
                process.wait()
                await asyncio.sleep(0.2)

    def worker_pids(self) -> list[int]:
        assert self.master is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.master.pid).children()
            return [child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE]
        return []

    async def kill_master(self) -> None:
        """Its workers notice, and end their calls in order; a new server takes over meanwhile."""
        assert self.master is not None
        self.orphans.update(self.worker_pids())
        self.master.kill()
        self.master.wait()
        await self.serve()

    async def stop_master(self) -> None:
        assert self.master is not None
        self.master.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(self.master.wait, _STOP_S)
        except subprocess.TimeoutExpired:
            self._violations.append("a server did not stop on SIGTERM")
            self.orphans.update(self.worker_pids())
            self.master.kill()
        await self.serve()

    async def fail_over_redis(self) -> None:
        """To a replica that has nothing."""
        self._primary = 1 - self._primary
        server = self.redis
        client = Redis.from_url(server.url)
        await client.flushall()
        await client.aclose()
        self.to_redis.point_at(server.url)

    async def command(self, *words: str) -> dict[str, Any]:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "scripts.cli",
            "--json",
            *words,
            env=self._environment(),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, said = await process.communicate()
        try:
            answer: dict[str, Any] = json.loads(out)
        except ValueError:
            self._violations.append(f"tuma {' '.join(words)}: {said.decode()[-500:]}")
            return {}
        return answer

    async def stop_server(self) -> None:
        if self.master is not None and self.master.poll() is None:
            self.master.send_signal(signal.SIGTERM)
            try:
                await asyncio.to_thread(self.master.wait, _STOP_S)
            except subprocess.TimeoutExpired:
                self._violations.append("the server did not stop on SIGTERM")

    async def _stop_everything(self) -> None:
        pids = [*self.orphans, *(self.worker_pids() if self.master is not None else [])]
        if self.master is not None:
            self.master.kill()
            self.master.wait()
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if "serve" in process.cmdline():
                    process.kill()
        for server in (*self._redises, self.postgres):
            await self.in_thread(server.kill)
        self._thread.shutdown()
        if not self._violations:
            shutil.rmtree(self._folder, ignore_errors=True)
        else:
            self._violations.append(f"logs are in {self._folder}")
