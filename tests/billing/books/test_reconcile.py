"""Reconciliation by day and model, by the key's and the account's totals, beside calls in flight and other runs."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from billing.books.opening_balance import record_openings
from billing.books.reconcile import Reconciler
from billing.calls.ledger import Ledger
from billing.calls.outcome import Ending
from billing.errors import ProviderUnavailableError
from billing.ids import new_id
from billing.money import NANO
from billing.pricing.cost import Usage
from billing.provider.records import Source
from config.settings import ReconcileSettings
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.billing.calls.test_ledger import opening
from tests.billing.calls.test_sweeper import generate
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, sync_models

MODEL = "openai/gpt-4o-mini"


def tomorrow() -> datetime:
    return datetime.now(UTC) + timedelta(days=1)


class House:
    """A house that has settled some calls, with an answer's id or without."""

    def __init__(self, office: Office, payer: Payer) -> None:
        self.office = office
        self.payer = payer
        self.ledger = Ledger(office.database, worker_id=new_id())

    async def open(self, hold_nano: int = NANO) -> Any:
        call = replace(opening(self.payer, hold_nano), model=MODEL)
        assert await self.ledger.open_calls([call]) == ["opened"]
        return call.call_id

    async def settle(self, cost: int, generation_id: str | None) -> None:
        ending = Ending(
            await self.open(),
            "settled",
            "completed",
            generation_id=generation_id,
            cost_nanousd=cost,
            provider_cost_nanousd=cost,
            charge_nano=cost,
            usage=Usage(1, 1),
        )
        assert (await self.ledger.settle_calls([ending]))[0].won

    def reconciler(self, provider: Any = None, **changes: Any) -> Reconciler:
        settings = ReconcileSettings(**{"sample": 0, "wait_s": 5, **changes})
        return Reconciler(self.office.database, provider or self.office.upstream, settings)


@pytest.fixture
async def house(office: Office, sim: SimulatedProvider) -> House:
    await sync_models(office)
    await record_openings(office.database, office.upstream)
    return House(office, await make_payer(office))


@pytest.mark.calendar
async def test_a_day_that_differs_leads_to_its_call(house: House, sim: SimulatedProvider) -> None:
    """A call settled as exact at a figure that the provider changed later is found without the sample's luck."""
    right, wrong = await generate(sim, chunks=5), await generate(sim, chunks=9)
    await house.settle(sim.books.generations[right].cost_nanousd, right)
    billed = sim.books.generations[wrong].cost_nanousd
    await house.settle(billed + 12_345, wrong)
    report = await house.reconciler().run(now=tomorrow())
    assert report.days_checked == 1
    assert [(item.cause, item.ours_nanousd, item.provider_nanousd) for item in report.differences] == [
        ("changed", billed + 12_345, billed)
    ]
    assert report.drift_nanousd == 0
    again = await house.reconciler().run(now=tomorrow())
    assert (again.days_checked, again.differences) == (1, [])
    await check_books(house.office)


async def test_a_day_whose_difference_no_call_explains_is_reported(
    house: House, sim: SimulatedProvider
) -> None:
    unseen = sim.books.generations[await generate(sim, chunks=5)].cost_nanousd
    report = await house.reconciler().run(now=tomorrow())
    assert [(item.cause, item.provider_nanousd, item.tx_id is None) for item in report.differences] == [
        ("day_and_model", unseen, True),
        ("billed_without_an_answer", unseen, False),
    ]
    text = str(report)
    assert MODEL in text
    assert "agree to the nano-dollar" in text
    await check_books(house.office)
    again = await house.reconciler().run(now=tomorrow())
    assert [(item.cause, item.known) for item in again.differences] == [("day_and_model", True)]
    async with house.office.database.connection() as connection:
        assert await connection.fetchval("SELECT count(*) FROM reconciliation_diffs") == 2


@pytest.mark.calendar
async def test_todays_activity_is_not_compared(house: House, sim: SimulatedProvider) -> None:
    await generate(sim, chunks=5)
    assert (await house.reconciler().run()).days_checked == 0


async def test_two_runs_at_once_book_a_loss_once(house: House, sim: SimulatedProvider) -> None:
    unseen = sim.books.generations[await generate(sim, chunks=5)].cost_nanousd
    reports = await asyncio.gather(*(house.reconciler().run() for _ in range(3)))
    booked = [item for report in reports for item in report.differences if item.tx_id is not None]
    assert [item.provider_nanousd for item in booked] == [unseen]
    assert all(report.drift_nanousd == 0 for report in reports)
    await check_books(house.office)


async def test_a_run_waits_for_the_one_before(house: House) -> None:
    first, second = house.reconciler(), house.reconciler(wait_s=0.3)
    async with first._alone():
        with pytest.raises(ProviderUnavailableError, match="another reconciliation is running"):
            await second.run()
    await second.run()


async def test_calls_in_flight_are_allowed_for_by_their_holds(house: House, sim: SimulatedProvider) -> None:
    call_id = await house.open(hold_nano=NANO)
    generation = sim.books.generations[await generate(sim, chunks=5)]
    report = await house.reconciler().run()
    assert report.differences == []
    assert report.live_calls == 1
    assert report.drift_nanousd == generation.cost_nanousd
    # What is more than all that is held cannot be theirs; it is reported, and booked when nothing is in flight.
    small = await house.open(hold_nano=1)
    await house.ledger.settle_calls([Ending(call_id, "void", "lost")])
    report = await house.reconciler().run()
    assert [(item.cause, item.tx_id) for item in report.differences] == [
        ("billed_beyond_calls_in_flight", None)
    ]
    await house.ledger.settle_calls([Ending(small, "void", "lost")])
    report = await house.reconciler().run()
    assert [item.cause for item in report.differences] == ["billed_without_an_answer"]
    await check_books(house.office)


class SharedAccount:
    """The provider as a house sees it whose account others use, too; other keys used 5 USD before us and then more."""

    keeps_bills = False

    def __init__(self, office: Office) -> None:
        self.upstream = office.upstream
        self.elsewhere_usd = Decimal(5)

    async def find_totals_usd(self) -> Mapping[Source, Decimal]:
        key = (await self.upstream.find_totals_usd())["key"]
        assert isinstance(key, Decimal)
        return {"key": key, "credits": key + self.elsewhere_usd}

    async def find_activity(self) -> None:
        return None


async def test_what_others_use_of_the_account_is_named_and_not_booked(
    office: Office, sim: SimulatedProvider
) -> None:
    await sync_models(office)
    shared = SharedAccount(office)
    await record_openings(office.database, shared)  # type: ignore[arg-type]
    house = House(office, await make_payer(office))
    generation_id = await generate(sim, chunks=5)
    await house.settle(sim.books.generations[generation_id].cost_nanousd, generation_id)
    assert (await house.reconciler(shared).run()).differences == []
    shared.elsewhere_usd += 2
    report = await house.reconciler(shared).run()
    assert [(item.cause, item.tx_id) for item in report.differences] == [("account_used_elsewhere", None)]
    assert report.drift_nanousd == 0
    await check_books(office)


async def test_a_total_that_becomes_known_later_counts_from_then(
    office: Office, sim: SimulatedProvider
) -> None:
    await sync_models(office)
    key = (await office.upstream.find_totals_usd())["key"]
    assert isinstance(key, Decimal)
    known: Mapping[Source, Decimal] = {"key": key}

    class KeyOnly(SharedAccount):
        async def find_totals_usd(self) -> Mapping[Source, Decimal]:
            return known

    await record_openings(office.database, KeyOnly(office))  # type: ignore[arg-type]
    house = House(office, await make_payer(office))
    generation_id = await generate(sim, chunks=5)
    await house.settle(sim.books.generations[generation_id].cost_nanousd, generation_id)
    await record_openings(office.database, office.upstream)
    report = await house.reconciler().run()
    assert report.differences == []
    assert report.drift_nanousd == 0


class PartlyAway:
    """A provider of which some records do not answer."""

    keeps_bills = True

    def __init__(self, office: Office, *away: str) -> None:
        self.upstream = office.upstream
        self.away = away

    def _require(self, name: str) -> None:
        if name in self.away:
            raise ProviderUnavailableError(f"the provider's /{name} answered 500")

    async def find_totals_usd(self) -> Mapping[Source, Decimal | ProviderUnavailableError]:
        totals = dict(await self.upstream.find_totals_usd())
        for source in totals:
            if source in self.away:
                totals[source] = ProviderUnavailableError(f"the provider's /{source} answered 500")
        return totals

    async def find_activity(self) -> Any:
        self._require("activity")
        return await self.upstream.find_activity()

    async def find_bill(self, generation_id: str) -> Any:
        self._require("bills")
        return await self.upstream.find_bill(generation_id)


@pytest.mark.parametrize("name", ["activity", "bills", "credits", "key"])
async def test_a_record_that_does_not_answer_stops_no_other_and_explains_nothing(
    house: House, sim: SimulatedProvider, name: str
) -> None:
    """One call was estimated too low, one was never answered: what is known of them is mended, the rest is left to the next run."""
    estimated, _lost = await generate(sim, chunks=9), await generate(sim, chunks=4)
    billed = sim.books.generations[estimated].cost_nanousd
    ending = Ending(
        await house.open(),
        "settled",
        "completed",
        accuracy="estimated",
        generation_id=estimated,
        cost_nanousd=billed - 1000,
        charge_nano=billed - 1000,
        usage=Usage(1, 1),
    )
    await house.ledger.settle_calls([ending])
    partly = PartlyAway(house.office, name)
    report = await house.reconciler(partly).run()
    assert list(report.away) == [name]
    assert not report.as_json()["complete"]
    assert f"/{name} answered 500" in str(report)
    causes = {item.cause for item in report.differences}
    assert (
        causes
        == {
            "activity": {"estimated"},
            "bills": set(),
            "credits": {"estimated", "billed_without_an_answer"},
            "key": {"estimated"},
        }[name]
    )
    assert (report.drift_nanousd is None) == (name == "key")
    async with house.office.database.connection() as connection:
        assert await connection.fetchval("SELECT away FROM reconciliation_runs ORDER BY id DESC LIMIT 1") == [
            name
        ]
    partly.away = ()
    whole = await house.reconciler(partly).run()
    assert whole.as_json()["complete"]
    assert (whole.drift_nanousd, whole.away) == (0, {})
    await check_books(house.office)


async def test_a_total_of_the_account_does_not_stand_in_for_the_keys(house: House) -> None:
    """Others use the account: what they were billed is no difference of ours."""
    await house.settle(1000, None)
    report = await house.reconciler(PartlyAway(house.office, "key", "bills")).run()
    assert report.differences == []
    assert report.drift_nanousd is None


async def test_a_provider_none_of_whose_records_answers_is_away(house: House) -> None:
    with pytest.raises(ProviderUnavailableError, match="/key answered 500"):
        await house.reconciler(PartlyAway(house.office, "key", "credits", "activity", "bills")).run()
