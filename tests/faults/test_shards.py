"""What a shard of Redis that is away, or wrong, does to the others: nothing."""

import asyncio
from collections.abc import Iterable
from typing import Any

import aiohttp
import pytest

from billing.books.opening_balance import record_openings
from billing.calls.sweeper import Sweeper
from billing.errors import RedisUnavailableError
from billing.holds.hold import shard_of
from billing.holds.holds import Holds
from billing.redis.client import RedisWay
from billing.redis.connection import Argument
from billing.redis.pipeline import RedisPipe, Script
from scripts.office import Office
from tests.billing.calls.test_sweeper import Abandoned
from tests.faults.test_kill import MODEL
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, sync_models
from tests.support.running import Running

NANO = 10**9


class Lame(RedisPipe):
    """A link to Redis on which one shard is away."""

    def __init__(self, way: RedisWay, shard: int) -> None:
        self._way = way
        self._away = f"{{s{shard:02d}}}"

    async def run(self, *command: Argument) -> Any:
        self._look_at(str(command[1]))
        return await self._way.run(*command)

    async def call(self, script: Script, keys: Iterable[str], args: Iterable[Argument]) -> Any:
        names = tuple(keys)
        self._look_at(names[0])
        return await self._way.call(script, names, args)

    def _look_at(self, key: str) -> None:
        if self._away in key:
            raise RedisUnavailableError("Redis is unavailable: played")


async def payers_of_two_shards(office: Office) -> tuple[Payer, Payer]:
    first = await make_payer(office)
    while True:
        second = await make_payer(office)
        if shard_of(second.user_id) != shard_of(first.user_id):
            return first, second


async def test_calls_of_a_shard_that_is_there_are_swept(office: Office) -> None:
    await sync_models(office)
    await record_openings(office.database, office.upstream)
    lost, other = (Abandoned(office, payer) for payer in await payers_of_two_shards(office))
    stale = Abandoned(office, other.payer)
    await lost.leave()
    await other.leave()
    await office.holds.reserve(stale.hold)  # its worker died before it was open
    settings = office.settings.sweep
    holds = Holds(
        Lame(office.pipe, shard_of(lost.payer.user_id)), office.settings.holds, office.holds._read_mirror
    )
    sweeper = Sweeper(office.database, holds, office.upstream, settings)
    await asyncio.sleep(office.settings.holds.lease_s + 0.2)
    with pytest.raises(RedisUnavailableError):
        await sweeper.sweep()
    assert (await other.row())["state"] == "void"
    assert (await lost.row())["state"] == "open"
    assert [lease.call_id for lease in await office.holds.find_leases(expired=False, limit=9)] == [
        lost.call_id
    ]
    counts = await Sweeper(office.database, office.holds, office.upstream, settings).sweep()
    assert counts is not None
    assert counts.void == 1
    await check_books(office)


class Numbered(int):
    """Stands for a call in flight."""

    epoch, is_lost = 0, False


async def test_leases_are_renewed_on_the_shards_that_are_there(
    proxy: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While all of Redis is away nobody waits for one failure after the other."""
    calls, renewed = proxy.services.calls, list[Any]()
    away = {number for number in range(500) if number % 3 == 0}

    async def renew(number: Any) -> None:
        renewed.append(number)
        if number in away:
            raise RedisUnavailableError("Redis is unavailable: played")

    with monkeypatch.context() as patched:
        patched.setattr(calls.leases, "_renew", renew)
        patched.setattr(calls.leases, "_live", {number: Numbered(number) for number in range(500)})
        await calls.leases._renew_calls()
        assert renewed == list(range(500))
        renewed.clear()
        away.update(range(500))
        await calls.leases._renew_calls()
    assert renewed == list(range(100))


@pytest.mark.parametrize("told", [{}, {"fail_status": 500}], ids=["billed", "not billed"])
async def test_a_mirror_that_postgres_belies_is_dropped(
    proxy: Running, office: Office, told: dict[str, Any]
) -> None:
    """Whatever made it admit too much, it does so to the calls of one moment only."""
    payer = await make_payer(office, amount="0.00001")
    key = f"tuma:{{s{shard_of(payer.user_id):02d}}}:u:{payer.user_id}"
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    headers = {"Authorization": f"Bearer {payer.secret}"}

    async def call(session: aiohttp.ClientSession, **more: Any) -> int:
        async with session.post(f"{proxy.base_url}/v1/chat/completions", json={**body, **more}) as response:
            await response.read()
            return response.status

    async with aiohttp.ClientSession(headers=headers) as session:
        assert await call(session, max_tokens=1) == 200
        await proxy.quiet()
        await office.pipe.run("HINCRBY", key, f"available:{payer.wallet_id}", str(NANO))
        assert await call(session, max_tokens=1000, sim=told) in (402, 502)
        await proxy.quiet()
        assert await office.holds.find_available(payer.user_id, payer.wallet_id) is None
        await check_books(office)
