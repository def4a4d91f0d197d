"""Redis round trips, coalesced: what concurrent calls ask in one turn of the loop goes out as one pipeline.

One redis-py round trip costs about three times the CPU of a command in a shared pipeline, so every command of the
way of a call goes through here. A pipeline that does not answer in time fails all its commands, and its connection
is dropped: what the server did with them is unknown, and callers treat it so.
"""

import asyncio
import hashlib
import ssl
import time
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import NoScriptError, RedisError, ResponseError

from billing.errors import BrokenInvariantError, InputError, RedisUnavailableError
from billing.meters import Meters
from billing.redis.connection import Argument, Command, RedisLink
from billing.redis.survey import Server, Survey
from billing.tasks import TrackedTasks
from config.settings import RedisSettings

_POLL_S = 0.01
# States of a server, which Redis before 7 hides inside the error of the script that met them.
_NOT_THE_PRIMARY = ("READONLY", "MASTERDOWN", "read only replica", "UNBLOCKED")
_STATES = (*_NOT_THE_PRIMARY, "OOM", "MISCONF", "LOADING", "NOREPLICAS", "CLUSTERDOWN")


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script: its text and the SHA-1 by which Redis knows it."""

    name: str
    text: str
    sha: str

    def words(self, keys: Iterable[str], args: Iterable[Argument]) -> tuple[Argument, ...]:
        """Return the command that runs it."""
        names = tuple(keys)
        return ("EVALSHA", self.sha, len(names), *names, *args)


def load_script(room: str, name: str, *shared: str) -> Script:
    """Read ``lua/<name>.lua`` of a room, behind the functions of the ``shared`` files."""
    folder = files(room).joinpath("lua")
    text = "".join(folder.joinpath(f"{part}.lua").read_text(encoding="utf-8") for part in (*shared, name))
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


class ScriptCommand(Command):
    """A script to be run; ``loaded`` once its text was sent because Redis did not know it."""

    __slots__ = ("loaded", "script")

    def __init__(self, script: Script, words: tuple[Argument, ...]) -> None:
        super().__init__(words)
        self.script = script
        self.loaded = False


class RedisPipe:
    """Coalesces commands into pipelines over one connection.

    Args:
        settings: URL, timeout, and commands per pipeline.
        meters: where pipelines are counted.
    """

    def __init__(self, settings: RedisSettings, meters: Meters | None = None) -> None:
        self._meters = meters or Meters()
        self._settings = settings
        self._redis: Redis | None = None
        self._queue: list[Command] = []
        self._link: RedisLink | None = None
        self._flushing = False
        self._opening: asyncio.Task[None] | None = None
        self._loading: set[str] = set()  # scripts whose text is on its way
        self._tasks = TrackedTasks()

    def run(self, *command: Argument) -> Awaitable[Any]:
        """Send one command.

        Raises:
            RedisUnavailableError: Redis is away or slow; whether the command ran is unknown.
        """
        return self._submit(Command(command))

    def call(self, script: Script, keys: Iterable[str], args: Iterable[Argument]) -> Awaitable[Any]:
        """Run a script; its text is sent only if Redis does not know it.

        Raises:
            RedisUnavailableError: Redis is away or slow; whether the script ran is unknown.
        """
        return self._submit(ScriptCommand(script, script.words(keys, args)))

    def _submit(self, *commands: Command) -> asyncio.Future[Any]:
        """Queue commands, next to each other; return the answer of the last."""
        self._queue += commands
        if not self._flushing:
            # In the next turn of the loop: everything that is ready in this one joins.
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)
        return commands[-1].answer

    def _flush(self) -> None:
        self._flushing = False
        link = self._link
        if link is None or not link.is_usable:
            if self._queue and (self._opening is None or self._opening.done()):
                self._opening = self._tasks.start(self._open(), name="redis connection")
            return
        most, now_s = self._settings.pipeline_max, time.perf_counter()
        while self._queue:
            batch = self._queue[:most]
            del self._queue[:most]
            self._meters.redis_wait.observe(now_s - batch[0].since_s)
            self._meters.redis_rows.observe(len(batch))
            link.send(batch)

    async def _open(self) -> None:
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                connection = await self._connect()
            self._link = RedisLink(
                connection,
                timeout_s=self._settings.timeout_s,
                on_reply=self._take,
                on_lost=self._lose,
            )
        except (RedisError, OSError, TimeoutError, RuntimeError) as error:
            self._fail(self._take_queue(), RedisUnavailableError(f"Redis is unavailable: {_reason(error)}"))
        except InputError as error:
            self._fail(self._take_queue(), error)
        except BaseException:
            self._fail(self._take_queue(), RedisUnavailableError("Redis pipeline was stopped"))
            raise
        else:
            self._flush()

    def _take_queue(self) -> list[Command]:
        queue, self._queue = self._queue, []
        return queue

    async def _connect(self) -> AbstractConnection:
        if self._redis is None:
            self._redis = self._make_client()
        connection: AbstractConnection = self._redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return connection

    def _make_client(self) -> Redis:
        url = self._settings.url.get_secret_value()
        try:
            return Redis.from_url(
                url,
                socket_timeout=None,  # one deadline over the whole pipeline instead
                socket_connect_timeout=self._settings.timeout_s,
                **_tls_options(self._settings, encrypted=url.startswith("rediss://")),
            )
        except ValueError:
            # Its text may show a part of the password, as a port.
            raise InputError(
                "TUMA_REDIS__URL is not of the form redis://:password@host:6379/0 (or rediss://);"
                " in a password, write / ? # @ : % as %2F %3F %23 %40 %3A %25"
            ) from None

    def _take(self, command: Command, reply: Any) -> None:
        """Hand a reply to who waits for it."""
        if isinstance(reply, RedisError):
            if isinstance(reply, NoScriptError) and isinstance(command, ScriptCommand) and not command.loaded:
                self._load(command)
                return
            if self._link is not None and _is_of_another_time(reply):
                self._link.retire()  # a new one finds who is the primary now
            self._fail((command,), self._refusal(command, reply))
        elif not command.answer.done():
            command.answer.set_result(reply)

    def _load(self, command: ScriptCommand) -> None:
        """Send the script's text, unless it is on its way, and the command once more: it did not run."""
        command.loaded = True
        script = command.script
        if script.sha not in self._loading:
            self._loading.add(script.sha)
            load = Command(("SCRIPT", "LOAD", script.text))
            load.answer.add_done_callback(lambda answer: self._loaded(script, answer))
            self._submit(load)
        self._submit(command)

    def _loaded(self, script: Script, answer: asyncio.Future[Any]) -> None:
        self._loading.discard(script.sha)
        if not answer.cancelled():
            answer.exception()  # looked at: the script's own command fails, too

    @staticmethod
    def _refusal(command: Command, reply: RedisError) -> Exception:
        # LOADING, READONLY, OOM…: Redis answers but cannot serve; a script's own error is a bug of ours.
        what = command.script.name if isinstance(command, ScriptCommand) else str(command.words[0])
        broken = str(reply).startswith(("ERR Error running script", "ERR user_script", "user_script"))
        broken = broken and not any(state in str(reply) for state in _STATES)
        kind: type[Exception] = BrokenInvariantError if broken else RedisUnavailableError
        return kind(f"Redis refused {what}: {reply}")

    def _lose(self, link: RedisLink, unknown: Sequence[Command], error: BaseException) -> None:
        """A connection ended; what became of the commands on it is unknown."""
        if self._link is link:
            self._link = None
        self._fail(unknown, RedisUnavailableError(f"Redis is unavailable: {_reason(error)}"))
        self._tasks.start(link.connection.disconnect(nowait=True), name="redis connection's end")

    @staticmethod
    def _fail(commands: Iterable[Command], error: Exception) -> None:
        for command in commands:
            if not command.answer.done():
                command.answer.set_exception(error)

    async def ping(self) -> None:
        """Return if the server answers.

        Raises:
            RedisUnavailableError: it does not.
        """
        await self.run("PING")

    async def survey(self) -> Survey:
        """Ask the server who it is.

        Raises:
            RedisUnavailableError: it does not answer.
        """
        sections = ("server", "memory", "replication")
        infos = await asyncio.gather(*(self.run("INFO", section) for section in sections))
        return Survey((Server.read(*infos),))

    async def close(self) -> None:
        """Finish what is queued, then close the connection."""
        deadline = time.monotonic() + self._settings.timeout_s * 2
        while (
            self._queue or self._link
        ) and time.monotonic() < deadline:  # a link is as long as what it waits for
            await asyncio.sleep(_POLL_S)
        if self._link is not None:
            self._link.close()
        await self._tasks.drain(self._settings.timeout_s)
        if self._redis is not None:
            await self._redis.aclose()


def _tls_options(settings: RedisSettings, *, encrypted: bool) -> dict[str, Any]:
    """Return how a server's certificate is checked: always, and for its host's name.

    Raises:
        InputError: the CA file cannot be used, or is there for a connection that would not be encrypted.
    """
    if not encrypted:
        if settings.ca_file:
            raise InputError("TUMA_REDIS__CA_FILE is set, but TUMA_REDIS__URL does not start with rediss://")
        return {}
    options = {"ssl_check_hostname": True, "ssl_min_version": ssl.TLSVersion.TLSv1_2}
    if not settings.ca_file:
        return options
    try:
        ssl.create_default_context(cafile=settings.ca_file)
    except OSError as error:
        raise InputError(f"TUMA_REDIS__CA_FILE cannot be used: {error.strerror or error}") from None
    return {**options, "ssl_ca_certs": settings.ca_file}


def _reason(error: BaseException) -> str:
    """Say why, as far as it is known and no secret."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not accepted: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError):
            return "it does not speak TLS as rediss:// demands"
        cause = cause.__cause__ or cause.__context__
    return type(error).__name__


def _is_of_another_time(reply: object) -> bool:
    """Tell whether a server says that it is no longer, or not yet, the one to be asked."""
    return isinstance(reply, ResponseError) and any(state in str(reply) for state in _NOT_THE_PRIMARY)


def decode_map(reply: list[bytes] | Mapping[bytes, bytes]) -> dict[str, str]:
    """Turn HGETALL's reply (RESP2 list or RESP3 map) into text."""
    if isinstance(reply, Mapping):
        return {key.decode(): value.decode() for key, value in reply.items()}
    return {reply[index].decode(): reply[index + 1].decode() for index in range(0, len(reply), 2)}
