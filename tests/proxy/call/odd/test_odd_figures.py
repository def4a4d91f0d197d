"""Figures of OpenRouter's with keys of our own, and such as no amount can be."""

import asyncio
import json
from decimal import Decimal
from typing import Any

import pytest

from billing.books.proof import Books
from billing.books.reconcile import Reconciler
from billing.calls.corrections import Corrections
from billing.errors import InputError
from billing.pricing.price_book import ModelPrice, PriceBook
from config.settings import Settings
from scripts.office import Office
from tests.proxy.call.scripted import (
    COST_NANO,
    DONE,
    USAGE,
    Case,
    Scripted,
    Turn,
    chunk,
    completion,
    running,
)
from tests.support.payers import Payer, make_payer

BYOK: dict[str, Any] = {"cost": 0.00001, "is_byok": True, "cost_details": {"upstream_inference_cost": 0.0002}}


@pytest.mark.parametrize("place", ["answer", "stream", "record", "record in all", "late record"])
async def test_a_key_of_our_own_behind_openrouter(
    settings: Settings, provider: Scripted, office: Office, payer: Payer, place: str
) -> None:
    """The wallet pays what the call cost in all; of OpenRouter's quota only its fee was taken."""
    record = {"id": "gen-1", "total_cost": 0.00001, "is_byok": True, "upstream_inference_cost": 0.0002}
    if place == "record in all":
        record |= {"total_cost": 0.00021, "usage": 0.00001}
    if place.startswith("record"):
        provider.records["gen-1"] = record
    told = BYOK if place in ("answer", "stream") else {}

    async def script(turn: Turn) -> None:
        if place == "stream":
            await turn.stream(chunk("Hello"), chunk("", "stop"), chunk(usage={**USAGE, **told}), DONE)
        else:
            await turn.plain(completion(usage={**USAGE, **told}))

    async with running(settings, provider, office, payer, kind="openrouter", generation_wait_s=0.2) as case:
        assert (await case.ask(script, stream=place == "stream"))[0] == 200
        if place == "late record":
            assert tuple(await case.call())[2:4] == ("estimated", COST_NANO)
            provider.records["gen-1"] = record
            upstream = case.proxy.services.upstream
            await Reconciler(office.database, upstream, settings.reconcile).run()
        assert tuple(await case.call())[2:5] == ("exact", 210_000, 210_000)
    async with office.database.connection() as connection:
        row = await connection.fetchrow(
            "SELECT (SELECT provider_cost_nanousd FROM calls) AS billed, (SELECT sum(spent_nanousd) FROM quota_slabs) AS spent,"
            " (SELECT sum(amount_nanousd) FROM shadow_usd_ledger WHERE kind = 'own_key') AS own,"
            " (SELECT sum(amount_nanousd) FROM shadow_usd_ledger WHERE kind IN ('settlement', 'correction')) AS ours"
        )
    assert tuple(map(int, row)) == (10_000, 10_000, 200_000, 10_000)
    checks = await Books(office.database, office.holds, office.upstream, sweep_grace_s=5).check()
    assert {name for name, check in checks.items() if not check.ok} <= {"I8"}, (
        "the simulated provider billed nothing"
    )
    assert "own keys 0.0002 USD" in checks["I4"].detail


@pytest.mark.parametrize("cost", [5e9, 1e12, 1e40, 1e300])
@pytest.mark.parametrize("place", ["answer", "record"])
async def test_an_absurd_cost_is_looked_at_by_people(
    settings: Settings, provider: Scripted, office: Office, payer: Payer, cost: float, place: str
) -> None:
    """Beyond 64 bits of nano-dollars: the call is in review at once, its hold kept, and all others go on."""
    provider.records["gen-1"] = {"id": "gen-1", "total_cost": cost, "native_tokens_prompt": 1000}

    async def script(turn: Turn) -> None:
        odd = turn.body.get("seed") == 1
        usage = (
            {**USAGE, **({"cost": cost} if place == "answer" else {})} if odd else {**USAGE, "cost": 0.0002}
        )
        await turn.plain(completion(usage=usage))

    async with running(settings, provider, office, payer, kind="openrouter") as case:
        answers = await asyncio.gather(*(case.ask(script, seed=seed) for seed in (1, 2, 3)))
        assert [status for status, _ in answers] == [200, 200, 200]
        async with office.database.connection() as connection:
            states = await connection.fetch("SELECT state, charge_nano, hold_nano FROM calls ORDER BY state")
            bill = await case.proxy.services.upstream.find_bill("gen-1")
            assert bill is not None
            settled = await connection.fetchval("SELECT id FROM calls WHERE state = 'settled' LIMIT 1")
        assert [row["state"] for row in states] == ["review", "settled", "settled"]
        assert [row["charge_nano"] for row in states[1:]] == [200_000, 200_000]
        wallet = await office.wallets.get_wallet(payer.wallet_id)
        assert wallet.held_nano == states[0]["hold_nano"] > 0
        assert wallet.posted_nano == 10**10 - 400_000
        with pytest.raises(InputError, match=r"beyond what any amount can be|too large"):
            await Corrections(office.database, charge_estimates_upward=True).correct(settled, bill)
    checks = await Books(office.database, office.holds, office.upstream, sweep_grace_s=5).check()
    assert {name for name, check in checks.items() if not check.ok} <= {"I8"}


async def test_no_wallet_is_fuller_than_can_be_added_up(
    settings: Settings, provider: Scripted, office: Office, payer: Payer
) -> None:
    await office.wallets.credit(payer.wallet_id, 2**62, reason="much")
    with pytest.raises(InputError, match="at most"):
        await office.wallets.credit(payer.wallet_id, 2**62, reason="more")
    with pytest.raises(InputError, match="at most"):
        await office.wallets.set_wallet(payer.wallet_id, overdraft_nano=2**62)
    assert (await office.wallets.get_wallet(payer.wallet_id)).posted_nano == 10**10 + 2**62
    async with running(settings, provider, office, payer) as case:
        assert (await case.ask(lambda turn: turn.plain(completion(usage=USAGE))))[0] == 200
        assert await case.charged() == COST_NANO
    async with office.database.transaction() as connection:  # one that came to it before there was a bound
        await connection.execute(
            "UPDATE wallets SET overdraft_nano = $2 WHERE id = $1", payer.wallet_id, 2**62
        )
    checks = await Books(office.database, office.holds, office.upstream, sweep_grace_s=5).check()
    assert {
        name: check.detail for name, check in checks.items() if not check.ok and name not in ("I6", "I8")
    } == {}


async def test_a_hold_beyond_any_wallet_is_refused(
    settings: Settings, provider: Scripted, office: Office, payer: Payer
) -> None:
    prices: dict[str, Decimal | None] = {"prompt_usd": Decimal(1), "completion_usd": Decimal(10_000)}
    dear = ModelPrice("acme/dear", "Dear", None, None, prices)
    await PriceBook(office.database).set_prices([dear], source="manual")
    async with running(settings, provider, office, payer) as case:
        status, body = await case.ask(
            lambda turn: turn.plain(completion(usage=USAGE)), model="acme/dear", max_tokens=10_000_000
        )
        error = json.loads(body)["error"]
        assert (status, error["code"]) == (402, "insufficient_funds")
        assert "any wallet" in error["message"]


async def test_what_does_not_fit_a_wallet_is_looked_at_by_people(
    settings: Settings, provider: Scripted, office: Office, payer: Payer
) -> None:
    """A sum that Postgres cannot keep ends one call in review, and holds up no other."""
    other = await make_payer(office)
    async with office.database.transaction() as connection:
        await connection.execute(
            "UPDATE wallets SET posted_nano = $2, overdraft_nano = $3 WHERE id = $1",
            payer.wallet_id,
            -(2**63) + 100_000,
            2**63 - 1,
        )

    async def script(turn: Turn) -> None:
        await turn.plain(completion(usage=USAGE))

    async with running(settings, provider, office, payer) as case:
        beside = Case(case.proxy, provider, office, other)
        answers = await asyncio.gather(*(each.ask(script, max_tokens=10) for each in (case, beside)))
        assert [status for status, _ in answers] == [200, 200]
    async with office.database.connection() as connection:
        rows = await connection.fetch("SELECT wallet_id, state, charge_nano FROM calls")
    assert {row["wallet_id"]: (row["state"], row["charge_nano"]) for row in rows} == {
        payer.wallet_id: ("review", 0),
        other.wallet_id: ("settled", COST_NANO),
    }
