"""Rules of the way of a call: reserved, opened, answered, extended, and ended in each way."""

import asyncio
from collections.abc import Mapping
from datetime import datetime
from uuid import UUID

from hypothesis import strategies as st
from hypothesis.stateful import rule

from billing.calls.assessment import Evidence
from billing.ids import new_id
from billing.pricing.cost import Usage
from tests.stateful.machine import ANSWERS, Machine, costs, parts, picks, wallets, workers
from tests.stateful.scene import WORKERS
from tests.stateful.world import (
    TOKEN_NANOUSD,
    ending_of,
)


class CallRules(Machine):
    """What a worker that lives does with a call."""

    @rule(name=wallets, worker=workers, cost=costs, part=parts, answered=st.sampled_from(ANSWERS))
    def begin(self, name: str, worker: int, cost: int, part: int, answered: str) -> None:
        """Reserve and open; perhaps the provider answers at once."""
        for story in self.admit(name, [worker], cost):
            self.let_answer(story, part, answered)

    @rule(name=wallets, many=st.integers(2, 6), cost=costs)
    def reserve_in_parallel(self, name: str, many: int, cost: int) -> None:
        """As many are admitted as the wallet covers, whichever worker asks."""
        self.admit(name, [index % WORKERS for index in range(many)], cost)

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
