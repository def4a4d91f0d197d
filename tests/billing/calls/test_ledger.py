"""The posting functions in real Postgres."""

import asyncio
from dataclasses import replace
from uuid import UUID

import asyncpg
import pytest

from billing.calls.assessment import Evidence, assess
from billing.calls.ledger import Extension, Ledger, Opening
from billing.calls.outcome import Ending
from billing.errors import BrokenInvariantError, InputError, NotFoundError, PostgresUnavailableError
from billing.fx.quote import usd_quote
from billing.ids import minted_at, new_id
from billing.money import NANO
from billing.postgres.group_commit import Batcher
from billing.postgres.migrate import MigrationError, migrate, require_current
from billing.pricing.cost import Usage
from scripts.office import Office
from tests.support.payers import Payer, make_payer


def opening(payer: Payer, hold_nano: int) -> Opening:
    return Opening(
        new_id(),
        payer.user_id,
        payer.wallet_id,
        payer.key_id,
        "m",
        stream=False,
        price_id=new_id(),
        fx_quote_id=UUID(int=0),
        hold_nano=hold_nano,
        hold_nanousd=hold_nano,
    )


def ending(call_id: UUID, cost: int, **more: object) -> Ending:
    fields = {"cost_nanousd": cost, "provider_cost_nanousd": cost, "charge_nano": cost, **more}
    return Ending(call_id, "settled", "completed", usage=Usage(10, 20), **fields)  # type: ignore[arg-type]


@pytest.fixture
def ledger(office: Office) -> Ledger:
    return Ledger(office.database, worker_id=new_id())


async def posted(office: Office, payer: Payer) -> tuple[int, int]:
    wallet = await office.wallets.get_wallet(payer.wallet_id)
    return wallet.posted_nano, wallet.held_nano


async def books_hold(office: Office) -> None:
    from billing.books.proof import Books
    from proxy.upstream.openai import OpenAIUpstream

    upstream = OpenAIUpstream(office.settings.upstream)
    checks = await Books(office.database, office.holds, upstream, sweep_grace_s=60).check()
    assert {name: check.detail for name, check in checks.items() if not check.ok} == {}


async def test_a_call_from_hold_to_settlement(office: Office, ledger: Ledger) -> None:
    payer = await make_payer(office)
    first, second = opening(payer, NANO), opening(payer, 2 * NANO)
    assert await ledger.open_calls([first, second]) == ["opened", "opened"]
    assert await posted(office, payer) == (10 * NANO, 3 * NANO)
    assert await ledger.open_calls([first, second]) == ["opened", "opened"], "a commit may be repeated"
    assert await posted(office, payer) == (10 * NANO, 3 * NANO)
    results = await ledger.settle_calls([ending(second.call_id, 500), ending(first.call_id, 1500)])
    assert [item.call_id for item in results] == [second.call_id, first.call_id]
    assert all(item.won for item in results)
    assert results[0].posted_nano == 10 * NANO - 2000
    again = await ledger.settle_calls([ending(first.call_id, 999)])
    assert (again[0].won, again[0].charge_nano) == (False, 1500), "a call is settled once"
    assert await posted(office, payer) == (10 * NANO - 2000, 0)
    await books_hold(office)


async def test_settled_from_many_workers_at_once(office: Office, ledger: Ledger) -> None:
    payer = await make_payer(office)
    calls = [opening(payer, 1000) for _ in range(40)]
    await ledger.open_calls(calls)
    ends = [ending(call.call_id, 100) for call in calls]
    rounds = [ends, ends[::-1], ends[10:] + ends[:10], ends[20:] + ends[:20]]
    results = await asyncio.gather(*(ledger.settle_calls(batch) for batch in rounds))
    assert sum(item.won for batch in results for item in batch) == 40
    assert await posted(office, payer) == (10 * NANO - 4000, 0)
    await books_hold(office)


async def test_twice_in_one_batch_is_once(office: Office, ledger: Ledger) -> None:
    payer = await make_payer(office)
    call = opening(payer, 1000)
    await ledger.open_calls([call])
    await ledger.settle_calls([ending(call.call_id, 100), ending(call.call_id, 100)])
    assert await posted(office, payer) == (10 * NANO - 100, 0)
    await books_hold(office)


async def test_postgres_refuses_what_redis_should_not_have_admitted(office: Office, ledger: Ledger) -> None:
    payer = await make_payer(office, amount="1")
    calls = [opening(payer, NANO // 2) for _ in range(3)]
    assert await ledger.open_calls(calls) == ["opened", "opened", "insufficient_funds"]
    async with office.database.connection() as connection:
        await connection.execute("UPDATE wallets SET status = 'frozen' WHERE id = $1", payer.wallet_id)
    assert await ledger.open_calls([opening(payer, 1)]) == ["wallet_frozen"]
    await ledger.settle_calls([ending(call.call_id, 0, charge_nano=0) for call in calls[:2]])
    await books_hold(office)


async def test_extensions_are_absolute_and_bounded(office: Office, ledger: Ledger) -> None:
    payer = await make_payer(office)
    call = opening(payer, NANO)
    await ledger.open_calls([call])
    for _ in range(2):
        assert await ledger.extend_calls([Extension(call.call_id, 4 * NANO, 4 * NANO)]) == ["extended"]
        assert await posted(office, payer) == (10 * NANO, 4 * NANO)
    assert await ledger.extend_calls([Extension(call.call_id, 11 * NANO, 11 * NANO)]) == [
        "insufficient_funds"
    ]
    await ledger.settle_calls([ending(call.call_id, 5)])
    assert await ledger.extend_calls([Extension(call.call_id, 5 * NANO, 5 * NANO)]) == ["settled"]
    assert await posted(office, payer) == (10 * NANO - 5, 0)
    await books_hold(office)


async def test_a_settlement_never_fails_for_lack_of_funds(office: Office, ledger: Ledger) -> None:
    payer = await make_payer(office, amount="0.000001")
    call = opening(payer, 1000)
    await ledger.open_calls([call])
    assert (await ledger.settle_calls([ending(call.call_id, 5000)]))[0].posted_nano == -4000
    assert await ledger.open_calls([opening(payer, 1)]) == ["insufficient_funds"]
    await books_hold(office)


async def test_void_and_review_and_house(office: Office, ledger: Ledger) -> None:
    payer = await make_payer(office)
    calls = [opening(payer, 1000) for _ in range(3)]
    await ledger.open_calls(calls)
    await ledger.settle_calls(
        [Ending(calls[0].call_id, "void", "failed"), Ending(calls[1].call_id, "review", "lost")]
    )
    assert await posted(office, payer) == (10 * NANO, 2000), "in review the hold stays"
    await ledger.settle_calls([ending(calls[1].call_id, 70)])
    await ledger.settle_calls([ending(calls[2].call_id, 90, charge_nano=0, house_nanousd=90)])
    assert await posted(office, payer) == (10 * NANO - 70, 0)
    late = replace(opening(payer, 0), hold_nano=0, hold_nanousd=0)
    async with office.database.connection() as connection:
        await connection.execute("UPDATE wallets SET status = 'frozen' WHERE id = $1", payer.wallet_id)
    assert await ledger.open_calls([late]) == ["opened"], "a loss on the house needs no funds"
    await ledger.settle_calls([ending(late.call_id, 30, charge_nano=0, house_nanousd=30)])
    async with office.database.connection() as connection:
        loss = await connection.fetchval(
            "SELECT -sum(amount_nano) FROM journal_entry WHERE account = 'house_loss'"
        )
    assert loss == 120
    await books_hold(office)


async def test_settling_an_unknown_call_is_loud(ledger: Ledger) -> None:
    with pytest.raises(BrokenInvariantError):
        await ledger.settle_calls([ending(new_id(), 5)])


async def test_an_unbalanced_posting_is_refused_whole(office: Office, ledger: Ledger) -> None:
    payer = await make_payer(office)
    call = opening(payer, 1000)
    await ledger.open_calls([call])
    with pytest.raises(asyncpg.PostgresError, match=r"does not balance|check"):
        async with office.database.transaction() as connection:
            await connection.execute(
                "SELECT post_entries($1, $2, $3, $4, $5, $6)",
                [call.call_id, call.call_id],
                [1, 2],
                ["wallet", "grant"],
                [payer.wallet_id, None],
                ["USD", "USD"],
                [100, -99],
            )
    assert await posted(office, payer) == (10 * NANO, 1000)


async def test_what_is_posted_is_never_rewritten(office: Office) -> None:
    await make_payer(office)
    for statement in (
        "UPDATE journal_entry SET amount_nano = 1",
        "DELETE FROM journal_entry",
        "DELETE FROM journal_tx",
        "UPDATE journal_tx SET memo = ''",
    ):
        async with office.database.connection() as connection:
            with pytest.raises(asyncpg.RestrictViolationError):
                await connection.execute(statement)


async def test_credit_is_idempotent_by_key(office: Office) -> None:
    payer = await make_payer(office, amount="0")
    first = await office.wallets.credit(payer.wallet_id, 5, reason="r", key="k")
    second = await office.wallets.credit(payer.wallet_id, 5, reason="r", key="k")
    assert first.tx_id == second.tx_id
    assert await posted(office, payer) == (5, 0)
    with pytest.raises(InputError):
        await office.wallets.credit(payer.wallet_id, 6, reason="r", key="k")
    with pytest.raises(NotFoundError):
        await office.wallets.credit(new_id(), 6, reason="r")
    for bad in (0, -1, 2**62 + 1):
        with pytest.raises(InputError):
            await office.wallets.credit(payer.wallet_id, bad, reason="r")
    many = await asyncio.gather(
        *(office.wallets.credit(payer.wallet_id, 7, reason="r", key="same") for _ in range(20))
    )
    assert len({credit.tx_id for credit in many}) == 1
    assert await posted(office, payer) == (12, 0)
    await books_hold(office)


async def test_migrations_run_once_and_refuse_a_newer_schema(office: Office) -> None:
    before, after = await migrate(office.database)
    assert before == after
    await asyncio.gather(migrate(office.database), migrate(office.database))
    await require_current(office.database)
    async with office.database.connection() as connection:
        await connection.execute(
            "INSERT INTO schema_migrations (number, name, digest) VALUES (9999, 'future', '')"
        )
    for attempt in (migrate, require_current):
        with pytest.raises(MigrationError, match="newer"):
            await attempt(office.database)


async def test_calls_lie_in_the_partition_of_their_month(office: Office, ledger: Ledger) -> None:
    payer = await make_payer(office)
    call = opening(payer, 1)
    await ledger.open_calls([call])
    async with office.database.connection() as connection:
        name = await connection.fetchval(
            "SELECT tableoid::regclass::text FROM calls WHERE id = $1", call.call_id
        )
        assert name == f"calls_{minted_at(call.call_id):%Y_%m}"
        assert await connection.fetchval("SELECT ensure_partitions(3)") == 0
    await ledger.settle_calls([Ending(call.call_id, "void", "test")])
    old = replace(call, call_id=new_id(at_ms=0))
    await ledger.open_calls([old])
    await ledger.settle_calls([ending(old.call_id, 1)])
    await books_hold(office)


async def test_the_batcher_waits_for_postgres_and_loses_nothing() -> None:
    away = True
    committed: list[int] = []

    async def commit(batch: list[int]) -> list[int]:
        if away:
            raise PostgresUnavailableError("away")
        if 13 in batch:
            raise ValueError("thirteen")
        committed.extend(batch)
        return [item * 2 for item in batch]

    batcher: Batcher[int, int] = Batcher(commit, name="test", rows_max=8, delay_ms=0, queue_max=100)  # type: ignore[arg-type]
    answers = [batcher.submit(number) for number in range(30)]
    await asyncio.sleep(0.15)
    assert batcher.away
    assert not committed
    away = False
    results = await asyncio.gather(*answers, return_exceptions=True)
    assert isinstance(results[13], BrokenInvariantError)
    assert [item for index, item in enumerate(results) if index != 13] == [
        n * 2 for n in range(30) if n != 13
    ]
    assert sorted(committed) == [n for n in range(30) if n != 13], "one bad item does not hold up the others"
    assert await batcher.close(1) == []


def test_no_evidence_is_void_and_the_house_can_pay() -> None:
    from decimal import Decimal

    from billing.pricing.cost import Price

    price = Price(new_id(), "m", Decimal("0.000001"), Decimal("0.000002"))
    call_id = new_id()
    nothing = assess(call_id, Evidence(), price=price, fx=usd_quote(), outcome="x")
    assert (nothing.state, nothing.charge_nano) == ("void", 0)
    told = assess(
        call_id, Evidence(billed_usd=Decimal("0.0000000015")), price=price, fx=usd_quote(), outcome="x"
    )
    assert (told.cost_nanousd, told.charge_nano, told.accuracy) == (2, 2, "exact")
    counted = assess(
        call_id, Evidence(usage=Usage(1, 1), counted=True), price=price, fx=usd_quote(), outcome="x"
    )
    assert (counted.cost_nanousd, counted.accuracy, counted.source) == (3000, "estimated", "counted")
    house = assess(
        call_id, Evidence(billed_usd=Decimal(1)), price=price, fx=usd_quote(), outcome="x", house=True
    )
    assert (house.cost_nanousd, house.charge_nano, house.house_nanousd) == (NANO, 0, NANO)
