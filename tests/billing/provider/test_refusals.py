"""Whose fault a refusal is: one caller's never stops the others, and an account that is refused is found out."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast
from uuid import UUID

import pytest

from billing.errors import ProviderQuotaError, ProviderUnavailableError
from billing.ids import new_id
from billing.provider.quota import Quota
from billing.provider.refusals import CALLERS_MIN, Refusal, Standing, Subject
from scripts.office import Office
from tests.billing.provider.test_quota import make_worker, settings


class Record:
    """A provider's record of our account."""

    def __init__(self) -> None:
        self.key: Standing | None = "unknown"
        self.money: Standing | None = "unknown"
        self.asked = 0
        self.wait_s = 0.0

    async def find_standing(self, subject: Subject) -> Standing:
        self.asked += 1
        await asyncio.sleep(self.wait_s)
        standing = self.key if subject == "key" else self.money
        if standing is None:
            raise ProviderUnavailableError("the provider's /key does not answer")
        return standing


class Refused:
    """A worker's quota, and calls that its provider refuses."""

    def __init__(self, quota: Quota, record: Record) -> None:
        self.quota = quota
        self.record = record

    async def call(
        self, user_id: UUID, model: str = "m", *, subject: Subject = "money", is_empty: bool = False
    ) -> bool:
        """One call that is refused; whether it was let pass at all."""
        call_id = new_id()
        try:
            self.quota.admit(call_id, user_id)
        except ProviderQuotaError:
            return False
        self.quota.refused(Refusal(call_id, user_id, model, subject, "402: no", is_empty=is_empty))
        self.quota.ended(call_id)
        await self.quota._tasks.drain(2)
        return True

    def serve(self, user_id: UUID) -> bool:
        """One call that is served; whether it was let pass."""
        call_id = new_id()
        try:
            self.quota.admit(call_id, user_id)
        except ProviderQuotaError:
            return False
        self.quota.served(call_id)
        self.quota.ended(call_id)
        return True

    def is_paused(self) -> bool:
        return self.quota.state != "ok"


@pytest.fixture
async def refused(office: Office) -> AsyncIterator[Refused]:
    record = Record()
    worker_id = await make_worker(office)
    quota = Quota(office.database, cast("Any", record), worker_id=worker_id, settings=settings(pause_s=0.3))
    yield Refused(quota, record)
    await quota.close()


async def test_one_caller_never_stops_the_others(office: Office, refused: Refused) -> None:
    caller = new_id()
    for index in range(30):
        assert await refused.call(caller, f"model-{index % 7}")
        assert await refused.call(caller, f"model-{index % 7}", subject="key")
    assert not refused.is_paused()
    async with office.database.connection() as connection:
        row = await connection.fetchrow("SELECT paused_until, refused_reason FROM provider_quota")
    assert tuple(row) == (None, "402: no"), "operators are told all the same"
    assert refused.serve(new_id())


async def test_one_model_that_is_refused_to_everybody_stops_no_other(refused: Refused) -> None:
    for _ in range(20):
        assert await refused.call(new_id(), "only-this")
    assert not refused.is_paused()


async def test_different_callers_and_models_alike_are_the_account(refused: Refused) -> None:
    for index in range(CALLERS_MIN):
        assert not refused.is_paused()
        assert await refused.call(new_id(), f"model-{index}")
    assert refused.is_paused()
    assert not refused.serve(new_id())


async def test_a_call_that_is_served_in_between_clears_the_account(refused: Refused) -> None:
    for index in range(5 * CALLERS_MIN):
        assert await refused.call(new_id(), f"model-{index}")
        if index % 2:
            assert refused.serve(new_id())
    assert not refused.is_paused()


async def test_refusals_of_long_ago_do_not_count(office: Office) -> None:
    record = Record()
    quota = Quota(
        office.database,
        cast("Any", record),
        worker_id=await make_worker(office),
        settings=settings(refusals_s=0.05),
    )
    refused = Refused(quota, record)
    for index in range(3 * CALLERS_MIN):
        assert await refused.call(new_id(), f"model-{index}")
        await asyncio.sleep(0.06)
    assert not refused.is_paused()


async def test_a_record_that_refuses_the_account_is_enough(refused: Refused) -> None:
    refused.record.money = "refused"
    assert await refused.call(new_id())
    assert refused.is_paused()


@pytest.mark.parametrize("standing", ["served", None])
async def test_a_record_of_an_account_in_order_or_one_that_is_away(
    refused: Refused, standing: Standing | None
) -> None:
    """In order: nobody is stopped, whatever they say. Away: as without one."""
    refused.record.money = refused.record.key = standing
    for index in range(CALLERS_MIN):
        assert await refused.call(new_id(), f"model-{index}", is_empty=standing is not None)
    assert refused.is_paused() == (standing is None)


async def test_an_empty_account_that_says_so_pauses_at_once(refused: Refused) -> None:
    assert await refused.call(new_id(), is_empty=True)
    assert refused.is_paused()


async def test_the_record_is_asked_once_at_a_time(refused: Refused) -> None:
    refused.record.wait_s, refused.record.money = 0.2, "served"
    for _ in range(50):
        refused.quota.refused(Refusal(new_id(), new_id(), "m", "money", "402: no"))
    await refused.quota._tasks.drain(2)
    assert refused.record.asked == 1
    refused.record.wait_s = 0
    for _ in range(50):
        assert await refused.call(new_id())
    assert refused.record.asked == 1, "one caller does not make us ask for every call"


async def test_who_tried_last_in_vain_leaves_the_next_try_to_others(refused: Refused) -> None:
    """A caller whose every call is refused must not keep a pause alive that is not theirs alone."""
    caller, other = new_id(), new_id()
    for index in range(CALLERS_MIN):
        assert await refused.call(new_id(), f"model-{index}")
    await asyncio.sleep(0.35)
    assert await refused.call(caller)
    assert refused.is_paused(), "still refused"
    await asyncio.sleep(0.45)
    assert not refused.serve(caller), "whose turn it was"
    assert refused.serve(other)
    assert not refused.is_paused()
    assert refused.serve(caller)


async def test_who_is_alone_finds_out_by_themselves(refused: Refused) -> None:
    refused.record.key = "refused"
    caller = new_id()
    assert await refused.call(caller, subject="key")
    assert refused.is_paused()
    refused.record.key = "unknown"
    async with asyncio.timeout(5):
        while not refused.serve(caller):
            await asyncio.sleep(0.05)
    assert not refused.is_paused()


async def test_a_record_that_is_wrong_about_the_key_is_believed_once(refused: Refused) -> None:
    """A key without the right to see the models: calls are served with it."""
    refused.record.key = "refused"
    assert await refused.call(new_id(), subject="key")
    assert refused.is_paused()
    await asyncio.sleep(0.35)
    assert refused.serve(new_id())
    await refused.quota._tasks.drain(2)
    caller = new_id()
    for _ in range(10):
        assert await refused.call(caller, subject="key")
    assert not refused.is_paused()
