"""A worker dies at every single step of a call's way; whoever lives makes the books right again.

Each attempt is a new wallet and a new worker. The worker dies in place of its n-th step, the survivors recover, and
everything is checked; n grows until a worker lives to the end of its scenario. ``CRASH_AT=n`` begins with the n-th.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from pydantic import SecretStr

from billing.books.reconcile import Reconciler
from billing.calls.assessment import Evidence
from billing.calls.live_call import LiveCall
from billing.calls.outcome import Ending
from billing.holds.hold import Hold
from billing.identity.caller import Caller
from billing.ids import new_id
from billing.pricing.cost import Usage
from config.settings import Settings
from tests.stateful.mortal import Life, MortalLoop
from tests.stateful.world import (
    MODEL,
    WIDE,
    Connections,
    House,
    LittleProvider,
    Worker,
    check_all,
    ending_of,
    furnish,
    make_caller,
    quote_of,
    with_settings,
)
from tests.support.settings import make_settings

CREDIT_NANO = 10**9
HOLD_NANOUSD = 10**8
EXTENDED_NANO = 15 * 10**7
COST_NANOUSD = 7 * 10**7
OVER_NANOUSD = 2 * 10**8  # more than the hold after its extension
RECOVERY_S = 20
POLL_S = 0.002
STEPS_MAX = 2_000


@dataclass
class Attempt:
    """One worker's attempt, and what the test knows of it from outside."""

    n: int
    life: Life
    worker: Worker
    house: House
    provider: LittleProvider
    caller: Caller
    billed: dict[UUID, str] = field(default_factory=dict)  # the provider's id of each answer, by call
    noted: set[UUID] = field(default_factory=set)  # calls whose note was acknowledged
    voided: set[UUID] = field(default_factory=set)  # calls whose own worker ends them at zero

    @property
    def credit_key(self) -> str:
        return f"credit {self.caller.wallet_id}"

    async def credit(self, by: Worker) -> None:
        await by.wallets.credit(self.caller.wallet_id, CREDIT_NANO, reason="top-up", key=self.credit_key)
        await by.holds.cool(self.caller.user_id)

    async def begin(self, cost_nanousd: int = COST_NANOUSD) -> LiveCall:
        """Reserve, open, let the provider answer, confirm, note the answer's id."""
        calls = self.worker.calls
        quote = quote_of(self.house, self.caller, HOLD_NANOUSD)
        call = await calls.reserve(self.caller, quote, call_id=new_id(), model=MODEL, stream=True)
        calls.open(call)
        self.billed[call.call_id] = self.provider.answer(cost_nanousd)
        await calls.confirm_open(call)
        await calls.leases.note(call, generation_id=self.billed[call.call_id])
        self.noted.add(call.call_id)
        return call

    async def settle(self, call: LiveCall) -> None:
        bill = self.provider.bills[self.billed[call.call_id]]
        evidence = Evidence(bill.generation_id, bill.cost_usd, Usage(1, 1))
        await asyncio.wait((self.worker.calls.end(call, ending_of(call, evidence)),))

    def arm(self) -> None:
        self.life.arm(self.n)


Scenario = Callable[[Attempt], Awaitable[None]]


async def whole_way(attempt: Attempt) -> None:
    """Every step of a call that ends well."""
    attempt.arm()
    await attempt.credit(attempt.worker)
    call = await attempt.begin()
    await asyncio.gather(
        attempt.worker.calls.leases._renew_worker(), attempt.worker.calls.leases._renew_calls()
    )
    await attempt.worker.calls.leases._note_in_postgres([call])
    assert await attempt.worker.calls.extend(call, hold_nano=EXTENDED_NANO, hold_nanousd=EXTENDED_NANO)
    await attempt.settle(call)


async def void(attempt: Attempt) -> None:
    """The provider refuses; the call ends at zero."""
    await attempt.credit(attempt.worker)
    call = await attempt.begin(cost_nanousd=0)
    attempt.voided.add(call.call_id)
    attempt.arm()
    await asyncio.wait((attempt.worker.calls.end(call, ending_of(call, Evidence(), outcome="refused")),))


async def over_the_hold(attempt: Attempt) -> None:
    """The answer cost more than was held, and more than the wallet has."""
    await attempt.credit(attempt.worker)
    call = await attempt.begin(cost_nanousd=CREDIT_NANO + OVER_NANOUSD)
    attempt.arm()
    await attempt.settle(call)


async def two_in_one_batch(attempt: Attempt) -> None:
    """Two calls of one wallet go the same way at the same time."""
    await attempt.credit(attempt.worker)
    attempt.arm()
    calls = await asyncio.gather(attempt.begin(), attempt.begin(OVER_NANOUSD))
    await asyncio.gather(*(attempt.settle(call) for call in calls))


@dataclass
class Campaign:
    """The survivors, and the database that all attempts share."""

    settings: Settings
    provider: LittleProvider
    house: House
    survivor: Worker
    audit: Any
    flush: bool = False  # whether Redis loses everything between a death and the recovery
    voids: int = 0  # answers that were billed and never noted

    async def run(self, scenario: Scenario) -> int:
        """Let workers die at every step, from ``CRASH_AT`` on; return how many steps the scenario has."""
        for n in range(int(os.environ.get("CRASH_AT", "1")), STEPS_MAX):
            steps = await self.attempt(scenario, n)
            if steps is not None:
                return steps
        raise AssertionError("this scenario has no end")

    async def attempt(self, scenario: Scenario, n: int) -> int | None:
        """Let one worker try; return its number of steps if it lived to the end."""
        name = f"mortal {n}"
        life = Life()
        connections = Connections(_named(self.settings, name), name=name)
        worker = Worker(connections, self.provider)
        caller = await make_caller(self.survivor.connections)
        attempt = Attempt(n, life, worker, self.house, self.provider, caller)

        steps = 0

        async def lived() -> None:
            nonlocal steps
            await worker.register()
            await scenario(attempt)
            steps = life.steps
            life.arm(None)
            await worker.calls.close(1.0)
            await connections.close()

        task = life.begin(lived())
        try:
            await asyncio.wait((task, life.died), return_when=asyncio.FIRST_COMPLETED)
            if not life.dead:
                await task
            await self.recover(attempt, name)
        except Exception as error:
            error.add_note(f"the worker died in place of step {n}: CRASH_AT={n} does it again")
            raise
        finally:
            await life.bury()
        return None if life.dead else steps

    async def recover(self, attempt: Attempt, name: str) -> None:
        """Do what an operator and the other workers do after a death, and check what comes of it."""
        await self._wait_until_gone(name)
        before = await self._calls(attempt)
        noted = await self._noted(attempt)
        if self.flush:
            await self.survivor.pipe.run("FLUSHALL")
            noted = set()
        noted |= {call_id for call_id, row in before.items() if row["generation_id"] is not None}
        await attempt.credit(self.survivor)
        await self._sweep()
        await self._check_calls(attempt, before, noted)
        await self._check_ended(attempt)
        await self._check_wallet(attempt)
        await self._check_admission(attempt)
        await check_all(self.survivor, self.provider)

    async def _wait_until_gone(self, name: str) -> None:
        """Wait until the servers are through with what the dead worker had sent."""
        async with asyncio.timeout(RECOVERY_S):
            while await self.audit.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE starts_with(application_name, $1)", name
            ):
                await asyncio.sleep(POLL_S)
            while f"name={name.replace(' ', '-')} ".encode() in await self.survivor.pipe.run(
                "CLIENT", "LIST"
            ):
                await asyncio.sleep(POLL_S)

    async def _calls(self, attempt: Attempt) -> dict[UUID, Any]:
        rows = await self.audit.fetch("SELECT * FROM calls WHERE wallet_id = $1", attempt.caller.wallet_id)
        return {row["id"]: row for row in rows}

    async def _noted(self, attempt: Attempt) -> set[UUID]:
        """Return the calls whose answer's id reached Redis, acknowledged or not."""
        found = set(attempt.noted)
        for call_id in attempt.billed:
            notes = await self.survivor.holds.find_notes(attempt.caller.user_id, call_id)
            if "generation_id" in notes:
                found.add(call_id)
        return found

    async def _sweep(self) -> None:
        """Sweep until no call is live and no hold or slab is left: the leases are over in a moment."""
        async with asyncio.timeout(RECOVERY_S):
            while True:
                await self.survivor.sweeper.sweep()
                live = await self.audit.fetchval(
                    "SELECT count(*) FROM calls WHERE state IN ('open', 'review')"
                )
                leased = await self.audit.fetchval(
                    "SELECT sum(leased_nanousd - spent_nanousd) FROM quota_slabs"
                )
                left = live or leased or await self.survivor.holds.find_leases(expired=False, limit=10)
                if not left:
                    return
                await asyncio.sleep(POLL_S)

    async def _check_calls(self, attempt: Attempt, before: dict[UUID, Any], noted: set[UUID]) -> None:
        """Each call is in one end state: as it was, or exactly at the bill if its id was noted, else void."""
        after = await self._calls(attempt)
        assert after.keys() == before.keys()
        for call_id, row in after.items():
            generation_id = attempt.billed[call_id]
            billed_nanousd = int(self.provider.bills[generation_id].cost_usd.scaleb(9))
            if before[call_id]["state"] == "open":
                exact = call_id in noted
            else:
                assert row == before[call_id], "what is posted stays"
                exact = call_id not in attempt.voided
            if exact:
                assert (row["state"], row["accuracy"]) == ("settled", "exact")
                assert row["generation_id"] == generation_id
                assert row["cost_nanousd"] == row["charge_nano"] == billed_nanousd
            else:
                assert (row["state"], row["cost_nanousd"], row["charge_nano"]) == ("void", 0, 0)
        # What was billed for an answer that no settled call stands for is a difference to be listed.
        for call_id, generation_id in attempt.billed.items():
            billed_nanousd = int(self.provider.bills[generation_id].cost_usd.scaleb(9))
            if billed_nanousd and (call_id not in after or after[call_id]["state"] == "void"):
                self.provider.listed_nanousd += billed_nanousd
                self.voids += 1

    async def _check_ended(self, attempt: Attempt) -> None:
        """Whoever tries to end a call once more, at whatever figure, is too late."""
        again = [
            Ending(call_id, "settled", "again", cost_nanousd=1, charge_nano=1)
            for call_id in await self._calls(attempt)
        ]
        assert not any(item.won for item in await self.survivor.ledger.settle_calls(again))

    async def _check_wallet(self, attempt: Attempt) -> None:
        """The credit came once; the wallet paid what its calls cost and nothing else; nothing is held."""
        wallet_id = attempt.caller.wallet_id
        grants = await self.audit.fetch(
            "SELECT e.amount_nano FROM journal_tx t JOIN journal_entry e ON e.tx_id = t.id AND e.wallet_id = t.wallet_id"
            " WHERE t.kind = 'grant' AND t.wallet_id = $1",
            wallet_id,
        )
        assert [row["amount_nano"] for row in grants] == [CREDIT_NANO]
        charges = sum(row["charge_nano"] for row in (await self._calls(attempt)).values())
        wallet = await self.survivor.wallets.get_wallet(wallet_id)
        assert (wallet.posted_nano, wallet.held_nano) == (CREDIT_NANO - charges, 0)

    async def _check_admission(self, attempt: Attempt) -> None:
        """Redis admits by what Postgres says, to the last nano."""
        caller, holds = attempt.caller, self.survivor.holds
        wallet = await self.survivor.wallets.get_wallet(caller.wallet_id)
        mirror = await holds.find_available(caller.user_id, caller.wallet_id)
        assert mirror in (None, wallet.available_nano)
        if wallet.available_nano > 0:
            every = wallet.available_nano
            probe = Hold(new_id(), caller.user_id, caller.wallet_id, caller.key_id, every, 1, WIDE)
            await holds.reserve(probe)
            assert await holds.find_available(caller.user_id, caller.wallet_id) == 0
            await holds.release(probe, charge_nano=0)
        assert await holds.list_holds(caller.user_id) == {}

    async def reconcile(self) -> None:
        """Book what was listed as the house's loss: then the provider's whole bill is accounted for."""
        listed, self.provider.listed_nanousd = self.provider.listed_nanousd, 0
        report = await Reconciler(self.survivor.database, self.provider, self.settings.reconcile).run()
        differences = [(item.cause, item.provider_nanousd, item.ours_nanousd) for item in report.differences]
        assert sum(theirs - ours for _, theirs, ours in differences if theirs is not None) == listed
        assert {cause for cause, _, _ in differences} == ({"billed_without_an_answer"} if listed else set())
        await check_all(self.survivor, self.provider)


def _named(settings: Settings, name: str) -> Settings:
    """Return settings by which Redis knows this worker's connections by name."""
    url = settings.redis.url.get_secret_value()
    named = f"{url}{'&' if '?' in url else '?'}client_name={name.replace(' ', '-')}"
    return with_settings(settings, "redis", url=SecretStr(named))


@asynccontextmanager
async def campaign(settings: Settings) -> AsyncIterator[Campaign]:
    """Open the survivors on an empty database."""
    provider = LittleProvider()
    connections = Connections(settings, name="survivor")
    audit = await asyncpg.connect(settings.postgres.dsn.get_secret_value())
    try:
        house = await furnish(connections, provider, rates={})
        yield Campaign(settings, provider, house, Worker(connections, provider), audit)
    finally:
        await audit.close()
        await connections.close()


@pytest.fixture
def settings(dsn: str, redis_url: str) -> Settings:
    """Leases end at once: nobody waits for the dead."""
    return make_settings(
        postgres_dsn=dsn,
        redis_url=redis_url,
        holds={"lease_s": 0.001},
        sweep={"worker_lease_s": 0.001},
        batch={"settle_delay_ms": 0},
        redis={"timeout_s": RECOVERY_S},
    )


# Each with the fewest steps it can plausibly have: fewer, and the deaths have not been where the money is.
CASES = {
    "whole way": (whole_way, {}, False, 60),
    "whole way, then a flush": (whole_way, {}, True, 60),
    "void": (void, {}, False, 10),
    "over the hold": (over_the_hold, {}, False, 10),
    "over the hold, noted while it waits": (over_the_hold, {"settle_wait_s": 1e-9}, False, 15),
    "two in one batch": (two_in_one_batch, {}, False, 60),
    "two in one batch, then a flush": (two_in_one_batch, {}, True, 60),
}


@pytest.mark.parametrize("name", CASES)
def test_a_crash_at_every_step(name: str, settings: Settings) -> None:
    scenario, batch, flush, steps_min = CASES[name]

    async def work() -> None:
        async with campaign(with_settings(settings, "batch", **batch)) as one:
            one.flush = flush
            steps = await one.run(scenario)
            await one.reconcile()
            print(f"{name}: {steps} crash points, {one.voids} answers billed and never noted")
            assert steps >= steps_min

    with asyncio.Runner(loop_factory=MortalLoop) as runner:
        runner.run(work())
