"""The test stand: Postgres, Redis, the provider, the floor, Tuma and the load generator, each a process of its own."""

import asyncio
import json
import os
import resource
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from billing.fx.book import FxBook
from billing.identity.key import KeyRules
from billing.identity.keys import Keys
from billing.money import NANO
from billing.postgres.migrate import migrate
from billing.pricing.price_book import PriceBook
from config.settings import Settings, load_settings
from proxy.upstream.price_listing import read_listing
from scripts.bench.gauges import Clocks
from scripts.bench.processes.admit import URL_FROM
from scripts.bench.scenarios import Scenario
from scripts.office import Office, open_office
from scripts.programs.children import end, first_line, spawn
from scripts.programs.embedded import EmbeddedPostgres, EmbeddedRedis

FLOORS = FLOOR, FLOOR_ASYNCIO = "floor", "floor-asyncio"
TUMA = "tuma"
TUMA_KEY = "sk-bench-tuma"
SETTLE_KEY = "sk-bench-settle"
BIG_KEY = "sk-bench-big"
CAPACITY_KEY = "sk-bench-capacity"
_FLOOR_KEY = "sk-bench-floor"
PEPPER = "a pepper for the bench, long enough"
_WALLETS = 32
_CREDIT = 10_000_000
CURRENCY, RATE, SPREAD = "NGN", 1600, 40  # of it for a dollar, and what is spread beside them
_MARKUP_BPS = SPREAD * 10_000 // RATE
_STOP_S = 30.0
_ASK_S = 10.0
JOB_S = 120.0


@dataclass(frozen=True, slots=True)
class Side:
    """A proxy that is measured.

    Args:
        base_url: up to and with ``/v1``.
        keys: with which calls are made, in turns.
        pid: of its process; None for a peer's, which is somewhere.
        billed_to: the provider's key of the books that its calls are in; "" for a side without books.
        postgres_pid: of its Postgres, if that is not the stand's first.
    """

    name: str
    base_url: str
    keys: tuple[str, ...]
    pid: int | None = None
    billed_to: str = ""
    postgres_pid: int | None = None

    def target(self, scenario: Scenario) -> dict[str, Any]:
        """Return where the calls of a scenario go, and what they are, for the load generator."""
        parts = urlsplit(self.base_url)
        secure = parts.scheme == "https"
        return {
            "host": parts.hostname,
            "port": parts.port or (443 if secure else 80),
            "secure": secure,
            "requests": self.requests(scenario),
        }

    def requests(self, scenario: Scenario) -> list[str]:
        """Return the request of a scenario for each key, as it goes over the wire."""
        parts = urlsplit(self.base_url)
        body = scenario.body()
        return [
            f"POST {parts.path}/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n{body}"
            for key in self.keys
        ]


class Stand:
    """Everything that runs. ``stop`` ends it in reverse, also when ``start`` broke off.

    Args:
        folder: of its data and logs.
        upstream_port: of the provider, for peers that must know it beforehand; 0 picks a free one.
    """

    def __init__(self, folder: Path, *, upstream_port: int = 0) -> None:
        self._folder = folder
        self._upstream_port = upstream_port
        self._stack = ExitStack()
        self._load: subprocess.Popen[str] | None = None
        self._postgres: EmbeddedPostgres | None = None
        self._redis: EmbeddedRedis | None = None
        self._pids: dict[str, int] = {}
        self.upstream_url = ""
        self.floors: tuple[Side, ...] = ()
        self.tuma = Side(TUMA, "", ())

    def start_stores(self) -> None:
        """Start Postgres, Redis and the provider, with as many open files allowed as the machine allows.

        Raises:
            EmbeddedError: one of them does not start.
        """
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._postgres = self._stack.enter_context(EmbeddedPostgres(self._folder / "postgres"))
        self._redis = self._stack.enter_context(EmbeddedRedis(self._folder / "redis"))
        process, self.upstream_url = self._part("upstream", "--port", str(self._upstream_port))
        self._pids = {
            "postgres_cpu_ms": self._postgres.pid,
            "redis_cpu_ms": self._redis.pid,
            "provider_cpu_ms": process.pid,
        }

    def free_bytes(self) -> int:
        """Return how much room the disk has for data."""
        return shutil.disk_usage(self._folder).free

    @contextmanager
    def quick_postgres(self, name: str) -> Iterator[EmbeddedPostgres]:
        """Run a Postgres that does not wait for the disk, to be filled; then have the disk take what is left."""
        with EmbeddedPostgres(self._folder / name, fast=True) as server:
            yield server
        os.sync()

    def start_postgres(self, name: str) -> EmbeddedPostgres:
        """Start one more Postgres, in earnest."""
        return self._stack.enter_context(EmbeddedPostgres(self._folder / name))

    def settings(
        self,
        *,
        database: str = "tuma",
        upstream_key: str = TUMA_KEY,
        postgres: EmbeddedPostgres | None = None,
        redis_number: int = 0,
    ) -> Settings:
        """Return what Tuma is set to; all else is as it is delivered.

        Args:
            database: in Postgres.
            upstream_key: with which it calls the provider.
            postgres: another than the stand's first.
            redis_number: of the database in Redis; each set of books needs one of its own.
        """
        postgres = postgres or self._postgres
        assert postgres is not None
        assert self._redis is not None
        return load_settings(
            postgres={"dsn": postgres.dsn(database)},
            redis={"url": f"{self._redis.url.removesuffix('/0')}/{redis_number}"},
            upstream={"base_url": self.upstream_url, "api_key": upstream_key},
            auth={"key_pepper": PEPPER},
            port=0,
        )

    def start_proxies(self, keys: tuple[str, ...]) -> None:
        """Start the floors, Tuma and the load generator.

        Raises:
            EmbeddedError: one of them does not start.
        """
        self.floors = (self._start_floor(FLOOR, "uvloop"), self._start_floor(FLOOR_ASYNCIO, "asyncio"))
        self.tuma = self.start_tuma(TUMA, self.settings(), keys, billed_to=TUMA_KEY)
        self._load = self._spawn("load", stdin=subprocess.PIPE)
        first_line(self._load, "bench load")
        self._pids["load_cpu_ms"] = self._load.pid

    def _start_floor(self, name: str, loop: str) -> Side:
        options = ("--base-url", self.upstream_url, "--api-key", _FLOOR_KEY, "--loop", loop)
        process, url = self._part("floor", *options)
        return Side(name, url, ("sk-nobody-looks",), process.pid)

    def start_tuma(
        self,
        name: str,
        settings: Settings,
        keys: tuple[str, ...],
        *,
        billed_to: str,
        workers: int = 1,
        postgres: EmbeddedPostgres | None = None,
    ) -> Side:
        """Start a Tuma, as it is delivered but for where its servers are, and how much one user may do at once.

        Args:
            name: of the side.
            settings: from ``settings()``.
            keys: with which it is called.
            billed_to: its own key of the provider.
            workers: how many processes serve.
            postgres: another than the stand's first.

        Raises:
            EmbeddedError: it does not start.
        """
        env = {
            "TUMA_POSTGRES__DSN": settings.postgres.dsn.get_secret_value(),
            "TUMA_REDIS__URL": settings.redis.url.get_secret_value(),
            "TUMA_UPSTREAM__BASE_URL": self.upstream_url,
            "TUMA_UPSTREAM__API_KEY": billed_to,
            "TUMA_AUTH__KEY_PEPPER": PEPPER,
            "TUMA_LIMITS__USER_CALLS_IN_FLIGHT": "100000",  # one user makes them all; they are counted as anybody's
            "TUMA_PORT": "0",
            "TUMA_WORKERS": str(workers),
        }
        # What it logs is written, as everywhere; into a file, so that it does not run over the terminal.
        log = self._stack.enter_context((self._folder / f"{name}.log").open("wb"))
        process = spawn([sys.executable, "-m", "scripts.cli", "serve"], {**os.environ, **env}, stderr=log)
        self._stack.callback(end, process, timeout_s=_STOP_S)
        url = first_line(process, f"tuma serve (see {log.name})").rpartition(" ")[2]
        return Side(name, f"{url}/v1", keys, process.pid, billed_to, postgres.pid if postgres else None)

    def _part(self, name: str, *options: str) -> tuple[subprocess.Popen[str], str]:
        process = self._spawn(name, *options)
        return process, first_line(process, f"bench {name}").rpartition(" ")[2]

    def _spawn(self, name: str, *options: str, stdin: int | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", f"scripts.bench.processes.{name}", *options]
        process = spawn(command, os.environ, stdin=stdin)
        self._stack.callback(end, process, timeout_s=_STOP_S)
        return process

    def add_database(self, name: str) -> None:
        """Make one more database."""
        assert self._postgres is not None
        self._postgres.create_database(name)

    async def load(self, side: Side, scenario: Scenario, **job: Any) -> dict[str, Any]:
        """Let the load generator do a job on a side; return what it says."""
        told = {
            **side.target(scenario),
            "stream": scenario.stream,
            "paced": scenario.paced,
            "rate": None,
            "timeout_s": JOB_S,
            **job,
        }
        return await asyncio.to_thread(self._tell_load, told)

    def _tell_load(self, job: Mapping[str, Any]) -> dict[str, Any]:
        load = self._load
        assert load is not None
        assert load.stdin is not None
        assert load.stdout is not None
        load.stdin.write(json.dumps(job) + "\n")
        load.stdin.flush()
        line = load.stdout.readline()
        said: dict[str, Any] = (
            json.loads(line) if line else {"errors": 1, "error": "the load generator ended"}
        )
        return said

    async def ask_upstream(self, path: str, key: str, body: object = None) -> dict[str, Any]:
        """GET from the provider, or POST where there is a body."""
        request = urllib.request.Request(  # noqa: S310 - our own server on loopback
            f"{self.upstream_url}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {key}"},
        )

        def ask() -> dict[str, Any]:
            with urllib.request.urlopen(request, timeout=_ASK_S) as answer:  # noqa: S310 - the same
                found: dict[str, Any] = json.loads(answer.read())
                return found

        return await asyncio.to_thread(ask)

    @contextmanager
    def admitting(self, clients: int, *options: str) -> Iterator[list[subprocess.Popen[str]]]:
        """Have so many processes work on Redis, in a database of their own there (``scripts/bench/processes/admit.py``)."""
        url = self.settings(redis_number=2).redis.url.get_secret_value()
        command = [sys.executable, "-m", "scripts.bench.processes.admit", *options]
        processes: list[subprocess.Popen[str]] = []
        try:
            while len(processes) < clients:  # one by one: should a start fail, those before are ended
                processes.append(spawn(command, {**os.environ, URL_FROM: url}))
            yield processes
        finally:
            for process in processes:
                end(process, timeout_s=_STOP_S)

    def clocks(self, side: Side) -> Clocks:
        """Return the CPU clocks of all that works for a side's calls, its own as ``cpu_ms``."""
        own = {"cpu_ms": side.pid, "postgres_cpu_ms": side.postgres_pid}
        return Clocks({**self._pids, **{name: pid for name, pid in own.items() if pid is not None}})

    def stop(self) -> None:
        """End every process that was started."""
        if self._load is not None and self._load.stdin is not None:
            with suppress(OSError):
                self._load.stdin.close()
        self._stack.close()


@contextmanager
def standing(folder: Path, *, upstream_port: int) -> Iterator[Stand]:
    """Have a stand, whose processes end however this does."""
    stand = Stand(folder, upstream_port=upstream_port)
    try:
        yield stand
    finally:
        stand.stop()


async def prepare(office: Office) -> None:
    """Make the schema, prices and a rate."""
    await migrate(office.database)
    priced, _ = read_listing(await office.upstream.list_models())
    await PriceBook(office.database).set_prices(priced, source=office.settings.upstream.kind)
    await FxBook(office.database, office.settings.fx).set_rate(
        "USD", CURRENCY, Decimal(RATE), markup_bps=_MARKUP_BPS
    )


async def add_payers(office: Office) -> tuple[str, ...]:
    """Make wallets with money; return a key of each."""
    keys = Keys(office.database, office.settings.auth, office.settings.limits)
    made = []
    for number in range(_WALLETS):
        user_id = await office.wallets.create_user(f"bench{number}@tuma.example")
        wallet_id = await office.wallets.create_wallet(str(user_id), currency=CURRENCY)
        await office.wallets.credit(wallet_id, _CREDIT * NANO, reason="money for the bench")
        made.append((await keys.create(wallet_id, KeyRules(name="bench"))).secret)
    return tuple(made)


async def begin(stand: Stand) -> None:
    """Start everything, with prices and payers in the books."""
    stand.start_stores()
    async with open_office(stand.settings()) as office:
        await prepare(office)
        keys = await add_payers(office)
    stand.start_proxies(keys)
