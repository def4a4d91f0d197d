"""Wallets are locked in one order: batches over the same wallets never wait for each other in a circle.

A batcher repeats what a deadlock undid, so a wrong order would show as nothing but slowness: these tests ask the
ledger itself. Nothing would be proved by a small table that Postgres happens to read in the same order every time;
single postings move the wallets' rows about meanwhile.
"""

import asyncio
import random
from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

import pytest

from billing.calls.ledger import Extension, Ledger, Opening
from billing.calls.outcome import Ending
from billing.ids import new_id
from scripts.office import Office
from tests.billing.calls.test_ledger import opening
from tests.support.payers import Payer, make_payer

WALLETS = 12
ROUNDS = 25
TOGETHER = 8


@pytest.fixture
async def payers(office: Office) -> list[Payer]:
    return [await make_payer(office) for _ in range(WALLETS)]


@pytest.fixture
async def ledgers(office: Office) -> list[Ledger]:
    return [Ledger(office.database, worker_id=new_id()) for _ in range(TOGETHER)]


def shuffled(payers: Sequence[Payer], dice: random.Random) -> list[Opening]:
    return [opening(payer, 1_000) for payer in dice.sample(payers, len(payers))]


async def test_batches_over_the_same_wallets_never_deadlock(
    office: Office, payers: list[Payer], ledgers: list[Ledger]
) -> None:
    dice = random.Random(4)

    async def go(ledger: Ledger, calls: list[Opening]) -> None:
        ids: list[UUID] = [call.call_id for call in calls]
        assert await ledger.open_calls(calls) == ["opened"] * len(calls)
        dice.shuffle(ids)
        assert set(await ledger.extend_calls([Extension(call_id, 2_000, 2_000) for call_id in ids])) == {
            "extended"
        }
        dice.shuffle(ids)
        ends = [Ending(call_id, "settled", "completed", cost_nanousd=7, charge_nano=7) for call_id in ids]
        assert all(item.won for item in await ledger.settle_calls(ends))

    for _ in range(ROUNDS):
        several = [shuffled(payers, dice) for _ in ledgers[1:]]
        alone = [[opening(payer, 1_000)] for payer in dice.sample(payers, 3)]
        await asyncio.gather(
            *(go(ledger, calls) for ledger, calls in zip(ledgers[1:], several, strict=True)),
            *(go(ledgers[0], calls) for calls in alone),
        )


async def test_openings_and_extensions_of_the_same_wallets_never_deadlock(
    payers: list[Payer], ledgers: list[Ledger]
) -> None:
    """Both at the same time, again and again: were one in another order, they would meet."""
    dice = random.Random(5)
    half = TOGETHER // 2
    running = [shuffled(payers, dice) for _ in range(half)]
    for ledger, calls in zip(ledgers, running, strict=False):
        await ledger.open_calls(calls)
    for number in range(ROUNDS):
        hold = 2_000 + number
        await asyncio.gather(
            *(
                ledger.extend_calls([Extension(call.call_id, hold, hold) for call in calls])
                for ledger, calls in zip(ledgers, running, strict=False)
            ),
            *(ledger.open_calls(shuffled(payers, dice)) for ledger in ledgers[half:]),
        )


async def test_whoever_keeps_wallets_watched_holds_no_feed_and_waits(
    office: Office, payers: list[Payer]
) -> None:
    """A batch has its wallets, and then wants their feeds; one of the wallets is watched already, the other is new."""
    known, new = sorted(payer.wallet_id for payer in payers)[:2]

    async def watch(*wallets: UUID) -> None:
        async with office.database.connection() as connection:
            await connection.execute(
                "SELECT watch_wallets($1, $2, $3)", wallets, timedelta(hours=1), timedelta(seconds=10)
            )

    async with office.database.connection() as connection:
        await connection.execute(
            "SELECT watch_wallets($1, $2, $3)", [known], timedelta(minutes=5), timedelta(seconds=10)
        )
    async with office.database.connection() as observer, office.database.transaction() as batch:
        await batch.execute("SELECT FROM wallets WHERE id = ANY ($1) FOR NO KEY UPDATE", [known, new])
        watching = asyncio.create_task(watch(known, new))
        async with asyncio.timeout(30):
            while not await observer.fetchval(
                "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
                " WHERE NOT l.granted AND a.query LIKE 'SELECT watch_wallets%'"
            ):
                await asyncio.sleep(0.01)
        await batch.execute("SELECT FROM feeds WHERE wallet_id = $1 FOR NO KEY UPDATE", known)
    await watching
    async with office.database.connection() as observer, office.database.transaction() as batch:
        await batch.execute(
            "UPDATE feeds SET watched_until = now() + interval '5 min' WHERE wallet_id = $1", known
        )
        await asyncio.wait_for(watch(known), 30)  # it is busy: the next time
    async with office.database.connection() as observer:
        left = "SELECT watched_until > now() + interval '50 min' FROM feeds WHERE wallet_id = $1"
        assert not await observer.fetchval(left, known)
        await watch(known)
        assert await observer.fetchval(left, known)


async def test_forgetting_feeds_waits_for_nobody(office: Office, payers: list[Payer]) -> None:
    """It takes them in no order: one that is held, by who has another, is forgotten the next time."""
    held, free = (payer.wallet_id for payer in payers[:2])
    async with office.database.connection() as connection:
        await connection.execute(
            "SELECT watch_wallets($1, $2, $3)", [held, free], timedelta(seconds=1), timedelta(seconds=10)
        )
        await connection.execute("UPDATE feeds SET watched_until = now() - interval '1 hour'")
    forget = "SELECT forget_feeds(interval '1 minute', 100)"
    async with office.database.transaction() as other, office.database.connection() as connection:
        await other.execute("SELECT FROM feeds WHERE wallet_id = $1 FOR NO KEY UPDATE", held)
        await connection.execute(forget)
        assert [row["wallet_id"] for row in await connection.fetch("SELECT wallet_id FROM feeds")] == [held]
    async with office.database.connection() as connection:
        await connection.execute(forget)
        assert await connection.fetchval("SELECT count(*) FROM feeds") == 0
