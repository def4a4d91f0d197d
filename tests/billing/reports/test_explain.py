"""The words about a charge are followed with a calculator of the test's own, and must lead to what was posted."""

import random
import re
from collections.abc import Sequence
from decimal import ROUND_CEILING, Context, Decimal, localcontext
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.calls.assessment import Evidence, assess
from billing.calls.corrections import Corrections
from billing.calls.ledger import Ledger, Opening
from billing.errors import NotFoundError
from billing.fx.book import FxBook
from billing.fx.quote import FxQuote
from billing.ids import new_id
from billing.money import NANO, format_amount
from billing.postgres.database import Database
from billing.pricing.cost import Price, Usage
from billing.pricing.price_book import ModelPrice, PriceBook
from billing.provider.records import Bill
from billing.reports.call_view import CallFilter, OwnCalls, describe_call
from billing.reports.explain import CallFacts, explain
from config.settings import FxSettings
from scripts.cli.calls import _write_call
from scripts.office import Office
from tests.billing.calls.test_ledger import books_hold
from tests.support.payers import Payer, make_payer

_NUMBER = r"(-?[0-9]+(?:\.[0-9]+)?)"
_PRICES = tuple(
    f"{name}_usd"
    for name in (
        "prompt",
        "completion",
        "cached_read",
        "cached_write",
        "reasoning",
        "image",
        "audio",
        "request",
    )
)
_WIDE = Context(prec=300)
_NANO = Decimal("1e-9")


def follow(lines: list[str]) -> Decimal:
    """Check every sum that the lines name, and return the charge that they lead to."""
    cost = charge = None
    parts: list[Decimal] = []
    with localcontext(_WIDE):
        for line in lines:
            if part := re.fullmatch(rf"([0-9]+) [a-z ]+ × {_NUMBER} USD = {_NUMBER} USD", line):
                assert Decimal(part[1]) * Decimal(part[2]) == Decimal(part[3]), line
                parts.append(Decimal(part[3]))
            elif compared := re.fullmatch(rf"By our price book: (.*) = {_NUMBER} USD\.", line):
                products = [
                    re.fullmatch(rf"([0-9]+) [a-z ]+ × {_NUMBER}", item) for item in compared[1].split(" + ")
                ]
                total = sum(Decimal(item[1]) * Decimal(item[2]) for item in products if item is not None)
                assert None not in products and total == Decimal(compared[2]), line
            elif named := re.match(rf"Cost: {_NUMBER} USD", line):
                cost = Decimal(named[1])
                assert not parts or sum(parts) == cost, line
            elif product := re.fullmatch(
                rf"{_NUMBER} USD(?: × {_NUMBER} [A-Z]+ per USD)?(?: × \(1 \+ ([0-9]+)/10000\))? = {_NUMBER} [A-Z]+",
                line,
            ):
                factor = Decimal(product[2] or 1) * (1 + Decimal(product[3] or 0) / 10000)
                assert Decimal(product[1]) * factor == Decimal(product[4]), line
                assert cost is None or Decimal(product[1]) == cost, line
                exact = Decimal(product[4])
                plain = Decimal(product[1]) * Decimal(product[2] or 1)
                base = plain.quantize(_NANO, rounding=ROUND_CEILING)
            elif rounded := re.fullmatch(rf"Rounded up, this once, to 9 decimals: {_NUMBER} [A-Z]+\.", line):
                charge = exact.quantize(_NANO, rounding=ROUND_CEILING)
                assert charge == Decimal(rounded[1]), line
            elif markup := re.match(rf"Of it, markup: {_NUMBER} .* it would be {_NUMBER} ", line):
                assert Decimal(markup[2]) == base, line
                assert charge is not None and Decimal(markup[1]) == charge - base, line
            elif held := re.match(
                rf"Held during the call: {_NUMBER} .*; paid when it ended: {_NUMBER} ", line
            ):
                paid = Decimal(held[2])
                assert charge in (None, paid), line
                charge, rest = paid, Decimal(held[1]) - paid
                words = f"{format_amount(int(abs(rest) * NANO))} "
                assert words in line and ("given back" if rest >= 0 else "beyond the hold") in line, line
            elif change := re.search(rf": the charge goes from {_NUMBER} to {_NUMBER} ", line):
                assert charge == Decimal(change[1]), line
                charge, cost = Decimal(change[2]), None
            elif final := re.fullmatch(rf"Charge: {_NUMBER} [A-Z]+\.", line):
                assert charge == Decimal(final[1]), lines
    assert charge is not None, lines
    return charge


def make_price(model: str, price_id: UUID, each: Sequence[Decimal]) -> Price:
    named: dict[str, Any] = dict(zip(_PRICES, each, strict=True))
    return Price(price_id, model, **named)


prices = st.decimals(min_value=0, max_value=Decimal("0.01"), places=18)
counts = st.integers(0, 200_000)


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    prompt, completion = draw(counts), draw(counts)
    cached = draw(st.integers(0, prompt))
    written = draw(st.integers(0, prompt - cached))
    return Usage(
        prompt,
        completion,
        cached,
        written,
        draw(st.integers(0, completion)),
        draw(st.integers(0, 3)),
        draw(st.integers(0, prompt - cached - written)),
    )


@given(
    prices=st.tuples(*[prices] * 8),
    usage=usages(),
    rate=st.decimals(min_value=Decimal("1e-18"), max_value=Decimal(10) ** 6, places=18),
    markup=st.integers(0, 100_000),
    billed=st.none() | st.decimals(min_value=0, max_value=100, places=20),
    hold=st.integers(0, 10**15),
)
def test_every_line_holds_and_leads_to_the_charge(
    prices: tuple[Decimal, ...],
    usage: Usage,
    rate: Decimal,
    markup: int,
    billed: Decimal | None,
    hold: int,
) -> None:
    price, fx = make_price("m", new_id(), prices), FxQuote(new_id(), "NGN", rate, markup)
    end = assess(new_id(), Evidence(billed_usd=billed, usage=usage), price=price, fx=fx, outcome="completed")
    facts = CallFacts(
        state=end.state,
        outcome=end.outcome,
        currency="NGN",
        hold_nano=hold,
        cost_nanousd=end.cost_nanousd,
        charge_nano=end.charge_nano,
        accuracy=end.accuracy,
        generation_id=None,
        ended_at=None,
        source=end.source,
        usage=usage,
        exact_attousd=end.exact_attousd,
        settled_nano=end.charge_nano,
        price=price,
        fx=fx,
        changes=(),
    )
    lines = explain(facts)
    assert follow(lines) == Decimal(end.charge_nano).scaleb(-9)
    assert any(line.startswith("Rounded up") for line in lines)
    assert not any("not kept" in line for line in lines)


class Shop:
    """Prices, rates and a wallet, and calls settled by them for real."""

    def __init__(self, office: Office, payer: Payer, seed: int) -> None:
        self.office, self.payer, self.dice = office, payer, random.Random(seed)
        self.prices: list[Price] = []
        self.quotes: list[FxQuote] = []

    async def open(self) -> None:
        for number in range(6):
            values = {name: Decimal(self.dice.randrange(10**13)).scaleb(-18) for name in _PRICES}
            await PriceBook(self.office.database).set_prices(
                [ModelPrice(f"m{number}", "m", None, None, values)], source="manual"
            )
            async with self.office.database.connection() as connection:
                price_id = await connection.fetchval(
                    "SELECT id FROM model_prices WHERE model_id = $1", f"m{number}"
                )
            self.prices.append(make_price(f"m{number}", price_id, list(values.values())))
            rate = Decimal(self.dice.randrange(1, 10**12)).scaleb(-8)
            self.quotes.append(
                await FxBook(self.office.database, FxSettings()).set_rate(
                    "USD", "NGN", rate, markup_bps=self.dice.randrange(2_000)
                )
            )

    async def settle(self, count: int, **more: Any) -> list[UUID]:
        dice, openings, endings = self.dice, [], []
        for _ in range(count):
            price, fx = dice.choice(self.prices), dice.choice(self.quotes)
            prompt, completion = dice.randrange(5_000), dice.randrange(5_000)
            cached = dice.randrange(prompt + 1)
            usage = Usage(
                prompt,
                completion,
                cached,
                0,
                dice.randrange(completion + 1),
                dice.randrange(2),
                dice.randrange(prompt - cached + 1),
            )
            evidence = Evidence(
                "gen-1",
                billed_usd=dice.choice(
                    (None, Decimal(dice.randrange(10**14)).scaleb(-dice.choice((12, 9, 16))))
                ),
                usage=usage,
                counted=dice.random() < 0.3,
            )
            call_id = new_id()
            openings.append(
                Opening(
                    call_id,
                    self.payer.user_id,
                    self.payer.wallet_id,
                    self.payer.key_id,
                    price.model,
                    stream=False,
                    price_id=price.id,
                    fx_quote_id=fx.id,
                    hold_nano=dice.randrange(1, 10**12),
                    hold_nanousd=1,
                )
            )
            endings.append(assess(call_id, evidence, price=price, fx=fx, outcome="completed", **more))
        ledger = Ledger(self.office.database, worker_id=new_id())
        assert set(await ledger.open_calls(openings)) == {"opened"}
        assert all(item.won for item in await ledger.settle_calls(endings))
        return [item.call_id for item in endings]


@pytest.fixture
async def shop(office: Office) -> Shop:
    payer = await make_payer(office, amount="1000000", currency="NGN", overdraft="1000000000")
    made = Shop(office, payer, seed=7)
    await made.open()
    return made


async def charged(office: Office, call_id: UUID) -> Decimal:
    """What the wallet's own entries say of a call."""
    async with office.database.connection() as connection:
        paid = await connection.fetchval(
            "SELECT coalesce(-sum(e.amount_nano), 0)::bigint FROM journal_entry e JOIN journal_tx t ON t.id = e.tx_id"
            " WHERE e.account = 'wallet' AND t.call_id = $1",
            call_id,
        )
    return Decimal(paid).scaleb(-9)


async def test_the_explanation_leads_to_what_was_posted(office: Office, shop: Shop) -> None:
    own = OwnCalls(Database(office.settings.postgres, role="api"))
    ids = await shop.settle(40)
    corrections = Corrections(office.database, charge_estimates_upward=True)
    for number, call_id in enumerate(ids):
        if number % 4 == 0:
            bill = Bill("gen-1", Decimal(shop.dice.randrange(10**12)).scaleb(-13), Usage())
            await corrections.correct(call_id, bill)
        if number % 5 == 0 and await charged(office, call_id) > 0:
            await corrections.refund(call_id, amount_nano=1, reason="a slow answer")
    for call_id in ids:
        shown = await describe_call(office.database, call_id)
        posted = await charged(office, call_id)
        assert follow(shown["explanation"]) == posted == Decimal(shown["charge"] or "0")
        assert not any("not kept" in line for line in shown["explanation"])
        theirs = await own.describe(shop.payer.user_id, call_id, wallet_id=shop.payer.wallet_id)
        assert follow(theirs["explanation"]) == posted
        assert "a slow answer" not in _write_call(shown) or any(
            "Refund" in line for line in theirs["explanation"]
        )
    await own._database.close()
    await books_hold(office)


async def test_what_the_house_bears_is_the_operators_to_see(office: Office, shop: Shop) -> None:
    own = OwnCalls(Database(office.settings.postgres, role="api"))
    (call_id,) = await shop.settle(1, house=True)
    shown = await describe_call(office.database, call_id)
    theirs = await own.describe(shop.payer.user_id, call_id, wallet_id=shop.payer.wallet_id)
    assert any(line.startswith("Of the cost the house bears") for line in shown["explanation"])
    assert follow(shown["explanation"]) == follow(theirs["explanation"]) == 0
    assert not any("bears" in line or "The provider billed" in line for line in theirs["explanation"])
    hidden = {"provider_cost_usd", "house_usd", "spread", "hold_usd", "postings", "user_id"}
    assert shown.keys() - theirs.keys() == hidden
    await own._database.close()


async def test_nobody_reads_anothers_calls(office: Office, shop: Shop) -> None:
    database = Database(office.settings.postgres, role="api")
    own = OwnCalls(database)
    (call_id,) = await shop.settle(1)
    other = await make_payer(office)
    for wallet_id in (other.wallet_id, shop.payer.wallet_id):
        with pytest.raises(NotFoundError):
            await own.describe(other.user_id, call_id, wallet_id=wallet_id)
        assert await own.list_page(other.user_id, wallet_id, CallFilter(), limit=10) == []
    second = await office.wallets.create_wallet(str(shop.payer.user_id), currency="NGN")
    with pytest.raises(NotFoundError):  # a key sees what its own wallet paid
        await own.describe(shop.payer.user_id, call_id, wallet_id=second)
    async with database.as_person(shop.payer.user_id) as connection:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.fetch("SELECT house_nanousd FROM calls")
    await database.close()


async def test_a_loser_leaves_the_winners_figures(office: Office, shop: Shop) -> None:
    """The worker and the sweeper end the same call: what is kept is what was charged."""
    (call_id,) = await shop.settle(1)
    before = await describe_call(office.database, call_id)
    late = assess(
        call_id,
        Evidence("gen-1", billed_usd=Decimal("0.00000000012345"), usage=Usage(1, 1)),
        price=shop.prices[0],
        fx=shop.quotes[0],
        outcome="worker_lost",
    )
    ledger = Ledger(office.database, worker_id=new_id())
    assert [item.won for item in await ledger.settle_calls([late])] == [False]
    assert (await describe_call(office.database, call_id)) == before
