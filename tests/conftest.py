"""Real servers for the tests: one embedded Postgres and Redis per session, one database and one Redis per test."""

import asyncio
import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import hypothesis
import pytest
import structlog
from aiohttp import web

from billing.books import Books, Check
from billing.db import Database
from billing.fxbook import FxBook
from billing.keys import KeyRules, Keys
from billing.migrate import migrate
from billing.money import parse_amount
from billing.pricebook import PriceBook
from config.settings import FxSettings, Settings, load_settings
from proxy.app import init_app
from proxy.connection import ClientRunner, ClientServer
from proxy.services import SERVICES, Services
from proxy.upstream.listing import read_listing
from scripts.embedded import EmbeddedPostgres, EmbeddedRedis
from scripts.office import Office, open_office
from scripts.sim.provider import SimulatedProvider

# The oldest PostgreSQL that is supported, and Redis as Debian has it; CI installs both.
DEBIAN_POSTGRES = Path("/usr/lib/postgresql/15/bin")
DEBIAN_REDIS = Path("/usr/bin/redis-server")
_ROOM_BYTES = 4 * 1024**3
PEPPER = "a pepper for the tests, long enough"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="soaks and fault campaigns in full")
    parser.addoption(
        "--postgres", help="DSN, without database, of a server to use in place of the embedded Postgres"
    )
    parser.addoption("--minutes", type=float, help="the fault campaign for so long, instead of one round")
    parser.addoption(
        "--servers",
        choices=("wheels", "debian"),
        default="wheels",
        help="whose Postgres and Redis the tests start: those of the wheels, or of Debian's packages",
    )
    parser.addoption("--redis", help="URL of a server to use (and to flush) in place of the embedded Redis")


def pytest_configure() -> None:
    for name in [name for name in os.environ if name.startswith(("TUMA_", "OTEL_"))]:
        del os.environ[name]
    # Machines are shared: an example may take its time; pytest's own timeout ends what hangs.
    hypothesis.settings.register_profile("tuma", deadline=None)
    hypothesis.settings.load_profile("tuma")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes long, so that no process is left alone with it at the end."""
    items.sort(key=lambda item: not {"faults", "stateful"} & set(item.path.parts))


def _find_memory() -> str | None:
    """Return where files lie in memory, if there is room: databases are made and dropped a thousand times."""
    place = Path("/dev/shm")
    roomy = place.is_dir() and os.access(place, os.W_OK) and shutil.disk_usage(place).free > _ROOM_BYTES
    return str(place) if roomy else None


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tuma-tests-", dir=_find_memory()) as name:
        yield Path(name)


@dataclass(frozen=True, slots=True)
class OwnPostgres:
    """A server that runs already."""

    base: str

    def dsn(self, database: str) -> str:
        return f"{self.base.rstrip('/')}/{database}"


@dataclass(frozen=True, slots=True)
class OwnRedis:
    """A server that runs already."""

    url: str


@pytest.fixture(scope="session")
def postgres(folder: Path, request: pytest.FixtureRequest) -> Iterator[EmbeddedPostgres | OwnPostgres]:
    own = request.config.getoption("--postgres")
    if own:
        yield OwnPostgres(own)
        return
    programs = DEBIAN_POSTGRES if request.config.getoption("--servers") == "debian" else None
    with EmbeddedPostgres(folder / "postgres", fast=True, programs=programs) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server(folder: Path, request: pytest.FixtureRequest) -> Iterator[EmbeddedRedis | OwnRedis]:
    own = request.config.getoption("--redis")
    if own:
        yield OwnRedis(own)
        return
    program = DEBIAN_REDIS if request.config.getoption("--servers") == "debian" else None
    with EmbeddedRedis(folder / "redis", program=program) as server:
        yield server


@pytest.fixture(scope="session")
async def template(postgres: EmbeddedPostgres | OwnPostgres) -> str:
    """A migrated database, to copy for each test."""
    admin = await asyncpg.connect(postgres.dsn("postgres"))
    await admin.execute("DROP DATABASE IF EXISTS test_template")
    await admin.execute("CREATE DATABASE test_template")
    await admin.close()
    dsn = postgres.dsn("test_template")
    database = Database(make_settings(postgres_dsn=dsn, redis_url="redis://127.0.0.1:1").postgres)
    await migrate(database)
    await database.close()
    return "test_template"


_numbers = itertools.count(1)


@pytest.fixture
async def dsn(postgres: EmbeddedPostgres | OwnPostgres, template: str) -> AsyncIterator[str]:
    name = f"test_{next(_numbers)}"
    admin = await asyncpg.connect(postgres.dsn("postgres"))
    await admin.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
    await admin.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    await admin.close()
    yield postgres.dsn(name)
    admin = await asyncpg.connect(postgres.dsn("postgres"))
    await admin.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
    await admin.close()


@pytest.fixture
async def redis_url(redis_server: EmbeddedRedis | OwnRedis) -> str:
    from redis.asyncio import Redis

    client = Redis.from_url(redis_server.url)
    await client.flushall()
    await client.aclose()
    return redis_server.url


@pytest.fixture
async def sim() -> AsyncIterator[SimulatedProvider]:
    async with SimulatedProvider() as provider:
        yield provider


def make_settings(
    *, postgres_dsn: str, redis_url: str, upstream_url: str = "http://127.0.0.1:1/v1", **more: Any
) -> Settings:
    base: dict[str, Any] = {
        "postgres": {"dsn": postgres_dsn},
        "redis": {"url": redis_url},
        "upstream": {"base_url": upstream_url, "api_key": "sk-sim", "generation_wait_s": 5},
        "auth": {"key_pepper": PEPPER},
        "holds": {"lease_s": 2, "renew_s": 0.5},
        "sweep": {"period_s": 0.3, "worker_lease_s": 2},
        "batch": {"open_wait_s": 2},
        "port": 0,
        "shutdown_s": 10,
    }
    for name, value in more.items():
        base[name] = {**base.get(name, {}), **value} if isinstance(value, dict) else value
    return load_settings(**base)


@pytest.fixture
def settings(dsn: str, redis_url: str, sim: SimulatedProvider) -> Settings:
    return make_settings(postgres_dsn=dsn, redis_url=redis_url, upstream_url=sim.base_url)


@pytest.fixture
async def office(settings: Settings) -> AsyncIterator[Office]:
    async with open_office(settings) as opened:
        yield opened


@dataclass(frozen=True, slots=True)
class Payer:
    """A wallet and a key that spends from it."""

    user_id: UUID
    wallet_id: UUID
    key_id: UUID
    secret: str


_people = itertools.count(1)


async def make_payer(
    office: Office, *, amount: str = "10", currency: str = "USD", overdraft: str = "0", **limits: Any
) -> Payer:
    user_id = await office.wallets.create_user(f"user{next(_people)}@example.com")
    wallet_id = await office.wallets.create_wallet(
        str(user_id), currency=currency, overdraft_nano=parse_amount(overdraft)
    )
    if parse_amount(amount):
        await office.wallets.credit(wallet_id, parse_amount(amount), reason="test")
    made = await Keys(office.database, office.settings.auth, office.settings.limits).create(
        wallet_id, KeyRules(**limits)
    )
    return Payer(user_id, wallet_id, made.id, made.secret)


async def sync_models(office: Office) -> None:
    priced, _ = read_listing(await office.upstream.list_models())
    await PriceBook(office.database).set_prices(priced, source="openrouter")


async def set_rate(office: Office, currency: str, rate: str, markup_bps: int = 0) -> None:
    from decimal import Decimal

    await FxBook(office.database, FxSettings()).set_rate(
        "USD", currency, Decimal(rate), markup_bps=markup_bps
    )


@dataclass(frozen=True, slots=True)
class Running:
    """A proxy that runs in this process, over a real socket."""

    base_url: str
    services: Services
    app: web.Application
    server: Any

    async def quiet(self, timeout_s: float = 15) -> None:
        async with asyncio.timeout(timeout_s):
            while len(self.services.calls) or len(self.services.calls._endings):
                await asyncio.sleep(0.01)


@asynccontextmanager
async def run_proxy(settings: Settings) -> AsyncIterator[Running]:
    app = init_app(settings)
    limits = settings.limits.model_copy(update={"lingering_s": min(settings.limits.lingering_s, 1.0)})
    runner = ClientRunner(app, limits=limits, shutdown_timeout=1.0)
    await runner.setup()
    try:
        assert isinstance(runner.server, ClientServer)
        app[SERVICES].tasks.keep(runner.server.drop_slow_clients, name="slow clients")
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
        await site.start()
        port = runner.addresses[0][1]
        yield Running(f"http://127.0.0.1:{port}", app[SERVICES], app, runner.server)
    finally:
        await runner.cleanup()


@pytest.fixture
async def proxy(settings: Settings, office: Office) -> AsyncIterator[Running]:
    await sync_models(office)
    async with run_proxy(settings) as running:
        yield running


async def check_books(office: Office) -> dict[str, Check]:
    """Assert I1 to I8 on a quiet system; return what the checks say."""
    checks = await Books(office.database, office.holds, office.upstream, sweep_grace_s=5).check()
    assert {name: check.detail for name, check in checks.items() if not check.ok} == {}
    async with office.database.connection() as connection:
        live = await connection.fetchval("SELECT count(*) FROM calls WHERE state = 'open'")
        held = await connection.fetchval("SELECT coalesce(sum(held_nano), 0) FROM wallets")
    assert live == 0
    assert held == 0
    assert await office.holds.find_leases(expired=False, limit=10) == []
    return checks
