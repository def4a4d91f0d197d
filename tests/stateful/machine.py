"""What the rules of the state machine are made of: the house, its people, and a call's way step by step, beside the model."""

import asyncio
from collections.abc import Coroutine
from fractions import Fraction
from typing import Any
from uuid import UUID

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine

from billing.calls.assessment import Evidence
from billing.calls.live_call import LiveCall
from billing.calls.outcome import Ending
from billing.errors import CapExceededError, InsufficientFundsError, WalletFrozenError
from billing.identity.caller import Caller
from billing.ids import new_id
from tests.stateful.model import LIVE, Coin, Purse, Story
from tests.stateful.scene import WAIT_S, WORKERS, Scene
from tests.stateful.world import (
    MODEL,
    TOKEN_NANOUSD,
    LittleProvider,
    Worker,
    ending_of,
    furnish,
    make_caller,
    quote_of,
)

USD = Coin("USD", Fraction(1), 0)
NGN = Coin("NGN", Fraction("1600.37"), 250)
START_NANOUSD = 10**10
OVERDRAFT_NANOUSD = 2 * 10**9
DEFAULT_NANOUSD = 10**6

costs = st.integers(1, 3 * 10**9)  # nano-dollars
picks = st.integers(0, 11)  # of what there is, counted round
workers = st.integers(0, WORKERS - 1)
wallets = st.sampled_from(["prepaid", "prepaid", "overdraft", "naira"])
ANSWERS = ("not yet", "noted", "noted", "unnoted", "record late")
REFUSALS = (InsufficientFundsError, CapExceededError, WalletFrozenError)
parts = st.sampled_from([0, 1, 50, 100, 130])  # percent of the hold


class Machine(RuleBasedStateMachine):
    """Three wallets, two workers, many calls, on an empty database; every rule is awaited on the test's loop."""

    scene: Scene

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

    def cost(self) -> int:
        return sum(story.cost for story in self.stories) + self.losses

    def billed(self, story: Story) -> int:
        """What the provider has billed for a call's answer, in nano-dollars."""
        if story.generation_id is None:
            return 0
        return int(self.provider.bills[story.generation_id].cost_usd.scaleb(9))

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

    async def end(self, story: Story, ending: Ending) -> Any:
        worker, call = self.live[story.call_id]
        task = worker.calls.end(call, ending)
        async with asyncio.timeout(WAIT_S):
            await asyncio.wait((task,))
        return task.result()

    def begin_end(self, story: Story) -> asyncio.Task[Any]:
        worker, call = self.live[story.call_id]
        return worker.calls.end(call, self.exact_ending(story))

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

    async def lose_redis(self) -> None:
        await self.workers[0].pipe.run("FLUSHALL")
        for story in self.stories:
            story.noted = False
            if story.state not in ("reserved", *LIVE):
                story.uncertain = False

    async def reopen_redis(self) -> None:
        """Let the workers in again, on new connections: the first command on a cut one is refused."""
        self.scene.redis.open()
        for worker in self.workers:
            if worker.pipe._link is not None:
                worker.pipe._link.close()
