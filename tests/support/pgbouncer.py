"""PgBouncer, as docs/ops has it, in front of the tests' Postgres."""

import configparser
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
from pydantic import SecretStr

from billing.postgres.database import Database
from billing.postgres.migrate import migrate
from config.settings import PostgresSettings, Settings
from scripts.programs.embedded import EmbeddedPostgres, _allow, _Server
from tests.support.paths import ROOT
from tests.support.servers import OwnPostgres

PROGRAM = Path("/usr/sbin/pgbouncer")
OPS = ROOT / "docs" / "ops"
_PASSWORD = "known to the pooler alone"
_HOUSE = "test_house"  # who owns the schema: no superuser, as nobody's DSN should name one


class PgBouncer(_Server):
    """A pooler of one database.

    Args:
        data_dir: where its files are.
        dsn: of the database, past the pooler.
        identity: as whom it runs: it refuses to run as root, as Postgres does.
        pool_size: connections to Postgres per role.
        more: settings beside those of docs/ops.
    """

    name = "PgBouncer"

    def __init__(
        self, data_dir: Path, *, dsn: str, identity: dict[str, Any], pool_size: int, more: dict[str, str]
    ) -> None:
        super().__init__(data_dir)
        self.direct_dsn = dsn
        self._as = identity
        self._told = {"default_pool_size": str(pool_size), **more}
        self._configuration = self.data_dir / "pgbouncer.ini"

    @property
    def dsn(self) -> str:
        parts = urlsplit(self.direct_dsn)
        return parts._replace(netloc=f"{parts.netloc.rpartition(':')[0]}:{self.port}").geturl()

    def _identity(self) -> dict[str, Any]:
        return self._as

    def _prepare(self) -> None:
        for folder in self.data_dir.parents if self._as else ():
            _allow(folder, 0o001)

    def _stop_left_over(self) -> None:
        """Nothing outlives a test."""

    def _command(self) -> Sequence[str]:
        written = configparser.ConfigParser(delimiters="=", interpolation=None)
        written.read(OPS / "pgbouncer.ini")
        parts = urlsplit(self.direct_dsn)
        name = parts.path.lstrip("/")
        place = written["databases"].pop("tuma")
        assert place == "host=127.0.0.1 port=5432 dbname=tuma auth_user=pgbouncer"
        written["databases"][name] = f"host=127.0.0.1 port={parts.port} dbname={name} auth_user=pgbouncer"
        users = self.data_dir / "userlist.txt"
        users.write_text(f'"pgbouncer" "{_PASSWORD}"\n')
        written["pgbouncer"].update({"listen_port": str(self.port), "auth_file": str(users), **self._told})
        with self._configuration.open("w") as out:
            written.write(out)
        for path in (self._configuration, users, self.data_dir):
            path.chmod(0o755)
        return [str(PROGRAM), str(self._configuration)]

    def _is_ready(self, pid: int) -> bool:  # noqa: ARG002 - it has no pid file
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True


async def introduce(dsn: str) -> str:
    """Let PgBouncer look up logins in a database, as docs/ops says, and return the DSN of the schema's owner there."""
    password = urlsplit(dsn).password
    admin = await asyncpg.connect(dsn)
    if await admin.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", _HOUSE) is None:
        await admin.execute(f"CREATE ROLE {_HOUSE} LOGIN CREATEROLE PASSWORD '{password}'")
        await admin.execute(f"GRANT tuma_owner TO {_HOUSE}")
    script = (OPS / "pgbouncer.sql").read_text()
    if await admin.fetchval("SELECT 1 FROM pg_roles WHERE rolname = 'pgbouncer'") is not None:
        script = script.replace("CREATE ROLE pgbouncer LOGIN;\n", "")
    await admin.execute(script)
    await admin.execute(f"ALTER ROLE pgbouncer PASSWORD '{_PASSWORD}'")
    await admin.close()
    # What a role does in a database belongs to that database: the template's is not copied.
    database = Database(PostgresSettings(dsn=SecretStr(dsn), direct_dsn=SecretStr(dsn), pooler="transaction"))
    await migrate(database)
    await database.close()
    return dsn.replace("//postgres:", f"//{_HOUSE}:")


@asynccontextmanager
async def pooling(
    postgres: EmbeddedPostgres | OwnPostgres,
    dsn: str,
    folder: Path,
    *,
    pool_size: int = 4,
    more: dict[str, str] | None = None,
) -> AsyncIterator[PgBouncer]:
    """Run PgBouncer before a database."""
    assert isinstance(postgres, EmbeddedPostgres)
    own = await introduce(dsn)
    with PgBouncer(
        folder / "pgbouncer", dsn=own, identity=postgres._identity(), pool_size=pool_size, more=more or {}
    ) as server:
        yield server


def pooled(settings: Settings, server: PgBouncer, **more: Any) -> Settings:
    """Return settings that lead through the pooler."""
    told = {"dsn": SecretStr(server.dsn), "direct_dsn": SecretStr(server.direct_dsn), "pooler": "transaction"}
    return settings.model_copy(update={"postgres": settings.postgres.model_copy(update={**told, **more})})
