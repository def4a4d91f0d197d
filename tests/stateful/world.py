"""What the stateful tests share: a provider with books of its own, workers, and callers."""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from billing.books.opening_balance import record_openings
from billing.books.proof import Books, Check
from billing.calls.assessment import Evidence, assess
from billing.calls.calls import Calls
from billing.calls.ledger import Ledger
from billing.calls.live_call import LiveCall
from billing.calls.outcome import Ending
from billing.calls.sweeper import Sweeper
from billing.fx.book import FxBook
from billing.fx.quote import FxQuote, usd_quote
from billing.holds.holds import Holds
from billing.identity.caller import Caller
from billing.identity.keys import Keys
from billing.ids import new_id
from billing.limits import Limits
from billing.postgres.database import Database
from billing.pricing.cost import Price, Usage
from billing.pricing.price_book import ModelPrice, PriceBook
from billing.pricing.quote import Quote
from billing.pricing.tokens import PromptCount
from billing.provider.quota import Quota, QuotaWatch
from billing.provider.records import Activity, Bill, Source
from billing.provider.refusals import Standing, Subject
from billing.redis.pipeline import RedisPipe
from billing.wallets.wallets import Wallets
from config.settings import FxSettings, Settings

MODEL = "little/model"
TOKEN_NANOUSD = 1_000  # a token costs as much in a prompt as in an answer
WIDE = Limits(10**9, 10**12)
NANO_EXPONENT = -9
LEFT_USD = Decimal(10**6)  # of the provider's quota, however much was used


class LittleProvider:
    """A provider's own books: what it billed for each answer, whether anybody asked or not."""

    def __init__(self) -> None:
        self.bills: dict[str, Bill] = {}
        self.keeps_bills = True
        self.withheld: set[str] = set()  # answers whose records it has not written yet
        self.listed_nanousd = 0  # of its total, what the test lists as a difference

    def answer(self, cost_nanousd: int, tokens: int = 0) -> str:
        """Answer something; return the answer's id."""
        generation_id = f"gen-{new_id()}"
        self.bill(generation_id, cost_nanousd, tokens)
        return generation_id

    def bill(self, generation_id: str, cost_nanousd: int, tokens: int = 0) -> None:
        """Bill an answer, or change its bill."""
        self.bills[generation_id] = Bill(
            generation_id, Decimal(cost_nanousd).scaleb(NANO_EXPONENT), Usage(0, tokens)
        )

    async def find_bill(self, generation_id: str) -> Bill | None:
        return None if generation_id in self.withheld else self.bills.get(generation_id)

    async def find_totals_usd(self) -> Mapping[Source, Decimal]:
        total = sum((bill.cost_usd for bill in self.bills.values()), Decimal(0))
        return {"key": total - Decimal(self.listed_nanousd).scaleb(NANO_EXPONENT)}

    async def find_left_usd(self) -> Decimal | None:
        return LEFT_USD

    async def find_standing(self, _: Subject) -> Standing:
        return "served"

    async def find_activity(self) -> list[Activity] | None:
        return None


class Connections:
    """A worker's ways to Postgres and Redis; a worker that comes after it may take them over."""

    def __init__(self, settings: Settings, *, name: str = "tuma test") -> None:
        self.settings = settings
        self.database = Database(settings.postgres, name=name)
        self.pipe = RedisPipe(settings.redis)

    async def close(self) -> None:
        await self.pipe.close()
        await self.database.close()


class Worker:
    """One worker: the real calls and the real sweeper."""

    def __init__(self, connections: Connections, provider: LittleProvider) -> None:
        settings = connections.settings
        self.id = new_id()
        self.connections = connections
        self.settings = settings
        self.database = connections.database
        self.pipe = connections.pipe
        self.ledger = Ledger(self.database, worker_id=self.id)
        self.holds = Holds(self.pipe, settings.holds, self.ledger.read_mirror)
        self.wallets = Wallets(self.database)
        self.sweeper = Sweeper(self.database, self.holds, provider, settings.sweep)
        self.quota = Quota(self.database, provider, worker_id=self.id, settings=settings.quota)
        self.calls = Calls(self.database, self.holds, self.quota, worker_id=self.id, settings=settings)

    async def register(self) -> None:
        await self.calls.leases.register_worker(host="test", pid=1)


@dataclass(frozen=True, slots=True)
class House:
    """What every call is priced with."""

    price: Price
    rates: dict[str, FxQuote]


async def furnish(
    connections: Connections, provider: LittleProvider, *, rates: dict[str, tuple[str, int]]
) -> House:
    """Fill an empty database: a price, exchange rates with their markup, and what the provider had billed before."""
    book = PriceBook(connections.database)
    token_usd = Decimal(TOKEN_NANOUSD).scaleb(NANO_EXPONENT)
    prices = {"prompt_usd": token_usd, "completion_usd": token_usd}
    await book.set_prices([ModelPrice(MODEL, MODEL, None, None, prices)], source="test")
    await book.load()
    quotes = {"USD": usd_quote()}
    for currency, (rate, markup_bps) in rates.items():
        quotes[currency] = await FxBook(connections.database, FxSettings()).set_rate(
            "USD", currency, Decimal(rate), markup_bps=markup_bps
        )
    await record_openings(connections.database, provider)
    await QuotaWatch(connections.database, provider, connections.settings.quota).observe()
    return House(book.get_model(MODEL).price, quotes)


async def make_caller(connections: Connections, *, currency: str = "USD", overdraft_nano: int = 0) -> Caller:
    """Make a user with an empty wallet and a key."""
    wallets = Wallets(connections.database)
    user_id = await wallets.create_user(f"{new_id()}@example.com")
    wallet_id = await wallets.create_wallet(str(user_id), currency=currency, overdraft_nano=overdraft_nano)
    settings = connections.settings
    key = await Keys(connections.database, settings.auth, settings.limits).create(wallet_id)
    return Caller(user_id, wallet_id, key.id, currency, WIDE)


def quote_of(house: House, caller: Caller, hold_nanousd: int) -> Quote:
    """Quote a call at so many nano-dollars."""
    fx = house.rates[caller.currency]
    hold_attousd = hold_nanousd * 10**9
    return Quote(
        house.price,
        fx,
        PromptCount(1),
        1,
        hold_attousd,
        hold_nanousd,
        max(fx.charge(hold_attousd).charge_nano, 1),
    )


def ending_of(call: LiveCall, evidence: Evidence, *, outcome: str = "completed") -> Ending:
    """Assess a call as the proxy does when it ends."""
    return assess(call.call_id, evidence, price=call.quote.price, fx=call.quote.fx, outcome=outcome)


def with_settings(settings: Settings, section: str, **changes: Any) -> Settings:
    """Return the settings with some of a section's values changed."""
    return settings.model_copy(update={section: getattr(settings, section).model_copy(update=changes)})


async def check_all(worker: Worker, provider: LittleProvider) -> dict[str, Check]:
    """Assert I1 to I8, and that nothing is left in flight; return what the checks say."""
    checks = await Books(worker.database, worker.holds, provider, sweep_grace_s=0).check()
    assert {name: check.detail for name, check in checks.items() if not check.ok} == {}
    async with worker.database.connection() as connection:
        left = await connection.fetchrow(
            "SELECT (SELECT count(*) FROM calls WHERE state IN ('open', 'review')) AS live,"
            " (SELECT coalesce(sum(held_nano), 0) FROM wallets) AS held"
        )
    assert (left["live"], left["held"]) == (0, 0)
    assert await worker.holds.find_leases(expired=False, limit=10) == []
    return checks
