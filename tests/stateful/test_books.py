"""A state machine drives the real billing code beside a plain model; the books must hold after every step.

Two workers, a sweeper and a provider with books of its own; Postgres and Redis fail on the way. A failure prints its
steps and its seed; ``FAULT_SEED=… pytest tests/stateful/test_books.py`` runs the same again, and then looks for the
fewest steps that fail.
"""

import asyncio
import os
import random
from collections.abc import Coroutine, Mapping
from contextlib import AsyncExitStack
from datetime import datetime
from fractions import Fraction
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from billing.books.reconcile import Reconciler
from billing.calls.assessment import Evidence
from billing.calls.corrections import Corrections
from billing.calls.live_call import LiveCall
from billing.calls.outcome import Ending
from billing.calls.sweeper import SweepCounts, Sweeper
from billing.errors import CapExceededError, InputError, InsufficientFundsError, WalletFrozenError
from billing.identity.caller import Caller
from billing.ids import new_id
from billing.pricing.cost import Usage
from billing.wallets.caps import Caps, Scope
from tests.stateful.model import LIVE, Coin, Purse, Story
from tests.stateful.world import (
    MODEL,
    TOKEN_NANOUSD,
    Connections,
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
from tests.support.tcp_proxy import TcpProxy

USD = Coin("USD", Fraction(1), 0)
NGN = Coin("NGN", Fraction("1600.37"), 250)
START_NANOUSD = 10**10
OVERDRAFT_NANOUSD = 2 * 10**9
WORKERS = 2
DEFAULT_NANOUSD = 10**6
WAIT_S = 30  # for what must happen; nobody waits so long unless it does not
POLL_S = 0.005

costs = st.integers(1, 3 * 10**9)  # nano-dollars
bills = st.one_of(st.sampled_from([0, 10**6, 10**9]), st.integers(0, 4 * 10**9))  # nano-dollars
picks = st.integers(0, 11)  # of what there is, counted round
workers = st.integers(0, WORKERS - 1)
wallets = st.sampled_from(["prepaid", "prepaid", "overdraft", "naira"])
ANSWERS = ("not yet", "noted", "noted", "unnoted", "record late")
REFUSALS = (InsufficientFundsError, CapExceededError, WalletFrozenError)
cap_scopes: st.SearchStrategy[Scope] = st.sampled_from(["wallet", "user"])
parts = st.sampled_from([0, 1, 50, 100, 130])  # percent of the hold


class BooksMachine(RuleBasedStateMachine):
    """Three wallets, two workers, many calls, on an empty database; every rule is awaited on the test's loop."""

    scene: "Scene"

    def __init__(self) -> None:
        super().__init__()
        self.provider = LittleProvider()
        self.stories: list[Story] = []
        self.live: dict[UUID, tuple[Worker, LiveCall]] = {}
        self.credits: list[tuple[str, int, str]] = []  # wallet, nano units, key
        self.losses = 0  # nano-dollars that reconciliation booked though no call explains them
        self.audit = self.scene.audit
        self.run(self.open())

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.scene.runner.run(work)

    # -- the house ----------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        await self.scene.clear()
        self.workers = [Worker(connections, self.provider) for connections in self.scene.connections]
        first = self.scene.connections[0]
        self.house = await furnish(first, self.provider, rates={"NGN": ("1600.37", NGN.markup_bps)})
        for worker in self.workers:
            await worker.register()
            worker.quota.give_back(
                await worker.quota.take(1), spent_nanousd=0
            )  # a slab for the whole example
        self.purses: dict[str, Purse] = {}
        self.callers: dict[str, Caller] = {}
        for name, coin, overdraft in (
            ("prepaid", USD, 0),
            ("overdraft", USD, OVERDRAFT_NANOUSD),
            ("naira", NGN, 0),
        ):
            self.purses[name] = Purse(coin, overdraft)
            self.callers[name] = await make_caller(first, currency=coin.currency, overdraft_nano=overdraft)
            await self.top_up(name, coin.charge(START_NANOUSD), f"first {name}")
        self.names = {id(purse): name for name, purse in self.purses.items()}

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

    # -- what the rules are made of -----------------------------------------------------------------------------------

    async def top_up(self, name: str, amount: int, key: str) -> None:
        caller = self.callers[name]
        await self.workers[0].wallets.credit(caller.wallet_id, amount, reason="top-up", key=key)
        await self.cool(name)
        if (name, amount, key) not in self.credits:
            self.credits.append((name, amount, key))
            self.purses[name].credits += amount

    async def cool(self, name: str) -> None:
        """As every worker does when it hears that Postgres changed."""
        caller = self.callers[name]
        await self.workers[0].holds.cool(caller.user_id)

    def caller_of(self, story: Story) -> Caller:
        return self.callers[self.names[id(story.purse)]]

    def find(self, *states: str, lost: bool | None = False) -> list[Story]:
        return [
            story for story in self.stories if story.state in states and (lost is None or story.lost == lost)
        ]

    def pick(self, index: int, *states: str, lost: bool | None = False) -> Story | None:
        """Pick a call, None if there is none. No precondition asks for one: which worker wins a race is up to chance,
        and Hypothesis wants to be offered the same rules whenever it repeats the same steps."""
        found = self.find(*states, lost=lost)
        return found[index % len(found)] if found else None

    def pick_open(self, index: int) -> Story | None:
        """Pick an open call; begin one if there is none; None if there is no money for it."""
        opened = self.find("open") or self.admit("prepaid", [index % WORKERS], DEFAULT_NANOUSD)
        return opened[index % len(opened)] if opened else None

    def billed(self, story: Story) -> int:
        """What the provider has billed for a call's answer, in nano-dollars."""
        if story.generation_id is None:
            return 0
        return int(self.provider.bills[story.generation_id].cost_usd.scaleb(9))

    async def reserve_one(self, name: str, worker: Worker, cost: int) -> Story | None:
        """Reserve at a worker; None when it is refused."""
        caller = self.callers[name]
        quote = quote_of(self.house, caller, cost)
        try:
            call = await worker.calls.reserve(caller, quote, call_id=new_id(), model=MODEL, stream=True)
        except REFUSALS:
            return None
        story = Story(call.call_id, self.purses[name], quote.hold_nano, quote.hold_nanousd)
        assert story.hold == max(story.purse.coin.charge(cost), 1)
        self.live[story.call_id] = (worker, call)
        return story

    async def open_some(self, stories: list[Story]) -> None:
        """Open calls together; Postgres admits them, in this order, as far as each wallet reaches."""
        for story in stories:
            worker, call = self.live[story.call_id]
            worker.calls.open(call)
        for story in stories:
            worker, call = self.live[story.call_id]
            try:
                await worker.calls.confirm_open(call)
            except REFUSALS:
                story.state = "refused"
            else:
                story.state = "open"

    async def end(self, story: Story, ending: Ending) -> Any:
        worker, call = self.live[story.call_id]
        task = worker.calls.end(call, ending)
        async with asyncio.timeout(WAIT_S):
            await asyncio.wait((task,))
        return task.result()

    def exact_ending(self, story: Story) -> Ending:
        """The ending of a call whose bill is known, or that was never answered."""
        call = self.live[story.call_id][1]
        if story.generation_id is None:
            return ending_of(call, Evidence(), outcome="upstream_error")
        bill = self.provider.bills[story.generation_id]
        return ending_of(call, Evidence(bill.generation_id, bill.cost_usd, bill.usage))

    def ended(self, story: Story) -> None:
        """The model's part of ``exact_ending``."""
        if story.generation_id is None:
            story.state = "void"
        else:
            story.settle(self.billed(story))
        story.uncertain = False

    # -- credits ------------------------------------------------------------------------------------------------------

    @rule(name=wallets, amount=costs, repeats=st.booleans(), index=picks)
    def credit(self, name: str, amount: int, repeats: bool, index: int) -> None:
        """Money comes in, or an operator repeats an earlier credit with its key: it comes in once."""
        if repeats:
            self.run(self.top_up(*self.credits[index % len(self.credits)]))
        else:
            self.run(self.top_up(name, self.purses[name].coin.charge(amount), f"key-{new_id()}"))

    @rule(
        name=wallets, scope=cap_scopes, more=st.one_of(st.none(), st.just(0), costs), restarts=st.booleans()
    )
    def cap(self, name: str, scope: Scope, more: int | None, restarts: bool) -> None:
        """Cap a wallet or its user a little above what was counted, or lift the cap; perhaps the windows are forgotten."""
        purse, caller = self.purses[name], self.callers[name]
        limit = None if more is None else sum(purse.counted(scope)) + more
        if limit is None:
            purse.caps.pop(scope, None)
        else:
            purse.caps[scope] = max(limit, 0)

        async def work() -> None:
            scope_id = caller.wallet_id if scope == "wallet" else caller.user_id
            room = Caps(self.workers[0].database)
            await room.set_caps(scope, scope_id, {"total": purse.caps.get(scope)})
            if restarts:
                await self.audit.execute("DELETE FROM cap_windows")
            await self.cool(name)

        self.run(work())

    @rule(name=wallets, frozen=st.booleans())
    def freeze(self, name: str, frozen: bool) -> None:
        """An operator freezes a wallet, or lets it go: calls in flight end as ever, new ones are refused."""

        async def work() -> None:
            await self.audit.execute(
                "UPDATE wallets SET status = $2 WHERE id = $1",
                self.callers[name].wallet_id,
                "frozen" if frozen else "active",
            )
            await self.cool(name)

        self.run(work())
        self.purses[name].frozen = frozen

    # -- the way of a call --------------------------------------------------------------------------------------------

    @rule(name=wallets, worker=workers, cost=costs, part=parts, answered=st.sampled_from(ANSWERS))
    def begin(self, name: str, worker: int, cost: int, part: int, answered: str) -> None:
        """Reserve and open; perhaps the provider answers at once."""
        for story in self.admit(name, [worker], cost):
            self.let_answer(story, part, answered)

    @rule(name=wallets, many=st.integers(2, 6), cost=costs)
    def reserve_in_parallel(self, name: str, many: int, cost: int) -> None:
        """As many are admitted as the wallet covers, whichever worker asks."""
        self.admit(name, [index % WORKERS for index in range(many)], cost)

    def admit(self, name: str, asking: list[int], cost: int) -> list[Story]:
        """Let workers ask for holds at the same time and open what they get; return the calls that are open."""

        async def work() -> list[Story]:
            purse = self.purses[name]
            found = await asyncio.gather(
                *(self.reserve_one(name, self.workers[worker], cost) for worker in asking)
            )
            admitted = [story for story in found if story is not None]
            hold = max(purse.coin.charge(cost), 1)
            covered = purse.room(hold, cost, len(asking))
            if purse.certain:
                assert len(admitted) == covered
            await self.open_some(admitted)
            opened = [story for story in admitted if story.state == "open"]
            assert len(opened) == min(len(admitted), covered), "Postgres admits what it covers, and no more"
            for story in admitted:
                if story.state == "refused":
                    await self.end(story, self.exact_ending(story))
                    story.state = "gone"
            purse.calls += opened
            self.stories += opened
            rows = await self.audit.fetch(
                "SELECT available_after_nano FROM calls WHERE id = ANY ($1)",
                [story.call_id for story in opened],
            )
            assert (
                min((row["available_after_nano"] for row in rows), default=purse.available) == purse.available
            )
            return opened

        found: list[Story] = self.run(work())
        return found

    @rule(name=wallets, worker=workers, cost=costs)
    def reserve(self, name: str, worker: int, cost: int) -> None:
        """A hold whose call is not in Postgres yet: a lost mirror is rebuilt without it."""
        story = self.run(self.reserve_one(name, self.workers[worker], cost))
        if story is not None:
            story.uncertain = True
            story.purse.calls.append(story)
            self.stories.append(story)

    @rule(name=wallets, worker=workers, cost=costs, amount=costs, ends=st.booleans())
    def reserve_while_money_moves(self, name: str, worker: int, cost: int, amount: int, ends: bool) -> None:
        """A mirror is not filled from a snapshot that is out of date: money comes in, or a call ends, meanwhile."""
        asked = self.workers[worker]
        read_mirror = asked.holds._read_mirror
        ending = next((story for story in self.find("open") if story.purse is self.purses[name]), None)

        async def read_and_move(user_id: UUID, moment: datetime) -> Mapping[str, str]:
            snapshot = await read_mirror(user_id, moment)
            asked.holds._read_mirror = read_mirror
            if ends and ending is not None:
                await self.end(ending, self.exact_ending(ending))
                self.ended(ending)
            else:
                await self.top_up(name, amount, f"key-{new_id()}")
            return snapshot

        self.run(self.cool(name))
        asked.holds._read_mirror = read_and_move
        self.admit(name, [worker], cost)
        assert asked.holds._read_mirror == read_mirror

    @rule(index=picks, part=parts)
    def open_late(self, index: int, part: int) -> None:
        """Open what was reserved before; what Postgres refuses is the house's, if the provider billed it."""
        story = self.pick(index, "reserved")
        if story is None:
            return
        fits = story.purse.covers(story.hold, story.hold_usd)
        self.run(self.open_some([story]))
        assert (story.state == "open") == fits
        if story.state == "refused":
            self.let_answer(story, part)
            self.run(self.end(story, self.exact_ending(story)))
            story.uncertain = False
            story.state = "gone"
            if self.billed(story):
                story.settle_on_the_house(self.billed(story))

    @rule(index=picks, part=parts, answered=st.sampled_from(ANSWERS))
    def answer(self, index: int, part: int, answered: str) -> None:
        story = self.pick_open(index)
        if story is not None:
            self.let_answer(story, part, answered)

    def let_answer(self, story: Story, part: int, answered: str = "unnoted") -> None:
        """The provider answers and bills; perhaps its id is noted, perhaps its record is written later."""
        worker, call = self.live[story.call_id]
        if answered == "not yet":
            return
        if story.generation_id is None:
            cost = call.hold_nanousd * part // 100
            story.tokens = cost // TOKEN_NANOUSD // 2
            story.generation_id = self.provider.answer(cost, story.tokens)
        if answered == "record late":
            self.provider.withheld.add(story.generation_id)
        if answered != "unnoted":
            notes = {"generation_id": story.generation_id, "completion_tokens": str(story.tokens)}
            self.run(worker.calls.leases.note(call, **notes))
            story.noted = True

    @rule(index=picks, more=costs)
    def extend(self, index: int, more: int) -> None:
        story = self.pick_open(index)
        if story is None:
            return
        worker, call = self.live[story.call_id]
        cost = call.hold_nanousd + more
        hold = story.purse.coin.charge(cost)
        fits = story.purse.covers(hold - story.hold, cost - story.hold_usd)
        extended = self.run(worker.calls.extend(call, hold_nano=hold, hold_nanousd=cost))
        assert extended <= fits
        if story.purse.certain:
            assert extended == fits
        if extended:
            story.hold, story.hold_usd = hold, cost
        elif call.hold.amount_nano == hold:
            story.uncertain = True  # Redis extended it, Postgres did not: the release will tell

    @rule(index=picks, part=parts, way=st.sampled_from(["once", "twice", "both", "flushed", "release lost"]))
    def settle(self, index: int, part: int, way: str) -> None:
        """End a call at its bill: once, twice, from both workers at once, after a flush, or with its release lost."""
        story = self.pick_open(index)
        if story is None:
            return
        if story.generation_id is None:
            self.let_answer(story, part)
        ending = self.exact_ending(story)

        async def work() -> None:
            if way == "flushed":
                await self.lose_redis()
            if way == "both":
                other = self.workers[0].ledger
                settled, (second,) = await asyncio.gather(
                    self.end(story, ending), other.settle_calls([ending])
                )
                assert settled.won != second.won
                return
            if way == "release lost":
                self.scene.redis.shut()
            settled = await self.end(story, ending)
            if way == "release lost":
                await self.reopen_redis()
            assert settled.won
            if way == "twice":
                assert (await self.end(story, ending)).won
                assert not (await self.workers[1].ledger.settle_calls([ending]))[0].won

        self.run(work())
        self.ended(story)
        if way == "release lost":
            story.uncertain = True

    @rule(index=picks, tokens=st.integers(0, 3 * 10**6))
    def settle_estimated(self, index: int, tokens: int) -> None:
        """The provider says nothing: what was counted is charged until it does."""
        story = self.pick_open(index)
        if story is None:
            return
        if story.generation_id is None:
            self.let_answer(story, 50)
        usage = Usage(0, tokens)
        evidence = Evidence(story.generation_id, usage=usage, counted=True)
        self.run(self.end(story, ending_of(self.live[story.call_id][1], evidence)))
        story.settle(tokens * TOKEN_NANOUSD, accuracy="estimated")
        story.uncertain = False

    @rule(index=picks)
    def void(self, index: int) -> None:
        """End a call at zero, though the provider may have billed it."""
        story = self.pick_open(index)
        if story is None:
            return
        evidence = Evidence(story.generation_id)
        self.run(self.end(story, ending_of(self.live[story.call_id][1], evidence, outcome="upstream_error")))
        story.state, story.known, story.uncertain = "void", story.generation_id is not None, False

    # -- what happens to ended calls ----------------------------------------------------------------------------------

    @rule(index=picks, bills=st.lists(bills, min_size=1, max_size=4))
    def correct(self, index: int, bills: list[int]) -> None:
        """The provider changes its bill, perhaps back and forth, and an operator follows."""
        story = self.pick(index, "settled", lost=None)
        if story is None:
            return
        generation_id = story.generation_id
        assert generation_id is not None

        async def work() -> None:
            corrections = Corrections(self.workers[0].database, charge_estimates_upward=True)
            for bill in bills:
                self.provider.bill(generation_id, bill)
                done = await corrections.correct(story.call_id, self.provider.bills[generation_id])
                story.correct(bill, estimate=story.accuracy == "estimated")
                assert (done.after.cost_nanousd, done.after.charge_nano) == (story.cost, story.charge)
            await self.cool(self.names[id(story.purse)])

        self.run(work())

    @rule(index=picks, percent=st.integers(1, 120))
    def refund(self, index: int, percent: int) -> None:
        story = self.pick(index, "settled", lost=None)
        if story is None:
            return
        amount = story.charge * percent // 100

        async def work() -> None:
            corrections = Corrections(self.workers[0].database, charge_estimates_upward=True)
            try:
                await corrections.refund(story.call_id, amount_nano=amount, reason="sorry")
            except InputError:
                assert amount == 0 or amount > story.charge
                return
            await self.cool(self.names[id(story.purse)])
            story.refund(amount)

        self.run(work())

    @rule()
    def reconcile(self) -> None:
        """Our cost follows the provider's bill, call by call; what no call explains is the house's loss."""
        self.run(self.follow_the_provider())

    async def follow_the_provider(self) -> None:
        self.provider.withheld.clear()  # whoever is reconciled with has written its records
        report = await Reconciler(
            self.workers[0].database, self.provider, self.workers[0].settings.reconcile
        ).run()
        for story in self.find("review", lost=None):
            story.settle(self.billed(story))
            story.uncertain = False
        for story in self.find("settled", "void", lost=None):
            bill = self.billed(story)
            if story.known and not (bill == story.cost and story.accuracy in (None, "exact")):
                story.correct(bill, estimate=story.state == "settled" and story.accuracy == "estimated")
        drift = sum(map(self.billed, self.stories)) - self.cost()
        assert report.live_calls == len(self.find(*LIVE, lost=None))
        if drift > 0 and not report.live_calls:
            self.losses += drift
            for story in self.stories:
                story.written_off = story.written_off or not story.known
            drift = 0
        assert report.drift_nanousd == drift
        for name in self.purses:
            await self.cool(name)

    # -- workers come and go ------------------------------------------------------------------------------------------

    @rule(worker=workers)
    def worker_lost(self, worker: int) -> None:
        self.lose_worker(worker)

    def lose_worker(self, worker: int) -> None:
        """A worker is heard of no more; another takes its place. Its leases run on."""
        old = self.workers[worker]
        self.workers[worker] = Worker(old.connections, self.provider)
        self.run(self.workers[worker].register())
        for story in self.find("reserved", *LIVE):
            story.lost = self.live[story.call_id][0] is old

    @rule(
        index=picks,
        part=parts,
        answered=st.sampled_from(ANSWERS),
        flushed=st.booleans(),
        patient=st.booleans(),
        keeps_bills=st.booleans(),
        late=st.booleans(),
    )
    def crash(
        self,
        index: int,
        part: int,
        answered: str,
        flushed: bool,
        patient: bool,
        keeps_bills: bool,
        late: bool,
    ) -> None:
        """A worker dies in the middle of an answer, and the other one sweeps when its leases are over.

        With ``late`` it was only slow, and ends its call after all.
        """
        story = self.pick_open(index)
        if story is None:
            return
        self.let_answer(story, part, answered)
        number = self.workers.index(self.live[story.call_id][0])
        beside = (number + 1) % WORKERS
        self.admit("overdraft", [beside], DEFAULT_NANOUSD)  # a call that is to be left alone
        if flushed:
            self.run(self.lose_redis())
        self.lose_worker(number)
        self.run(self.end_leases())
        other = self.workers[beside]
        self.run(self.sweep_once(other, patient=patient, keeps_bills=keeps_bills))
        if late:
            self.end_late(story)

    async def end_leases(self) -> None:
        """Time passes: the leases that nobody renews are over; the living have renewed theirs."""
        alive = [worker.id for worker in self.workers]
        await self.audit.execute(
            "UPDATE workers SET lease_until = now() - interval '1 second' WHERE id <> ALL ($1)", alive
        )
        holds = self.workers[0].holds
        for lease in await holds.find_leases(expired=False, limit=10**6):
            owner = self.live[lease.call_id][0]
            if lease.call_id not in owner.calls._live or owner.id not in alive:
                key = f"tuma:{{s{lease.user_id.int % 64:02d}}}:leases"
                member = f"{lease.call_id}|{lease.wallet_id}|{lease.user_id}|{lease.key_id}"
                await self.workers[0].pipe.run("ZADD", key, "XX", "1", member)

    @rule()
    def renew(self) -> None:
        """Workers renew their leases: what a flush took is put back."""

        async def work() -> None:
            for worker in self.workers:
                await asyncio.gather(worker.calls.leases._renew_worker(), worker.calls.leases._renew_calls())

        self.run(work())
        for story in self.find("open"):
            story.noted = story.noted or "generation_id" in self.live[story.call_id][1].notes
            # Its extension may have been refused by Postgres alone: then its hold is still another in Redis.
            story.uncertain = self.live[story.call_id][1].hold.amount_nano != story.hold

    @rule(worker=workers, over=st.booleans(), patient=st.booleans(), keeps_bills=st.booleans())
    def sweep(self, worker: int, over: bool, patient: bool, keeps_bills: bool) -> None:
        """What the dead left is ended by the provider's records, once their leases are over; the living keep theirs."""
        if over:
            self.run(self.end_leases())
        self.run(self.sweep_once(self.workers[worker], patient=patient, keeps_bills=keeps_bills))

    async def sweep_once(self, worker: Worker, *, patient: bool, keeps_bills: bool) -> None:
        changes = {} if patient else {"review_after_s": 1e-9}
        sweeper = Sweeper(
            worker.database,
            worker.holds,
            self.provider,
            with_settings(worker.settings, "sweep", **changes).sweep,
        )
        expected = SweepCounts()
        orphans = [story for story in self.find(*LIVE, lost=True) if await self.is_over(story)]
        leases = await worker.holds.find_leases(expired=True, limit=10**6)
        self.provider.keeps_bills = keeps_bills
        counts = await sweeper.sweep()
        self.provider.keeps_bills = True
        for story in orphans:
            self.swept(story, expected, patient=patient, keeps_bills=keeps_bills)
        dropped = {lease.call_id for lease in leases}
        left = {lease.call_id for lease in await worker.holds.find_leases(expired=False, limit=10**6)}
        for story in self.stories:
            if story.call_id in dropped and story.state not in LIVE:
                story.uncertain = False
        for story in self.find("reserved", lost=True):
            if story.call_id not in left:
                story.state, story.uncertain = "gone", False
        assert counts is not None
        counts.holds_dropped = counts.waiting = 0
        assert counts.as_json() == expected.as_json()

    async def is_over(self, story: Story) -> bool:
        """Whether neither the worker nor the hold has a lease any more."""
        worker = self.live[story.call_id][0]
        lives = await self.audit.fetchval("SELECT lease_until > now() FROM workers WHERE id = $1", worker.id)
        leases = await self.workers[0].holds.find_leases(expired=False, limit=10**6)
        expired = await self.workers[0].holds.find_leases(expired=True, limit=10**6)
        held = {lease.call_id for lease in leases} - {lease.call_id for lease in expired}
        return not lives and story.call_id not in held

    def swept(self, story: Story, counts: SweepCounts, *, patient: bool, keeps_bills: bool) -> None:
        """The model's sweep of one call."""
        if not (story.noted or story.known):
            story.state = "void"
            counts.void += 1
        elif not keeps_bills:
            story.settle((story.tokens if story.noted else 0) * TOKEN_NANOUSD, accuracy="estimated")
            counts.estimated += 1
        elif story.generation_id not in self.provider.withheld:
            story.settle(self.billed(story))
            counts.exact += 1
        elif not patient and story.state == "open":
            story.state, story.known = "review", True
            counts.review += 1
        if story.state not in LIVE:
            story.uncertain = False

    @rule(index=picks)
    def settle_late(self, index: int) -> None:
        """A worker that was taken for dead ends its call after all, at the exact figure."""
        found = self.find_late()
        if found:
            self.end_late(found[index % len(found)])

    def end_late(self, story: Story) -> None:
        settlement = self.run(self.end(story, self.exact_ending(story)))
        story.late = True
        if story.state in LIVE:
            assert settlement.won
            self.ended(story)
            return
        assert not settlement.won
        if story.generation_id is not None:
            story.correct(self.billed(story), estimate=True)

    def find_late(self) -> list[Story]:
        # What a reconciliation has written off is not expected any more: it would be counted twice.
        return [
            story
            for story in self.find("settled", "void", *LIVE, lost=True)
            if not story.late and not story.written_off
        ]

    # -- servers fail -------------------------------------------------------------------------------------------------

    @rule(restarts=st.booleans())
    def flush(self, restarts: bool) -> None:
        """Redis loses its data; perhaps by a restart: connections are cut, scripts forgotten."""

        async def work() -> None:
            await self.lose_redis()
            if restarts:
                await self.workers[0].pipe.run("SCRIPT", "FLUSH")
                self.scene.redis.shut()
                await self.reopen_redis()

        self.run(work())

    async def reopen_redis(self) -> None:
        """Let the workers in again, on new connections: the first command on a cut one is refused."""
        self.scene.redis.open()
        for worker in self.workers:
            if worker.pipe._link is not None:
                worker.pipe._link.close()

    async def lose_redis(self) -> None:
        await self.workers[0].pipe.run("FLUSHALL")
        for story in self.stories:
            story.noted = False
            if story.state not in ("reserved", *LIVE):
                story.uncertain = False

    @rule(many=st.integers(1, 4))
    def postgres_away(self, many: int) -> None:
        """Postgres goes while calls end: their settlements wait, and are posted once when it is back."""
        if self.pick_open(0) is None:
            return
        stories = self.find("open")[:many]

        async def work() -> None:
            self.scene.postgres.shut()
            ends = [self.begin_end(story) for story in stories]
            batches = [self.live[story.call_id][0].calls._settles for story in stories]
            async with asyncio.timeout(WAIT_S):
                while not all(batch.away for batch in batches):
                    await asyncio.sleep(POLL_S)
                assert not any(task.done() for task in ends)
                self.scene.postgres.open()
                await asyncio.wait(ends)
            assert all(task.result().won for task in ends)

        self.run(work())
        for story in stories:
            self.ended(story)

    @rule(index=picks)
    def postgres_goes_after_the_commit(self, index: int) -> None:
        """The settlement is committed, its answer is lost: it is repeated, and posted once all the same."""
        story = self.pick_open(index)
        if story is None:
            return
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            " AND query LIKE '%settle_batch%'"
        )

        async def work() -> None:
            async with asyncio.timeout(WAIT_S):
                lock = await asyncpg.connect(self.scene.dsn)
                try:
                    await lock.execute("BEGIN")
                    await lock.execute(
                        "SELECT FROM wallets WHERE id = $1 FOR UPDATE", self.caller_of(story).wallet_id
                    )
                    task = self.begin_end(story)
                    while not await self.audit.fetchval(waiting):
                        await asyncio.sleep(POLL_S)
                    self.scene.postgres.mute()
                finally:
                    await lock.close()
                while await self.audit.fetchval(
                    "SELECT state = 'open' FROM calls WHERE id = $1", story.call_id
                ):
                    await asyncio.sleep(POLL_S)
                assert not task.done()
                self.scene.postgres.shut()
                self.scene.postgres.open()
                await asyncio.wait((task,))
            assert not task.result().won, "the repeat finds it settled"

        self.run(work())
        self.ended(story)

    def begin_end(self, story: Story) -> asyncio.Task[Any]:
        worker, call = self.live[story.call_id]
        return worker.calls.end(call, self.exact_ending(story))

    # -- the books ----------------------------------------------------------------------------------------------------

    def cost(self) -> int:
        return sum(story.cost for story in self.stories) + self.losses

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


class Scene:
    """What all examples share: a loop, a database and a Redis, each behind a gate, and connections through them.

    Args:
        dsn: of a migrated database, of which everything is deleted.
        redis_url: of a Redis, likewise.
    """

    def __init__(self, runner: asyncio.Runner, dsn: str, redis_url: str) -> None:
        self.runner = runner
        self.dsn = dsn
        self.postgres = TcpProxy(dsn)
        self.redis = TcpProxy(redis_url)
        self._redis_url = redis_url
        self._stack = AsyncExitStack()
        self._tables = ""
        self.connections: list[Connections] = []
        self.audit: Any = None

    async def open(self) -> None:
        self.audit = await asyncpg.connect(self.dsn)
        self._stack.push_async_callback(self.audit.close)
        self._tables = await self.audit.fetchval(
            "SELECT string_agg(relname, ', ') FROM pg_class WHERE relkind IN ('r', 'p') AND NOT relispartition"
            " AND relnamespace = 'public'::regnamespace AND relname NOT IN"
            " ('schema_functions', 'schema_migrations', 'audit_log', 'audit_blocks')"
        )
        for gate in (self.postgres, self.redis):
            await self._stack.enter_async_context(gate)
        configuration = make_settings(
            postgres_dsn=self.postgres.through(self.dsn),
            redis_url=self.redis.through(self._redis_url),
            holds={"lease_s": 600, "renew_s": 60},
            sweep={"worker_lease_s": 600, "review_after_s": 600},
            batch={"open_wait_s": WAIT_S, "settle_delay_ms": 0},
            reconcile={"sample": 10**6, "rows": 10**6},
            quota={"slab_usd": 10**5},
            redis={
                "timeout_s": WAIT_S
            },  # on a busy machine a command that timed out may run all the same, later
        )
        for _ in range(WORKERS):
            self.connections.append(Connections(configuration))
            self._stack.push_async_callback(self.connections[-1].close)

    async def clear(self) -> None:
        """Begin anew, so that an example depends on nothing but its steps."""
        # As nobody but a superuser can: the books refuse it.
        await self.audit.execute(
            f"SET session_replication_role = replica; TRUNCATE {self._tables}; RESET session_replication_role"
        )
        await self.audit.execute(
            "INSERT INTO fx_quotes (id, currency, rate, markup_bps) VALUES ($1, 'USD', 1, 0)", UUID(int=0)
        )
        await self.audit.execute("INSERT INTO provider_quota DEFAULT VALUES")
        await self.audit.execute("INSERT INTO quota_slabs (worker_id) VALUES ($1)", UUID(int=0))
        await self.connections[0].pipe.run("FLUSHALL")

    def open_gates(self) -> None:
        self.postgres.open()
        self.redis.open()

    async def close(self) -> None:
        await self._stack.aclose()


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
