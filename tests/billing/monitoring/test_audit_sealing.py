"""When blocks are sealed, by whom, and what runs beside it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from billing.monitoring.audit import Audit
from config.settings import Settings
from scripts.office import Office
from tests.billing.monitoring.audit_log import Log
from tests.support.running import run_proxy


async def test_a_row_that_commits_late_is_sealed_late(log: Log, dsn: str) -> None:
    """Number 1 is drawn before number 2, and committed after it: no block may pass it by."""
    slow, fast = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
    write = "SELECT write_audit('created', 'test', '', NULL, NULL, NULL, NULL)"
    try:
        transaction = slow.transaction()
        await transaction.start()
        await slow.execute(write)
        await fast.execute(write)
        began = time.monotonic()
        assert await log.audit.seal() == 0, "it waits, a bounded time"
        assert 0.25 <= time.monotonic() - began < 3
        sealing = asyncio.create_task(log.audit.seal())
        await asyncio.sleep(0.1)
        await transaction.commit()
        assert await sealing == 1
    finally:
        await slow.close()
        await fast.close()
    verdict = await log.audit.verify()
    assert (verdict.ok, verdict.rows, verdict.blocks) == (True, 2, 1)
    async with log.office.database.transaction(isolation="repeatable_read") as connection:
        with pytest.raises(asyncpg.InvalidTransactionStateError):  # its snapshot is older than the lock
            await connection.execute("SELECT seal_audit()")


async def test_writers_and_sealers_at_once(log: Log, dsn: str) -> None:
    async def write(number: int) -> None:
        connection = await asyncpg.connect(dsn)
        for turn in range(25):
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute("SELECT write_audit('created', 'test', '', NULL, NULL, NULL, NULL)")
            await asyncio.sleep(0.001 * ((turn + number) % 3))
            await (transaction.rollback() if (turn + number) % 5 == 0 else transaction.commit())
        await connection.close()

    async def seal() -> int:
        sealed = 0
        for _ in range(15):
            sealed += await log.audit.seal()
            await asyncio.sleep(0.002)
        return sealed

    done = await asyncio.gather(*(write(number) for number in range(6)), seal(), seal())
    verdict = await log.audit.verify()
    assert verdict.ok, verdict.as_json()
    assert (verdict.rows, verdict.unsealed) == (120, 0)
    assert verdict.blocks >= sum(count or 0 for count in done) > 2


async def test_a_running_server_seals(log: Log, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.routines._SEAL_PERIOD_S", 0.1)
    await log.write(3)
    async with run_proxy(settings), asyncio.timeout(10):
        async with log.office.database.connection() as connection:
            while not await connection.fetchval("SELECT count(*) FROM audit_blocks"):
                await asyncio.sleep(0.05)
    assert (await log.audit.verify()).unsealed == 0


async def test_who_may_only_read_verifies_all_the_same(log: Log, office: Office, dsn: str) -> None:
    await log.write(3)
    async with office.database.connection() as connection:
        await connection.execute(
            "DROP ROLE IF EXISTS test_auditor; CREATE ROLE test_auditor LOGIN;"
            " GRANT tuma_audit TO test_auditor"
        )
        try:
            await connection.execute("SET ROLE test_auditor")
            for statement in (
                "SELECT write_audit('', '', '', NULL, NULL, NULL, NULL)",
                "SELECT seal_audit()",
            ):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await connection.execute(statement)
            reader = Reader(connection)
            verdict = await Audit(reader).verify()  # type: ignore[arg-type]
            assert (verdict.ok, verdict.unsealed, verdict.head) == (True, 3, None)
        finally:
            await connection.execute("RESET ROLE; DROP OWNED BY test_auditor; DROP ROLE test_auditor")


class Reader:
    """A database of one connection."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Any]:
        yield self._connection

    session = connection
