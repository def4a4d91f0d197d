"""Sums for people come from a replica that follows closely, and say of when; else from the primary. A real one, that streams."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
from pydantic import SecretStr

from billing.errors import InputError, NotFoundError, PostgresUnavailableError
from billing.postgres.database import Database
from billing.postgres.replica import Late
from billing.reports.revenue import describe_revenue
from billing.reports.usage import UsageBook, UsageQuery
from config.settings import Settings
from scripts.cli.doctor import _ask_replica, _finding
from scripts.cli.usage import show_usage
from scripts.office import Office, open_office
from scripts.programs.embedded import EmbeddedPostgres
from tests.proxy.account.test_keys import Client
from tests.support.books import check_books
from tests.support.payers import make_payer, sync_models
from tests.support.running import run_proxy
from tests.support.servers import DEBIAN_POSTGRES, OwnPostgres

PAUSE_S = 0.3
TOKEN = "the operator's token, long enough"


class Replica(EmbeddedPostgres):
    """A copy of a server that follows it."""

    def follow(self, primary: EmbeddedPostgres) -> None:
        """Copy it, as its operator would; the copy starts as a standby."""
        self.data_dir.mkdir(parents=True)
        if os.geteuid() == 0:
            self._step_down()
        shutil.copy2(primary._password_file, self._password_file)
        source = primary.dsn("postgres")
        done = subprocess.run(
            [
                self._bin / "pg_basebackup",
                *("-d", source, "-D", self._cluster, "-R", "-X", "stream", "--checkpoint=fast", "--no-sync"),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        self._cluster.chmod(0o700)
        self.start()

    async def run(self, statement: str) -> Any:
        connection = await asyncpg.connect(self.dsn("postgres"))
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close()


@pytest.fixture
async def replica(
    dsn: str, postgres: EmbeddedPostgres | OwnPostgres, folder: Path, request: pytest.FixtureRequest
) -> AsyncIterator[Replica]:
    if not isinstance(postgres, EmbeddedPostgres):
        pytest.skip("needs the programs of the server")
    programs = DEBIAN_POSTGRES if request.config.getoption("--servers") == "debian" else None
    place = folder / "replica"
    server = Replica(place, fast=True, programs=programs)
    try:
        await asyncio.to_thread(server.follow, postgres)
        yield server
    finally:
        server.stop()
        shutil.rmtree(place, ignore_errors=True)


def beside(settings: Settings, replica: Replica, **more: Any) -> Settings:
    """Settings with the replica in them; its DSN names somebody else, who is never asked for."""
    name = settings.postgres.dsn.get_secret_value().rpartition("/")[2]
    where = SecretStr(f"postgresql://nobody:else@127.0.0.1:{replica.port}/{name}")
    told = {"replica_dsn": where, "replica_lag_s": 60.0, "replica_pause_s": PAUSE_S, **more}
    return settings.model_copy(
        update={
            "postgres": settings.postgres.model_copy(update=told),
            "admin": settings.admin.model_copy(update={"token": SecretStr(TOKEN)}),
        }
    )


class Reader:
    """Asks a proxy for sums."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, secret: str) -> None:
        self._session = session
        self._base_url = base_url
        self._secret = secret

    async def ask(self, path: str, secret: str | None = None) -> tuple[Any, str | None]:
        """Return the body, and since when it may not know everything."""
        head = {"Authorization": f"Bearer {secret or self._secret}"}
        async with self._session.get(self._base_url + path, headers=head) as response:
            assert response.status == 200, await response.text()
            body = await (response.json() if response.content_type.endswith("json") else response.text())
            return body, response.headers.get("x-tuma-as-of")

    async def calls(self) -> tuple[int, bool]:
        """Return how many calls there were, and whether a replica said so."""
        body, as_of = await self.ask("/v1/usage")
        return int(body["totals"]["calls"]), as_of is not None

    async def wait_for(self, wanted: tuple[int, bool]) -> None:
        async with asyncio.timeout(30):
            while await self.calls() != wanted:
                await asyncio.sleep(0.05)


async def asks_what_it_has_not_heard(
    replica: Replica, reader: Reader, call: Callable[[], Awaitable[None]]
) -> None:
    """It is the replica that answers: what it has not heard of is not in the sum, and the answer says of when it is."""
    await replica.run("SELECT pg_wal_replay_pause()")
    async with asyncio.timeout(10):
        while await replica.run("SELECT pg_get_wal_replay_pause_state()") != "paused":
            await asyncio.sleep(0.02)
    before, as_of = await reader.ask("/v1/usage")
    await call()
    body, later = await reader.ask("/v1/usage")
    assert (body["totals"]["calls"], later) == (1, as_of), "the number of before, and of when it is"
    assert body["totals"] == before["totals"]
    month = f"{datetime.fromisoformat(str(as_of)):%Y-%m}"
    for path in ("/v1/usage?format=csv", f"/v1/wallet/statements/{month}"):
        assert (await reader.ask(path))[1] == as_of, path
    assert (await reader.ask("/admin/revenue", TOKEN))[0]["as_of"] == as_of
    # A person sees their own rows alone, there as here; what a decision hangs on is never of before.
    for path in ("/v1/wallet", "/v1/wallet/transactions", "/v1/calls", "/v1/wallet/caps"):
        assert (await reader.ask(path))[1] is None, path
    assert len((await reader.ask("/v1/calls"))[0]["data"]) == 2


async def test_sums_come_from_the_replica_and_say_of_when(
    settings: Settings, office: Office, replica: Replica
) -> None:
    await sync_models(office)
    payer = await make_payer(office)
    told = beside(settings, replica)
    async with run_proxy(told) as running, aiohttp.ClientSession() as session:
        client = Client(session, running.base_url, payer.secret)
        reader = Reader(session, running.base_url, payer.secret)

        async def call() -> None:
            assert await client.call() == 200
            await running.quiet()

        await call()
        await reader.wait_for((1, True))
        reads = running.services.usage._late._meters.replica_reads.values

        await asks_what_it_has_not_heard(replica, reader, call)
        # Somebody of whom the replica has not heard is no stranger.
        other = await make_payer(office)
        body, as_of = await reader.ask("/v1/usage", other.secret)
        assert (body["totals"]["calls"], as_of) == (0, None)
        assert reads[("unknown",)] == 1

        await replica.run("SELECT pg_wal_replay_resume()")
        await reader.wait_for((2, True))
        body, as_of = await reader.ask("/v1/usage", other.secret)
        assert (body["totals"]["calls"], as_of is None) == (0, False), (
            "another's calls are not shown there either"
        )

        # Killed: the primary answers.
        replica.kill()
        await call()
        assert await reader.calls() == (3, False)
        assert reads[("away",)] == 1
        await asyncio.sleep(0)
        assert await reader.calls() == (3, False)
        assert reads[("away",)] == 2
        replica.start()
        await reader.wait_for((3, True))

        # Promoted, it goes its own way, and is no replica any more.
        await replica.run("SELECT pg_promote()")
        await call()
        await reader.wait_for((4, False))
        assert reads[("no_replica",)] >= 1
    await check_books(office)


async def test_a_replica_too_far_behind_is_not_asked(
    settings: Settings, office: Office, replica: Replica
) -> None:
    payer = await make_payer(office)
    told = beside(settings, replica, replica_lag_s=0.5, replica_pause_s=0.05)
    async with open_office(told) as both:
        book = UsageBook(both.late)

        async def as_of() -> datetime | None:
            return (await book.read_wallet(payer.wallet_id, UsageQuery())).as_of

        async def commit() -> None:
            await office.wallets.credit(payer.wallet_id, 1, reason="a commit")

        async with asyncio.timeout(30):  # while there are commits, it is asked
            while await as_of() is None:
                await commit()
        shown = await show_usage(
            both, wallet=None, user=str(payer.user_id), since=None, until=None, by="model"
        )
        revenue = await describe_revenue(both.late)
        ok, said = await _ask_replica(both)
        assert ok
        assert "its latest commit is" in said
        await replica.run("SELECT pg_wal_replay_pause()")
        async with asyncio.timeout(30):  # it receives, and does not follow
            while await as_of() is not None:
                await commit()
        now = await describe_revenue(both.late)
        assert now["as_of"] is None
        assert both.late._unfit == "behind"
        for told_of in (shown["as_of"], revenue["as_of"]):
            assert told_of is None or datetime.fromisoformat(told_of).tzinfo is not None
        with pytest.raises(NotFoundError):
            await book.read_wallet(payer.key_id, UsageQuery())


async def test_what_the_replica_cannot_do_the_primary_does(
    settings: Settings, office: Office, replica: Replica
) -> None:
    told = beside(settings, replica)
    asked = []

    async def conflict(_connection: Any, as_of: datetime | None) -> str:
        asked.append(as_of)
        if as_of is not None:
            raise asyncpg.SerializationError("canceling statement due to conflict with recovery")
        return "done"

    async def refuse(_connection: Any, as_of: datetime | None) -> str:
        asked.append(as_of)
        raise InputError("too many rows")

    async with open_office(told) as both:
        async with asyncio.timeout(30):  # until it has seen a commit
            while len(asked) < 2:
                asked.clear()
                await make_payer(office)
                assert await both.late.read(conflict) == "done"
        assert [as_of is None for as_of in asked] == [False, True]
        asked.clear()
        with pytest.raises(InputError, match="too many rows"):
            await both.late.read(refuse)
        assert len(asked) == 1, "what the caller asked for wrongly is not asked for again"

    hasty = beside(settings, replica, replica_pause_s=60.0)
    async with open_office(hasty) as both:
        gone = Gone(hasty.postgres)
        late = Late(both.database, gone)
        for _ in range(3):
            assert await late.read(conflict) == "done"
        assert gone.asked == 1, "one that is away is not asked again for a while"

    where = told.postgres.replica_dsn.get_secret_value()
    nowhere = SecretStr(where.rpartition("/")[0] + "/not_there")
    async with open_office(beside(settings, replica, replica_dsn=nowhere)) as both:
        assert await both.late.read(conflict) == "done"
        assert both.late._unfit == "refused"
        ok, said = await _finding_of(both)
        assert not ok
        assert "TUMA_POSTGRES__REPLICA_DSN cannot be used" in said
    with pytest.raises(InputError, match="TUMA_POSTGRES__REPLICA_DSN is not of the form"):
        async with open_office(beside(settings, replica, replica_dsn=SecretStr("replica:5432"))):
            pass


class Gone(Database):
    """A replica that is away, and counts who asks."""

    asked = 0

    def transaction(self, **_: object) -> Any:
        self.asked += 1
        raise PostgresUnavailableError("away")


async def _finding_of(office: Office) -> tuple[bool, str]:
    found = await _finding("replica", _ask_replica(office))
    return found["ok"], found["detail"]
