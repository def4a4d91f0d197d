"""Rules of faults: workers die or are late, the sweeper ends what they left, Redis forgets, Postgres goes."""

import asyncio

import asyncpg
from hypothesis import strategies as st
from hypothesis.stateful import rule

from billing.calls.sweeper import SweepCounts, Sweeper
from tests.stateful.machine import ANSWERS, DEFAULT_NANOUSD, Machine, parts, picks, workers
from tests.stateful.model import LIVE, Story
from tests.stateful.scene import WAIT_S, WORKERS
from tests.stateful.world import (
    TOKEN_NANOUSD,
    Worker,
    with_settings,
)

POLL_S = 0.005


class FaultRules(Machine):
    """What fails, and who puts it right."""

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
