"""A state machine drives the real billing code beside a plain model; the books must hold after every step.

Two workers, a sweeper and a provider with books of its own; Postgres and Redis fail on the way. A failure prints its
steps and its seed; ``FAULT_SEED=… pytest tests/stateful/test_books.py`` runs the same again, and then looks for the
fewest steps that fail.
"""

import asyncio
import os
import random

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import invariant, run_state_machine_as_test

from tests.stateful.call_rules import CallRules
from tests.stateful.fault_rules import FaultRules
from tests.stateful.model import LIVE
from tests.stateful.money_rules import MoneyRules
from tests.stateful.scene import Scene
from tests.stateful.world import (
    check_all,
)


class BooksMachine(MoneyRules, CallRules, FaultRules):
    """All rules together; the books are looked at after each, and when all is calm."""

    def teardown(self) -> None:
        async def close() -> None:
            try:
                await self.calm_down()
            finally:
                self.scene.open_gates()
                for worker in {worker.id: worker for worker, _ in self.live.values()}.values():
                    await worker.calls.close(1.0)
                # Workers that died, and those of this example, have connections of their own: they end with them.
                for connections in self.scene.connections:
                    held, connections.database._held = connections.database._held, []
                    await asyncio.gather(*(connection.close() for connection in held))

        self.run(close())

    @invariant()
    def the_books_hold(self) -> None:
        self.run(self.look())

    async def look(self) -> None:
        """I1, I2, I4, I6 and I7, and the model's figures, straight from the servers."""
        assert not await self.audit.fetch(
            "SELECT tx_id FROM journal_entry GROUP BY tx_id, currency HAVING sum(amount_nano) <> 0"
        )
        sums = await self.audit.fetchrow(
            "SELECT (SELECT coalesce(sum(amount_nanousd), 0) FROM shadow_usd_ledger WHERE kind <> 'opening')::bigint AS shadow,"
            " (SELECT coalesce(-sum(amount_nano), 0) FROM journal_entry WHERE account = 'provider_cost')::bigint AS cost,"
            " (SELECT coalesce(sum(cost_nanousd), 0) FROM calls)::bigint AS calls,"
            " (SELECT coalesce(sum(amount_nano), 0) FROM journal_entry WHERE account = 'fx_spread')::bigint AS spread"
        )
        assert sums["shadow"] == sums["cost"] == sums["calls"] + self.losses == self.cost()
        assert sums["spread"] == sum(story.spread for story in self.stories)
        rows = await self.audit.fetch(
            "SELECT w.id, w.posted_nano, w.held_nano,"
            " (SELECT coalesce(sum(e.amount_nano), 0) FROM journal_entry e WHERE e.wallet_id = w.id)::bigint AS entries,"
            " (SELECT coalesce(sum(c.hold_nano), 0) FROM calls c WHERE c.wallet_id = w.id"
            "  AND c.state IN ('open', 'review'))::bigint AS holds FROM wallets w"
        )
        found = {row["id"]: row for row in rows}
        for name, purse in self.purses.items():
            caller = self.callers[name]
            row = found[caller.wallet_id]
            assert row["posted_nano"] == row["entries"] == purse.posted
            assert row["held_nano"] == row["holds"] == purse.held
            if purse.certain:
                mirror = await self.workers[0].holds.find_available(caller.user_id, caller.wallet_id)
                assert mirror in (None, purse.available)
        await self.look_at_caps()
        for story in self.stories:
            assert story.charge <= story.purse.coin.charge(story.cost), (
                "no wallet pays more than its call cost"
            )
        states = await self.audit.fetch("SELECT id, state FROM calls")
        assert {row["id"]: row["state"] for row in states} == {
            story.call_id: story.state for story in self.stories if story.state not in ("reserved", "gone")
        }

    async def look_at_caps(self) -> None:
        """Every cap counts what the model counts, in Postgres and, where Redis knows, there too."""
        rows = await self.audit.fetch("SELECT scope_id, period, held_nano, spent_nano FROM cap_windows")
        found = {(row["scope_id"], row["period"]): (row["held_nano"], row["spent_nano"]) for row in rows}
        for name, purse in self.purses.items():
            caller = self.callers[name]
            mirror = await self.workers[0].holds.read_mirror(caller.user_id) if purse.certain else {}
            for scope, limit in purse.caps.items():
                scope_id = caller.wallet_id if scope == "wallet" else caller.user_id
                counted = purse.counted(scope)
                assert found.get((scope_id, "total"), counted) == counted
                left = mirror.get(f"left:{scope_id}:total")
                assert left in (None, str(limit - sum(counted)))

    async def calm_down(self) -> None:
        """Faults have stopped: everything ends, and I1 to I8 hold, by the provider's own sum too."""
        self.provider.withheld.clear()
        for story in self.find("reserved"):
            await self.end(story, self.exact_ending(story))
            story.state, story.uncertain = "gone", False
        for story in self.find("open"):
            await self.end(story, self.exact_ending(story))
            self.ended(story)
        await self.end_leases()
        await self.sweep_once(self.workers[0], patient=True, keeps_bills=True)
        assert not self.find(*LIVE, "reserved", lost=None)
        await self.follow_the_provider()
        await self.look()
        await check_all(self.workers[0], self.provider)
        for name, purse in self.purses.items():
            if purse.covers(1, 0):
                (probe,) = [await self.reserve_one(name, self.workers[1], 0)]
                assert probe is not None
                await self.end(probe, self.exact_ending(probe))
            mirror = await self.workers[0].holds.find_available(
                self.callers[name].user_id, self.callers[name].wallet_id
            )
            assert mirror in (None, purse.available)


@pytest.mark.timeout(1800)  # with --long; else it takes seconds
def test_the_books_hold_whatever_happens(
    dsn: str, redis_url: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("billing.books.reconcile._QUIET_PAUSE_S", 0)  # nobody else is at work
    monkeypatch.setattr("billing.postgres.group_commit._BACKOFF_FIRST_S", 0.005)
    given = int(os.environ.get("FAULT_SEED", "0"))
    number = given or random.SystemRandom().randrange(1, 10**9)
    print(f"FAULT_SEED={number}")
    long = request.config.getoption("--long")
    with asyncio.Runner() as runner:
        scene = Scene(runner, dsn, redis_url)
        runner.run(scene.open())
        try:
            run_state_machine_as_test(
                seed(number)(type("Machine", (BooksMachine,), {"scene": scene})),
                settings=settings(
                    max_examples=300 if long else 25,
                    stateful_step_count=60 if long else 30,
                    deadline=None,
                    suppress_health_check=list(HealthCheck),
                    database=None,
                    phases=[Phase.generate, Phase.shrink] if given else [Phase.generate],
                ),
            )
        finally:
            runner.run(scene.close())


def test_a_call_that_ends_while_another_asks_for_quota(dsn: str, redis_url: str) -> None:
    """``FAULT_SEED=114097347``, in its fewest steps: a worker without a slab of the quota asked a cold mirror's snapshot first.

    A call of the wallet ended after that snapshot, and gave back what covers the new one; yet it was refused.
    """
    with asyncio.Runner() as runner:
        scene = Scene(runner, dsn, redis_url)
        runner.run(scene.open())
        try:
            machine = type("Machine", (BooksMachine,), {"scene": scene})()
            machine.renew()
            machine.crash(
                index=0,
                part=0,
                answered="not yet",
                flushed=False,
                patient=False,
                keeps_bills=False,
                late=False,
            )
            machine.postgres_goes_after_the_commit(index=0)
            machine.extend(index=11, more=1)
            (ending,) = machine.find("open")
            assert ending.purse is machine.purses["prepaid"]
            machine.cap(name="prepaid", scope="wallet", more=0, restarts=False)
            machine.reserve_while_money_moves(name="prepaid", worker=0, cost=1, amount=1, ends=True)
            machine.the_books_hold()
            machine.teardown()
        finally:
            runner.run(scene.close())
