"""The sums of usage are what the calls say at every moment, and a sum that says otherwise is found."""

import asyncio
import random
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from uuid import UUID

import asyncpg
import pytest

from billing.books.proved_days import DayBook
from billing.books.usage_proof import _NAMES, FIRST_ID, LAST_ID, compare_usage
from billing.calls.corrections import Corrections
from billing.calls.ledger import Ledger
from billing.calls.outcome import Ending
from billing.errors import BrokenInvariantError
from billing.ids import id_floor, new_id
from billing.pricing.cost import Usage
from billing.provider.records import Bill
from billing.reports.usage import BIN_BOUNDS_MS, Sums, UsageBook, UsageQuery
from scripts.office import Office
from tests.billing.reports.spender import Spender, check, differences, totals
from tests.support.payers import Payer, make_payer


@pytest.mark.calendar
async def test_the_sums_are_those_of_the_calls(office: Office, payer: Payer, spender: Spender) -> None:
    calls = [await spender.open() for _ in range(40)]
    for start in range(0, 40, 7):
        await spender.settle(calls[start : start + 7])
    ended = spender.endings.values()
    settled = [item for item in ended if item.state == "settled"]
    found = await totals(office, payer)
    assert found.calls == len(settled) > 20
    assert found.voids == len(ended) - len(settled) > 0
    assert found.exact == sum(item.accuracy == "exact" for item in settled)
    assert found.cost_nanousd == sum(item.cost_nanousd for item in settled)
    assert found.charge_nano == sum(item.charge_nano for item in settled)
    assert found.spread_nano == sum(item.spread_nano for item in settled)
    for name in (
        "prompt_tokens",
        "completion_tokens",
        "cached_read_tokens",
        "cached_write_tokens",
        "reasoning_tokens",
    ):
        assert getattr(found, name) == sum(getattr(item.usage, name) for item in settled), name
    for name, bins in (("first_byte_ms", found.first_byte_bins), ("duration_ms", found.duration_bins)):
        known = [getattr(item, name) for item in settled if getattr(item, name) is not None]
        assert getattr(found, name) == sum(known)
        ceilings = (*BIN_BOUNDS_MS, 10**9)
        assert bins == tuple(
            sum(low <= value < high for value in known)
            for low, high in zip((0, *BIN_BOUNDS_MS), ceilings, strict=True)
        )
    assert await differences(office) == []


async def test_repairs_are_in_the_sums(office: Office, payer: Payer, spender: Spender) -> None:
    """Corrections both ways, refunds, what the house bears, a void call that cost something after all."""
    corrections = Corrections(office.database, charge_estimates_upward=True)
    first = await spender.spend(accuracy="estimated", charge_nano=5_000, cost_nanousd=5_000, spread_nano=0)
    await corrections.correct(first, Bill("g", Decimal("0.000007"), Usage()))
    assert (await totals(office, payer)).charge_nano == 7_000
    assert (await totals(office, payer)).exact == 1
    await corrections.refund(first, amount_nano=3_000, reason="sorry")
    found = await totals(office, payer)
    assert (found.charge_nano, found.cost_nanousd, found.calls) == (4_000, 7_000, 1)
    lost = await spender.open()
    await spender.ledger.settle_calls([Ending(lost, "void", "worker_lost")])
    assert ((await totals(office, payer)).calls, (await totals(office, payer)).voids) == (1, 1)
    await corrections.correct_late(
        Ending(lost, "settled", "completed", cost_nanousd=1000, provider_cost_nanousd=1000, charge_nano=1000)
    )
    found = await totals(office, payer)
    assert (found.calls, found.voids, found.charge_nano, found.cost_nanousd) == (2, 0, 5_000, 8_000)
    await spender.spend(cost_nanousd=900, charge_nano=0, spread_nano=0, house_nanousd=900)
    report = await UsageBook(office.database).read_wallet(payer.wallet_id, UsageQuery())
    assert report.totals["USD"].house_nanousd == 900 + 3_000
    assert await differences(office) == []


async def test_a_call_in_review_counts_when_it_ends(office: Office, payer: Payer, spender: Spender) -> None:
    call = await spender.open()
    await spender.ledger.settle_calls([Ending(call, "review", "worker_lost", generation_id="g")])
    assert (await totals(office, payer)) == Sums()
    assert await differences(office) == []
    await spender.settle([call], accuracy="exact")
    assert (await totals(office, payer)).calls == 1
    assert await differences(office) == []


async def test_many_settle_at_once(office: Office, spender: Spender, payer: Payer) -> None:
    """Several workers and the sweeper, the same calls twice, corrections in between: nothing is counted twice or left out."""
    others = [await make_payer(office) for _ in range(3)]
    spenders = [spender, *(Spender(office, other, random.Random(7)) for other in others)]
    calls = [(who, await who.open()) for who in spenders for _ in range(40)]
    corrections = Corrections(office.database, charge_estimates_upward=True)
    seen: list[list[str]] = []

    async def settle(part: list[tuple[Spender, UUID]]) -> None:
        endings = [who.ending(call) for who, call in part]
        await Ledger(office.database, worker_id=new_id()).settle_calls(endings)

    async def correct(call: UUID) -> None:
        while True:
            try:
                await corrections.correct(call, Bill("g", Decimal("0.0000005"), Usage()))
            except BrokenInvariantError:  # still live
                await asyncio.sleep(0.01)
            else:
                return

    async def watch() -> None:
        for _ in range(10):
            seen.append(await differences(office))

    dice = random.Random(3)
    parts = [dice.sample(calls, 30) for _ in range(12)]
    rest = [calls[start : start + 40] for start in range(0, len(calls), 40)]
    await asyncio.gather(
        *(settle(part) for part in [*parts, *rest]), *(correct(call) for _, call in calls[::16]), watch()
    )
    assert seen == [[]] * 10
    assert await differences(office) == []
    report = await UsageBook(office.database).read_all(UsageQuery(by=()))
    assert report.totals["USD"].calls + report.totals["USD"].voids == len(calls)


async def test_no_cost_changes_without_the_sums(office: Office, spender: Spender) -> None:
    """What settled before there were sums, in a transaction that ends after, is made to settle again."""
    await spender.spend()
    for change in ("cost_nanousd = 1", "state = 'void'", "charge_nano = charge_nano", "accuracy = 'exact'"):
        async with office.database.connection() as connection:
            with pytest.raises(asyncpg.SerializationError):
                await connection.execute(f"UPDATE calls SET {change}")
    async with office.database.connection() as connection:
        await connection.execute("UPDATE calls SET generation_id = 'other'")


async def test_a_batch_begun_before_the_migration_is_sent_again(
    office: Office, payer: Payer, spender: Spender
) -> None:
    """An older version's function waits for the migration's lock, goes on with its old text, and must not pass the sums by."""
    calls = [await spender.open() for _ in range(2)]
    async with office.database.connection() as connection:
        text = await connection.fetchval(
            "SELECT pg_get_functiondef(oid) FROM pg_proc WHERE proname = 'settle_batch' ORDER BY pronargs DESC LIMIT 1"
        )
        trigger = await connection.fetchval(
            "SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgname = 'calls_usage_kept' AND tgparentid = 0"
        )
        for line in ("PERFORM set_config('tuma.usage_kept', 'yes', true);", "PERFORM add_usage(winners, 1);"):
            assert text.count(line) == 1
            text = text.replace(line, "")
        await connection.execute(text.replace("FUNCTION public.settle_batch(", "FUNCTION public.settle_old("))
        await connection.execute("DROP TRIGGER calls_usage_kept ON calls")

    async with office.database.connection() as old, office.database.connection() as migration:

        async def settle(call: UUID) -> None:
            columns = [
                [call],
                ["settled"],
                ["completed"],
                ["exact"],
                ["provider_cost"],
                ["g"],
                *([[1]] * 5),
                *([[0]] * 7),
                *([[]] * 4),
            ]
            marks = ", ".join(f"${place}" for place in range(1, 24))
            await old.fetch(f"SELECT * FROM settle_old({marks})", new_id(), *columns)

        await settle(calls[0])
        running = migration.transaction()
        await running.start()
        await migration.execute("LOCK TABLE calls IN SHARE ROW EXCLUSIVE MODE")
        waiting = asyncio.create_task(settle(calls[1]))
        blocked = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'calls'::regclass"
        async with asyncio.timeout(30):
            while not await migration.fetchval(blocked):
                await asyncio.sleep(0.01)
        await migration.execute(trigger)
        await migration.execute("SELECT rebuild_usage($1, $2)", FIRST_ID, LAST_ID)
        await running.commit()
        with pytest.raises(asyncpg.SerializationError):
            await waiting
    await spender.settle([calls[1]], accuracy="exact")
    assert (await totals(office, payer)).calls == 2
    assert await differences(office) == []


@pytest.mark.calendar
async def test_summing_anew_changes_nothing(office: Office, spender: Spender) -> None:
    """As an operator may ask for it."""
    now = datetime.now(UTC)
    for hours in (0, 0.1, 0.2, 1, 5, 30, 800):
        await spender.spend(now - timedelta(hours=hours))
    await spender.open()
    query = "SELECT to_jsonb(r)::text AS row FROM usage_rollup r ORDER BY 1"
    async with office.database.connection() as connection:
        before = [row["row"] for row in await connection.fetch(query)]
        await connection.execute("UPDATE usage_rollup SET calls = calls + 1")
        await connection.execute("SELECT rebuild_usage($1, $2)", FIRST_ID, LAST_ID)
        assert [row["row"] for row in await connection.fetch(query)] == before
        hour = now.replace(minute=0, second=0, microsecond=0)
        await connection.execute(
            "SELECT rebuild_usage($1, $2)", id_floor(hour), id_floor(hour + timedelta(hours=1))
        )
        assert [row["row"] for row in await connection.fetch(query)] == before
    assert len(before) >= 5


@pytest.mark.parametrize("name", _NAMES)
async def test_every_difference_is_found(office: Office, spender: Spender, name: str) -> None:
    await spender.spend(accuracy="exact")
    assert await check(office) == (True, "the sums of usage are what the calls say")
    changed = f"{name}[3] = {name}[3] + 1" if name.endswith("bins") else f"{name} = {name} + 1"
    async with office.database.connection() as connection:
        await connection.execute(f"UPDATE usage_rollup SET {changed}")
    ok, detail = await check(office)
    assert not ok
    assert f"{name} " in detail
    assert str(spender.payer.wallet_id) in detail


async def test_a_missing_and_an_invented_sum_are_found(office: Office, spender: Spender) -> None:
    await spender.spend()
    async with office.database.connection() as connection:
        await connection.execute("UPDATE usage_rollup SET model = 'another'")
    found = await differences(office)
    assert len(found) == 2
    assert any("(calls say None)" in text for text in found)
    assert any(" None (calls say" in text for text in found)


@pytest.mark.calendar
async def test_a_day_is_not_proved_while_its_usage_is_wrong(office: Office, spender: Spender) -> None:
    await spender.spend(datetime.now(UTC) - timedelta(days=4))
    await spender.spend(datetime.now(UTC) - timedelta(days=3))
    async with office.database.connection() as connection:
        await connection.execute(
            "UPDATE usage_rollup SET voids = voids + 1 WHERE quarter < now() - interval '3.5 days'"
        )
    with pytest.raises(BrokenInvariantError, match="is not what its calls say"):
        await DayBook(office.database).verify_all()
    assert not (await check(office))[0]
    async with office.database.connection() as connection:
        assert await connection.fetchval("SELECT count(*) FROM verified_days") == 0
        await connection.execute("SELECT rebuild_usage($1, $2)", FIRST_ID, LAST_ID)
    assert await DayBook(office.database).verify_all() == 2
    assert (await check(office))[0]


@pytest.mark.calendar
async def test_proved_days_are_read_again_where_they_changed(office: Office, spender: Spender) -> None:
    """A refund or a late settlement changes an old sum: that wallet's quarter is compared, the rest of the day is not."""
    old = datetime.now(UTC) - timedelta(days=4)
    refunded, untouched = (
        await spender.spend(old, accuracy="exact"),
        await spender.spend(old - timedelta(hours=2)),
    )
    late = await spender.open(old + timedelta(hours=1))
    assert await DayBook(office.database).verify_all() >= 1
    await Corrections(office.database, charge_estimates_upward=True).refund(
        refunded, amount_nano=None, reason="sorry"
    )
    await spender.settle([late], accuracy="exact")
    assert (
        await check(office)
        == await check(office, full=True)
        == (True, "the sums of usage are what the calls say")
    )

    async def is_found(call: UUID) -> bool:
        async with office.database.connection() as connection:
            tampering = connection.transaction()
            await tampering.start()
            await connection.execute(
                "UPDATE usage_rollup SET charge_nano = charge_nano + 1 WHERE quarter = usage_quarter($1)",
                call,
            )
            cut = await connection.fetchval("SELECT end_id FROM verified_days ORDER BY day DESC LIMIT 1")
            quick = await compare_usage(connection, cut, LAST_ID)
            assert await compare_usage(connection, FIRST_ID, LAST_ID)
            await tampering.rollback()
        return bool(quick)

    assert await is_found(refunded)
    assert await is_found(late)
    assert not await is_found(untouched)
