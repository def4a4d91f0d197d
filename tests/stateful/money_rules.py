"""Rules of money: it comes in, is capped and frozen; bills change, are followed, and are given back."""

from hypothesis import strategies as st
from hypothesis.stateful import rule

from billing.books.reconcile import Reconciler
from billing.calls.corrections import Corrections
from billing.errors import InputError
from billing.ids import new_id
from billing.wallets.caps import Caps, Scope
from tests.stateful.machine import Machine, costs, picks, wallets
from tests.stateful.model import LIVE

bills = st.one_of(st.sampled_from([0, 10**6, 10**9]), st.integers(0, 4 * 10**9))  # nano-dollars
cap_scopes: st.SearchStrategy[Scope] = st.sampled_from(["wallet", "user"])


class MoneyRules(Machine):
    """What operators and reconciliation do, before a call and after it."""

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

    @rule(index=picks, bills=st.lists(bills, min_size=1, max_size=4))
    def correct(self, index: int, bills: list[int]) -> None:
        """The provider changes its bill, and then again from the first to the last: the operator follows each time."""
        story = self.pick(index, "settled", lost=None)
        if story is None:
            return
        generation_id = story.generation_id
        assert generation_id is not None

        async def work() -> None:
            corrections = Corrections(self.workers[0].database, charge_estimates_upward=True)
            for bill in bills * 2:
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
