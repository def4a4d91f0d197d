"""The fault campaign: the real `tuma serve` under load, killed, flushed, stopped, cut and stalled; then the books are read.

Run it with ``python -m tests.faults.campaign --minutes 20`` from the checkout's environment. It starts every server itself and
touches no other process. The schedule of faults comes from the seed, which is printed; when exactly each of them hits a
call does not.

It exits 1 if a promise was broken: a call left open, one in review that the provider knows, a difference to the provider's
books that reconciliation does not explain, a wallet that paid for more than its calls cost, an invariant that fails.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import psutil
from redis.asyncio import Redis

from billing.books.usage_proof import FIRST_ID, LAST_ID, compare_usage
from billing.fx.quote import FxQuote
from billing.ids import minted_at
from billing.money import attousd_from_decimal, format_usd
from billing.postgres.migrate import migrate
from config.settings import Settings
from scripts.office import Office, open_office
from scripts.programs.embedded import EmbeddedPostgres, EmbeddedRedis
from scripts.sim.provider import SimulatedProvider
from tests.support.paths import ROOT
from tests.support.payers import Payer, make_payer, set_rate, sync_models
from tests.support.settings import make_settings
from tests.support.tcp_proxy import TcpProxy

MODELS = ("openai/gpt-4o-mini", "openai/gpt-4o")
_HELLO = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100}
# What is asked, and where.
ASKS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": _HELLO,
    "/api/chat": _HELLO,
    "/v1/completions": {"prompt": "hi", "max_tokens": 100},
    "/v1/responses": {"input": "hi", "max_output_tokens": 100},
}
_CLIENTS = 24
_WORKERS = 3
_START_S = 30.0
_STOP_S = 45.0
_SETTLE_S = 90.0
_NOTED_S = 4.0  # by then an answer's id is in Postgres, on a busy machine
_KNOWN_S = 3.0  # so long after an answer's end the provider may still deny its id
_SWEPT_S = 30.0  # and by then the calls of a dead worker are swept, Postgres having been away meanwhile
# How often each fault comes in one round; rounds are shuffled, and follow each other until the time is over.
ROUND = {
    "kill_worker": 5,
    "kill_master": 1,
    "stop_master": 1,
    "flush": 2,
    "kill_redis": 1,
    "restart_redis": 1,
    "fail_over_redis": 1,
    "kill_postgres": 1,
    "cut_postgres": 1,
    "cut_redis": 1,
    "cut_provider": 1,
    "stall_postgres": 1,
    "stall_redis": 1,
}


@dataclass(slots=True)
class Result:
    """What a campaign did and found; ``violations`` are broken promises, in words."""

    seed: int
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    differences: Counter[str] = field(default_factory=Counter)
    billed_usd: str = ""
    house_loss_usd: str = ""
    lost_with_both: int = 0  # answered calls that are void because Redis and their worker were lost together
    drift_usd: str = ""
    lowest_balance: str = ""
    violations: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return everything by name."""
        return {name: getattr(self, name) for name in self.__slots__}

    def __str__(self) -> str:
        kills = sum(self.faults[name] for name in ("kill_worker", "kill_master"))
        stops = sum(
            self.faults[name] for name in ("kill_redis", "restart_redis", "fail_over_redis", "kill_postgres")
        )
        rows = [
            ("seed", str(self.seed)),
            ("seconds", f"{self.seconds:.0f}"),
            (
                "faults",
                f"{sum(self.faults.values())}: {kills} kills, {self.faults['flush']} flushes, {stops} servers stopped",
            ),
            *((f"  {name}", str(count)) for name, count in sorted(self.faults.items())),
            ("calls made", str(sum(self.answers.values()))),
            *((f"  {name}", str(count)) for name, count in sorted(self.answers.items())),
            ("calls ended", str(sum(self.ended.values()))),
            *((f"  {name}", str(count)) for name, count in sorted(self.ended.items())),
            ("differences", str(sum(self.differences.values()))),
            *((f"  {name}", str(count)) for name, count in sorted(self.differences.items())),
            ("billed, USD", self.billed_usd),
            ("house loss, USD", self.house_loss_usd),
            ("void by double fault", str(self.lost_with_both)),
            ("lowest balance", self.lowest_balance),
            ("drift, USD", self.drift_usd),
            ("violations", str(len(self.violations))),
            *(("  !", text) for text in self.violations),
        ]
        return "\n".join(f"{name:<22} {value}" for name, value in rows)


class Campaign:
    """One campaign, in a folder of its own.

    Args:
        seed: of the schedule.
        seconds: how long faults are injected; at least one round of them is.
        outage_s: how long Postgres is away at most.
        verbose: whether each fault is printed as it happens.
    """

    def __init__(self, seed: int, *, seconds: float, outage_s: float = 4.0, verbose: bool = False) -> None:
        self._dice = random.Random(seed)
        self._load_dice = random.Random(seed + 1)
        self._seconds = seconds
        self._outage_s = outage_s
        self._verbose = verbose
        self._began_s = time.monotonic()
        self._stopped = asyncio.Event()
        self._master: subprocess.Popen[str] | None = None
        self._orphans: set[int] = set()
        self._url = ""
        self._payers: list[Payer] = []
        self._answered: set[str] = set()  # calls of which a client has had a byte
        self._lost_s: list[float] = []  # Unix seconds at which Redis had lost what it knew
        self._killed_s: list[float] = []  # and at which a worker was killed
        self._back_s: list[float] = []  # and at which Postgres was back
        self.result = Result(seed)
        # Linux ends an embedded server with the thread that started it: one thread for all, as long as the campaign.
        self._thread = ThreadPoolExecutor(1)
        self._folder = Path(tempfile.mkdtemp(prefix="tuma-campaign-"))
        self._postgres = EmbeddedPostgres(self._folder / "postgres", fast=True)
        self._redises = [EmbeddedRedis(self._folder / name) for name in ("redis0", "redis1")]
        self._primary = 0
        self._provider = SimulatedProvider()

    async def run(self) -> Result:
        """Inject, let it settle, and look."""
        try:
            await self._start_servers()
            async with (
                TcpProxy(self._postgres.dsn()) as self._to_postgres,
                TcpProxy(self._redises[0].url) as self._to_redis,
                self._provider,
                TcpProxy(self._provider.base_url) as self._to_provider,
            ):
                self._settings = self._make_settings()
                async with self._office() as office:
                    await self._prepare(office)
                    await self._serve()
                    await self._inject()
                    await self._settle_down(office)
                    await self._look(office)
        finally:
            await self._stop_everything()
        self.result.seconds = time.monotonic() - self._began_s
        return self.result

    async def _in_thread(self, work: Callable[[], object]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _start_servers(self) -> None:
        await self._in_thread(self._postgres.start)
        first, second = self._redises
        await self._in_thread(first.start)
        # One password, as a primary and its replica have.
        second.data_dir.mkdir(parents=True, exist_ok=True)
        password = first.data_dir / "redis.password"
        shutil.copy2(password, second.data_dir / "redis.password")
        await self._in_thread(second.start)

    def _make_settings(self) -> Settings:
        return make_settings(
            postgres_dsn=self._to_postgres.through(self._postgres.dsn()),
            redis_url=self._to_redis.through(self._redises[0].url),
            upstream_url=self._to_provider.through(self._provider.base_url),
        )

    @asynccontextmanager
    async def _office(self) -> AsyncIterator[Office]:
        """An office, by the same ways as the server's."""
        async with open_office(self._settings) as office:
            yield office

    async def _prepare(self, office: Office) -> None:

        await migrate(office.database)
        await sync_models(office)
        await set_rate(office, "NGN", "1600", 250)
        rich = [await make_payer(office, amount="1000") for _ in range(6)]
        naira = [await make_payer(office, amount="500000", currency="NGN") for _ in range(3)]
        poor = [await make_payer(office, amount="0.002") for _ in range(3)]
        later = [await make_payer(office, amount="0.001", overdraft="0.01")]
        self._payers = [*rich, *naira, *poor, *later]

    # The server

    def _environment(self) -> dict[str, str]:
        settings = self._settings
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

    async def _serve(self) -> None:
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
                    self._master, self._url = process, line.split()[-1]
                    return
                process.wait()
                await asyncio.sleep(0.2)

    def _worker_pids(self) -> list[int]:
        assert self._master is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self._master.pid).children()
            return [child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE]
        return []

    # The load

    async def _load(self, session: aiohttp.ClientSession) -> None:
        while not self._stopped.is_set():
            outcome = await self._call(session)
            self.result.answers[outcome] += 1
            await asyncio.sleep(0.2 if outcome == "refused connection" else 0.01)

    def _draw_body(self) -> dict[str, Any]:
        dice = self._load_dice
        told: dict[str, Any] = {
            "chunks": dice.randrange(1, 40),
            "chunk_delay_ms": dice.choice((0, 5, 20, 60)),
            "first_delay_ms": dice.choice((0, 0, 50)),
            "cancellable": dice.random() < 0.5,
            "generation_id_header": dice.random() < 0.3,
        }
        trouble = dice.random()
        if trouble < 0.05:
            told["fail_status"] = dice.choice((400, 429, 500, 503))
        elif trouble < 0.10:
            told["error_after"] = dice.randrange(10)
        elif trouble < 0.15:
            told["cut_after"] = dice.randrange(10)
        elif trouble < 0.20:
            told["usage"] = "missing"
        elif trouble < 0.23:
            told["error_before_first"] = True
        elif trouble < 0.26:
            told["generation_delay_s"] = dice.random() * _KNOWN_S
        return {"model": dice.choice(MODELS), "stream": dice.random() < 0.75, "sim": told}

    async def _call(self, session: aiohttp.ClientSession) -> str:
        dice = self._load_dice
        payer = dice.choice(self._payers)
        leaves_after = dice.randrange(1, 20) if dice.random() < 0.15 else None
        path = dice.choices(list(ASKS), weights=(6, 1, 1, 2))[0]
        try:
            async with session.post(
                f"{self._url}{path}",
                json={**self._draw_body(), **ASKS[path]},
                headers={"Authorization": f"Bearer {payer.secret}"},
            ) as response:
                read = 0
                async for _ in response.content.iter_any():
                    read += 1
                    if read == 1 and response.status == 200:
                        self._answered.add(response.headers["x-request-id"])
                    if read == leaves_after:
                        return "hung up"
                return str(response.status)
        except aiohttp.ClientConnectorError:
            return "refused connection"
        except (aiohttp.ClientError, OSError):
            return "cut off"
        except TimeoutError:
            return "timed out"

    # The faults

    async def _inject(self) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            clients = [asyncio.get_running_loop().create_task(self._load(session)) for _ in range(_CLIENTS)]
            try:
                await asyncio.sleep(1.0)
                deadline = time.monotonic() + self._seconds
                for name in self._draw_faults(deadline):
                    await self._do(name)
                    await asyncio.sleep(0.2 + self._dice.random() * 1.5)
            finally:
                self._stopped.set()
                await asyncio.gather(*clients)

    def _draw_faults(self, deadline: float) -> Iterable[str]:
        """Yield a round of faults, then others while there is time."""
        first = True
        while first or time.monotonic() < deadline:
            deck = [name for name, count in ROUND.items() for _ in range(count)]
            self._dice.shuffle(deck)
            for name in deck:
                if not first and time.monotonic() > deadline:
                    return
                yield name
            first = False

    async def _do(self, name: str) -> None:
        began_s = time.monotonic()
        fault: Callable[[], Awaitable[object]] = getattr(self, f"_{name}")
        await fault()
        self.result.faults[name] += 1
        line = f"{began_s - self._began_s:8.2f} s  {name} ({time.monotonic() - began_s:.2f} s)"
        self.result.log.append(line)
        if self._verbose:
            print(line, flush=True)

    async def _kill_worker(self) -> None:
        pids = self._worker_pids()
        if pids:
            os.kill(self._dice.choice(pids), signal.SIGKILL)
            self._killed_s.append(time.time())

    async def _kill_master(self) -> None:
        """Its workers notice, and end their calls in order; a new server takes over meanwhile."""
        assert self._master is not None
        self._orphans.update(self._worker_pids())
        self._master.kill()
        self._master.wait()
        await self._serve()

    async def _stop_master(self) -> None:
        assert self._master is not None
        self._master.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(self._master.wait, _STOP_S)
        except subprocess.TimeoutExpired:
            self.result.violations.append("a server did not stop on SIGTERM")
            self._orphans.update(self._worker_pids())
            self._master.kill()
        await self._serve()

    async def _flush(self) -> None:
        client = Redis.from_url(self._redises[self._primary].url)
        await client.flushall()
        self._lost_s.append(time.time())
        if self._dice.random() < 0.5:
            await client.script_flush()
        await client.aclose()

    async def _kill_redis(self) -> None:
        """A crash, and a restart from its append-only file, or from nothing."""
        server = self._redises[self._primary]
        await self._in_thread(server.kill)
        if self._dice.random() < 0.5:
            for path in server.data_dir.rglob("*.aof*"):
                if path.is_file():
                    path.unlink()
        await asyncio.sleep(self._dice.random() * 2)
        await self._in_thread(server.start)
        self._lost_s.append(time.time())

    async def _restart_redis(self) -> None:
        server = self._redises[self._primary]
        await self._in_thread(server.stop)
        await asyncio.sleep(self._dice.random())
        await self._in_thread(server.start)

    async def _fail_over_redis(self) -> None:
        """To a replica that has nothing."""
        self._primary = 1 - self._primary
        server = self._redises[self._primary]
        client = Redis.from_url(server.url)
        await client.flushall()
        await client.aclose()
        self._to_redis.point_at(server.url)
        self._lost_s.append(time.time())

    async def _kill_postgres(self) -> None:
        await self._in_thread(self._postgres.kill)
        await asyncio.sleep(1 + self._dice.random() * (self._outage_s - 1))
        await self._in_thread(self._postgres.start)
        self._back_s.append(time.time())

    async def _cut_postgres(self) -> None:
        self._to_postgres.cut()

    async def _cut_redis(self) -> None:
        self._to_redis.cut()

    async def _cut_provider(self) -> None:
        self._to_provider.cut()

    async def _stall_postgres(self) -> None:
        await self._to_postgres.stall(0.5 + self._dice.random() * 2)
        self._back_s.append(time.time())

    async def _stall_redis(self) -> None:
        await self._to_redis.stall(0.5 + self._dice.random() * 2)

    # Afterwards

    async def _settle_down(self, office: Office) -> None:
        """A server runs on, undisturbed, until nothing is open."""
        with contextlib.suppress(TimeoutError):
            await self._provider.books.wait_quiet(timeout_s=_SETTLE_S)
        deadline = time.monotonic() + _SETTLE_S
        while time.monotonic() < deadline:
            async with office.database.connection() as connection:
                live = await connection.fetchval(
                    "SELECT count(*) FROM calls WHERE state IN ('open', 'review')"
                )
            if not live and not await office.holds.find_leases(expired=False, limit=10):
                break
            await asyncio.sleep(0.2)
        else:
            self.result.violations.append(f"after {_SETTLE_S:.0f} quiet seconds {live} calls have not ended")
        await asyncio.sleep(_KNOWN_S)
        for pid in self._orphans:
            if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                self.result.violations.append(f"worker {pid} outlives its master")

    async def _command(self, *words: str) -> dict[str, Any]:
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
            self.result.violations.append(f"tuma {' '.join(words)}: {said.decode()[-500:]}")
            return {}
        return answer

    async def _look(self, office: Office) -> None:
        result = self.result
        await self._command("sweep")
        result.ended = await self._count_ended(office)
        first = await self._command("reconcile")
        result.differences = Counter(item["cause"] for item in first.get("differences", []))
        second = await self._command("reconcile")
        result.drift_usd = second.get("drift_usd", "unknown")
        if result.drift_usd != "0":
            result.violations.append(f"drift {result.drift_usd} USD")
        for item in second.get("differences", []):
            result.violations.append(f"a difference that does not go away: {item}")
        checks = (await self._command("books", "check")).get("checks", {})
        result.violations += [
            f"{name}: {check['detail']}" for name, check in checks.items() if not check["ok"]
        ]
        if len(checks) != 9:
            result.violations.append(f"only {len(checks)} of the checks of the books were made")
        await self._stop_server()
        await self._command("sweep")
        await self._look_at_calls(office)
        await self._look_at_quota(office)
        await self._look_at_usage(office)

    async def _count_ended(self, office: Office) -> Counter[str]:
        async with office.database.connection() as connection:
            rows = await connection.fetch(
                "SELECT state, accuracy, count(*) AS calls FROM calls GROUP BY state, accuracy"
            )
        return Counter(
            {
                row["accuracy"] if row["state"] == "settled" else row["state"]: row["calls"]
                for row in rows
                if row["calls"]
            }
        )

    async def _look_at_calls(self, office: Office) -> None:
        """No wallet pays for more than its calls cost, by the provider's own books."""
        books = self._provider.books
        async with office.database.connection() as connection:
            calls = await connection.fetch(
                "SELECT c.*, f.rate, f.markup_bps FROM calls c JOIN fx_quotes f ON f.id = c.fx_quote_id"
            )
            lowest = await connection.fetch(
                "SELECT currency, min(posted_nano + overdraft_nano) AS low FROM wallets GROUP BY currency ORDER BY 1"
            )
            loss = int(
                await connection.fetchval(
                    "SELECT coalesce(-sum(amount_nano), 0) FROM journal_entry WHERE account = 'house_loss'"
                )
            )
        self.result.lowest_balance = ", ".join(
            f"{format_usd(row['low'])} {row['currency']}" for row in lowest
        )
        self.result.house_loss_usd = format_usd(loss)
        self.result.billed_usd = format_usd(books.total_nanousd)
        for call in calls:
            fault = self._judge(call, books.generations.get(call["generation_id"] or ""))
            if fault is None and call["state"] == "void" and str(call["id"]) in self._answered:
                if self._is_of_a_double_fault(call["id"]):
                    self.result.lost_with_both += 1
                else:
                    fault = "void, though its client had an answer"
            if fault is not None:
                self.result.violations.append(f"call {call['id']} ({call['outcome']}): {fault}")
        unknown = self._answered - {str(call["id"]) for call in calls}
        self.result.violations += [f"call {call_id} was answered and never opened" for call_id in unknown]

    def _is_of_a_double_fault(self, call_id: UUID) -> bool:
        """Tell whether its worker died before the answer's id could be in Postgres, and Redis lost its data before the sweep.

        See docs/reliability.md.
        """
        begun_s = minted_at(call_id).timestamp()
        # From when on Postgres could be told: from the beginning, or since it was back.
        from_s = [begun_s, *(back_s for back_s in self._back_s if back_s > begun_s)]
        return any(
            begun_s < killed_s
            and any(since_s < killed_s < since_s + _NOTED_S for since_s in from_s)
            and any(begun_s < lost_s < killed_s + _SWEPT_S for lost_s in self._lost_s)
            for killed_s in self._killed_s
        )

    @staticmethod
    def _judge(call: Any, generation: Any) -> str | None:
        if call["state"] == "open":
            return "still open"
        if call["state"] == "review":
            return "in review though the provider knows it" if generation is not None else None
        billed = 0 if generation is None else generation.cost_nanousd
        if call["charge_nano"] and generation is None:
            return "charged, and the provider knows no such answer"
        if generation is not None and generation.request_id != str(call["id"]):
            return f"has the answer of call {generation.request_id}"
        if call["state"] == "void":
            return f"void, but {billed} nano-dollars were billed" if billed else None
        fx = FxQuote(call["fx_quote_id"], call["currency"], call["rate"], call["markup_bps"])
        most = fx.charge(attousd_from_decimal(Decimal(billed).scaleb(-9))).charge_nano
        if call["charge_nano"] > most:
            return f"charged {call['charge_nano']} nano {call['currency']}, and cost {most}"
        if call["charge_nano"] < most and not call["house_nanousd"]:
            return f"charged only {call['charge_nano']} of {most} nano {call['currency']}, and nobody bore the rest"
        if call["cost_nanousd"] != billed:
            return f"our cost is {call['cost_nanousd']} nano-dollars, the provider's {billed}"
        return None

    async def _look_at_quota(self, office: Office) -> None:
        async with office.database.connection() as connection:
            row = await connection.fetchrow(
                "SELECT sum(leased_nanousd) AS leased, sum(spent_nanousd) AS spent FROM quota_slabs"
            )
        if row["leased"] != row["spent"]:
            self.result.violations.append(
                f"{row['leased'] - row['spent']} nano-dollars of the quota were not returned"
            )

    async def _look_at_usage(self, office: Office) -> None:
        """What usage sums is what the calls say, after all that was done to them."""
        async with office.database.connection() as connection:
            differences = await compare_usage(connection, FIRST_ID, LAST_ID)
            summed = await connection.fetchval("SELECT sum(calls) + sum(voids) FROM usage_rollup")
            ended = await connection.fetchval("SELECT count(*) FROM calls WHERE state IN ('settled', 'void')")
        self.result.violations += [f"usage: {text}" for text in differences]
        if summed != ended:
            self.result.violations.append(f"usage sums {summed} calls, {ended} have ended")

    async def _stop_server(self) -> None:
        if self._master is not None and self._master.poll() is None:
            self._master.send_signal(signal.SIGTERM)
            try:
                await asyncio.to_thread(self._master.wait, _STOP_S)
            except subprocess.TimeoutExpired:
                self.result.violations.append("the server did not stop on SIGTERM")

    async def _stop_everything(self) -> None:
        pids = [*self._orphans, *(self._worker_pids() if self._master is not None else [])]
        if self._master is not None:
            self._master.kill()
            self._master.wait()
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if "serve" in process.cmdline():
                    process.kill()
        for server in (*self._redises, self._postgres):
            await self._in_thread(server.kill)
        self._thread.shutdown()
        if not self.result.violations:
            shutil.rmtree(self._folder, ignore_errors=True)
        else:
            self.result.violations.append(f"logs are in {self._folder}")


def draw_seed() -> int:
    """Return FAULT_SEED from the environment, else a new seed."""
    return int(os.environ.get("FAULT_SEED", "0")) or random.SystemRandom().randrange(1, 10**9)


def main() -> None:
    """Run a campaign from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--outage-s", type=float, default=20.0)
    parser.add_argument("--json", type=Path, help="write the result there, too")
    arguments = parser.parse_args()
    seed = arguments.seed or draw_seed()
    print(f"FAULT_SEED={seed}", flush=True)

    async def run() -> Result:
        return await Campaign(
            seed, seconds=arguments.minutes * 60, outage_s=arguments.outage_s, verbose=True
        ).run()

    result = asyncio.run(run())
    print(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result.as_json(), indent=1))
    sys.exit(bool(result.violations))


if __name__ == "__main__":
    main()
