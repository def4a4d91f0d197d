"""Corrections, refunds and reconciliation: the books follow the provider, the wallet by the policy."""

import asyncio
from decimal import Decimal
from typing import Any

import pytest

from billing.books.opening_balance import record_openings
from billing.books.reconcile import Reconciler
from billing.calls.corrections import Adjustment, Corrections
from billing.calls.ledger import Ledger
from billing.calls.outcome import Ending
from billing.errors import BrokenInvariantError, InputError, NotFoundError
from billing.ids import new_id
from billing.money import NANO
from billing.pricing.cost import Usage
from billing.provider.records import Bill
from billing.reports.call_view import describe_call
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.billing.calls.test_ledger import books_hold, opening
from tests.billing.calls.test_sweeper import generate
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, sync_models


class Ended:
    """A settled call of a payer, and what to do with it."""

    def __init__(self, office: Office, payer: Payer) -> None:
        self.office = office
        self.payer = payer
        self.call_id = new_id()

    async def settle(self, cost: int, *, accuracy: str = "exact", **more: Any) -> None:
        ledger = Ledger(self.office.database, worker_id=new_id())
        call = opening(self.payer, NANO)
        self.call_id = call.call_id
        await ledger.open_calls([call])
        fields: dict[str, Any] = {"cost_nanousd": cost, "charge_nano": cost, "accuracy": accuracy, **more}
        state = fields.pop("state", "settled")
        if accuracy == "exact" and state == "settled":
            fields["provider_cost_nanousd"] = cost
        await ledger.settle_calls([Ending(call.call_id, state, "completed", usage=Usage(1, 1), **fields)])

    async def correct(self, nanousd: int, *, upward: bool = True) -> Adjustment:
        corrections = Corrections(self.office.database, charge_estimates_upward=upward)
        return await corrections.correct(self.call_id, Bill("gen-1", Decimal(nanousd).scaleb(-9), Usage()))

    async def refund(self, amount: int | None, **more: Any) -> Adjustment:
        corrections = Corrections(self.office.database, charge_estimates_upward=True)
        return await corrections.refund(self.call_id, amount_nano=amount, reason="sorry", **more)

    async def stands(self) -> tuple[int, int, int]:
        """Balance taken, our cost, and the house's loss."""
        wallet = await self.office.wallets.get_wallet(self.payer.wallet_id)
        async with self.office.database.connection() as connection:
            cost, loss = await connection.fetchrow(
                "SELECT coalesce(-sum(amount_nano) FILTER (WHERE account = 'provider_cost'), 0)::bigint,"
                " coalesce(-sum(amount_nano) FILTER (WHERE account = 'house_loss'), 0)::bigint FROM journal_entry"
            )
        return 10 * NANO - wallet.posted_nano, cost, loss


@pytest.fixture
async def ended(office: Office) -> Ended:
    return Ended(office, await make_payer(office))


async def test_an_estimate_follows_the_provider_both_ways(office: Office, ended: Ended) -> None:
    await ended.settle(1000, accuracy="estimated")
    assert (await ended.correct(1500)).tx_id is not None
    assert await ended.stands() == (1500, 1500, 0)
    assert (await ended.correct(1500)).tx_id is None, "repeating it posts nothing"
    assert await ended.stands() == (1500, 1500, 0)
    await ended.correct(400)
    assert await ended.stands() == (400, 400, 0)
    shown = await describe_call(office.database, ended.call_id)
    assert (shown["accuracy"], shown["provider_cost_usd"], shown["charge"]) == (
        "exact",
        "0.0000004",
        "0.0000004",
    )
    assert [posting["kind"] for posting in shown["postings"]].count("correction") > 0
    await books_hold(office)


async def test_an_exact_charge_is_never_raised(office: Office, ended: Ended) -> None:
    await ended.settle(1000)
    await ended.correct(1700)
    assert await ended.stands() == (1000, 1700, 700), "the house pays the difference"
    await ended.correct(1200)
    assert await ended.stands() == (1000, 1200, 200)
    await books_hold(office)


async def test_a_charge_is_lowered_though_the_house_bears_a_part(office: Office, ended: Ended) -> None:
    await ended.settle(1000)
    await ended.correct(1700)
    await ended.correct(800)
    assert await ended.stands() == (800, 800, 0), "no wallet pays more than its call cost"
    await ended.refund(300)
    await ended.correct(200)
    assert await ended.stands() == (200, 200, 0)
    await books_hold(office)


async def test_a_bill_that_comes_and_goes_is_followed_every_time(office: Office, ended: Ended) -> None:
    await ended.settle(1000)
    for bill in (1500, 1200, 1500, 1200, 1500):
        await ended.correct(bill)
        assert await ended.stands() == (1000, bill, bill - 1000)
    await books_hold(office)


async def test_the_policy_may_spare_the_wallet(office: Office, ended: Ended) -> None:
    await ended.settle(1000, accuracy="estimated")
    await ended.correct(1500, upward=False)
    assert await ended.stands() == (1000, 1500, 500)
    await books_hold(office)


async def test_a_void_call_that_was_billed_is_the_houses_loss(office: Office, ended: Ended) -> None:
    await ended.settle(0, state="void")
    await ended.correct(300)
    assert await ended.stands() == (0, 300, 300)
    await books_hold(office)


@pytest.mark.parametrize("by_provider", [True, False])
async def test_a_late_settlement_of_the_calls_own_worker_is_charged(
    office: Office, ended: Ended, by_provider: bool
) -> None:
    """By the provider's figure and by usage at the price book alike; both by void and by estimate of the sweeper's."""
    await ended.settle(0, state="void")
    late = Ending(
        ended.call_id,
        "settled",
        "completed",
        source="provider_cost" if by_provider else "price_book",
        generation_id="gen-1",
        cost_nanousd=300,
        provider_cost_nanousd=300 if by_provider else None,
        charge_nano=300,
        usage=Usage(1, 1),
    )
    corrections = Corrections(office.database, charge_estimates_upward=True)
    assert (await corrections.correct_late(late)).tx_id is not None
    assert await ended.stands() == (300, 300, 0)
    assert (await corrections.correct_late(late)).tx_id is None, "repeating it posts nothing"
    shown = await describe_call(office.database, ended.call_id)
    assert shown["provider_cost_usd"] == ("0.0000003" if by_provider else None)
    assert shown["accuracy"] == "exact"
    await books_hold(office)


@pytest.mark.parametrize(
    ("swept", "stands"),
    [({"state": "void"}, (300, 300, 0)), ({"accuracy": "estimated"}, (300, 300, 0)), ({}, (200, 200, 0))],
    ids=["void", "estimated", "exact"],
)
async def test_late_usage_that_does_not_add_up_is_better_than_what_was_noted(
    office: Office, ended: Ended, swept: dict[str, Any], stands: tuple[int, int, int]
) -> None:
    """It is an estimate still, and changes nothing that the provider's record proved."""
    await ended.settle(0 if "state" in swept else 200, **swept)
    late = Ending(
        ended.call_id,
        "settled",
        "completed",
        accuracy="estimated",
        source="price_book",
        cost_nanousd=300,
        charge_nano=300,
        usage=Usage(1, 1),
    )
    await Corrections(office.database, charge_estimates_upward=True).correct_late(late)
    assert await ended.stands() == stands
    shown = await describe_call(office.database, ended.call_id)
    assert shown["accuracy"] == ("estimated" if swept else "exact")
    await books_hold(office)


async def test_a_late_settlement_of_a_call_that_was_refused_is_the_houses(
    office: Office, ended: Ended
) -> None:
    """Its client was told that it is not answered: what the sweeper charged is given back."""
    await ended.settle(200, accuracy="estimated")
    late = Ending(
        ended.call_id, "settled", "worker_stalled", cost_nanousd=300, house_nanousd=300, usage=Usage(1, 1)
    )
    await Corrections(office.database, charge_estimates_upward=True).correct_late(late)
    assert await ended.stands() == (0, 300, 300)
    await books_hold(office)


async def test_what_settled_already_and_is_settled_again_differs_in_nothing(
    office: Office, ended: Ended
) -> None:
    """A commit whose answer was lost is repeated, and does not win: that is no late settlement."""
    await ended.settle(1000, source="price_book", spread_nano=10)
    async with office.database.connection() as connection:
        await connection.execute("UPDATE calls SET provider_cost_nanousd = NULL")
    again = Ending(
        ended.call_id,
        "settled",
        "completed",
        source="price_book",
        cost_nanousd=1000,
        charge_nano=1000,
        spread_nano=10,
        usage=Usage(1, 1),
    )
    corrections = Corrections(office.database, charge_estimates_upward=True)
    assert (await corrections.correct_late(again)).tx_id is None
    assert await ended.stands() == (1000, 1000, 0)


async def test_refunds_in_part_and_in_full(office: Office, ended: Ended) -> None:
    await ended.settle(1000)
    await ended.refund(400)
    assert await ended.stands() == (600, 1000, 400)
    with pytest.raises(InputError):
        await ended.refund(601)
    await ended.refund(None)
    assert await ended.stands() == (0, 1000, 1000)
    with pytest.raises(InputError):
        await ended.refund(None)
    await books_hold(office)


async def test_a_refund_is_idempotent_by_key(office: Office, ended: Ended) -> None:
    await ended.settle(1000)
    for _ in range(3):
        await ended.refund(100, key="ticket-7")
    assert await ended.stands() == (900, 1000, 100)
    with pytest.raises(InputError):
        await ended.refund(200, key="ticket-7")
    await books_hold(office)


async def test_concurrent_adjustments_see_each_other(office: Office, ended: Ended) -> None:
    await ended.settle(1000)
    await asyncio.gather(*(ended.refund(100, key=f"ticket-{number}") for number in range(5)))
    assert await ended.stands() == (500, 1000, 500)
    await books_hold(office)


async def test_markup_comes_back_with_a_refund(office: Office, ended: Ended) -> None:
    await ended.settle(1000, charge_nano=1100, spread_nano=100)
    await ended.refund(550)
    async with office.database.connection() as connection:
        spread = await connection.fetchval(
            "SELECT sum(amount_nano) FROM journal_entry WHERE account = 'fx_spread'"
        )
    assert spread == 50
    await ended.refund(None)
    async with office.database.connection() as connection:
        spread = await connection.fetchval(
            "SELECT sum(amount_nano) FROM journal_entry WHERE account = 'fx_spread'"
        )
    assert spread == 0
    await books_hold(office)


async def test_a_live_or_unknown_call_is_not_adjusted(office: Office, ended: Ended) -> None:
    with pytest.raises(NotFoundError):
        await ended.correct(5)
    ledger = Ledger(office.database, worker_id=new_id())
    call = opening(ended.payer, 10)
    await ledger.open_calls([call])
    ended.call_id = call.call_id
    for attempt in (ended.correct(5), ended.refund(None)):
        with pytest.raises(BrokenInvariantError):
            await attempt


async def test_reconciliation_finds_and_repairs(office: Office, sim: SimulatedProvider, ended: Ended) -> None:
    await sync_models(office)
    await record_openings(office.database, office.upstream)
    reconciler = Reconciler(office.database, office.upstream, office.settings.reconcile)
    low, high, right, void = [await generate(sim, chunks=chunks) for chunks in (5, 10, 15, 20)]
    billed = {name: sim.books.generations[name].cost_nanousd for name in (low, high, right, void)}
    await ended.settle(billed[low] + 777, accuracy="estimated", generation_id=low)
    await ended.settle(billed[high] - 777, accuracy="estimated", generation_id=high)
    await ended.settle(billed[right], generation_id=right)
    await ended.settle(0, state="void", generation_id=void)
    unseen = sim.books.generations[await generate(sim, chunks=9)].cost_nanousd
    report = (await reconciler.run()).as_json()
    assert report["drift_usd"] == "0"
    causes = sorted(item["cause"] for item in report["differences"])
    assert causes == ["billed_without_an_answer", "estimated", "estimated", "void_but_billed"]
    assert all(item["corrected"] for item in report["differences"])
    taken, cost, loss = await ended.stands()
    assert taken == billed[low] + billed[high] + billed[right]
    assert cost == sim.books.total_nanousd
    assert loss == billed[void] + unseen
    again = await reconciler.run()
    assert again.differences == []
    await check_books(office)
    async with office.database.connection() as connection:
        assert await connection.fetchval("SELECT count(*) FROM reconciliation_diffs") == 4
