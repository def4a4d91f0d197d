"""A mirror that another primary has filled is cold: a promoted replica may lack the last writes of the old one."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from redis.asyncio import Redis

from billing.errors import InsufficientFundsError, WalletFrozenError
from billing.holds.hold import shard_of
from billing.holds.holds import Holds
from billing.redis.pipeline import RedisPipe
from config.settings import HoldSettings, RedisSettings
from scripts.office import Office
from scripts.programs.embedded import EmbeddedRedis
from tests.billing.holds.test_holds import available, hold_of
from tests.support.payers import Payer, make_payer
from tests.support.redis_cluster import wait_for_async
from tests.support.servers import DEBIAN_REDIS

NANO = 10**9


@pytest.fixture(scope="module")
def replica_server(folder: Path, request: pytest.FixtureRequest) -> Iterator[EmbeddedRedis]:
    program = DEBIAN_REDIS if request.config.getoption("--servers") == "debian" else None
    with EmbeddedRedis(folder / "redis-replica", program=program) as server:
        yield server


@pytest.fixture
async def replica(replica_server: EmbeddedRedis, redis_server: Any, redis_url: str) -> AsyncIterator[Any]:
    """A replica in step with the tests' Redis; ``REPLICAOF NO ONE`` promotes it."""
    if not isinstance(redis_server, EmbeddedRedis):
        pytest.skip("the replica must reach the server with a password of its own making")
    client: Any = Redis.from_url(replica_server.url)
    password = redis_url.partition("//:")[2].partition("@")[0]
    await client.config_set("masterauth", password)
    await client.execute_command("REPLICAOF", "127.0.0.1", redis_server.port)

    async def in_step() -> bool:
        role = await client.role()
        return bool(role[0] == b"slave" and role[3] == b"connected")

    await wait_for_async(in_step)
    yield client
    await client.execute_command("REPLICAOF", "NO", "ONE")
    await client.aclose()


async def promote(office: Office, replica: Any) -> None:
    """Let it have all writes until now, and none after."""
    primary: Any = Redis.from_url(office.settings.redis.url.get_secret_value())
    assert await primary.wait(1, 5000) == 1
    await primary.aclose()
    await replica.execute_command("REPLICAOF", "NO", "ONE")


@pytest.fixture
async def successor(office: Office, replica_server: EmbeddedRedis) -> AsyncIterator[Holds]:
    """Holds on the replica."""
    pipe = RedisPipe(RedisSettings(url=SecretStr(replica_server.url)))
    yield Holds(pipe, HoldSettings(), office.holds._read_mirror)
    await pipe.close()


async def make_other(office: Office, payer: Payer) -> None:
    """As if another primary had filled the mirror."""
    key = f"tuma:{{s{shard_of(payer.user_id):02d}}}:u:{payer.user_id}"
    assert await office.pipe.run("HSET", key, "lineage", "f" * 40) == 0


async def test_a_promoted_replica_admits_by_postgres_not_by_what_it_inherited(
    office: Office, replica: Any, successor: Holds
) -> None:
    payer = await make_payer(office, amount="1", overdraft="9")
    await office.holds.reserve(hold_of(payer, NANO))
    await promote(office, replica)
    # What the old primary is told now is lost: the wallet has less, and its mirror was dropped there.
    await office.wallets.set_wallet(payer.wallet_id, overdraft_nano=0)
    await office.cool(payer.wallet_id)
    assert await successor.find_available(payer.user_id, payer.wallet_id) is None
    assert await successor.read_mirror(payer.user_id) == {}
    with pytest.raises(InsufficientFundsError):
        await successor.look(hold_of(payer, 5 * NANO))
    with pytest.raises(InsufficientFundsError):
        await successor.reserve(hold_of(payer, 5 * NANO))
    await successor.reserve(hold_of(payer, NANO))
    assert await successor.find_available(payer.user_id, payer.wallet_id) == 0


async def test_a_freeze_that_the_replica_did_not_hear_of_holds(
    office: Office, replica: Any, successor: Holds
) -> None:
    payer = await make_payer(office)
    hold = hold_of(payer, NANO)
    await office.holds.reserve(hold)
    await promote(office, replica)
    await office.wallets.set_wallet(payer.wallet_id, status="frozen", reason="lost")
    await office.cool(payer.wallet_id)
    with pytest.raises(WalletFrozenError):
        await successor.reserve(hold_of(payer, NANO))
    assert not await successor.extend(hold, 2 * NANO)


async def test_a_right_to_fill_is_not_inherited(office: Office, replica: Any, successor: Holds) -> None:
    """Somebody was filling; that their snapshot had become old was told to the old primary only."""
    payer = await make_payer(office)
    hold = hold_of(payer, NANO)
    keys = [f"tuma:{{s{shard_of(payer.user_id):02d}}}:{kind}:{payer.user_id}" for kind in "uf"]
    assert await office.pipe.call(office.holds._claim, keys[1:], ("mine",)) == 1
    await promote(office, replica)
    await office.cool(payer.wallet_id)
    args = ("mine", 1000, f"available:{payer.wallet_id}", "999")
    assert await successor._pipe.call(successor._fill, keys, args) == 0
    await successor.reserve(hold)  # and it keeps nobody from filling
    assert await successor.find_available(payer.user_id, payer.wallet_id) == 9 * NANO


async def test_a_hold_in_a_mirror_of_another_lineage_is_extended_by_postgres(office: Office) -> None:
    payer = await make_payer(office, amount="2", overdraft="8")
    hold = hold_of(payer, NANO)
    await office.holds.reserve(hold)
    await make_other(office, payer)
    await office.wallets.set_wallet(payer.wallet_id, overdraft_nano=0)
    assert not await office.holds.extend(hold, 3 * NANO)
    assert await office.holds.extend(hold, 2 * NANO)
    assert await available(office, payer) == 0


async def test_a_mirror_of_another_lineage_bears_what_calls_in_flight_do_to_it(office: Office) -> None:
    """It is dropped by the next admission, whatever a renewal or a release did to it before."""
    payer = await make_payer(office, amount="10")
    first, second = hold_of(payer, NANO), hold_of(payer, NANO)
    await office.holds.reserve(first)
    await office.holds.reserve(second)
    await make_other(office, payer)
    assert await office.holds.renew(first) == "renewed"
    assert await office.holds.release(second, charge_nano=0) == "released"
    assert await available(office, payer) is None
    await office.holds.reserve(hold_of(payer, NANO))
    assert (
        await available(office, payer) == 9 * NANO
    )  # the first is not open in Postgres, which knows nothing of it
    assert await office.holds.renew(first) == "restored"
    assert await available(office, payer) == 8 * NANO
