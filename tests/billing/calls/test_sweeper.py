"""The sweeper, call by call, against the simulated provider's records."""

import asyncio
from decimal import Decimal
from typing import Any
from uuid import UUID

import aiohttp
import pytest

import billing.calls.sweeper as sweeper_module
from billing.books.opening_balance import record_openings
from billing.books.reconcile import Reconciler
from billing.calls.assessment import ending_as_note
from billing.calls.ledger import Ledger, Opening
from billing.calls.outcome import Ending, Settlement
from billing.calls.sweeper import SweepCounts, Sweeper
from billing.holds.hold import Hold
from billing.ids import new_id
from billing.limits import Limits
from billing.pricing.cost import Usage
from billing.provider.records import Bill
from proxy.upstream.openai import OpenAIUpstream
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, sync_models

MODEL = "openai/gpt-4o-mini"
WIDE = Limits(10**6, 10**9)


class Abandoned:
    """A call whose worker died: open in Postgres, its hold in Redis, its leases over."""

    def __init__(self, office: Office, payer: Payer) -> None:
        self.office = office
        self.payer = payer
        self.call_id = new_id()
        self.hold = Hold(self.call_id, payer.user_id, payer.wallet_id, payer.key_id, 10**6, 10, WIDE)

    async def leave(self, **notes: str) -> None:
        await self.office.holds.reserve(self.hold)
        async with self.office.database.connection() as connection:
            price_id = await connection.fetchval(
                "SELECT id FROM model_prices WHERE model_id = $1 AND valid_to IS NULL", MODEL
            )
        opening = Opening(
            self.call_id,
            self.payer.user_id,
            self.payer.wallet_id,
            self.payer.key_id,
            MODEL,
            stream=True,
            price_id=price_id,
            fx_quote_id=UUID(int=0),
            hold_nano=10**6,
            hold_nanousd=10**6,
        )
        ledger = Ledger(self.office.database, worker_id=new_id())
        assert await ledger.open_calls([opening]) == ["opened"]
        if notes:
            await self.office.holds.renew(self.hold, notes)

    async def row(self) -> Any:
        async with self.office.database.connection() as connection:
            return await connection.fetchrow("SELECT * FROM calls WHERE id = $1", self.call_id)


@pytest.fixture
async def abandoned(office: Office, sim: SimulatedProvider) -> Abandoned:
    await sync_models(office)
    await record_openings(office.database, office.upstream)
    return Abandoned(office, await make_payer(office))


def sweeper_of(office: Office, **changes: Any) -> Sweeper:
    settings = office.settings.sweep.model_copy(update=changes)
    return Sweeper(office.database, office.holds, office.upstream, settings)


async def sweep(office: Office, **changes: Any) -> SweepCounts:
    counts = await sweeper_of(office, **changes).sweep()
    assert counts is not None
    return counts


async def generate(sim: SimulatedProvider, **told: Any) -> str:
    """Let the provider answer something; return the answer's id."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "sim": told}
    async with aiohttp.ClientSession(headers={"Authorization": "Bearer sk-sim"}) as session:
        async with session.post(f"{sim.base_url}/chat/completions", json=body) as response:
            return str((await response.json())["id"])


async def lease_over(office: Office) -> None:
    await asyncio.sleep(office.settings.holds.lease_s + 0.1)


async def test_a_known_id_is_settled_exactly(
    office: Office, sim: SimulatedProvider, abandoned: Abandoned
) -> None:
    generation_id = await generate(sim, chunks=7)
    await abandoned.leave(generation_id=generation_id)
    assert (await sweep(office)).waiting == 1, "its lease has not ended: its worker may live"
    await lease_over(office)
    assert (await sweep(office)).exact == 1
    row = await abandoned.row()
    assert (row["state"], row["accuracy"], row["generation_id"]) == ("settled", "exact", generation_id)
    assert row["charge_nano"] == sim.books.total_nanousd
    assert (await sweep(office)).exact == 0, "sweeping again changes nothing"
    await check_books(office)


async def test_no_id_is_void(office: Office, abandoned: Abandoned) -> None:
    await abandoned.leave()
    await lease_over(office)
    assert (await sweep(office)).void == 1
    assert (await abandoned.row())["state"] == "void"
    await check_books(office)


async def test_an_id_that_is_denied_goes_to_review_and_comes_back(
    office: Office, sim: SimulatedProvider, abandoned: Abandoned
) -> None:
    generation_id = await generate(sim, generation_delay_s=5)
    await abandoned.leave(generation_id=generation_id)
    await lease_over(office)
    assert (await sweep(office)).waiting == 1, "the provider may write its record yet"
    assert (await sweep(office, review_after_s=0.1)).review == 1
    wallet = await office.wallets.get_wallet(abandoned.payer.wallet_id)
    assert wallet.held_nano == 10**6, "in review the hold stays"
    await asyncio.sleep(3)
    assert (await sweep(office, review_after_s=0.1)).exact == 1
    assert (await abandoned.row())["charge_nano"] == sim.books.total_nanousd
    await check_books(office)


async def test_reconciliation_ends_a_call_in_review(
    office: Office, sim: SimulatedProvider, abandoned: Abandoned
) -> None:
    generation_id = await generate(sim, generation_delay_s=5)
    await abandoned.leave(generation_id=generation_id)
    await lease_over(office)
    reconciler = Reconciler(office.database, office.upstream, office.settings.reconcile)
    assert (await sweep(office, review_after_s=0.1)).review == 1
    first = [(item.cause, item.call_id) for item in (await reconciler.run()).differences]
    assert first == [("unknown_to_provider", abandoned.call_id)]
    async with asyncio.timeout(10):
        while await office.upstream.find_bill(generation_id) is None:
            await asyncio.sleep(0.1)
    report = await reconciler.run()
    assert [(item.cause, item.call_id) for item in report.differences] == [("in_review", abandoned.call_id)]
    assert report.drift_nanousd == 0
    row = await abandoned.row()
    assert (row["state"], row["accuracy"], row["charge_nano"]) == (
        "settled",
        "exact",
        sim.books.total_nanousd,
    )
    assert (await sweep(office)).holds_dropped == 1
    await check_books(office)


async def test_a_loss_is_taken_back_when_its_answer_is_known_after_all(
    office: Office, sim: SimulatedProvider, abandoned: Abandoned
) -> None:
    """Void with an id, as its worker judged it, while the provider still denied it; then its record appears."""
    generation_id = await generate(sim, generation_delay_s=3)
    await abandoned.leave(generation_id=generation_id)
    ending = Ending(abandoned.call_id, "void", "upstream_error", generation_id=generation_id)
    assert (await Ledger(office.database, worker_id=new_id()).settle_calls([ending]))[0].won
    reconciler = Reconciler(office.database, office.upstream, office.settings.reconcile)
    first = await reconciler.run()
    assert [item.cause for item in first.differences] == ["unknown_to_provider", "billed_without_an_answer"]
    assert first.drift_nanousd == 0
    async with asyncio.timeout(10):
        while await office.upstream.find_bill(generation_id) is None:
            await asyncio.sleep(0.1)
    second = await reconciler.run()
    assert [item.cause for item in second.differences] == ["void_but_billed", "answered_after_all"]
    assert all(item.tx_id is not None for item in second.differences)
    assert second.drift_nanousd == 0
    assert (await reconciler.run()).differences == []
    async with office.database.connection() as connection:
        loss = await connection.fetchval(
            "SELECT -sum(amount_nano) FROM journal_entry WHERE account = 'house_loss'"
        )
    assert loss == sim.books.total_nanousd
    await office.holds.forget((await office.holds.find_leases(expired=False, limit=1))[0])
    await check_books(office)


async def test_less_than_settled_is_no_loss_to_take_back(
    office: Office, sim: SimulatedProvider, abandoned: Abandoned
) -> None:
    unseen = sim.books.generations[await generate(sim)].cost_nanousd
    reconciler = Reconciler(office.database, office.upstream, office.settings.reconcile)
    assert [item.cause for item in (await reconciler.run()).differences] == ["billed_without_an_answer"]
    await abandoned.leave()
    ending = Ending(
        abandoned.call_id,
        "settled",
        "completed",
        cost_nanousd=unseen + 5,
        provider_cost_nanousd=unseen + 5,
        charge_nano=1,
        usage=Usage(1, 1),
    )
    assert (await Ledger(office.database, worker_id=new_id()).settle_calls([ending]))[0].won
    report = await reconciler.run()
    assert [item.cause for item in report.differences] == ["answered_after_all", "billed_less_than_settled"]
    assert report.drift_nanousd == -5


async def test_a_settlement_that_waited_for_postgres_is_posted(office: Office, abandoned: Abandoned) -> None:
    ending = Ending(
        abandoned.call_id,
        "settled",
        "completed",
        generation_id="gen-x",
        cost_nanousd=4321,
        provider_cost_nanousd=4321,
        charge_nano=4321,
        usage=Usage(3, 4),
    )
    await abandoned.leave(generation_id="gen-x", settlement=ending_as_note(ending))
    await lease_over(office)
    assert (await sweep(office)).exact == 1
    row = await abandoned.row()
    assert (row["outcome"], row["charge_nano"]) == ("completed", 4321)


async def test_without_records_the_noted_progress_is_the_estimate(
    office: Office, abandoned: Abandoned
) -> None:
    await abandoned.leave(generation_id="chatcmpl-1", prompt_tokens="100", completion_tokens="50")
    await lease_over(office)
    plain = Sweeper(
        office.database, office.holds, OpenAIUpstream(office.settings.upstream), office.settings.sweep
    )
    counts = await plain.sweep()
    assert counts is not None
    assert counts.estimated == 1
    row = await abandoned.row()
    assert (row["accuracy"], row["charge_nano"]) == ("estimated", 100 * 150 + 50 * 600)


async def test_a_worker_that_lives_keeps_its_calls(office: Office, abandoned: Abandoned) -> None:
    await abandoned.leave()
    async with office.database.connection() as connection:
        await connection.execute(
            "INSERT INTO workers (id, host, pid, lease_until) SELECT worker_id, 'h', 1, now() + interval '1 hour' FROM calls"
        )
    await lease_over(office)
    await office.pipe.run("FLUSHALL")
    assert (await sweep(office)).as_json() == SweepCounts().as_json()
    assert (await abandoned.row())["state"] == "open"


async def test_a_hold_without_a_call_is_dropped_with_its_lease(office: Office, abandoned: Abandoned) -> None:
    await office.holds.reserve(abandoned.hold)
    assert (
        await office.holds.find_available(abandoned.payer.user_id, abandoned.payer.wallet_id)
        == 10**10 - 10**6
    )
    await lease_over(office)
    assert (await sweep(office)).holds_dropped == 1
    await check_books(office)


async def test_one_sweeps_at_a_time_and_one_settlement_wins(
    office: Office, sim: SimulatedProvider, abandoned: Abandoned
) -> None:
    await abandoned.leave(generation_id=await generate(sim))
    await lease_over(office)
    late = Ending(
        abandoned.call_id,
        "settled",
        "completed",
        cost_nanousd=sim.books.total_nanousd,
        provider_cost_nanousd=sim.books.total_nanousd,
        charge_nano=sim.books.total_nanousd,
    )
    ledger = Ledger(office.database, worker_id=new_id())
    results: list[Any] = await asyncio.gather(
        *(sweeper_of(office).sweep() for _ in range(4)), ledger.settle_calls([late]), return_exceptions=True
    )
    settled: list[Settlement] = results[-1]
    swept = sum(item.exact for item in results[:-1] if isinstance(item, SweepCounts))
    assert swept + settled[0].won == 1
    await office.holds.release(abandoned.hold, charge_nano=None)
    await check_books(office)


async def test_what_does_not_fit_a_wallet_holds_up_no_other(
    abandoned: Abandoned, office: Office, sim: SimulatedProvider
) -> None:
    dear = Ending(abandoned.call_id, "settled", "completed", cost_nanousd=10**7, charge_nano=10**7)
    await abandoned.leave(settlement=ending_as_note(dear))
    async with office.database.transaction() as connection:
        await connection.execute(
            "UPDATE wallets SET posted_nano = $2 WHERE id = $1", abandoned.payer.wallet_id, -(2**63) + 10**6
        )
    other = Abandoned(office, await make_payer(office))
    await other.leave()
    await lease_over(office)
    counts = await sweep(office)
    assert (counts.review, counts.void) == (1, 1)
    assert ((await abandoned.row())["state"], (await other.row())["state"]) == ("review", "void")
    again = await sweep(office)
    assert (again.review, again.waiting) == (0, 1), "it is told once"


class Slow:
    """The provider, whose records come when they are let."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self.asked, self.let = asyncio.Event(), asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._provider, name)

    async def find_bill(self, generation_id: str) -> Any:
        self.asked.set()
        await self.let.wait()
        return await self._provider.find_bill(generation_id)


async def test_one_that_stands_still_keeps_nobody_from_sweeping(
    office: Office, sim: SimulatedProvider, abandoned: Abandoned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeper_module, "_STALLED", "700ms")
    await abandoned.leave(generation_id=await generate(sim))
    await lease_over(office)
    slow = Slow(office.upstream)
    still = asyncio.get_running_loop().create_task(
        Sweeper(office.database, office.holds, slow, office.settings.sweep).sweep()
    )
    await slow.asked.wait()
    other = Sweeper(office.database, office.holds, office.upstream, office.settings.sweep)
    assert await other.sweep() is None, "one at a time"
    async with asyncio.timeout(10):
        while (counts := await other.sweep()) is None:
            await asyncio.sleep(0.1)
    assert counts.exact == 1
    slow.let.set()
    found = await still
    assert found is not None
    assert found.exact == 0, "the call has ended once"
    assert (await abandoned.row())["charge_nano"] == sim.books.total_nanousd
    await check_books(office)


async def test_a_swept_call_that_a_key_of_our_own_paid_costs_what_it_cost_in_all(
    office: Office, sim: SimulatedProvider, abandoned: Abandoned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenRouter's record (``is_byok``): its fee is taken from our account there, the rest is billed elsewhere."""
    await abandoned.leave(generation_id="gen-own")
    upstream = office.upstream

    async def find_bill(_: str) -> Bill:
        return Bill("gen-own", Decimal("0.00021"), Usage(1000, 100), Decimal("0.0002"))

    monkeypatch.setattr(upstream, "find_bill", find_bill)
    await lease_over(office)
    assert (await sweep(office)).exact == 1
    row = await abandoned.row()
    assert (row["accuracy"], row["cost_nanousd"], row["charge_nano"]) == ("exact", 210_000, 210_000)
    assert row["provider_cost_nanousd"] == 10_000
    async with office.database.connection() as connection:
        own = await connection.fetchval(
            "SELECT sum(amount_nanousd) FROM shadow_usd_ledger WHERE kind = 'own_key'"
        )
    assert own == 200_000
