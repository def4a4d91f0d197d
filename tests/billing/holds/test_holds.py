"""Holds in real Redis: admission, leases, mirrors that come and go."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import pytest
import uvloop
from pydantic import SecretStr
from redis.asyncio import Redis

from billing.calls.ledger import Ledger
from billing.calls.outcome import Ending
from billing.errors import InsufficientFundsError, RateLimitError, RedisUnavailableError, WalletFrozenError
from billing.holds.hold import Hold, _mirror_keys, shard_of
from billing.holds.holds import Holds
from billing.ids import new_id
from billing.limits import Limits
from billing.money import NANO
from billing.pricing.cost import Usage
from billing.redis.connection import Command, RedisLink
from billing.redis.pipeline import RedisPipe, load_script
from config.settings import HoldSettings, RedisSettings
from scripts.office import Office
from tests.billing.calls.test_ledger import opening
from tests.support.payers import Payer, make_payer
from tests.support.tcp_proxy import TcpProxy

WIDE = Limits(requests_per_min=1_000_000, tokens_per_min=10**9)


def hold_of(payer: Payer, amount_nano: int, *, limits: Limits = WIDE, tokens: int = 10) -> Hold:
    return Hold(new_id(), payer.user_id, payer.wallet_id, payer.key_id, amount_nano, tokens, limits)


async def available(office: Office, payer: Payer) -> int | None:
    return await office.holds.find_available(payer.user_id, payer.wallet_id)


async def test_a_hold_is_taken_and_given_back(office: Office) -> None:
    payer = await make_payer(office)
    hold = hold_of(payer, 3 * NANO)
    state = await office.holds.reserve(hold)
    assert await available(office, payer) == 7 * NANO
    assert state.remaining_requests == WIDE.requests_per_min - 1
    assert await office.holds.reserve(hold) is not None
    assert await available(office, payer) == 7 * NANO, "the same call holds once"
    assert await office.holds.release(hold, charge_nano=1 * NANO) == "released"
    assert await available(office, payer) == 9 * NANO
    assert await office.holds.release(hold, charge_nano=1 * NANO) == "cold", (
        "a forgotten hold never credits twice"
    )
    assert await available(office, payer) is None


async def test_refusals_change_nothing(office: Office) -> None:
    payer = await make_payer(office, amount="1")
    with pytest.raises(InsufficientFundsError):
        await office.holds.reserve(hold_of(payer, NANO + 1))
    assert await available(office, payer) == NANO
    narrow = Limits(requests_per_min=1, tokens_per_min=100)
    await office.holds.reserve(hold_of(payer, 1, limits=narrow))
    with pytest.raises(RateLimitError) as caught:
        await office.holds.reserve(hold_of(payer, 1, limits=narrow))
    assert 50_000 < caught.value.retry_after_ms <= 60_000
    with pytest.raises(RateLimitError):
        await office.holds.reserve(hold_of(payer, 1, limits=Limits(10**6, 100), tokens=101))
    single = Limits(10**6, 10**9, calls_in_flight=1)
    other = await make_payer(office)
    first = hold_of(other, 1, limits=single)
    await office.holds.reserve(first)
    with pytest.raises(RateLimitError):
        await office.holds.reserve(hold_of(other, 1, limits=single))
    await office.holds.release(first, charge_nano=0)
    await office.holds.reserve(hold_of(other, 1, limits=single))


async def test_a_frozen_wallet_holds_nothing(office: Office) -> None:
    payer = await make_payer(office)
    async with office.database.connection() as connection:
        await connection.execute("UPDATE wallets SET status = 'frozen' WHERE id = $1", payer.wallet_id)
    with pytest.raises(WalletFrozenError):
        await office.holds.reserve(hold_of(payer, 1))


async def test_integers_beyond_2_53_stay_exact(office: Office) -> None:
    amount = 2**53 + 1
    payer = await make_payer(office, amount=f"{amount // NANO}.{amount % NANO:09d}")
    hold = hold_of(payer, 2**53)
    await office.holds.reserve(hold)
    assert await available(office, payer) == 1
    with pytest.raises(InsufficientFundsError):
        await office.holds.reserve(hold_of(payer, 2))
    await office.holds.release(hold, charge_nano=2**53 - 1)
    assert await available(office, payer) == 2


async def test_overdraft_is_available(office: Office) -> None:
    payer = await make_payer(office, amount="1", overdraft="2")
    await office.holds.reserve(hold_of(payer, 3 * NANO))
    assert await available(office, payer) == 0


async def test_no_more_than_fits_is_admitted_under_any_concurrency(office: Office) -> None:
    payer = await make_payer(office, amount="10")

    async def attempt() -> bool:
        try:
            await office.holds.reserve(hold_of(payer, NANO))
        except InsufficientFundsError:
            return False
        return True

    admitted = await asyncio.gather(*(attempt() for _ in range(1000)))
    assert sum(admitted) == 10
    assert await available(office, payer) == 0


async def test_extend(office: Office) -> None:
    payer = await make_payer(office)
    hold = hold_of(payer, 4 * NANO)
    await office.holds.reserve(hold)
    assert await office.holds.extend(hold, 8 * NANO)
    assert await available(office, payer) == 2 * NANO
    assert not await office.holds.extend(hold.extended_to(8 * NANO), 11 * NANO)
    assert await available(office, payer) == 2 * NANO
    await office.holds.release(hold, charge_nano=5 * NANO)
    assert await available(office, payer) == 5 * NANO


async def flush(office: Office) -> None:
    await office.pipe.run("FLUSHALL")


async def test_a_flush_costs_nobody_anything(office: Office) -> None:
    payer = await make_payer(office)
    hold = hold_of(payer, 4 * NANO)
    await office.holds.reserve(hold)
    await flush(office)
    other = hold_of(payer, NANO)
    await office.holds.reserve(other)
    assert await available(office, payer) == 9 * NANO, (
        "the mirror comes from Postgres, which knows of no open call"
    )
    assert await office.holds.renew(hold, {"generation_id": "gen-1"}) == "restored"
    assert await available(office, payer) == 5 * NANO
    assert await office.holds.renew(hold) == "renewed"
    assert await available(office, payer) == 5 * NANO
    assert await office.holds.find_notes(payer.user_id, hold.call_id) == {"generation_id": "gen-1"}
    await office.holds.release(hold, charge_nano=0)
    assert await available(office, payer) == 9 * NANO


async def test_a_release_whose_hold_a_flush_took_is_not_charged_again(office: Office) -> None:
    """The mirror was made anew between a settlement's commit and its release: the charge is in it, the hold is not."""
    payer = await make_payer(office)
    call = opening(payer, 4 * NANO)
    hold = Hold(call.call_id, payer.user_id, payer.wallet_id, payer.key_id, 4 * NANO, 10, WIDE)
    await office.holds.reserve(hold)
    ledger = Ledger(office.database, worker_id=new_id())
    assert await ledger.open_calls([call]) == ["opened"]
    ending = Ending(
        *(call.call_id, "settled", "completed"),
        generation_id="g",
        accuracy="exact",
        cost_nanousd=NANO,
        charge_nano=NANO,
        usage=Usage(1, 1),
    )
    assert (await ledger.settle_calls([ending]))[0].won
    await flush(office)
    await office.holds.reserve(hold_of(payer, 2 * NANO))
    assert await available(office, payer) == 7 * NANO
    assert await office.holds.release(hold, charge_nano=NANO) == "cold"
    await office.holds.reserve(hold_of(payer, 2 * NANO))
    assert await available(office, payer) == 7 * NANO


async def test_a_hold_is_extended_after_a_flush(office: Office) -> None:
    payer = await make_payer(office)
    hold = hold_of(payer, 4 * NANO)
    await office.holds.reserve(hold)
    await flush(office)
    assert await office.holds.extend(hold, 6 * NANO)
    assert await available(office, payer) == 4 * NANO
    await flush(office)
    assert not await office.holds.extend(hold.extended_to(6 * NANO), 11 * NANO)


async def test_a_fill_that_was_overtaken_is_thrown_away(office: Office) -> None:
    """Between the snapshot and the fill something else settles on the cold wallet: the snapshot is stale."""
    payer = await make_payer(office)
    read = office.holds._read_mirror
    interfered: list[bool] = []

    async def slow(user_id: UUID, moment: datetime) -> Mapping[str, str]:
        snapshot = await read(user_id, moment)
        if not interfered:
            interfered.append(True)
            await office.wallets.credit(payer.wallet_id, 5 * NANO, reason="meanwhile")
            await office.holds.cool(payer.user_id)
        return snapshot

    office.holds._read_mirror = slow
    await office.holds.reserve(hold_of(payer, NANO))
    assert interfered
    assert await available(office, payer) == 14 * NANO


async def test_a_cold_wallet_is_read_once_whoever_asks(office: Office) -> None:
    """The token of a fill is set only if absent: fifty calls at once ask Postgres once."""
    payer = await make_payer(office)
    read_mirror = office.holds._read_mirror
    read: list[UUID] = []

    async def counting(user_id: UUID, moment: datetime) -> Mapping[str, str]:
        read.append(user_id)
        return await read_mirror(user_id, moment)

    holds = Holds(office.pipe, HoldSettings(), counting)
    await asyncio.gather(*(holds.reserve(hold_of(payer, NANO // 100)) for _ in range(50)))
    assert read == [payer.user_id]
    assert await available(office, payer) == 10 * NANO - 50 * (NANO // 100)


async def test_a_fill_never_overwrites_a_mirror(office: Office) -> None:
    payer = await make_payer(office)
    await office.holds.reserve(hold_of(payer, NANO))
    prefix = f"tuma:{{s{shard_of(payer.user_id):02d}}}:"
    keys = (f"{prefix}u:{payer.user_id}", f"{prefix}f:{payer.user_id}")
    claim, fill = (
        load_script("billing.holds", "claim", "lineage"),
        load_script("billing.holds", "fill", "lineage"),
    )
    assert await office.pipe.call(claim, keys[1:], ("token",)) == 1
    args = ("token", 1000, f"available:{payer.wallet_id}", "999")
    assert await office.pipe.call(fill, keys, args) == 0
    assert await available(office, payer) == 9 * NANO


async def test_redis_away_fails_closed_within_the_bound(office: Office) -> None:
    payer = await make_payer(office)
    pipe = RedisPipe(RedisSettings(url="redis://127.0.0.1:1/0", timeout_s=0.5))  # type: ignore[arg-type]
    holds = Holds(pipe, HoldSettings(), office.holds._read_mirror)
    async with asyncio.timeout(2):
        with pytest.raises(RedisUnavailableError):
            await holds.reserve(hold_of(payer, NANO))
    await pipe.close()


async def test_a_redis_that_does_not_answer_fails_closed(office: Office) -> None:
    async def silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    payer = await make_payer(office)
    pipe = RedisPipe(RedisSettings(url=f"redis://127.0.0.1:{port}/0", timeout_s=0.3))  # type: ignore[arg-type]
    holds = Holds(pipe, HoldSettings(), office.holds._read_mirror)
    async with asyncio.timeout(2):
        with pytest.raises(RedisUnavailableError):
            await holds.reserve(hold_of(payer, NANO))
    await pipe.close()
    server.close()


async def test_concurrent_commands_share_pipelines(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    send = RedisLink.send

    def counting(link: RedisLink, commands: Sequence[Command]) -> None:
        sent.append(len(commands))
        send(link, commands)

    monkeypatch.setattr(RedisLink, "send", counting)
    await asyncio.gather(*(office.pipe.run("PING") for _ in range(200)))
    assert sum(sent) == 200
    assert len(sent) <= 3


async def test_a_failover_to_an_empty_replica(office: Office, redis_url: str) -> None:
    """While the server is a replica nothing is admitted; promoted, and empty, it admits by Postgres."""
    assert isinstance(office.pipe, RedisPipe)
    payer = await make_payer(office)
    hold = hold_of(payer, 4 * NANO)
    await office.holds.reserve(hold)
    admin: Any = Redis.from_url(redis_url)
    try:
        await admin.execute_command("REPLICAOF", "127.0.0.1", "1")
        for attempt in (
            office.holds.reserve(hold_of(payer, 1)),
            office.holds.release(hold, charge_nano=1),
            office.holds.renew(hold),
        ):
            with pytest.raises(RedisUnavailableError):
                await attempt
        assert office.pipe._link is None, "its connection is dropped: the next one finds the primary"
    finally:
        await admin.execute_command("REPLICAOF", "NO", "ONE")
        await admin.flushall()
        await admin.aclose()
    assert await office.holds.renew(hold) == "cold"
    await office.holds.reserve(hold_of(payer, 6 * NANO))
    with pytest.raises(InsufficientFundsError):
        await office.holds.reserve(hold_of(payer, 5 * NANO))
    assert await office.holds.renew(hold) == "restored"
    assert await available(office, payer) == 0


@pytest.mark.parametrize("setting", [("maxmemory", "1"), ("min-replicas-to-write", "1")])
async def test_a_redis_that_may_not_write_fails_closed(
    office: Office, redis_url: str, setting: tuple[str, str]
) -> None:
    payer = await make_payer(office)
    admin: Any = Redis.from_url(redis_url)
    try:
        await admin.config_set(*setting)
        with pytest.raises(RedisUnavailableError):
            await office.holds.reserve(hold_of(payer, NANO))
    finally:
        await admin.config_set(setting[0], "0")
        await admin.aclose()
    await office.holds.reserve(hold_of(payer, NANO))
    assert await available(office, payer) == 9 * NANO


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_connections_that_were_cut_are_not_used(redis_server: Any, loop: str) -> None:
    """After a restart of Redis the next call is admitted, not refused once per connection."""
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else None)

    async def work() -> None:
        pipe = RedisPipe(RedisSettings(url=SecretStr(redis_server.url)))
        admin: Any = Redis.from_url(redis_server.url)
        for _ in range(3):
            await asyncio.gather(*(pipe.run("PING") for _ in range(1000)))
            await admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await asyncio.sleep(0.05)
            assert await asyncio.gather(*(pipe.run("PING") for _ in range(10))) == [b"PONG"] * 10
        await admin.aclose()
        await pipe.close()

    with runner:
        runner.run(work())


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_cut_in_the_middle_fails_closed_and_is_over_with_it(redis_server: Any, loop: str) -> None:
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else None)

    async def work() -> None:
        async with TcpProxy(redis_server.url) as between:
            pipe = RedisPipe(RedisSettings(url=SecretStr(between.through(redis_server.url)), timeout_s=1))
            for _ in range(20):
                asked = [asyncio.ensure_future(pipe.run("PING")) for _ in range(2000)]
                await asyncio.sleep(0)
                between.cut()
                async with asyncio.timeout(5):
                    answers = await asyncio.gather(*asked, return_exceptions=True)
                assert {type(answer) for answer in answers} <= {bytes, RedisUnavailableError}
            await asyncio.sleep(0.05)
            assert await pipe.run("PING") == b"PONG"
            await pipe.close()

    with runner:
        runner.run(work())


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_reply_that_does_not_come_is_given_up_and_one_that_waits_to_be_read_is_not(
    redis_server: Any, loop: str
) -> None:
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else None)

    async def work() -> None:
        async with TcpProxy(redis_server.url) as between:
            pipe = RedisPipe(RedisSettings(url=SecretStr(between.through(redis_server.url)), timeout_s=0.3))
            assert await pipe.run("PING") == b"PONG"
            between.mute()
            async with asyncio.timeout(5):
                with pytest.raises(RedisUnavailableError, match="TimeoutError"):
                    await pipe.run("PING")
            between.open()
            async with asyncio.timeout(5):
                assert await pipe.run("PING") == b"PONG", "on a new connection"
            await pipe.close()
        pipe = RedisPipe(RedisSettings(url=SecretStr(redis_server.url), timeout_s=0.3))
        assert await pipe.run("PING") == b"PONG"
        for _ in range(3):
            asked = asyncio.ensure_future(pipe.run("PING"))
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # it is sent
            time.sleep(0.5)  # noqa: ASYNC251 - this process stands still, as one that is out of processor time
            assert await asked == b"PONG"
        await pipe.close()

    with runner:
        runner.run(work())


async def test_a_right_to_fill_is_taken_of_a_cold_mirror_alone(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else filled it meanwhile: a right taken then would let a snapshot from before a release become the next mirror."""
    payer = await make_payer(office)
    hold = hold_of(payer, NANO)
    await office.holds.check(hold)  # filled
    read, tokens = office.holds._read, list[object]()

    async def read_as_cold(asked: Hold) -> tuple[int, Mapping[str, str], list[Any]]:
        monkeypatch.setattr(office.holds, "_read", read)
        now_us, _, windows = await read(asked)
        return now_us, {}, windows

    async def fill(asked: Hold) -> None:
        tokens.append(asked)

    monkeypatch.setattr(office.holds, "_read", read_as_cold)
    monkeypatch.setattr(office.holds, "_fill_mirror", fill)
    await office.holds.check(hold)
    assert tokens == []
    assert not await office.pipe.run("EXISTS", _mirror_keys(payer.user_id)[1])
    assert await office.pipe.run("EXISTS", _mirror_keys(payer.user_id)[0])


async def test_a_check_fills_a_cold_mirror_and_holds_nothing(office: Office) -> None:
    payer = await make_payer(office, amount="1")
    await office.holds.check(hold_of(payer, NANO))
    with pytest.raises(InsufficientFundsError):
        await office.holds.check(hold_of(payer, NANO + 1))
    assert await office.pipe.run("EXISTS", _mirror_keys(payer.user_id)[0])
    assert await office.holds.find_leases(expired=False, limit=10) == []
