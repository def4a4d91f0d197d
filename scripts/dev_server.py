"""``./scripts/dev``: everything at once, for real, on one machine with nothing but Python.

Embedded Postgres and Redis (unless yours are named), the schema, a demo user with a wallet and a key, the simulated
provider (unless an upstream key is set), and ``tuma serve``. All of it stops with Ctrl-C; the data stay in ``.tuma/``.
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
from collections.abc import Callable
from contextlib import ExitStack, suppress
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

from billing.acting import acting
from billing.errors import FxSourceError, InvalidKeyError, TumaError
from billing.fxbook import FxBook
from billing.fxfeed import FxFeed
from billing.keys import KeyRules, Keys
from billing.migrate import migrate
from billing.money import NANO
from billing.pricebook import PriceBook
from config.logging import configure_logging
from config.settings import LogSettings, Settings, SettingsError, load_settings
from proxy.fxsources import make_sources
from proxy.upstream.listing import read_listing
from scripts.dev_check import check
from scripts.embedded import EmbeddedError, EmbeddedPostgres, EmbeddedRedis, find_free_port
from scripts.office import Office, open_office, operator_name
from scripts.processes import end_with_parent

_HOME = Path(__file__).resolve().parent.parent / ".tuma"
_DEMO_EMAIL = "demo@tuma.example"
_DEMO_CURRENCY = "NGN"
_DEMO_RATE = "1600"
_DEMO_CREDIT = 250_000
_READY_S = 60.0
_RESTARTS_MAX = 20
_SIM_KEY = "sk-sim"


class DevServer:
    """Starts the parts in order and stops them in reverse.

    Args:
        say: takes a line of progress.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._stack = ExitStack()
        self._env: dict[str, str] = dict(os.environ)
        self._serve: subprocess.Popen[str] | None = None
        self._stopping = False
        self.base_url = ""
        self.wallet_id = ""
        self.api_key = ""
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
        (_HOME / "running.json").unlink(missing_ok=True)
        self._remembered = self._load_memory()
        self._env.setdefault("TUMA_AUTH__KEY_PEPPER", self._remembered["pepper"])
        self._env.setdefault("TUMA_ADMIN__TOKEN", self._remembered["admin_token"])
        self._env.setdefault("TUMA_LOG__FORMAT", "console")
        self._start_stores()
        self._start_provider()
        asyncio.run(self._prepare())
        self._start_server()
        self._write_env()

    def _load_memory(self) -> dict[str, str]:
        path = _HOME / "dev.json"
        found: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
        for name in ("pepper", "admin_token"):
            found.setdefault(name, secrets.token_urlsafe(32))
        return found

    def _save_memory(self) -> None:
        path = _HOME / "dev.json"
        path.touch(mode=0o600)
        path.write_text(json.dumps(self._remembered))

    def _start_stores(self) -> None:
        """Postgres and Redis, each unless one of your own is named."""
        if not self._env.get("TUMA_POSTGRES__DSN"):
            postgres = EmbeddedPostgres(_HOME / "postgres")
            self._stack.callback(postgres.stop)
            postgres.start()
            self._env["TUMA_POSTGRES__DSN"] = postgres.dsn()
            self._say(f"Postgres on 127.0.0.1:{postgres.port}")
        if not self._env.get("TUMA_REDIS__URL"):
            redis = EmbeddedRedis(_HOME / "redis")
            self._stack.callback(redis.stop)
            redis.start()
            self._env["TUMA_REDIS__URL"] = redis.url
            self._say(f"Redis on 127.0.0.1:{redis.port}")

    def _start_provider(self) -> None:
        if self._env.get("TUMA_UPSTREAM__API_KEY"):
            self._say(f"upstream: {self.settings.upstream.base_url}")
            self._env.setdefault("TUMA_UPSTREAM__BASE_URL", self.settings.upstream.base_url)
            return
        port_file = _HOME / "provider.port"
        port = find_free_port(int(port_file.read_text()) if port_file.exists() else 0)
        port_file.write_text(str(port))
        command = [sys.executable, "-m", "scripts.sim.provider", "--port", str(port), "--api-key", _SIM_KEY]
        process = _spawn([*command, "--books", str(_HOME / "provider-books.jsonl")], self._env)
        self._stack.callback(_end, process)
        line = _first_line(process, "simulated provider")
        self._env["TUMA_UPSTREAM__BASE_URL"] = line.rpartition(" ")[2]
        self._env["TUMA_UPSTREAM__API_KEY"] = _SIM_KEY
        self._env["TUMA_UPSTREAM__KIND"] = "openrouter"
        self._say(line)

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
        self._serve = _spawn([sys.executable, "-m", "scripts.cli", "serve"], self._env)
        line = _first_line(self._serve, "tuma serve")
        self.base_url = line.rpartition(" ")[2] + "/v1"

    def _end_server(self) -> None:
        self._stopping = True
        if self._serve is not None:
            _end(self._serve)

    def _write_env(self) -> None:
        """Leave the settings for other terminals: ``set -a; . .tuma/env``."""
        path = _HOME / "env"
        path.touch(mode=0o600)
        names = sorted(name for name in self._env if name.startswith("TUMA_"))
        path.write_text("".join(f"{name}={shlex.quote(self._env[name])}\n" for name in names))

        running = _HOME / "running.json"
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


def _take_lock() -> IO[str] | None:
    """Take the data folder for this process; None when another ``./scripts/dev`` has it."""
    _HOME.mkdir(exist_ok=True)
    lock = (_HOME / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _use_running(options: argparse.Namespace) -> int:
    """Check the server that runs already, or say that it does."""
    running = _HOME / "running.json"
    deadline = time.monotonic() + _READY_S
    while options.check and not running.exists() and time.monotonic() < deadline:
        time.sleep(0.1)  # it is starting
    details = json.loads(running.read_text()) if options.check and running.exists() else None
    if details is None:
        print(f"./scripts/dev: another one runs on {_HOME}; stop it first, or use it", file=sys.stderr)
        return 1
    print(f"using the server that runs already: {details['base_url']}", file=sys.stderr)
    return _report(check(details), as_json=options.json)


def _report(result: dict[str, Any], *, as_json: bool) -> int:
    print(json.dumps(result) if as_json else result["report"], flush=True)
    return 0


def _spawn(command: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
    root = str(Path(__file__).resolve().parent.parent)
    return subprocess.Popen(
        command,
        env={**env, "PYTHONUNBUFFERED": "1"},
        cwd=root,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=end_with_parent(signal.SIGTERM),  # noqa: PLW1509 - two system calls, no lock taken
    )


def _first_line(process: subprocess.Popen[str], what: str) -> str:
    """Return the line that a child prints when it is ready.

    Raises:
        EmbeddedError: it ended before.
    """
    out: IO[str] | None = process.stdout
    assert out is not None
    line = out.readline().strip()
    if not line:
        process.wait()
        raise EmbeddedError(f"{what} did not start (exit {process.returncode}); see the lines above")
    return line


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_READY_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _welcome(server: DevServer, seconds: float) -> str:
    details = server.details
    body = json.dumps({"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "Say hello"}]})
    return f"""
Tuma is ready ({seconds:.1f} s). Every call is paid from a demo wallet in {_DEMO_CURRENCY}.

  base_url  {details["base_url"]}
  api_key   {details["api_key"]}

Try it from another terminal:

  curl -si {details["base_url"]}/chat/completions -H 'Authorization: Bearer {details["api_key"]}' -H 'Content-Type: application/json' -d '{body}'
  curl -s {details["base_url"]}/wallet -H 'Authorization: Bearer {details["api_key"]}'

As the operator:

  set -a; . {_HOME}/env; {sys.prefix}/bin/tuma wallets show {details["wallet_id"]}

Ctrl-C stops everything; the data stay in {_HOME}.
"""


def main() -> None:
    """Run ``./scripts/dev``."""
    parser = argparse.ArgumentParser(prog="./scripts/dev", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="make one streamed and one plain call, then stop"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON line when ready, and go on serving"
    )
    options = parser.parse_args()
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:5.1f} s] {line}", file=sys.stderr, flush=True)

    configure_logging(LogSettings(level="warning", format="console"))
    server = DevServer(say)
    status = 0
    lock = _take_lock()
    try:
        if lock is None:
            sys.exit(_use_running(options))
        server.start()
        if options.check:
            status = _report(check(server.details), as_json=options.json)
        else:
            ready = time.monotonic() - began
            print(json.dumps(server.details) if options.json else _welcome(server, ready), flush=True)
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
