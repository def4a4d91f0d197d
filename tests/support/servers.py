"""Postgres and Redis that the tests use: those of the wheels, Debian's, or somebody's own."""

from dataclasses import dataclass
from pathlib import Path

# The oldest PostgreSQL that is supported, and Redis as Debian has it; CI installs both.
DEBIAN_POSTGRES = Path("/usr/lib/postgresql/15/bin")


DEBIAN_REDIS = Path("/usr/bin/redis-server")


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
