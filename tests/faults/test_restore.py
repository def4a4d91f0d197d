"""The drill of docs/operations.md: a dump, a disaster, another server, and books that hold again."""

import asyncio
import subprocess
from pathlib import Path

import aiohttp
import asyncpg
import pytest

from billing.books.reconcile import Reconciler
from billing.calls.sweeper import Sweeper
from billing.identity.keys import Keys
from billing.monitoring.audit import Audit
from billing.postgres.database import Database
from billing.postgres.migrate import migrate
from config.settings import Settings
from scripts.office import Office, open_office
from scripts.programs.embedded import EmbeddedPostgres
from scripts.sim.provider import SimulatedProvider
from tests.proxy.account.test_keys import CHAT, Client
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, sync_models
from tests.support.running import run_proxy
from tests.support.servers import DEBIAN_POSTGRES, OwnPostgres


def run_program(server: EmbeddedPostgres, name: str, *arguments: str) -> None:
    done = subprocess.run(
        [server._bin / name, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


async def test_a_restored_backup(
    settings: Settings,
    office: Office,
    postgres: EmbeddedPostgres | OwnPostgres,
    sim: SimulatedProvider,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    if not isinstance(postgres, EmbeddedPostgres):
        pytest.skip("needs the programs of the server")
    await sync_models(office)
    payer = await make_payer(office)
    dump = tmp_path / "tuma.dump"
    kept = await dump_amid_calls(settings, office, postgres, payer, dump)
    programs = DEBIAN_POSTGRES if request.config.getoption("--servers") == "debian" else None
    with EmbeddedPostgres(tmp_path / "other", fast=True, programs=programs) as other:
        restored = await restore(settings, other, dump)
        async with open_office(restored) as there:
            assert (await there.wallets.get_wallet(payer.wallet_id)).held_nano > 0, "a call was under way"
            await put_right(there, payer, settings)
            checks = await check_books(there)
            assert (await Audit(there.database).verify()).ok
            async with there.database.connection() as connection:
                lost = await connection.fetchval(
                    "SELECT -sum(e.amount_nano) FROM journal_entry e WHERE e.account = 'house_loss'"
                )
            wallet = await there.wallets.get_wallet(payer.wallet_id)
            assert lost > 0, "what came after the backup the provider billed, and nobody's wallet paid"
            assert wallet.posted_nano <= kept
            assert checks["I8"].ok
        async with run_proxy(restored) as running, aiohttp.ClientSession() as session:
            client = Client(session, running.base_url, payer.secret)
            assert await client.call() == 200, "the revocation came after the backup: it must be repeated"


async def dump_amid_calls(
    settings: Settings, office: Office, postgres: EmbeddedPostgres, payer: Payer, dump: Path
) -> int:
    """Dump while a call is under way; more calls and a revocation come after. Return what the wallet had before, in nano."""
    async with run_proxy(settings) as running, aiohttp.ClientSession() as session:
        client = Client(session, running.base_url, payer.secret)
        for _ in range(3):
            assert await client.call() == 200
        await running.quiet()
        kept = (await office.wallets.get_wallet(payer.wallet_id)).posted_nano
        body = {**CHAT, "stream": True, "sim": {"chunks": 100, "chunk_delay_ms": 20}}
        head = {"Authorization": f"Bearer {payer.secret}"}
        url = running.base_url + "/v1/chat/completions"
        async with session.post(url, json=body, headers=head) as response:
            await response.content.readany()
            dsn = settings.postgres.dsn.get_secret_value()
            await asyncio.to_thread(run_program, postgres, "pg_dump", "-Fc", "-f", str(dump), dsn)
            await response.read()
        for _ in range(2):
            assert await client.call() == 200
        await running.quiet()
        await Keys(office.database, settings.auth, settings.limits).revoke(payer.key_id)
    return kept


async def restore(settings: Settings, other: EmbeddedPostgres, dump: Path) -> Settings:
    """Restore a dump on another server; return the settings of a house there."""
    other.create_database("scratch")
    await _migrate(settings, other.dsn("scratch"))  # the roles belong to the server, not to the dump
    await asyncio.to_thread(run_program, other, "pg_restore", "--exit-on-error", "-d", other.dsn(), str(dump))
    await _migrate(settings, other.dsn())
    postgres = settings.postgres.model_copy(update={"dsn": _secret(other.dsn())})
    return settings.model_copy(update={"postgres": postgres})


async def put_right(there: Office, payer: Payer, settings: Settings) -> None:
    """What the drill says to do: forget Redis, go past the events that were told, sweep, reconcile."""
    await there.pipe.run("FLUSHALL")
    async with there.database.connection() as connection:
        await connection.execute(
            "SELECT setval(pg_get_serial_sequence('events', 'id'),"
            " (SELECT coalesce(max(id), 0) + 10000000 FROM events))"
        )
    async with asyncio.timeout(60):  # until the lease of the worker that is no more has ended
        sweeper = Sweeper(there.database, there.holds, there.upstream, settings.sweep)
        while (await there.wallets.get_wallet(payer.wallet_id)).held_nano:
            await sweeper.sweep()
            await asyncio.sleep(0.2)
    await Reconciler(there.database, there.upstream, settings.reconcile).run()


def _secret(text: str) -> object:
    from pydantic import SecretStr

    return SecretStr(text)


async def _migrate(settings: Settings, dsn: str) -> None:
    database = Database(settings.postgres.model_copy(update={"dsn": _secret(dsn)}))
    await migrate(database)
    await database.close()
    connection = await asyncpg.connect(dsn)
    assert await connection.fetchval("SELECT count(*) FROM pg_roles WHERE rolname LIKE 'tuma_%'") == 8
    await connection.close()
