"""``./scripts/dev``: everything at once, for real, on one machine with nothing but Python.

Embedded Postgres and Redis (unless yours are named), the schema, a demo user with a wallet and a key, the simulated
provider (unless an upstream key is set), the simulated payment providers (unless a real one's key is set), and
``tuma serve``. All of it stops with Ctrl-C; the data stay in ``.tuma/``.
"""

import argparse
import asyncio
import fcntl
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from decimal import Decimal
from pathlib import Path
from typing import IO

from billing.actor import acting
from billing.errors import FxSourceError, InvalidKeyError, TumaError
from billing.fx.book import FxBook
from billing.fx.sync import FxFeed
from billing.identity.key import KeyRules
from billing.identity.keys import Keys
from billing.money import NANO
from billing.postgres.migrate import migrate
from billing.pricing.price_book import PriceBook
from config.logging import configure_logging
from config.settings import LogSettings, Settings, SettingsError, load_settings
from proxy.outbound.fx_sources import make_sources
from proxy.upstream.price_listing import read_listing
from scripts.local.check import check
from scripts.local.walk import walk
from scripts.office import Office, open_office, operator_name
from scripts.programs.children import end, first_line, spawn
from scripts.programs.embedded import EmbeddedError, EmbeddedPostgres, EmbeddedRedis, find_free_port
from scripts.sim.payments.currencies import PROVIDERS
from scripts.sim.payments.settings import settings_of
from scripts.sim.payments.signatures import Secrets

_HOME = Path(__file__).resolve().parents[2] / ".tuma"
_DEMO_EMAIL = "demo@tuma.example"
_DEMO_CURRENCY = "NGN"
_DEMO_RATE = "1600"
_DEMO_CREDIT = 250_000
_READY_S = 60.0
_RESTARTS_MAX = 20
_SIM_KEY = "sk-sim"
# What nobody told of is looked for more often than in production: somebody is watching.
_PAYMENTS_LOOK_S = "1"


class DevServer:
    """Starts the parts in order and stops them in reverse.

    Args:
        home: the folder of its data.
        say: takes a line of progress.
        quiet: log warnings alone, unless TUMA_LOG__LEVEL says otherwise: what is printed is the point then.
    """

    def __init__(self, home: Path, say: Callable[[str], None], *, quiet: bool) -> None:
        self._home = home
        self._say = say
        self._quiet = quiet
        self._stack = ExitStack()
        self._env: dict[str, str] = dict(os.environ)
        self._serve: subprocess.Popen[str] | None = None
        self._stopping = False
        self.base_url = ""
        self.wallet_id = ""
        self.api_key = ""
        self.payments_url = ""
        self._remembered: dict[str, str] = {}

    @property
    def details(self) -> dict[str, str]:
        """What a client or an operator needs, as the contract names it."""
        return {
            "base_url": self.base_url,
            "api_key": self.api_key,
            "wallet_id": self.wallet_id,
            "postgres_dsn": self._env["TUMA_POSTGRES__DSN"],
            "redis_url": self._env["TUMA_REDIS__URL"],
            "upstream_url": self._env.get("TUMA_UPSTREAM__BASE_URL", ""),
            "admin_token": self._env["TUMA_ADMIN__TOKEN"],
            "payments_url": self.payments_url,
        }

    @property
    def settings(self) -> Settings:
        """The settings as the server sees them."""
        os.environ.update(self._env)
        return load_settings()

    def start(self) -> None:
        """Start everything; on return calls are accepted.

        Raises:
            EmbeddedError, TumaError, SettingsError: a part does not start; what had started is for ``stop``.
        """
        (self._home / "running.json").unlink(missing_ok=True)
        self._remembered = self._load_memory()
        self._env.setdefault("TUMA_AUTH__KEY_PEPPER", self._remembered["pepper"])
        self._env.setdefault("TUMA_ADMIN__TOKEN", self._remembered["admin_token"])
        self._env.setdefault("TUMA_LOG__FORMAT", "console")
        if self._quiet:
            self._env.setdefault("TUMA_LOG__LEVEL", "warning")
        self._start_stores()
        self._start_provider()
        self._start_payments()
        asyncio.run(self._prepare())
        self._start_server()
        self._send_webhooks()
        self._write_env()

    def _load_memory(self) -> dict[str, str]:
        path = self._home / "dev.json"
        found: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
        for name in ("pepper", "admin_token"):
            found.setdefault(name, secrets.token_urlsafe(32))
        return found

    def _save_memory(self) -> None:
        path = self._home / "dev.json"
        path.touch(mode=0o600)
        path.write_text(json.dumps(self._remembered))

    def _start_stores(self) -> None:
        """Postgres and Redis, each unless one of your own is named."""
        if not self._env.get("TUMA_POSTGRES__DSN"):
            postgres = EmbeddedPostgres(self._home / "postgres")
            self._stack.callback(postgres.stop)
            postgres.start()
            self._env["TUMA_POSTGRES__DSN"] = postgres.dsn()
            self._say(f"Postgres on 127.0.0.1:{postgres.port}")
        if not self._env.get("TUMA_REDIS__URL"):
            redis = EmbeddedRedis(self._home / "redis")
            self._stack.callback(redis.stop)
            redis.start()
            self._env["TUMA_REDIS__URL"] = redis.url
            self._say(f"Redis on 127.0.0.1:{redis.port}")

    def _start_provider(self) -> None:
        if self._env.get("TUMA_UPSTREAM__API_KEY"):
            self._say(f"upstream: {self.settings.upstream.base_url}")
            self._env.setdefault("TUMA_UPSTREAM__BASE_URL", self.settings.upstream.base_url)
            return
        self._env["TUMA_UPSTREAM__BASE_URL"] = self._simulate(
            "provider", "scripts.sim.provider", "--api-key", _SIM_KEY
        )
        self._env["TUMA_UPSTREAM__API_KEY"] = _SIM_KEY
        self._env["TUMA_UPSTREAM__KIND"] = "openrouter"
        self._env.setdefault(
            "TUMA_UPSTREAM__EXTRA_MEMBERS", '["sim"]'
        )  # how a request tells the simulator what to do

    def _start_payments(self) -> None:
        """Simulate all payment providers, or none: beside a real one, nobody shall pay with simulated money."""
        real = [name for name in PROVIDERS if self._env.get(f"TUMA_{name.upper()}__SECRET_KEY")]
        if real:
            self._say(f"payments: {', '.join(real)}, for real")
            return
        self.payments_url = self._simulate("payments", "scripts.sim.payments.server")
        for name, section in settings_of(self.payments_url, Secrets()).items():
            self._env.update({f"TUMA_{name}__{key}".upper(): value for key, value in section.items()})
        self._env.setdefault("TUMA_PAYMENTS__LOOK_S", _PAYMENTS_LOOK_S)

    def _simulate(self, name: str, module: str, *options: str) -> str:
        """Start a simulator on the port of last time, if that is free, with its books; return its address."""
        port_file = self._home / f"{name}.port"
        port = find_free_port(int(port_file.read_text()) if port_file.exists() else 0)
        port_file.write_text(str(port))
        command = [sys.executable, "-m", module, "--port", str(port), *options]
        process = spawn([*command, "--books", str(self._home / f"{name}-books.jsonl")], self._env)
        self._stack.callback(end, process, timeout_s=_READY_S)
        line = first_line(process, module)
        self._say(line)
        return line.rpartition(" ")[2]

    def _send_webhooks(self) -> None:
        """Tell the simulated payment providers where the server is; one that is started again has the same address."""
        if not self.payments_url:
            return
        request = urllib.request.Request(  # noqa: S310 - our own server on loopback
            f"{self.payments_url}/sim/webhooks_to",
            data=json.dumps({"origin": self.base_url.removesuffix("/v1")}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=_READY_S):  # noqa: S310 - the same
            pass

    async def _prepare(self) -> None:
        async with open_office(self.settings) as office:
            before, after = await migrate(office.database)
            self._say(f"schema at version {after}" + (f" (was {before})" if before != after else ""))
            with acting(f"operator:{operator_name()}"):
                await self._seed(office)

    async def _seed(self, office: Office) -> None:
        book = PriceBook(office.database)
        priced, _ = read_listing(await office.upstream.list_models())
        await book.set_prices(priced, source=office.settings.upstream.kind)
        rates = FxBook(office.database, office.settings.fx)
        await self._ask_sources(office)
        await rates.load()
        if _DEMO_CURRENCY not in rates.quotes:
            await rates.set_rate("USD", _DEMO_CURRENCY, Decimal(_DEMO_RATE))
        keys = Keys(office.database, office.settings.auth, office.settings.limits)
        try:
            caller = await keys.authenticate(self._remembered.get("api_key", ""))
            self.wallet_id, self.api_key = str(caller.wallet_id), self._remembered["api_key"]
        except InvalidKeyError:
            await self._make_demo(office, keys)
        self._say(f"{len(priced)} models with prices; demo user {_DEMO_EMAIL}")

    async def _ask_sources(self, office: Office) -> None:
        """Quote the demo's currency by TUMA_FX__URL, where it is set and answers."""
        settings = office.settings.fx
        if settings.url:
            settings = settings.model_copy(update={"currencies": (*settings.currencies, _DEMO_CURRENCY)})
            with suppress(FxSourceError):
                await FxFeed(office.database, make_sources(settings), settings).sync()

    async def _make_demo(self, office: Office, keys: Keys) -> None:
        user_id = await office.wallets.find_user(_DEMO_EMAIL) or await office.wallets.create_user(_DEMO_EMAIL)
        wallet_id = await office.wallets.create_wallet(str(user_id), currency=_DEMO_CURRENCY)
        await office.wallets.credit(wallet_id, _DEMO_CREDIT * NANO, reason="money to try Tuma with")
        made = await keys.create(wallet_id, KeyRules(name="demo"))
        self.wallet_id, self.api_key = str(wallet_id), made.secret
        self._remembered["api_key"] = made.secret
        self._save_memory()

    def _start_server(self) -> None:
        self._env["TUMA_PORT"] = str(find_free_port(self.settings.port))
        self._spawn_server()
        self._stack.callback(self._end_server)

    def _spawn_server(self) -> None:
        self._serve = spawn([sys.executable, "-m", "scripts.cli", "serve"], self._env)
        line = first_line(self._serve, "tuma serve")
        self.base_url = line.rpartition(" ")[2] + "/v1"

    def _end_server(self) -> None:
        self._stopping = True
        if self._serve is not None:
            end(self._serve, timeout_s=_READY_S)

    def _write_env(self) -> None:
        """Leave the settings for other terminals: ``set -a; . .tuma/env``."""
        path = self._home / "env"
        path.touch(mode=0o600)
        names = sorted(name for name in self._env if name.startswith("TUMA_"))
        path.write_text("".join(f"{name}={shlex.quote(self._env[name])}\n" for name in names))

        running = self._home / "running.json"
        running.touch(mode=0o600)
        running.write_text(json.dumps(self.details))
        self._stack.callback(running.unlink, missing_ok=True)

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; a server that dies is started again."""
        stopped = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: stopped.set())
        restarts = 0
        while not stopped.wait(0.2):
            if self._serve is not None and self._serve.poll() is not None:
                restarts += 1
                if restarts > _RESTARTS_MAX:
                    raise EmbeddedError("tuma serve keeps dying; see the lines above")
                self._say(f"tuma serve ended with {self._serve.returncode}; starting it again")
                self._spawn_server()

    def stop(self) -> None:
        """Stop everything, in reverse order."""
        self._stopping = True
        self._stack.close()


def _take_lock(home: Path) -> IO[str] | None:
    """Take the data folder for this process; None when another ``./scripts/dev`` has it."""
    home.mkdir(parents=True, exist_ok=True)
    lock = (home / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _use_running(options: argparse.Namespace) -> int:
    """Check the server that runs already, or say that it does."""
    running, wanted = options.data / "running.json", options.check or options.walk
    deadline = time.monotonic() + _READY_S
    while wanted and not running.exists() and time.monotonic() < deadline:
        time.sleep(0.1)  # it is starting
    details = json.loads(running.read_text()) if wanted and running.exists() else None
    if details is None:
        print(f"./scripts/dev: another one runs on {options.data}; stop it first, or use it", file=sys.stderr)
        return 1
    print(f"using the server that runs already: {details['base_url']}", file=sys.stderr)
    for line in (options.data / "env").read_text().splitlines():
        name, _, value = line.partition("=")
        os.environ[name] = shlex.split(value)[0] if value else ""
    return _use(options, details, load_settings())


def _use(options: argparse.Namespace, details: dict[str, str], settings: Settings) -> int:
    """Make the calls of ``--check``, or go the ways of ``--walk``, and report."""
    if options.check:
        result = check(details)
        print(json.dumps(result) if options.json else result["report"], flush=True)
        return 0
    began = time.monotonic()

    def say(line: str) -> None:
        print(line, file=sys.stderr if options.json else sys.stdout, flush=True)

    result = asyncio.run(walk(details, settings, say))
    if options.json:
        print(json.dumps(result), flush=True)
    else:
        say(
            f"{len(result['steps'])} steps in {time.monotonic() - began:.1f} s, and the books held after each"
        )
    return 0


def _welcome(details: dict[str, str], home: Path, seconds: float) -> str:
    body = json.dumps({"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "Say hello"}]})
    return f"""
Tuma is ready ({seconds:.1f} s). Every call is paid from a demo wallet in {_DEMO_CURRENCY}.

  base_url  {details["base_url"]}
  api_key   {details["api_key"]}

Try it from another terminal:

  curl -si {details["base_url"]}/chat/completions -H 'Authorization: Bearer {details["api_key"]}' -H 'Content-Type: application/json' -d '{body}'
  curl -s {details["base_url"]}/wallet -H 'Authorization: Bearer {details["api_key"]}'
{_how_to_pay(details)}
As the operator:

  set -a; . {home}/env; {sys.prefix}/bin/tuma wallets show {details["wallet_id"]}

Ctrl-C stops everything; the data stay in {home}.
"""


def _how_to_pay(details: dict[str, str]) -> str:
    if not details["payments_url"]:
        return ""
    body = json.dumps({"provider": "paystack", "amount": "5000"})
    show = "import json, sys; print(json.load(sys.stdin)['url'])"
    return f"""
Top up (or by {", ".join(name for name in PROVIDERS if name != "paystack")}); open the address that it prints in a browser, and press a button:

  curl -s {details["base_url"]}/wallet/topups -H 'Authorization: Bearer {details["api_key"]}' -H 'Content-Type: application/json' -d '{body}' | python3 -c "{show}"
"""


def main() -> None:
    """Run ``./scripts/dev``."""
    parser = argparse.ArgumentParser(prog="./scripts/dev", description=__doc__)
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--check", action="store_true", help="make one streamed and one plain call, then stop")
    ways.add_argument(
        "--walk",
        action="store_true",
        help="top up at each payment provider, call, refund, dispute; prove the books after each step; then stop",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON line when ready, and go on serving"
    )
    parser.add_argument(
        "--data", type=lambda text: Path(text).resolve(), default=_HOME, help=f"where the data are; {_HOME}"
    )
    options = parser.parse_args()
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:5.1f} s] {line}", file=sys.stderr, flush=True)

    configure_logging(LogSettings(level="warning", format="console"))
    server = DevServer(options.data, say, quiet=options.check or options.walk)
    status = 0
    lock = _take_lock(options.data)
    try:
        if lock is None:
            sys.exit(_use_running(options))
        server.start()
        if options.check or options.walk:
            status = _use(options, server.details, server.settings)
        else:
            ready = time.monotonic() - began
            welcome = _welcome(server.details, options.data, ready)
            print(json.dumps(server.details) if options.json else welcome, flush=True)
            server.run()
    except (EmbeddedError, TumaError, SettingsError) as error:
        print(f"./scripts/dev: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        pass
    finally:
        server.stop()
    sys.exit(status)


if __name__ == "__main__":
    main()
