"""Redis round trips, coalesced: what concurrent calls ask in one turn of the loop goes out as one pipeline.

One redis-py round trip costs about three times the CPU of a command in a shared pipeline, so every command of the
way of a call goes through here. A pipeline that does not answer in time fails all its commands, and its connection
is dropped: what the server did with them is unknown, and callers treat it so.
"""

import asyncio
import hashlib
import ssl
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import NoScriptError, RedisError, ResponseError

from billing.errors import BrokenInvariantError, InputError, RedisUnavailableError
from billing.meters import Meters
from billing.redis_link import Argument, RedisLink
from billing.tasks import TrackedTasks
from config.settings import RedisSettings

# States of a server, which Redis before 7 hides inside the error of the script that met them.
_NOT_THE_PRIMARY = ("READONLY", "MASTERDOWN", "read only replica", "UNBLOCKED")
_STATES = (*_NOT_THE_PRIMARY, "OOM", "MISCONF", "LOADING", "NOREPLICAS", "CLUSTERDOWN")


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script: its text and the SHA-1 by which Redis knows it."""

    name: str
    text: str
    sha: str


def load_script(name: str, *shared: str) -> Script:
    """Read ``billing/lua/<name>.lua``, behind the functions of the ``shared`` files."""
    folder = files("billing").joinpath("lua")
    text = "".join(folder.joinpath(f"{part}.lua").read_text(encoding="utf-8") for part in (*shared, name))
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


@dataclass(slots=True)
class _Item:
    command: tuple[Argument, ...]
    script: Script | None
    answer: asyncio.Future[Any]
    since_s: float = field(default_factory=time.perf_counter)


class RedisPipe:
    """Coalesces commands into pipelines over a few connections.

    Args:
        settings: URL, timeout, connections and commands per pipeline.
        meters: where pipelines are counted.
    """

    def __init__(self, settings: RedisSettings, meters: Meters | None = None) -> None:
        self._meters = meters or Meters()
        self._settings = settings
        self._redis: Redis | None = None
        self._queue: list[_Item] = []
        self._idle: list[RedisLink] = []
        self._running = 0
        self._starting = False
        self._tasks = TrackedTasks()

    async def run(self, *command: Argument) -> Any:
        """Send one command.

        Raises:
            RedisUnavailableError: Redis is away or slow; whether the command ran is unknown.
        """
        return await self._submit(_Item(command, None, asyncio.get_running_loop().create_future()))

    async def call(self, script: Script, keys: Iterable[str], args: Iterable[Argument]) -> Any:
        """Run a script; its text is sent only if Redis does not know it.

        Raises:
            RedisUnavailableError: Redis is away or slow; whether the script ran is unknown.
        """
        names = tuple(keys)
        command = ("EVALSHA", script.sha, len(names), *names, *args)
        return await self._submit(_Item(command, script, asyncio.get_running_loop().create_future()))

    def _submit(self, item: _Item) -> asyncio.Future[Any]:
        self._queue.append(item)
        if not self._starting and self._running < self._settings.connections_max:
            self._starting = True
            self._running += 1
            self._tasks.start(self._drain(), name="redis pipeline")
        return item.answer

    async def _drain(self) -> None:
        # Yield once, so that everything that is ready in this turn of the loop joins the first pipeline.
        try:
            await asyncio.sleep(0)
        finally:
            self._starting = False
        try:
            while self._queue:
                batch = self._queue[: self._settings.pipeline_max]
                del self._queue[: len(batch)]
                await self._send(batch)
        finally:
            self._running -= 1

    async def _send(self, batch: list[_Item]) -> None:
        link: RedisLink | None = None
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                link = await self._connect()
                self._meters.redis_wait.observe(time.perf_counter() - batch[0].since_s)
                self._meters.redis_rows.observe(len(batch))
                replies = await link.exchange([item.command for item in batch])
                again = [
                    index
                    for index, reply in enumerate(replies)
                    if isinstance(reply, NoScriptError) and batch[index].script
                ]
                if again:
                    await self._load({batch[index].script for index in again if batch[index].script}, link)
                    second = await link.exchange([batch[index].command for index in again])
                    for index, reply in zip(again, second, strict=True):
                        replies[index] = reply
        except (RedisError, OSError, TimeoutError, RuntimeError) as error:
            # RuntimeError is what uvloop raises for a write to a connection that was reset.
            if link is not None:
                await link.close(now=True)
            self._fail(batch, RedisUnavailableError(f"Redis is unavailable: {_reason(error)}"))
        except InputError as error:
            self._fail(batch, error)
        except BaseException:
            if link is not None:
                await link.close(now=True)
            self._fail(batch, RedisUnavailableError("Redis pipeline was stopped"))
            raise
        else:
            if any(_is_of_another_time(reply) for reply in replies):
                await link.close(now=True)  # a new one finds who is the primary now
            else:
                self._idle.append(link)
            self._answer(batch, replies)

    async def _connect(self) -> RedisLink:
        while self._idle:
            idle = self._idle.pop()
            if idle.is_alive:
                return idle
            await idle.close(now=True)
        if self._redis is None:
            self._redis = self._make_client()
        connection: AbstractConnection = self._redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]
        await connection.connect()  # type: ignore[no-untyped-call]
        return RedisLink(connection)

    def _make_client(self) -> Redis:
        url = self._settings.url.get_secret_value()
        try:
            return Redis.from_url(
                url,
                socket_timeout=None,  # one deadline over the whole pipeline instead
                socket_connect_timeout=self._settings.timeout_s,
                max_connections=self._settings.connections_max + 4,
                **_tls_options(self._settings, encrypted=url.startswith("rediss://")),
            )
        except ValueError:
            # Its text may show a part of the password, as a port.
            raise InputError(
                "TUMA_REDIS__URL is not of the form redis://:password@host:6379/0 (or rediss://);"
                " in a password, write / ? # @ : % as %2F %3F %23 %40 %3A %25"
            ) from None

    @staticmethod
    async def _load(scripts: set[Script | None], link: RedisLink) -> None:
        await link.exchange([("SCRIPT", "LOAD", script.text) for script in scripts if script])

    @staticmethod
    def _fail(batch: list[_Item], error: Exception) -> None:
        for item in batch:
            if not item.answer.done():
                item.answer.set_exception(error)

    @staticmethod
    def _answer(batch: list[_Item], replies: list[Any]) -> None:
        for item, reply in zip(batch, replies, strict=True):
            if item.answer.done():
                continue
            if isinstance(reply, ResponseError):
                # LOADING, READONLY, OOM…: Redis answers but cannot serve; a script's own error is a bug of ours.
                what = item.script.name if item.script else str(item.command[0])
                broken = str(reply).startswith(("ERR Error running script", "ERR user_script", "user_script"))
                broken = broken and not any(state in str(reply) for state in _STATES)
                kind: type[Exception] = BrokenInvariantError if broken else RedisUnavailableError
                item.answer.set_exception(kind(f"Redis refused {what}: {reply}"))
            else:
                item.answer.set_result(reply)

    async def close(self) -> None:
        """Finish what is queued, then close the connections."""
        await self._tasks.drain(self._settings.timeout_s * 2)
        for link in self._idle:
            await link.close()
        self._idle.clear()
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
