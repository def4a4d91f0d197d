"""Real servers for the tests: one embedded Postgres and Redis per session, one database and one Redis per test."""

import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import hypothesis
import pytest
import structlog

from billing.postgres.database import Database
from billing.postgres.migrate import migrate
from config.settings import Settings
from scripts.office import Office, open_office
from scripts.programs.embedded import EmbeddedPostgres, EmbeddedRedis
from scripts.sim.provider import SimulatedProvider
from tests.support.clock import drop_partitions, mend_sleep, variables_of_clock
from tests.support.payers import sync_models
from tests.support.running import Running, run_proxy
from tests.support.servers import DEBIAN_POSTGRES, DEBIAN_REDIS, OwnPostgres, OwnRedis
from tests.support.settings import make_settings

_ROOM_BYTES = 4 * 1024**3


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
    parser.addoption(
        "--past-partitions",
        action="store_true",
        help="on a database whose last partition is that of last month, as if nobody had made more since",
    )
    parser.addoption("--redis", help="URL of a server to use (and to flush) in place of the embedded Redis")


def pytest_configure() -> None:
    for name in [name for name in os.environ if name.startswith(("TUMA_", "OTEL_"))]:
        del os.environ[name]
    mend_sleep()
    # Machines are shared: an example may take its time; pytest's own timeout ends what hangs.
    hypothesis.settings.register_profile("tuma", deadline=None)
    hypothesis.settings.load_profile("tuma")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with what takes long, so that no process is left alone with it at the end; leave out what is only for --long."""
    items.sort(key=lambda item: not {"faults", "stateful"} & set(item.path.parts))
    if not config.getoption("--long"):
        left_out = [item for item in items if item.get_closest_marker("long") is not None]
        items[:] = [item for item in items if item.get_closest_marker("long") is None]
        if left_out:
            config.hook.pytest_deselected(items=left_out)


def _find_memory() -> str | None:
    """Return where files lie in memory, if there is room: databases are made and dropped a thousand times."""
    place = Path("/dev/shm")
    roomy = place.is_dir() and os.access(place, os.W_OK) and shutil.disk_usage(place).free > _ROOM_BYTES
    return str(place) if roomy else None


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tuma-tests-", dir=_find_memory()) as name:
        yield Path(name)


@pytest.fixture(scope="session")
def postgres(folder: Path, request: pytest.FixtureRequest) -> Iterator[EmbeddedPostgres | OwnPostgres]:
    own = request.config.getoption("--postgres")
    if own:
        yield OwnPostgres(own)
        return
    programs = DEBIAN_POSTGRES if request.config.getoption("--servers") == "debian" else None
    where = folder / "postgres"
    with EmbeddedPostgres(where, fast=True, programs=programs, env=variables_of_clock()) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server(folder: Path, request: pytest.FixtureRequest) -> Iterator[EmbeddedRedis | OwnRedis]:
    own = request.config.getoption("--redis")
    if own:
        yield OwnRedis(own)
        return
    program = DEBIAN_REDIS if request.config.getoption("--servers") == "debian" else None
    with EmbeddedRedis(folder / "redis", program=program, env=variables_of_clock()) as server:
        yield server


@pytest.fixture(scope="session")
async def template(postgres: EmbeddedPostgres | OwnPostgres, request: pytest.FixtureRequest) -> str:
    """A migrated database, to copy for each test."""
    admin = await asyncpg.connect(postgres.dsn("postgres"))
    await admin.execute("DROP DATABASE IF EXISTS test_template")
    await admin.execute("CREATE DATABASE test_template")
    await admin.close()
    dsn = postgres.dsn("test_template")
    database = Database(make_settings(postgres_dsn=dsn, redis_url="redis://127.0.0.1:1").postgres)
    await migrate(database)
    if request.config.getoption("--past-partitions"):
        assert await drop_partitions(database)
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


@pytest.fixture
def settings(dsn: str, redis_url: str, sim: SimulatedProvider) -> Settings:
    return make_settings(postgres_dsn=dsn, redis_url=redis_url, upstream_url=sim.base_url)


@pytest.fixture
async def office(settings: Settings) -> AsyncIterator[Office]:
    async with open_office(settings) as opened:
        yield opened


@pytest.fixture
async def proxy(settings: Settings, office: Office) -> AsyncIterator[Running]:
    await sync_models(office)
    async with run_proxy(settings) as running:
        yield running
