"""Converting and charging never makes money: per currency, what the wallets pay is what the others get, to the nano."""

import random
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction

import pytest

from billing.books.opening_balance import record_openings
from billing.calls.assessment import Evidence, assess
from billing.calls.corrections import Corrections
from billing.calls.ledger import Ledger, Opening
from billing.calls.outcome import Ending
from billing.fx.book import FxBook
from billing.fx.quote import FxQuote
from billing.ids import new_id
from billing.pricing.cost import Price, Usage
from billing.pricing.price_book import PriceBook
from config.settings import FxSettings
from scripts.office import Office
from tests.support.currencies import RATES
from tests.support.payers import Payer, make_payer, sync_models

CALLS = 60


def draw_rate(dice: random.Random, about: str) -> Decimal:
    """Return a rate with up to 18 decimals, near the real one or anywhere."""
    if dice.random() < 0.5:
        return Decimal(about) + Decimal(dice.randrange(10**18)).scaleb(-18)
    return Decimal(dice.randrange(1, 10 ** dice.randint(1, 22))).scaleb(-18)


def draw_cost(dice: random.Random) -> Decimal:
    """Return a provider's figure in USD, from a fraction of a nano-dollar to hundreds."""
    return Decimal(dice.randrange(1, 10 ** dice.randint(1, 11))).scaleb(-dice.randint(9, 14))


@dataclass
class Till:
    """Makes calls in several currencies, and counts what they cost and what their wallets paid."""

    office: Office
    dice: random.Random
    price: Price
    paid: dict[str, int] = field(default_factory=dict)  # nano units, by currency
    cost_nanousd: int = 0

    async def take(self, currency: str, about: str) -> None:
        """Let a new payer make calls at some rate, and refund parts of some of them."""
        payer = await make_payer(self.office, amount="1000000000", currency=currency)
        rates = FxBook(self.office.database, FxSettings())
        markup_bps = self.dice.choice([0, 1, 250, 9_999])
        rate = draw_rate(self.dice, about)
        quote = await rates.set_rate("USD", currency, rate, markup_bps=markup_bps)
        endings = await self._call(payer, quote)
        for ending in endings:
            check_charge(ending, quote)
        refunded = await self._refund(self.dice.sample(endings, 10))
        self.paid[currency] = sum(ending.charge_nano for ending in endings) - refunded
        self.cost_nanousd += sum(ending.cost_nanousd for ending in endings)

    async def _call(self, payer: Payer, quote: FxQuote) -> list[Ending]:
        ledger = Ledger(self.office.database, worker_id=new_id())
        openings = [
            Opening(
                *(new_id(), payer.user_id, payer.wallet_id, payer.key_id, "m"),
                stream=False,
                price_id=self.price.id,
                fx_quote_id=quote.id,
                hold_nano=1,
                hold_nanousd=1,
            )
            for _ in range(CALLS)
        ]
        assert set(await ledger.open_calls(openings)) == {"opened"}
        endings = [
            assess(
                call.call_id,
                Evidence(str(call.call_id), draw_cost(self.dice), Usage(1, 1)),
                price=self.price,
                fx=quote,
                outcome="completed",
            )
            for call in openings
        ]
        await ledger.settle_calls(endings)
        return endings

    async def _refund(self, endings: list[Ending]) -> int:
        """Give back a part of each charge; return how much that was."""
        corrections = Corrections(self.office.database, charge_estimates_upward=True)
        refunded = 0
        for ending in endings:
            if ending.charge_nano:
                part = self.dice.randint(1, ending.charge_nano)
                await corrections.refund(ending.call_id, amount_nano=part, reason="test")
                refunded += part
        return refunded


def check_charge(ending: Ending, quote: FxQuote) -> None:
    """Upward, and by less than a nano for the dollars and one for the conversion."""
    nano_for_a_nano = Fraction(quote.rate) * (10_000 + quote.markup_bps) / 10_000
    exact = Fraction(ending.cost_nanousd) * nano_for_a_nano
    assert exact - nano_for_a_nano < ending.charge_nano < exact + 1
    assert 0 <= ending.spread_nano <= ending.charge_nano


@pytest.mark.parametrize("seed", range(3))
async def test_nothing_is_made_and_nothing_is_lost(office: Office, seed: int) -> None:
    dice = random.Random(seed)
    await sync_models(office)
    await record_openings(office.database, office.upstream)
    book = PriceBook(office.database)
    await book.load()
    till = Till(office, dice, book.get_model("openai/gpt-4o-mini").price)
    for currency, about in dice.sample(sorted(RATES.items()), 5):
        await till.take(currency, about)
    async with office.database.connection() as connection:
        rows = await connection.fetch(
            "SELECT currency, account, sum(amount_nano)::bigint AS nano FROM journal_entry GROUP BY 1, 2"
        )
    sums = {(row["currency"], row["account"]): row["nano"] for row in rows}
    for currency in {name for name, _ in sums}:
        assert sum(nano for (name, _), nano in sums.items() if name == currency) == 0, currency
    for currency, charged in till.paid.items():
        # What was granted is the grant account's negative.
        assert sums[currency, "wallet"] + sums[currency, "grant"] == -charged, currency
        if currency != "USD":
            gained = sum(sums.get((currency, name), 0) for name in ("fx_position", "fx_spread", "revenue"))
            assert gained == charged, currency
    assert sums["USD", "provider_prepaid"] == till.cost_nanousd == -sums["USD", "provider_cost"]
