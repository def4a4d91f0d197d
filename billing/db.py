"""Postgres: one pool, one way to tell "it is away" from "it refuses"."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import asyncpg

from billing.errors import InputError, PostgresUnavailableError
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
# What of a DSN's options names a file.
_FILES = frozenset(("sslrootcert", "sslcert", "sslkey", "sslcrl"))
# What a transaction may be repeated after, as every posting is idempotent.
REPEATABLE = (
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.LockNotAvailableError,
    asyncpg.QueryCanceledError,
)


class Database:
    """A lazily connecting pool: it can be made while Postgres is away.

    Args:
        settings: DSN, sizes and timeouts.
        name: shown in ``pg_stat_activity``.
    """

    def __init__(self, settings: PostgresSettings, *, name: str = "tuma") -> None:
        self._settings = settings
        self._name = name
        self._pool: Any = None
        self._opening = asyncio.Lock()

    async def _get_pool(self) -> Any:
        if self._pool is None:
            async with self._opening:
                if self._pool is None:
                    self._pool = await asyncpg.create_pool(
                        _read_dsn(self._settings),
                        min_size=1,
                        max_size=self._settings.pool_max,
                        timeout=self._settings.connect_timeout_s,
                        command_timeout=self._settings.command_timeout_s,
                        server_settings={"application_name": self._name, "lock_timeout": "5s"},
                    )
        return self._pool

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Any]:
        """Lend a connection.

        Raises:
            PostgresUnavailableError: none could be had, or it broke in use.
        """
        try:
            pool = await self._get_pool()
            async with pool.acquire(timeout=self._settings.connect_timeout_s) as connection:
                yield connection
        except MISCONFIGURED as error:
            raise InputError(f"TUMA_POSTGRES__DSN cannot be used: {error}") from None
        except AWAY as error:
            raise _unavailable(error) from error

    @asynccontextmanager
    async def transaction(
        self, *, isolation: str = "read_committed", readonly: bool = False
    ) -> AsyncIterator[Any]:
        """Lend a connection inside one transaction, committed when the block ends well."""
        async with (
            self.connection() as connection,
            connection.transaction(isolation=isolation, readonly=readonly),
        ):
            yield connection

    async def connect_alone(self) -> Any:
        """Open a connection outside the pool, for LISTEN and for advisory locks; the caller closes it.

        Raises:
            PostgresUnavailableError: Postgres is away.
        """
        try:
            return await asyncpg.connect(
                _read_dsn(self._settings),
                timeout=self._settings.connect_timeout_s,
                command_timeout=self._settings.command_timeout_s,
                server_settings={"application_name": f"{self._name} alone"},
            )
        except MISCONFIGURED as error:
            raise InputError(f"TUMA_POSTGRES__DSN cannot be used: {error}") from None
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


def _read_dsn(settings: PostgresSettings) -> str:
    """Return the DSN, if it can be read without a doubt where its password ends.

    asyncpg would look up the rest of a password with ``@`` as a host's name, and show one with ``/`` as a wrong port.

    Raises:
        InputError: it is missing or malformed; the message shows nothing of it.
    """
    dsn = settings.dsn.get_secret_value()
    example = "postgresql://user:password@host:5432/tuma"
    if not dsn:
        raise InputError(f"TUMA_POSTGRES__DSN is not set: {example}")
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
            f"TUMA_POSTGRES__DSN is not of the form {example}; in a password, write / ? # @ : % as %2F %3F %23 %40 %3A %25"
        )
    for name in _FILES & options.keys():
        if not Path(options[name]).is_file():
            raise InputError(f"TUMA_POSTGRES__DSN cannot be used: {name} names no file")
    return dsn


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
