"""The embedded servers: what they keep, what they survive, and what they leave alone."""

import asyncio
import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import psutil
import pytest
from redis import Redis

from scripts.programs import embedded
from scripts.programs.embedded import EmbeddedError, EmbeddedPostgres, EmbeddedRedis, find_free_port
from tests.support.paths import ROOT

# Starts both on the folder that it is given, says so, and waits to be killed; with "outlived", they do not end with it.
OWNER = """
import sys, time
from pathlib import Path
from scripts.programs import embedded
from scripts.programs.embedded import EmbeddedPostgres, EmbeddedRedis
postgres, redis = EmbeddedPostgres(Path(sys.argv[1]) / "postgres", fast=True), EmbeddedRedis(Path(sys.argv[1]) / "redis")
if sys.argv[2:] == ["outlived"]:
    embedded.end_with_parent = lambda _number: None
postgres.start(); redis.start()
print(postgres.pid, redis.pid, flush=True)
time.sleep(60)
"""


async def run(dsn: str, statement: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(dsn)
    try:
        found: list[asyncpg.Record] = await connection.fetch(statement)
        return found
    finally:
        await connection.close()


def gone(pid: int, within_s: float = 10) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder outside pytest's own, which every session of pytest closes to other users: as root Postgres is one."""
    with tempfile.TemporaryDirectory(prefix="tuma-embedded-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def used() -> Iterator[Path]:
    """A folder with a cluster, which one test after the other starts: that takes a tenth of making a new one."""
    with tempfile.TemporaryDirectory(prefix="tuma-embedded-") as name:
        yield Path(name)


@contextlib.contextmanager
def listening(address: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    with socket.create_server((address, port)) as server:
        yield server.getsockname()[1]


@contextlib.contextmanager
def owned(folder: Path, *options: str) -> Iterator[tuple["subprocess.Popen[str]", int, int]]:
    """Another process that started both servers on a folder."""
    command = [sys.executable, "-c", OWNER, str(folder), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as owner:
        assert owner.stdout is not None
        servers: list[psutil.Process] = []
        try:
            servers = [psutil.Process(int(pid)) for pid in owner.stdout.readline().split()]
            postgres, redis = servers
            yield owner, postgres.pid, redis.pid
        finally:
            owner.kill()
            for server in servers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    server.terminate()


async def test_postgres_keeps_its_data_its_port_and_its_password(used: Path) -> None:
    with EmbeddedPostgres(used / "postgres", fast=True) as server:
        dsn, pid = server.dsn(), server.pid
        await run(dsn, "CREATE TABLE kept AS SELECT 42 AS answer")
        server.create_database("other")
        assert (await run(server.dsn("other"), "SELECT current_database() AS name"))[0]["name"] == "other"
        server.restart()
        assert server.dsn() == dsn
        assert server.pid != pid
        assert (await run(dsn, "SELECT answer FROM kept"))[0]["answer"] == 42
    began = time.monotonic()
    with EmbeddedPostgres(used / "postgres", fast=True) as server:
        assert time.monotonic() - began < 5, "a server on data that are there is up at once"
        assert server.dsn() == dsn
        assert (await run(dsn, "SELECT answer FROM kept"))[0]["answer"] == 42


async def test_postgres_is_set_up_as_the_ledger_needs_it(used: Path) -> None:
    names = "('fsync', 'full_page_writes', 'synchronous_commit', 'server_encoding', 'lc_messages', 'max_connections')"
    query = f"SELECT name, setting FROM pg_settings WHERE name IN {names}"
    expected = {
        "synchronous_commit": "on",
        "server_encoding": "UTF8",
        "lc_messages": "C",
        "max_connections": "200",
    }
    for fast, durable in ((False, "on"), (True, "off")):
        with EmbeddedPostgres(used / "postgres", fast=fast) as server:
            found = {row["name"]: row["setting"] for row in await run(server.dsn(), query)}
        assert found == {**expected, "fsync": durable, "full_page_writes": durable}


async def test_postgres_survives_kill_9(used: Path) -> None:
    with EmbeddedPostgres(used / "postgres", fast=True) as server:
        dsn = server.dsn()
        await run(dsn, "CREATE TABLE kept_too AS SELECT 42 AS answer")
        # A backend that computes does not see that its postmaster is dead.
        busy = asyncio.create_task(run(dsn, "SELECT count(*) FROM generate_series(1, 10000000000) AS number"))
        await asyncio.sleep(0.3)
        children = psutil.Process(server.pid).children(recursive=True)
        pid = server.pid
        server.kill()
        assert gone(pid, 1)
        assert all(gone(child.pid, 1) for child in children)
        assert (server.data_dir / "pgdata" / "postmaster.pid").exists()
        server.restart()
        assert server.dsn() == dsn
        assert (await run(dsn, "SELECT answer FROM kept_too"))[0]["answer"] == 42
        with pytest.raises((OSError, asyncpg.PostgresConnectionError)):
            await busy


def test_redis_keeps_what_it_acknowledged(place: Path) -> None:
    with EmbeddedRedis(place / "a folder with spaces" / "redis") as server:
        url = server.url
        with Redis.from_url(url) as client:
            client.set("kept", 42)
            assert client.config_get("append*") == {
                "appendonly": "yes",
                "appendfsync": "everysec",
                "appendfilename": "appendonly.aof",
            }
        server.kill()
        server.restart()
        assert server.url == url
        with Redis.from_url(url) as client:
            assert client.get("kept") == b"42"
        server.restart()
    with (
        EmbeddedRedis(place / "a folder with spaces" / "redis") as server,
        Redis.from_url(server.url) as client,
    ):
        assert server.url == url
        assert client.get("kept") == b"42"


async def test_both_listen_on_loopback_only_and_ask_for_a_password(used: Path) -> None:
    with EmbeddedPostgres(used / "postgres", fast=True) as postgres, EmbeddedRedis(used / "redis") as redis:
        for server in (postgres, redis):
            connections = psutil.Process(server.pid).net_connections("all")
            listeners = [one for one in connections if one.status == psutil.CONN_LISTEN]
            assert [(one.laddr.ip, one.laddr.port) for one in listeners] == [("127.0.0.1", server.port)]
            assert not [one for one in connections if one.family == socket.AF_UNIX and one.laddr]
        with pytest.raises(asyncpg.InvalidPasswordError):
            await run(
                postgres.dsn().replace((used / "postgres" / "postgres.password").read_text(), "wrong"),
                "SELECT 1",
            )
        with socket.create_connection(("127.0.0.1", redis.port)) as stranger:
            stranger.sendall(b"PING\r\n")
            assert stranger.recv(100).startswith(b"-NOAUTH")
        secrets = [
            used / "postgres" / "postgres.password",
            *(used / "redis" / f"redis.{end}" for end in ("password", "conf")),
        ]
        for path in secrets:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_two_side_by_side(place: Path, used: Path) -> None:
    with (
        EmbeddedPostgres(used / "postgres", fast=True) as one,
        EmbeddedPostgres(place / "2", fast=True) as two,
        EmbeddedRedis(place / "1") as three,
        EmbeddedRedis(place / "2x") as four,
    ):
        assert len({one.port, two.port, three.port, four.port}) == 4
        await run(one.dsn(), "CREATE TABLE mine ()")
        one.kill()
        assert await run(two.dsn(), "SELECT to_regclass('mine') AS it") == [(None,)]


def test_a_port_that_was_taken_meanwhile_is_given_up(used: Path) -> None:
    for server in (EmbeddedPostgres(used / "postgres", fast=True), EmbeddedRedis(used / "redis")):
        with server:
            port = server.port
        with listening(port=port), type(server)(server.data_dir) as again:
            assert again.port != port


def test_a_port_that_was_asked_for_is_kept_or_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_STARTS_MAX", 1)
    port = find_free_port()
    with EmbeddedRedis(place / "r", port=port) as redis:
        assert redis.port == port
        # Another server answers on the port, and even knows the password: it must not pass for ours.
        (place / "s").mkdir()
        (place / "s" / "redis.password").write_text((place / "r" / "redis.password").read_text())
        with (
            pytest.raises(EmbeddedError, match=r"(?s)Redis does not start.*in use"),
            EmbeddedRedis(place / "s", port=port),
        ):
            pass
        with pytest.raises(EmbeddedError, match=r"(?s)Postgres does not start.*postgres\.log"):
            EmbeddedPostgres(place / "p", port=port, fast=True).start()


def test_servers_end_when_their_owner_is_killed(used: Path) -> None:
    if not sys.platform.startswith("linux"):
        return
    with owned(used) as (owner, postgres_pid, redis_pid):
        owner.kill()
        assert gone(postgres_pid)
        assert gone(redis_pid)


def test_a_folder_in_use_is_refused_and_a_left_over_is_stopped(used: Path) -> None:
    with owned(used, "outlived") as (owner, postgres_pid, redis_pid):
        with pytest.raises(EmbeddedError, match="in use by another process"):
            EmbeddedPostgres(used / "postgres", fast=True).start()
        with pytest.raises(EmbeddedError, match="in use by another process"):
            EmbeddedRedis(used / "redis").start()
        owner.kill()
        owner.wait()
        assert psutil.pid_exists(postgres_pid)
        assert psutil.pid_exists(redis_pid)
        with EmbeddedPostgres(used / "postgres", fast=True), EmbeddedRedis(used / "redis"):
            assert gone(postgres_pid, 0.5)
            assert gone(redis_pid, 0.5)


def test_a_stale_pid_file_harms_no_other_process(used: Path) -> None:
    postgres, redis = EmbeddedPostgres(used / "postgres", fast=True), EmbeddedRedis(used / "redis")
    with postgres, redis:
        pass
    alike = [used / "postgres" / "pgdata.other", used / "redis" / "redis.conf.other"]
    for path in alike:
        path.touch()
    # As the same user, with a command line that merely begins like ours.
    with subprocess.Popen(["tail", "-f", *map(str, alike)], **postgres._as) as bystander:
        try:
            (used / "postgres" / "pgdata" / "postmaster.pid").write_text(f"{bystander.pid}\n{used}\n")
            (used / "redis" / "redis.pid").write_text(f"{bystander.pid}\n")
            with postgres, redis:
                assert bystander.poll() is None
        finally:
            bystander.kill()


async def test_an_interrupted_initdb_is_begun_anew(place: Path) -> None:
    (place / "pgdata.making").mkdir()
    (place / "pgdata.making" / "PG_VERSION").write_text("18\n")
    with EmbeddedPostgres(place, fast=True) as server:
        await run(server.dsn("postgres"), "DROP DATABASE tuma")
        server.restart()
        assert await run(server.dsn(), "SELECT 1") == [(1,)]


def test_a_missing_wheel_names_the_settings_for_servers_of_ones_own(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    for server in (EmbeddedPostgres, EmbeddedRedis):
        with pytest.raises(EmbeddedError, match=r"TUMA_POSTGRES__DSN and TUMA_REDIS__URL"):
            server(place)
    with pytest.raises(EmbeddedError, match="not running"):
        _ = embedded._Server(place).pid


def test_a_folder_that_cannot_be_made_is_told_in_words(place: Path) -> None:
    (place / "file").touch()
    with pytest.raises(EmbeddedError, match=r"Redis does not start in .*file"):
        EmbeddedRedis(place / "file" / "redis").start()


def test_it_runs_in_a_deep_private_folder(place: Path) -> None:
    deep = place / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    for folder in (deep, deep.parent):
        folder.chmod(0o700)
    with EmbeddedPostgres(deep / "p", fast=True), EmbeddedRedis(deep / "r"):
        pass
    assert stat.S_IMODE(deep.stat().st_mode) == (0o701 if os.geteuid() == 0 else 0o700)


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGKILL"])
def test_one_that_ended_by_itself_starts_again(place: Path, signal_name: str) -> None:
    with EmbeddedRedis(place) as server:
        pid, port = server.pid, server.port
        os.kill(pid, signal.Signals[signal_name])
        assert server._process is not None
        server._process.wait(10)
        server.start()
        assert (server.pid != pid, server.port) == (True, port)
