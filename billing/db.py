"""Postgres: one pool, one way to tell "it is away" from "it refuses"."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit
from uuid import UUID

import asyncpg

from billing.access import Role, login_of
from billing.acting import find_acting
from billing.errors import InputError, PostgresUnavailableError
from billing.meters import Meters
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


class _TracelessConnection(asyncpg.Connection):  # type: ignore[misc]
    """A connection whose session nobody changes: returning it to the pool is no round trip, but after a broken transaction."""

    def get_reset_query(self) -> str:
        """Return nothing; a transaction that is still open is rolled back all the same."""
        return ""


class Database:
    """A lazily connecting pool: it can be made while Postgres is away.

    Args:
        settings: DSN, sizes and timeouts.
        name: shown in ``pg_stat_activity``.
        role: what is done as; the DSN's own user, without one.
        connections_max: at once; the settings' ``pool_max``, without one.
        meters: where waiting for a connection is counted.
    """

    def __init__(
        self,
        settings: PostgresSettings,
        *,
        name: str = "tuma",
        role: Role | None = None,
        connections_max: int | None = None,
        meters: Meters | None = None,
    ) -> None:
        self._meters = meters or Meters()
        self.settings = self._settings = settings
        self.role = role
        self._login = {"dsn": settings.dsn.get_secret_value()} if role is None else login_of(settings, role)
        self._connections_max = min(connections_max or settings.pool_max, settings.pool_max)
        self._name = name
        self._pool: Any = None
        self._opening = asyncio.Lock()
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
                        server_settings={"application_name": self._name, "lock_timeout": "5s"},
                        connection_class=(
                            _TracelessConnection if self.role in _LEAVE_NOTHING else asyncpg.Connection
                        ),
                    )
        return self._pool

    def _read_login(self) -> dict[str, str]:
        name = "TUMA_POSTGRES__DSN" if self.role is None else f"TUMA_POSTGRES__{self.role.upper()}_DSN"
        own = self.role is not None and "user" not in self._login and self.settings.roles
        check_dsn(self._login["dsn"], name=name if own else "TUMA_POSTGRES__DSN")
        return self._login

    def _misconfigured(self, error: BaseException) -> InputError:
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
        except (asyncpg.CharacterNotInRepertoireError, asyncpg.DataError) as error:
            if isinstance(error, asyncpg.CharacterNotInRepertoireError) or "surrogates" in str(error):
                raise InputError("a text has a character that cannot be stored, as NUL") from None
            raise
        except MISCONFIGURED as error:
            raise self._misconfigured(error) from None
        except AWAY as error:
            raise _unavailable(error) from error

    @asynccontextmanager
    async def transaction(
        self, *, isolation: str = "read_committed", readonly: bool = False
    ) -> AsyncIterator[Any]:
        """Lend a connection inside one transaction, committed when the block ends well.

        Postgres is told who acts (``billing/acting.py``), if anybody does but the house.
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

    async def connect_alone(self) -> Any:
        """Open a connection outside the pool, for LISTEN and for advisory locks; the caller closes it.

        Raises:
            PostgresUnavailableError: Postgres is away.
        """
        try:
            return await asyncpg.connect(
                **self._read_login(),
                timeout=self._settings.connect_timeout_s,
                command_timeout=self._settings.command_timeout_s,
                server_settings={"application_name": f"{self._name} alone"},
            )
        except MISCONFIGURED as error:
            raise self._misconfigured(error) from None
        except AWAY as error:
            raise _unavailable(error) from error

    async def close(self) -> None:
        """Close the pool, waiting a bounded time for connections in use."""
        if self._pool is not None:
            try:
                await asyncio.wait_for(self._pool.close(), self._settings.connect_timeout_s)
            except AWAY:
                self._pool.terminate()
            self._pool = None


def check_dsn(dsn: str, *, name: str = "TUMA_POSTGRES__DSN") -> None:
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
    else:
        reason = type(error).__name__
    return PostgresUnavailableError(f"Postgres is unavailable: {reason}")
