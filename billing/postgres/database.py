"""Postgres: one pool, one way to tell "it is away" from "it refuses"."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qsl, urlsplit
from uuid import UUID

import asyncpg

from billing.actor import find_acting
from billing.errors import InputError, PostgresUnavailableError
from billing.meters import Meters
from billing.postgres.pinned_connection import HeldConnection
from billing.postgres.roles import LOCK_TIMEOUT, Role, login_at, login_of
from config.settings import PostgresSettings

# What a connection raises when the server is away, restarting, or has cut us off (SQLSTATE classes 08, 53, 57P).
AWAY = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.InternalClientError,
)
# What Postgres answers to a DSN that names what is not there, or may not come in.
MISCONFIGURED = (
    asyncpg.ClientConfigurationError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
)
_UNFIT = (asyncpg.CharacterNotInRepertoireError, asyncpg.DataError)
_DSN = "TUMA_POSTGRES__DSN"
_TELL_OF_POOLER = "set TUMA_POSTGRES__POOLER=transaction, and TUMA_POSTGRES__DIRECT_DSN to the server itself (docs/operations.md)"
# Who may call functions and nothing else, of which none leaves a trace in the session: locks and settings end with the
# transaction. tests/billing/test_sessions.py asks all of those functions.
_LEAVE_NOTHING: frozenset[Role] = frozenset(("proxy", "settler"))
# What of a DSN's options names a file.
_FILES = frozenset(("sslrootcert", "sslcert", "sslkey", "sslcrl"))
# What a transaction may be repeated after, as every posting is idempotent.
REPEATABLE = (
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.LockNotAvailableError,
    asyncpg.QueryCanceledError,
)


class _TracelessConnection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types
    """A connection whose session nobody changes: returning it to the pool is no round trip, but after a broken transaction.

    Through a pooler there is no session to undo anything in: what asyncpg would undo may be another's by then.
    """

    def get_reset_query(self) -> str:
        """Return nothing; a transaction that is still open is rolled back all the same."""
        return ""


class Database:
    """A lazily connecting pool: it can be made while Postgres is away.

    Behind a pooler (``TUMA_POSTGRES__POOLER``) a server's connection is ours for one transaction alone. So no statement stays
    prepared, no session is told anything, and what needs a session gets one past the pooler: ``session``, ``connect_alone``.

    Args:
        settings: DSN, sizes and timeouts.
        name: shown in ``pg_stat_activity``.
        role: what is done as; the DSN's own user, without one.
        connections_max: at once; the settings' ``pool_max``, without one.
        meters: where waiting for a connection is counted.
        replica: on the replica, in place of the primary.
    """

    def __init__(
        self,
        settings: PostgresSettings,
        *,
        name: str = "tuma",
        role: Role | None = None,
        connections_max: int | None = None,
        meters: Meters | None = None,
        replica: bool = False,
    ) -> None:
        self._meters = meters or Meters()
        self.settings = self._settings = settings
        self.role = role
        self._replica = replica
        self._connections_max = min(connections_max or settings.pool_max, settings.pool_max)
        self._name = name
        self._pool: Any = None
        self._opening = asyncio.Lock()
        self._held: list[HeldConnection] = []
        self.acted = False  # somebody but the house did something: there may be rows of the audit log to seal

    async def _get_pool(self) -> Any:
        if self._pool is None:
            async with self._opening:
                if self._pool is None:
                    self._pool = await asyncpg.create_pool(
                        **self._read_login(),
                        min_size=1,
                        max_size=self._connections_max,
                        timeout=self._settings.connect_timeout_s,
                        command_timeout=self._settings.command_timeout_s,
                        **self._pool_options(),
                    )
        return self._pool

    def _pool_options(self) -> dict[str, Any]:
        if self._settings.pooler == "none":
            return {
                "server_settings": {"application_name": self._name, "lock_timeout": LOCK_TIMEOUT},
                "connection_class": (
                    _TracelessConnection if self.role in _LEAVE_NOTHING else asyncpg.Connection
                ),
            }
        return {
            "server_settings": {"application_name": self._name},  # a pooler refuses what it does not know
            "statement_cache_size": 0,
            "connection_class": _TracelessConnection,
        }

    def _read_login(self) -> dict[str, str]:
        login = self._own_login()
        if not self._replica:
            return login
        return login_at(self._settings, self.role, self._settings.replica_dsn.get_secret_value())

    def _own_login(self) -> dict[str, str]:
        settings, role = self._settings, self.role
        login = {"dsn": settings.dsn.get_secret_value()} if role is None else login_of(settings, role)
        own = role is not None and "user" not in login and settings.roles
        check_dsn(login["dsn"], name=f"TUMA_POSTGRES__{role.upper()}_DSN" if role and own else _DSN)
        return login

    def _direct_login(self) -> dict[str, str]:
        """Return how to log in past the pooler, if there is one."""
        login = self._read_login()
        dsn = self._settings.direct_dsn.get_secret_value()
        if not dsn or self._replica:
            return login
        check_dsn(dsn, name="TUMA_POSTGRES__DIRECT_DSN")
        return login_at(self._settings, self.role, dsn)

    def _misconfigured(self, error: BaseException) -> InputError:
        if isinstance(error, asyncpg.ProtocolViolationError):
            return InputError(f"TUMA_POSTGRES__DSN leads to a pooler ({error}): {_TELL_OF_POOLER}")
        if self._replica:
            return InputError(f"TUMA_POSTGRES__REPLICA_DSN cannot be used: {error}")
        if self.role is None:
            return InputError(f"TUMA_POSTGRES__DSN cannot be used: {error}")
        return InputError(
            f"Postgres does not let in the role of the {self.role} ({error}): run `tuma migrate`, which makes it, or say how"
            f" in TUMA_POSTGRES__{self.role.upper()}_DSN"
        )

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Any]:
        """Lend a connection.

        Raises:
            PostgresUnavailableError: none could be had, or it broke in use.
            InputError: a text has a character that Postgres does not store.
        """
        try:
            pool = await self._get_pool()
            began_s = time.perf_counter()
            async with pool.acquire(timeout=self._settings.connect_timeout_s) as connection:
                self._meters.pool_wait.observe(time.perf_counter() - began_s, self.role or "owner")
                yield connection
        except (*_UNFIT, *MISCONFIGURED, *AWAY) as error:
            self.refuse(error)

    def refuse(self, error: BaseException) -> NoReturn:
        """Raise what an error of Postgres means for who asked; itself, if it is none of these.

        Raises:
            PostgresUnavailableError: no connection could be had, or it broke in use.
            InputError: a text has a character that Postgres does not store, or the DSN cannot be used.
        """
        if isinstance(error, _UNFIT):
            if isinstance(error, asyncpg.CharacterNotInRepertoireError) or "surrogates" in str(error):
                raise InputError("a text has a character that cannot be stored, as NUL") from None
        elif isinstance(error, MISCONFIGURED) or (self._settings.pooler == "none" and _is_from_pooler(error)):
            raise self._misconfigured(error) from None
        elif isinstance(error, AWAY):
            raise _unavailable(error) from error
        raise error

    async def fetch(self, sql: str, *args: object) -> list[Any]:
        """Run one statement on a connection of the pool; raises as ``connection`` does."""
        async with self.connection() as connection:
            rows: list[Any] = await connection.fetch(sql, *args)
        return rows

    def hold(self) -> "HeldConnection | Database":
        """Return who runs statements for one user, on a connection beside the pool that is closed with it.

        Behind a pooler no connection can be held longer than a transaction, and no statement stays prepared: it is the pool.
        """
        if self._settings.pooler != "none":
            return self
        held = HeldConnection(self, close_timeout_s=self._settings.connect_timeout_s, broken=AWAY)
        self._held.append(held)
        return held

    async def connect(self) -> Any:
        """Open a connection as the pool does, outside of it; the caller closes it, and hands errors to ``refuse``."""
        return await asyncpg.connect(
            **self._read_login(),
            timeout=self._settings.connect_timeout_s,
            command_timeout=self._settings.command_timeout_s,
            **self._pool_options(),
        )

    @asynccontextmanager
    async def transaction(
        self, *, isolation: str = "read_committed", readonly: bool = False
    ) -> AsyncIterator[Any]:
        """Lend a connection inside one transaction, committed when the block ends well.

        Postgres is told who acts (``billing/actor.py``), if anybody does but the house.
        """
        async with (
            self.connection() as connection,
            connection.transaction(isolation=isolation, readonly=readonly),
        ):
            who = None if readonly else find_acting()
            if who is not None:
                self.acted = True
                await connection.execute(
                    "SELECT set_config('tuma.actor', $1, true), set_config('tuma.request_id', $2, true)",
                    who.actor,
                    who.request_id or "",
                )
            yield connection

    @asynccontextmanager
    async def as_person(self, user_id: UUID, *, readonly: bool = False) -> AsyncIterator[Any]:
        """Lend a connection inside one transaction in which policies and ``own_…`` functions see this user's rows alone."""
        async with self.transaction(readonly=readonly) as connection:
            await connection.execute("SELECT set_config('app.user_id', $1, true)", str(user_id))
            yield connection

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Any]:
        """Lend a connection of one's own past any pooler, for a lock, cursors or what else outlives a transaction.

        Raises:
            PostgresUnavailableError: none could be had, or it broke in use.
        """
        connection = await self.connect_alone(lock_timeout=LOCK_TIMEOUT)
        try:
            yield connection
        except AWAY as error:
            raise _unavailable(error) from error
        finally:
            try:
                await connection.close(timeout=self._settings.connect_timeout_s)
            except AWAY:
                connection.terminate()

    async def connect_alone(self, **told: str) -> Any:
        """Open a connection outside the pool and past any pooler, for LISTEN and for advisory locks; the caller closes it.

        Args:
            told: settings of the session.

        Raises:
            PostgresUnavailableError: Postgres is away.
        """
        try:
            return await asyncpg.connect(
                **self._direct_login(),
                timeout=self._settings.connect_timeout_s,
                command_timeout=self._settings.command_timeout_s,
                server_settings={"application_name": f"{self._name} alone", **told},
            )
        except MISCONFIGURED as error:
            raise self._misconfigured(error) from None
        except AWAY as error:
            raise _unavailable(error) from error

    async def close(self) -> None:
        """Close the pool and what is held, waiting a bounded time for connections in use."""
        await asyncio.gather(*(held.close() for held in self._held))
        if self._pool is not None:
            try:
                await asyncio.wait_for(self._pool.close(), self._settings.connect_timeout_s)
            except AWAY:
                self._pool.terminate()
            self._pool = None


def _is_from_pooler(error: BaseException) -> bool:
    return isinstance(error, asyncpg.ProtocolViolationError) and "startup parameter" in str(error)


def check_dsn(dsn: str, *, name: str = _DSN) -> None:
    """Refuse a DSN that cannot be read without a doubt where its password ends.

    asyncpg would look up the rest of a password with ``@`` as a host's name, and show one with ``/`` as a wrong port.

    Raises:
        InputError: it is missing or malformed; the message shows nothing of it.
    """
    example = "postgresql://user:password@host:5432/tuma"
    if not dsn:
        raise InputError(f"{name} is not set: {example}")
    try:
        parts = urlsplit(dsn)
        readable = parts.scheme in {"postgresql", "postgres"} and parts.netloc.count("@") <= 1
        for host in parts.netloc.rpartition("@")[2].split(","):
            int(host.rpartition("]")[2].partition(":")[2] or 0)
        options = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    except ValueError:
        readable, options = False, {}
    if not readable or "#" in dsn:
        raise InputError(
            f"{name} is not of the form {example}; in a password, write / ? # @ : % as %2F %3F %23 %40 %3A %25"
        )
    for option in _FILES & options.keys():
        if not Path(options[option]).is_file():
            raise InputError(f"{name} cannot be used: {option} names no file")


def _unavailable(error: BaseException) -> PostgresUnavailableError:
    """Say why, as far as it is known and no secret."""
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = f"its certificate is not accepted: {error.verify_message}"
    elif isinstance(error, ssl.SSLError):
        reason = "its TLS is none that is accepted"
    elif isinstance(error, ConnectionError) and "rejected SSL upgrade" in str(error):
        reason = "it does not speak TLS, which the DSN's sslmode demands"
    elif isinstance(error, asyncpg.ProtocolViolationError):
        reason = f"{type(error).__name__}: {error}"  # a pooler's words all come so
    else:
        reason = type(error).__name__
    return PostgresUnavailableError(f"Postgres is unavailable: {reason}")
