"""The worker that looks into payments dies between any two steps; whoever lives makes the books agree with the provider's.

Each attempt is a new wallet and a new worker: a page is made, its customer pays, we refund a part, a bank disputes a part and
decides for us; webhooks come in a random order, twice or not at all. The worker dies in place of its n-th step, a survivor goes
on, and our books are compared with the provider's own (I5). In short runs n grows by a stride; ``--long`` takes every step.
``CRASH_AT=n`` begins with the n-th.
"""

import asyncio
import hashlib
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from billing.books.opening_balance import record_openings
from billing.money import NANO
from billing.payments.intents import Intents
from billing.payments.payment import Intent
from billing.payments.refunds import Refunds
from billing.payments.reviews import Reviews
from billing.payments.worker import PaymentWorker
from billing.postgres.database import Database
from config.settings import Settings
from proxy.payments.providers import make_payment_apis
from scripts.office import Office, open_office
from scripts.sim.payments.currencies import PROVIDERS, Provider
from scripts.sim.payments.server import SimulatedPayments
from scripts.sim.provider import SimulatedProvider
from tests.stateful.mortal import Life, MortalLoop
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer
from tests.support.settings import make_settings

PAID, REFUNDED, DISPUTED = 5000, 2000, 1000
RECOVERY_S = 30
STEPS_MAX = 5_000
SHORT = 9  # attempts of a short run, about


class Crew:
    """A worker's rooms, each by its own role.

    Args:
        settings: with providers.
        name: of its connections, by which the server knows them.
    """

    def __init__(self, settings: Settings, name: str) -> None:
        self._databases = {
            role: Database(settings.postgres, name=name, role=role) for role in ("webhook", "api", "operator")
        }
        self.worker = PaymentWorker(
            self._databases["webhook"], make_payment_apis(settings), settings.payments
        )
        self.intents = Intents(self._databases["api"])
        self.refunds = Refunds(self._databases["operator"])
        self.reviews = Reviews(self._databases["operator"])
        self.clock = self._databases["clock"] = Database(settings.postgres, name=name)

    async def let_time_pass(self) -> None:
        """Let everything be due, as if its pauses were over."""
        async with self.clock.transaction() as connection:
            await connection.execute("UPDATE webhook_events SET next_at = now() WHERE state = 'new'")
            await connection.execute("UPDATE payment_intents SET poll_at = now() WHERE poll_at IS NOT NULL")
            await connection.execute("UPDATE payment_reversals SET poll_at = now() WHERE poll_at IS NOT NULL")

    async def count(self, query: str, *values: object) -> int:
        async with self.clock.connection() as connection:
            return int(await connection.fetchval(f"SELECT count(*) FROM {query}", *values))

    async def close(self) -> None:
        await self.worker.close()
        for database in self._databases.values():
            await database.close()


@dataclass
class Story:
    """One payer's story with one provider, and how far the world outside has come in it."""

    psp: SimulatedPayments
    settings: Settings
    provider: Provider
    payer: Payer
    dice: random.Random
    payment_id: str | None = None
    dispute_id: str | None = None
    delivered: set[str] = field(default_factory=set)

    async def tell(self, crew: Crew) -> None:
        """Go on from wherever it is; whoever tells it again begins at the beginning."""
        intent = await self._begin(crew)
        if self.payment_id is None:
            self.payment_id = self.psp.till.pay(self.psp.till.find_checkout(intent.reference)).id
        while not await crew.count("payment_credits WHERE provider_txn_id = $1", self._txn_id):
            await self._post(crew)
        if not await crew.count(
            "payment_reversals WHERE kind = 'refund' AND provider_txn_id = $1", self._txn_id
        ):
            await crew.refunds.begin(
                self.provider, self._txn_id, amount_nano=REFUNDED * NANO, reason="they asked"
            )
        await crew.worker.work()
        await self._post(crew)
        if self.dispute_id is None:
            payment = self.psp.books.payments[self.payment_id]
            scale = payment.amount_minor // PAID
            self.dispute_id = self.psp.till.dispute(payment, DISPUTED * scale).id
        await self._post(crew)
        if self.psp.books.disputes[self.dispute_id].status == "open":
            self.psp.till.win(self.psp.books.disputes[self.dispute_id])
        await self._post(crew)

    @property
    def _txn_id(self) -> str:
        assert self.payment_id is not None
        payment = self.psp.books.payments[self.payment_id]
        return payment.id if self.provider == "stripe" else str(payment.number)

    async def _begin(self, crew: Crew) -> Intent:
        intent = await crew.intents.create(
            self.payer.user_id,
            self.payer.wallet_id,
            self.provider,
            amount_nano=PAID * NANO,
            currency="NGN",
            key="once",
            expires_after_s=3600,
            poll_after_s=30,
            live_max=20,
        )
        return await crew.worker.open_page(intent, email="ada@example.com", return_url=None)

    async def _post(self, crew: Crew) -> None:
        """Deliver some of the webhooks that there are, in any order, some of them again; then work on them."""
        told = [event for event in self.psp.webhooks.events.values() if event.provider == self.provider]
        chosen = [
            event for event in told if self.dice.random() < (0.3 if event.id in self.delivered else 0.7)
        ]
        self.dice.shuffle(chosen)
        api = crew.worker.api_of(self.provider)
        for event in chosen[-6:]:
            key = api.read_webhook(event.body).key or hashlib.sha256(event.body).hexdigest()
            await crew.worker.payments.receive(self.provider, key, event.body.decode())
            self.delivered.add(event.id)
        if self.dice.random() < 0.5:
            await crew.let_time_pass()
        await crew.worker.work()

    async def recover(self, crew: Crew) -> None:
        """Go on to the end, and look until nothing is open any more."""
        async with asyncio.timeout(RECOVERY_S):
            await self.tell(crew)
            while await crew.count(
                "payment_reversals WHERE state IN ('requested', 'open') AND provider_txn_id = $1",
                self._txn_id,
            ) or await crew.count(
                "payment_intents WHERE state <> 'paid' AND wallet_id = $1", self.payer.wallet_id
            ):
                await self._look_at_the_providers_pages(crew)
                await crew.let_time_pass()
                await crew.worker.work()

    async def _look_at_the_providers_pages(self, crew: Crew) -> None:
        """As an operator does: a refund that was on its way when its worker died, and is not there, is sent again."""
        assert self.payment_id is not None
        if self.psp.books.refunds_of(self.psp.books.payments[self.payment_id]):
            return
        async with crew.clock.transaction() as connection:
            await connection.execute("UPDATE payment_reversals SET sent_at = sent_at - interval '1 hour'")
            unsure = await connection.fetch(
                "SELECT id FROM payment_reversals WHERE state = 'requested' AND sent_at IS NOT NULL AND provider_txn_id = $1",
                self._txn_id,
            )
        for row in unsure:
            await crew.reviews.send_again(row["id"])


@dataclass
class Campaign:
    """What all attempts share."""

    settings: Settings
    office: Office
    psp: SimulatedPayments
    survivor: Crew

    async def run(self, provider: Provider, *, stride: int, seed: int) -> int:
        """Let workers die at every ``stride``-th step; return how many steps the story has."""
        n = int(os.environ.get("CRASH_AT", "0")) or 1 + random.Random(seed).randrange(stride)
        while n < STEPS_MAX:
            steps = await self.attempt(provider, n, seed=seed + n)
            if steps is not None:
                return steps
            n += stride
        raise AssertionError("this story has no end")

    async def attempt(self, provider: Provider, n: int, *, seed: int) -> int | None:
        """Let one worker try; return its number of steps if it lived to the end."""
        name = f"mortal {provider} {n}"
        life = Life()
        crew = Crew(self.settings, name)
        payer = await make_payer(self.office, amount="0", currency="NGN")
        story = Story(self.psp, self.settings, provider, payer, random.Random(seed))
        steps = 0

        async def lived() -> None:
            nonlocal steps
            life.arm(n)
            await story.tell(crew)
            steps = life.steps
            life.arm(None)
            await crew.close()

        task = life.begin(lived())
        try:
            await asyncio.wait((task, life.died), return_when=asyncio.FIRST_COMPLETED)
            if not life.dead:
                await task
            await self._wait_until_gone(name)
            await story.recover(self.survivor)
            await self._check(story)
        except BaseException as error:
            error.add_note(f"{provider}: the worker died in place of step {n}, seed {seed}")
            raise
        finally:
            await life.bury()
        return None if life.dead else steps

    async def _wait_until_gone(self, name: str) -> None:
        """Wait until Postgres is through with what the dead worker had sent."""
        async with asyncio.timeout(RECOVERY_S), self.office.database.connection() as connection:
            while await connection.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE starts_with(application_name, $1)", name
            ):
                await asyncio.sleep(0.002)

    async def _check(self, story: Story) -> None:
        wallet = await self.office.wallets.get_wallet(story.payer.wallet_id)
        assert (wallet.posted_nano, wallet.status) == ((PAID - REFUNDED) * NANO, "active")
        assert story.payment_id is not None
        payment = self.psp.books.payments[story.payment_id]
        assert len(self.psp.books.refunds_of(payment)) == 1, "a refund is sent once"
        await check_books(self.office)
        await self._compare(story.provider)

    async def _compare(self, provider: Provider) -> None:
        """I5: what our clearing account says we have at the provider is what its own books say, fees apart."""
        async with self.office.database.connection() as connection:
            ours = await connection.fetchval(
                "SELECT coalesce(sum(c.paid_nano), 0) - coalesce((SELECT sum(r.amount_nano) FROM payment_reversals r"
                " WHERE r.provider = $1 AND r.state <> 'undone'), 0) FROM payment_credits c WHERE c.provider = $1",
                provider,
            )
            fees = await connection.fetchval(
                "SELECT coalesce(sum(fee_nano), 0) FROM payment_credits WHERE provider = $1", provider
            )
        minor = NANO // 100
        assert int(ours) == self.psp.books.paid_total(provider, "NGN") * minor
        assert int(fees) == self.psp.books.fees_total(provider, "NGN") * minor


def _with_providers(settings: Settings, psp: SimulatedPayments) -> Settings:
    return Settings.model_validate(
        {
            **settings.model_dump(),
            "stripe": {"secret_key": psp.secrets.stripe_key, "base_url": psp.stripe_url},
            "paystack": {"secret_key": psp.secrets.paystack_key, "base_url": psp.paystack_url},
            "flutterwave": {"secret_key": psp.secrets.flutterwave_key, "base_url": psp.flutterwave_url},
            "payments": {"timeout_s": 10},
        }
    )


@asynccontextmanager
async def campaign(dsn: str, redis_url: str) -> AsyncIterator[Campaign]:
    async with SimulatedProvider() as provider, SimulatedPayments() as psp:
        settings = make_settings(postgres_dsn=dsn, redis_url=redis_url, upstream_url=provider.base_url)
        async with open_office(settings) as office:
            await record_openings(office.database, office.upstream)
            whole = _with_providers(settings, psp)
            survivor = Crew(whole, "survivor")
            try:
                yield Campaign(whole, office, psp, survivor)
            finally:
                await survivor.close()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_crash_between_any_two_steps(
    provider: Provider, dsn: str, redis_url: str, request: pytest.FixtureRequest
) -> None:
    seed = int(os.environ.get("CRASH_SEED", "0")) or random.randrange(10**6)

    async def work() -> None:
        async with campaign(dsn, redis_url) as one:
            steps = await one.attempt(provider, STEPS_MAX, seed=seed)  # how long it is
            assert steps is not None
            stride = 1 if request.config.getoption("--long") else max(1, steps // SHORT)
            steps = await one.run(provider, stride=stride, seed=seed)
            print(f"{provider}: {steps} crash points, every {stride}th tried, seed {seed}")
            assert steps >= 60

    with asyncio.Runner(loop_factory=MortalLoop) as runner:
        runner.run(work())
