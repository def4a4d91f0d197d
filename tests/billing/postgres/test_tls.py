"""TLS to Redis and Postgres: certificates are checked, and nothing falls back to plain text."""

from pathlib import Path
from urllib.parse import urlsplit

import pytest
from pydantic import SecretStr

from billing.errors import InputError, PostgresUnavailableError, RedisUnavailableError
from billing.postgres.database import Database
from billing.redis.pipeline import RedisPipe
from config.settings import PostgresSettings, RedisSettings
from tests.support.tls_proxy import Authority, tls_before


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder, "authority")


@pytest.fixture(scope="module")
def stranger(folder: Path) -> Authority:
    return Authority(folder, "stranger")


async def ping(url: str, ca_file: str = "") -> None:
    pipe = RedisPipe(RedisSettings(url=SecretStr(url), ca_file=ca_file, timeout_s=3))
    try:
        assert await pipe.run("PING") == b"PONG"
    finally:
        await pipe.close()


async def test_redis(redis_url: str, authority: Authority, stranger: Authority) -> None:
    plain = urlsplit(redis_url)

    def there(port: int, host: str = "127.0.0.1") -> str:
        return f"rediss://:{plain.password}@{host}:{port}/0"

    async with tls_before(redis_url, authority.context_for("127.0.0.1")) as port:
        await ping(there(port), authority.file)
        with pytest.raises(
            RedisUnavailableError, match="its certificate is not accepted: unable to get local issuer"
        ):
            await ping(there(port), stranger.file)
        with pytest.raises(RedisUnavailableError, match="its certificate is not accepted"):
            await ping(there(port))  # whom the system trusts
        with pytest.raises(RedisUnavailableError, match="certificate is not accepted: Hostname mismatch"):
            await ping(there(port, "localhost"), authority.file)
        with pytest.raises(RedisUnavailableError):
            await ping(there(port).replace("rediss", "redis"))
    async with tls_before(redis_url, authority.context_for("other.example")) as port:
        with pytest.raises(RedisUnavailableError, match="certificate is not accepted: IP address mismatch"):
            await ping(there(port), authority.file)
    # A server without TLS is not spoken to in plain.
    with pytest.raises(RedisUnavailableError):
        await ping(redis_url.replace("redis://", "rediss://"), authority.file)


async def test_redis_settings_that_cannot_be_meant(
    redis_url: str, authority: Authority, folder: Path
) -> None:
    with pytest.raises(InputError, match="TUMA_REDIS__CA_FILE is set, but"):
        await ping(redis_url, authority.file)
    encrypted = redis_url.replace("redis://", "rediss://")
    with pytest.raises(InputError, match="TUMA_REDIS__CA_FILE cannot be used: No such file"):
        await ping(encrypted, str(folder / "nowhere.pem"))
    (folder / "garbage.pem").write_text("garbage")
    with pytest.raises(InputError, match="TUMA_REDIS__CA_FILE cannot be used"):
        await ping(encrypted, str(folder / "garbage.pem"))


async def ask(dsn: str) -> None:
    database = Database(PostgresSettings(dsn=SecretStr(dsn)))
    try:
        async with database.connection() as connection:
            assert await connection.fetchval("SELECT 1") == 1
        alone = await database.connect_alone()
        await alone.close()
    finally:
        await database.close()


async def test_postgres(dsn: str, authority: Authority, stranger: Authority) -> None:
    plain = urlsplit(dsn)

    def there(port: int, options: str, host: str = "127.0.0.1") -> str:
        return plain._replace(
            netloc=f"{plain.username}:{plain.password}@{host}:{port}", query=options
        ).geturl()

    full = f"sslmode=verify-full&sslrootcert={authority.file}"
    async with tls_before(dsn, authority.context_for("127.0.0.1"), postgres=True) as port:
        await ask(there(port, full))
        await ask(there(port, "sslmode=require"))
        for options, host, why in (
            (f"sslmode=verify-full&sslrootcert={stranger.file}", "127.0.0.1", "unable to get local issuer"),
            (full, "localhost", "Hostname mismatch"),
        ):
            with pytest.raises(PostgresUnavailableError, match=f"its certificate is not accepted: {why}"):
                await ask(there(port, options, host))
    # The embedded server has no TLS: it is not spoken to in plain where TLS is demanded.
    for options in (full, "sslmode=require"):
        with pytest.raises(PostgresUnavailableError, match="does not speak TLS"):
            await ask(plain._replace(query=options).geturl())


async def test_postgres_settings_that_cannot_be_meant(dsn: str) -> None:
    with pytest.raises(InputError, match="sslrootcert names no file"):
        await ask(f"{dsn}?sslmode=verify-full&sslrootcert=/nowhere.pem")
    with pytest.raises(InputError, match="sslmode"):
        await ask(f"{dsn}?sslmode=perhaps")
