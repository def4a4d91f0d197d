"""Converting and charging never makes money: per currency, what the wallets pay is what the others get, to the nano."""

import random
from decimal import Decimal
from fractions import Fraction

import pytest

from billing.books.opening_balance import record_openings
from billing.calls.assessment import Evidence, assess
from billing.calls.corrections import Corrections
from billing.calls.ledger import Ledger, Opening
from billing.fx.book import FxBook
from billing.fx.quote import FxQuote
from billing.ids import new_id
from billing.pricing.cost import Usage
from billing.pricing.price_book import PriceBook
from config.settings import FxSettings
from scripts.office import Office
from tests.support.currencies import RATES
from tests.support.payers import make_payer, sync_models

CALLS = 60


def draw_rate(dice: random.Random, about: str) -> Decimal:
    """Return a rate with up to 18 decimals, near the real one or anywhere."""
    if dice.random() < 0.5:
        return Decimal(about) + Decimal(dice.randrange(10**18)).scaleb(-18)
    return Decimal(dice.randrange(1, 10 ** dice.randint(1, 22))).scaleb(-18)


def draw_cost(dice: random.Random) -> Decimal:
    """Return a provider's figure in USD, from a fraction of a nano-dollar to hundreds."""
    return Decimal(dice.randrange(1, 10 ** dice.randint(1, 11))).scaleb(-dice.randint(9, 14))


@pytest.mark.parametrize("seed", range(3))
async def test_nothing_is_made_and_nothing_is_lost(office: Office, seed: int) -> None:
    dice = random.Random(seed)
    await sync_models(office)
    await record_openings(office.database, office.upstream)
    book, rates = PriceBook(office.database), FxBook(office.database, FxSettings())
    await book.load()
    ledger = Ledger(office.database, worker_id=new_id())
    corrections = Corrections(office.database, charge_estimates_upward=True)
    price = book.get_model("openai/gpt-4o-mini").price
    paid: dict[str, int] = {}
    cost_nanousd = 0
    for currency, about in dice.sample(sorted(RATES.items()), 5):
        payer = await make_payer(office, amount="1000000000", currency=currency)
        quote: FxQuote = await rates.set_rate(
            "USD", currency, draw_rate(dice, about), markup_bps=dice.choice([0, 1, 250, 9_999])
        )
        openings = [
            Opening(
                *(new_id(), payer.user_id, payer.wallet_id, payer.key_id, "m"),
                stream=False,
                price_id=price.id,
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
                Evidence(str(call.call_id), draw_cost(dice), Usage(1, 1)),
                price=price,
                fx=quote,
                outcome="completed",
            )
            for call in openings
        ]
        for ending in endings:
            exact = (
                Fraction(ending.cost_nanousd) * Fraction(quote.rate) * (10_000 + quote.markup_bps) / 10_000
            )
            # Upward, and by less than a nano for the dollars and one for the conversion.
            assert (
                exact - Fraction(quote.rate) * (10_000 + quote.markup_bps) / 10_000
                < ending.charge_nano
                < exact + 1
            )
            assert 0 <= ending.spread_nano <= ending.charge_nano
        await ledger.settle_calls(endings)
        refunded = 0
        for ending in dice.sample(endings, 10):
            if ending.charge_nano:
                part = dice.randint(1, ending.charge_nano)
                await corrections.refund(ending.call_id, amount_nano=part, reason="test")
                refunded += part
        paid[currency] = sum(ending.charge_nano for ending in endings) - refunded
        cost_nanousd += sum(ending.cost_nanousd for ending in endings)
    async with office.database.connection() as connection:
        rows = await connection.fetch(
            "SELECT currency, account, sum(amount_nano)::bigint AS nano FROM journal_entry GROUP BY 1, 2"
        )
    sums = {(row["currency"], row["account"]): row["nano"] for row in rows}
    for currency in {name for name, _ in sums}:
        assert sum(nano for (name, _), nano in sums.items() if name == currency) == 0, currency
    for currency, charged in paid.items():
        left = (
            sums[currency, "wallet"] + sums[currency, "grant"]
        )  # what was granted is the grant account's negative
        assert left == -charged, currency
        if currency != "USD":
            gained = sum(sums.get((currency, name), 0) for name in ("fx_position", "fx_spread", "revenue"))
            assert gained == charged, currency
    assert sums["USD", "provider_prepaid"] == cost_nanousd == -sums["USD", "provider_cost"]
