"""The test stand: Postgres, Redis, the provider, the floor, Tuma and the load generator, each a process of its own."""

import asyncio
import json
import os
import resource
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from billing.fxbook import FxBook
from billing.keys import KeyRules, Keys
from billing.migrate import migrate
from billing.money import NANO
from billing.pricebook import PriceBook
from config.settings import Settings, load_settings
from proxy.upstream.listing import read_listing
from scripts.bench.scenarios import Scenario
from scripts.embedded import EmbeddedPostgres, EmbeddedRedis
from scripts.office import Office, open_office
from scripts.parts import end, first_line, spawn

TUMA_KEY = "sk-bench-tuma"
SETTLE_KEY = "sk-bench-settle"
_FLOOR_KEY = "sk-bench-floor"
_PEPPER = "a pepper for the bench, long enough"
_WALLETS = 32
_CREDIT = 10_000_000
_CURRENCY, _RATE, _MARKUP_BPS = "NGN", "1600", 250
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
    """

    name: str
    base_url: str
    keys: tuple[str, ...]
    pid: int | None = None

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
        self.upstream_url = ""
        self.floor = Side("floor", "", ())
        self.tuma = Side("tuma", "", ())

    def start_stores(self) -> None:
        """Start Postgres, Redis and the provider, with as many open files allowed as the machine allows.

        Raises:
            EmbeddedError: one of them does not start.
        """
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._postgres = self._stack.enter_context(EmbeddedPostgres(self._folder / "postgres"))
        self._redis = self._stack.enter_context(EmbeddedRedis(self._folder / "redis"))
        self.upstream_url = self._part("upstream", "--port", str(self._upstream_port))[1]

    def settings(self, *, database: str = "tuma", upstream_key: str = TUMA_KEY) -> Settings:
        """Return what Tuma is set to; all else is as it is delivered."""
        assert self._postgres is not None
        assert self._redis is not None
        return load_settings(
            postgres={"dsn": self._postgres.dsn(database)},
            redis={"url": self._redis.url},
            upstream={"base_url": self.upstream_url, "api_key": upstream_key},
            auth={"key_pepper": _PEPPER},
            port=0,
        )

    def start_proxies(self, keys: tuple[str, ...]) -> None:
        """Start the floor, Tuma and the load generator.

        Raises:
            EmbeddedError: one of them does not start.
        """
        process, url = self._part("floor", "--base-url", self.upstream_url, "--api-key", _FLOOR_KEY)
        self.floor = Side("floor", url, ("sk-nobody-looks",), process.pid)
        settings = self.settings()
        env = {
            "TUMA_POSTGRES__DSN": settings.postgres.dsn.get_secret_value(),
            "TUMA_REDIS__URL": settings.redis.url.get_secret_value(),
            "TUMA_UPSTREAM__BASE_URL": self.upstream_url,
            "TUMA_UPSTREAM__API_KEY": TUMA_KEY,
            "TUMA_AUTH__KEY_PEPPER": _PEPPER,
            "TUMA_PORT": "0",
        }
        # What it logs is written, as everywhere; into a file, so that it does not run over the terminal.
        log = self._stack.enter_context((self._folder / "tuma.log").open("wb"))
        process = spawn([sys.executable, "-m", "scripts.cli", "serve"], {**os.environ, **env}, stderr=log)
        self._stack.callback(end, process, timeout_s=_STOP_S)
        url = first_line(process, f"tuma serve (see {log.name})").rpartition(" ")[2]
        self.tuma = Side("tuma", f"{url}/v1", keys, process.pid)
        self._load = self._spawn("load", stdin=subprocess.PIPE)
        first_line(self._load, "bench load")

    def _part(self, name: str, *options: str) -> tuple[subprocess.Popen[str], str]:
        process = self._spawn(name, *options)
        return process, first_line(process, f"bench {name}").rpartition(" ")[2]

    def _spawn(self, name: str, *options: str, stdin: int | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", f"scripts.bench.{name}", *options]
        process = spawn(command, os.environ, stdin=stdin)
        self._stack.callback(end, process, timeout_s=_STOP_S)
        return process

    def add_database(self, name: str) -> None:
        """Make one more database."""
        assert self._postgres is not None
        self._postgres.create_database(name)

    async def load(self, side: Side, scenario: Scenario, **job: Any) -> dict[str, Any]:
        """Let the load generator do a job on a side; return what it says."""
        parts = urlsplit(side.base_url)
        secure = parts.scheme == "https"
        told = {
            "host": parts.hostname,
            "port": parts.port or (443 if secure else 80),
            "secure": secure,
            "requests": side.requests(scenario),
            "stream": scenario.stream,
            "paced": scenario.paced,
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

    def stores_cpu_s(self) -> float:
        """Return the CPU time that Postgres and Redis have used, in seconds."""
        assert self._postgres is not None
        assert self._redis is not None
        return cpu_s(self._postgres.pid) + cpu_s(self._redis.pid)

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


async def prepare(office: Office) -> tuple[str, ...]:
    """Make the schema, prices, a rate, and wallets with money; return a key of each wallet."""
    await migrate(office.database)
    priced, _ = read_listing(await office.upstream.list_models())
    await PriceBook(office.database).set_prices(priced, source=office.settings.upstream.kind)
    await FxBook(office.database, office.settings.fx).set_rate(
        "USD", _CURRENCY, Decimal(_RATE), markup_bps=_MARKUP_BPS
    )
    keys = Keys(office.database, office.settings.auth, office.settings.limits)
    made = []
    for number in range(_WALLETS):
        user_id = await office.wallets.create_user(f"bench{number}@tuma.example")
        wallet_id = await office.wallets.create_wallet(str(user_id), currency=_CURRENCY)
        await office.wallets.credit(wallet_id, _CREDIT * NANO, reason="money for the bench")
        made.append((await keys.create(wallet_id, KeyRules(name="bench"))).secret)
    return tuple(made)


async def begin(stand: Stand) -> None:
    """Start everything, with prices and payers in the books."""
    stand.start_stores()
    async with open_office(stand.settings()) as office:
        keys = await prepare(office)
    stand.start_proxies(keys)


def cpu_s(pid: int) -> float:
    """Return the CPU time of a process and its living children, user and system, in seconds."""
    import psutil  # noqa: PLC0415 - comes with the embedded wheels, which an installation without them lacks

    total = 0.0
    process = psutil.Process(pid)
    for each in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            total += _exact_cpu_s(each.pid) or sum(each.cpu_times()[:2])
    return total


def _exact_cpu_s(pid: int) -> float | None:
    """Read a process's CPU clock, which ``/proc`` rounds to 10 ms; see clock_getcpuclockid(3). None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    with suppress(OSError):
        return time.clock_gettime((~pid << 3) | 2)
    return None


def memory_bytes(pid: int) -> int:
    """Return the resident memory of a process and its children."""
    import psutil  # noqa: PLC0415 - as above

    process = psutil.Process(pid)
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))
