"""The provider's quota: leased in slabs, returned, exhausted; and what happens when the provider refuses us."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from billing.calls.ledger import Ledger
from billing.calls.outcome import Ending
from billing.calls.sweeper import Sweeper
from billing.errors import ProviderQuotaError
from billing.ids import new_id
from billing.money import NANO
from billing.pricing.cost import Usage
from billing.provider.quota import Quota, QuotaWatch, return_slabs
from billing.provider.records import Activity, Bill, Source
from billing.provider.refusals import Standing, Subject
from config.settings import QuotaSettings
from scripts.office import Office
from tests.billing.calls.test_ledger import opening
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer


@dataclass
class SaysLeft:
    """A provider that only says how much it lets us consume."""

    left_usd: Decimal | None
    keeps_bills: bool = False

    async def find_left_usd(self) -> Decimal | None:
        return self.left_usd

    async def find_standing(self, subject: Subject) -> Standing:
        raise AssertionError(subject)

    async def find_totals_usd(self) -> Mapping[Source, Decimal]:
        return {}

    async def find_activity(self) -> list[Activity] | None:
        return None

    async def find_bill(self, generation_id: str) -> Bill | None:
        raise AssertionError(generation_id)


def settings(**changes: Any) -> QuotaSettings:
    return QuotaSettings(**{"slab_usd": Decimal(1), "pause_s": 0.2, "pause_max_s": 0.4, **changes})


async def observe(office: Office, left_usd: str | None, **changes: Any) -> None:
    said = SaysLeft(None if left_usd is None else Decimal(left_usd))
    await QuotaWatch(office.database, said, settings(**changes)).observe()


async def make_worker(office: Office, *, lease_s: float = 60) -> UUID:
    worker_id = new_id()
    async with office.database.connection() as connection:
        await connection.execute(
            "INSERT INTO workers (id, host, pid, lease_until) VALUES ($1, 'h', 1, now() + make_interval(secs => $2))",
            worker_id,
            lease_s,
        )
    return worker_id


async def make_quota(
    office: Office, *, lease_s: float = 60, provider: SaysLeft | None = None, **changes: Any
) -> Quota:
    worker_id = await make_worker(office, lease_s=lease_s)
    said = provider or SaysLeft(Decimal(1))
    return Quota(office.database, said, worker_id=worker_id, settings=settings(**changes))


async def account(office: Office) -> tuple[int, int]:
    """Return what is leased and what is spent, in nano-dollars."""
    async with office.database.connection() as connection:
        row = await connection.fetchrow("SELECT sum(leased_nanousd), sum(spent_nanousd) FROM quota_slabs")
    return int(row[0]), int(row[1])


async def test_without_a_limit_nothing_is_leased(office: Office) -> None:
    await observe(office, None)
    quota = await make_quota(office)
    assert await quota.take(10**6 * NANO) == 0
    assert await account(office) == (0, 0)


async def test_a_slab_serves_many_calls(office: Office) -> None:
    await observe(office, "1000")
    quota = await make_quota(office)
    for _ in range(100):
        assert await quota.take(NANO // 100) == NANO // 100
    assert await account(office) == (NANO, 0)
    quota.give_back(NANO // 100, spent_nanousd=NANO // 200)
    assert quota.free_nanousd == NANO // 200


async def test_takes_at_once_never_exceed_the_quota(office: Office) -> None:
    await observe(office, "3")
    quotas = [await make_quota(office) for _ in range(3)]
    hold = NANO // 10

    async def attempt(quota: Quota) -> int:
        try:
            return await quota.take(hold)
        except ProviderQuotaError:
            return 0

    taken = await asyncio.gather(*(attempt(quota) for _ in range(50) for quota in quotas))
    leased, _ = await account(office)
    assert sum(taken) <= leased <= 3 * NANO
    assert sum(taken) >= 2 * NANO, "most of the quota can be used, whoever asks"


async def test_a_lease_waits_for_another_under_way(office: Office) -> None:
    await observe(office, "1")
    first, second = await make_worker(office), await make_worker(office)
    lease = "SELECT given FROM lease_quota($1, 0, $2, $2)"
    async with office.database.connection() as one, office.database.connection() as other:
        async with one.transaction():
            assert await one.fetchval(lease, first, NANO * 6 // 10) == NANO * 6 // 10
            waiting = asyncio.get_running_loop().create_task(other.fetchval(lease, second, NANO * 6 // 10))
            await asyncio.sleep(0.2)
            assert not waiting.done()
        assert await waiting == 0


async def test_a_lease_whose_answer_was_lost_is_not_lost(office: Office) -> None:
    await observe(office, "10")
    quota = await make_quota(office)
    held = await quota.take(NANO // 2)
    async with office.database.connection() as connection:
        await connection.execute(
            "SELECT lease_quota($1, $2, $3, $3)", quota._worker_id, NANO, 4 * NANO
        )  # as if its answer had been lost
    assert (await account(office))[0] == 5 * NANO
    await quota.take(NANO)
    assert (await account(office))[0] <= 2 * NANO + NANO // 2
    quota.give_back(held, spent_nanousd=0)
    quota.give_back(NANO, spent_nanousd=0)
    await quota.close()
    assert await account(office) == (0, 0)


async def test_what_is_used_up_is_refused_and_what_is_observed_is_admitted_again(office: Office) -> None:
    await observe(office, "0.5")
    quota = await make_quota(office)
    await quota.take(NANO // 4)
    with pytest.raises(ProviderQuotaError):
        await quota.take(NANO)
    assert quota.state != "ok"
    await observe(office, "10")
    async with asyncio.timeout(5):
        while True:
            try:
                await quota.take(NANO)
                break
            except ProviderQuotaError:
                await asyncio.sleep(0.05)
    assert quota.state == "ok"


async def settle(office: Office, payer: Payer, worker_id: UUID, cost_nanousd: int) -> None:
    ledger = Ledger(office.database, worker_id=worker_id)
    call = opening(payer, cost_nanousd)
    assert await ledger.open_calls([call]) == ["opened"]
    ending = Ending(
        call.call_id,
        "settled",
        "completed",
        cost_nanousd=cost_nanousd,
        charge_nano=cost_nanousd,
        usage=Usage(1, 1),
    )
    assert (await ledger.settle_calls([ending]))[0].won
    assert not (await ledger.settle_calls([ending]))[0].won


async def test_settling_spends_the_slab_once(office: Office) -> None:
    payer = await make_payer(office)
    await observe(office, "10")
    quota = await make_quota(office)
    taken = await quota.take(2 * NANO)
    await settle(office, payer, quota._worker_id, NANO)
    quota.give_back(taken, spent_nanousd=NANO)
    assert await account(office) == (2 * NANO, NANO)
    assert quota.free_nanousd == NANO
    await quota.close()
    assert await account(office) == (NANO, NANO)


async def test_a_dead_workers_slab_is_returned_by_the_sweeper(office: Office) -> None:
    payer = await make_payer(office)
    await observe(office, "10")
    dead = await make_quota(office, lease_s=-5)
    await dead.take(3 * NANO)
    await settle(office, payer, dead._worker_id, NANO)
    call = opening(payer, 1000)
    ledger = Ledger(office.database, worker_id=dead._worker_id)
    await ledger.open_calls([call])
    assert await return_slabs(office.database, grace_s=1) == 0, "a call of it has not ended yet"
    sweeper = Sweeper(office.database, office.holds, office.upstream, office.settings.sweep)
    await ledger.settle_calls([Ending(call.call_id, "void", "worker_lost")])
    assert await sweeper.sweep() is not None
    assert await account(office) == (NANO, NANO)
    other = await make_quota(office)
    assert await other.take(8 * NANO) == 8 * NANO


async def test_an_idle_slab_is_given_back(office: Office) -> None:
    await observe(office, "2")
    idle = await make_quota(office, idle_s=0.05)
    idle.give_back(await idle.take(NANO // 4), spent_nanousd=0)
    other = await make_quota(office)
    with pytest.raises(ProviderQuotaError):
        await other.take(2 * NANO)
    task = asyncio.get_running_loop().create_task(idle.run())
    async with asyncio.timeout(5):
        while (await account(office))[0]:
            await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.sleep(0.5)  # the refusal is believed for that long
    assert await other.take(2 * NANO) == 2 * NANO


async def test_the_operators_budget_is_a_quota_too(office: Office) -> None:
    await observe(office, None, budget_usd=Decimal("0.5"))
    quota = await make_quota(office)
    with pytest.raises(ProviderQuotaError):
        await quota.take(NANO)
    assert await quota.take(NANO // 4) == NANO // 4


async def test_low_is_noted_once_and_unlearnt(office: Office) -> None:
    async def low() -> bool:
        async with office.database.connection() as connection:
            return bool(await connection.fetchval("SELECT low FROM provider_quota"))

    await observe(office, "100")
    assert not await low()
    await observe(office, "4.99")
    assert await low()
    await observe(office, "5")
    assert not await low()


async def test_a_refusal_pauses_and_one_call_finds_out(office: Office) -> None:
    quota = await make_quota(office)
    first, second, third = new_id(), new_id(), new_id()
    quota.admit(first, new_id())
    quota.pause("401: no")
    with pytest.raises(ProviderQuotaError) as refused:
        quota.admit(second, new_id())
    assert refused.value.retry_after_s == 1
    assert quota.state == "401: no"
    await asyncio.sleep(0.25)
    assert quota.state == "ok"
    quota.admit(second, new_id())
    with pytest.raises(ProviderQuotaError):
        quota.admit(third, new_id())  # one at a time finds out
    quota.ended(second)
    quota.admit(third, new_id())
    quota.pause("401: still no")
    await asyncio.sleep(0.25)
    with pytest.raises(ProviderQuotaError):
        quota.admit(first, new_id())  # twice as long
    await asyncio.sleep(0.25)
    quota.admit(first, new_id())
    quota.served(first)
    quota.admit(second, new_id())
    quota.admit(third, new_id())


async def test_other_workers_hear_of_a_pause(office: Office) -> None:
    quota, other = await make_quota(office, pause_s=30), await make_quota(office)
    quota.pause("402: empty")
    await quota.close()
    await other.load()
    with pytest.raises(ProviderQuotaError, match="402: empty"):
        other.admit(new_id(), new_id())


async def test_the_account_agrees_with_the_books_after_a_correction(office: Office) -> None:
    from billing.calls.corrections import Corrections

    payer = await make_payer(office)
    worker_id = await make_worker(office)
    ledger = Ledger(office.database, worker_id=worker_id)
    call = opening(payer, 1000)
    await ledger.open_calls([call])
    ending = Ending(
        call.call_id,
        "settled",
        "completed",
        accuracy="estimated",
        cost_nanousd=700,
        charge_nano=700,
        usage=Usage(1, 1),
    )
    await ledger.settle_calls([ending])
    corrections = Corrections(office.database, charge_estimates_upward=True)
    await corrections.correct(call.call_id, Bill("g", Decimal("0.0000009"), Usage()))
    assert (await account(office))[1] == 900
    async with office.database.connection() as connection:
        await connection.execute("INSERT INTO provider_openings VALUES ('key', -900)")
    await check_books(office)
