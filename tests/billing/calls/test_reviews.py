"""Calls in review, ended by people: once, within what was held, and with a reason."""

import asyncio
from uuid import UUID

import pytest

from billing.calls.ledger import Ledger
from billing.calls.outcome import Ending
from billing.calls.reviews import CallReviews
from billing.errors import InputError, NotFoundError
from billing.ids import new_id
from billing.money import NANO
from billing.monitoring.audit import Audit
from billing.reports.call_view import describe_call
from scripts.office import Office
from tests.billing.calls.test_ledger import books_hold, ending, opening, posted
from tests.support.payers import Payer, make_payer

HELD = 2 * NANO


@pytest.fixture
async def payer(office: Office) -> Payer:
    return await make_payer(office)


@pytest.fixture
async def call_id(office: Office, payer: Payer) -> UUID:
    """A call in review, which holds 2 of 10 USD."""
    ledger = Ledger(office.database, worker_id=new_id())
    opened = opening(payer, HELD)
    await ledger.open_calls([opened])
    await ledger.settle_calls([Ending(opened.call_id, "review", "lost", generation_id="gen-1")])
    return opened.call_id


@pytest.mark.parametrize(
    ("cost_nanousd", "house", "left_nano", "state"),
    [
        (NANO // 2, False, 10 * NANO - NANO // 2, "settled"),
        (NANO, True, 10 * NANO, "settled"),
        (0, False, 10 * NANO, "void"),
    ],
)
async def test_it_ends_at_what_an_operator_says(
    office: Office, payer: Payer, call_id: UUID, cost_nanousd: int, house: bool, left_nano: int, state: str
) -> None:
    done = await CallReviews(office.database).end(
        call_id, cost_nanousd=cost_nanousd, reason="as their page says", house=house
    )
    assert (done.wallet_id, done.charge_nano) == (payer.wallet_id, 10 * NANO - left_nano)
    assert await posted(office, payer) == (left_nano, 0), "nothing is held any more"
    shown = await describe_call(office.database, call_id)
    assert (shown["state"], shown["outcome"], shown["generation_id"]) == (state, "decided", "gen-1")
    assert shown["accuracy"] == "estimated"
    assert "an operator" in " ".join(shown["explanation"])
    (row,) = [
        row
        for row in await Audit(office.database).list_rows(wallet_id=payer.wallet_id)
        if row["action"] == "decided"
    ]
    assert row["after"] is not None
    assert (row["subject_id"], row["after"]["reason"]) == (str(call_id), "as their page says")
    await books_hold(office)


async def test_whoever_is_first_ends_it_once(office: Office, payer: Payer, call_id: UUID) -> None:
    reviews, ledger = CallReviews(office.database), Ledger(office.database, worker_id=new_id())

    async def decide(cost_nanousd: int) -> int:
        try:
            return (await reviews.end(call_id, cost_nanousd=cost_nanousd, reason="r")).charge_nano
        except InputError:
            return 0

    async def sweep(cost_nanousd: int) -> int:
        (found,) = await ledger.settle_calls([ending(call_id, cost_nanousd)])
        return found.charge_nano if found.won else 0

    paid = await asyncio.gather(*(work(1_000 + number) for number in range(6) for work in (decide, sweep)))
    assert len([charge for charge in paid if charge]) == 1
    assert await posted(office, payer) == (10 * NANO - sum(paid), 0)
    await books_hold(office)


@pytest.mark.parametrize(
    ("cost_nanousd", "reason", "said"),
    [
        (HELD + 1, "r", "held for the call"),
        (-1, "r", "no cost"),
        (2**63, "r", "no cost"),
        (1, "  ", "needs a reason"),
    ],
)
async def test_what_is_refused_changes_nothing(
    office: Office, payer: Payer, call_id: UUID, cost_nanousd: int, reason: str, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        await CallReviews(office.database).end(call_id, cost_nanousd=cost_nanousd, reason=reason)
    assert await posted(office, payer) == (10 * NANO, HELD)
    assert (await describe_call(office.database, call_id))["state"] == "review"


async def test_only_calls_in_review_are_decided_on(office: Office, payer: Payer) -> None:
    reviews, ledger = CallReviews(office.database), Ledger(office.database, worker_id=new_id())
    with pytest.raises(NotFoundError):
        await reviews.end(new_id(), cost_nanousd=1, reason="r")
    opened = opening(payer, HELD)
    await ledger.open_calls([opened])
    with pytest.raises(InputError, match="under way"):
        await reviews.end(opened.call_id, cost_nanousd=1, reason="r")
    # Were it decided between the look and the change: the function looks again, under the wallet's lock.
    async with office.database.transaction() as connection:
        found = await connection.fetchval(
            "SELECT end_review($1, $2, 1, 1, 0, 0, 'r')", new_id(), opened.call_id
        )
    assert found == "open"
    assert await posted(office, payer) == (10 * NANO, HELD)
