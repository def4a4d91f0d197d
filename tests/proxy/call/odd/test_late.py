"""Calls that the sweeper ended while their provider still thought, and what their worker then learns of the cost."""

import asyncio
from typing import Any

import pytest

from billing.calls.ledger import Ledger
from billing.calls.outcome import Ending
from billing.ids import new_id
from config.settings import Settings
from scripts.office import Office
from tests.proxy.call.scripted import USAGE, Scripted, Turn, completion, running
from tests.support.payers import Payer


async def end_without_it(office: Office) -> None:
    """As the sweeper would."""
    async with office.database.connection() as connection:
        while (call_id := await connection.fetchval("SELECT id FROM calls WHERE state = 'open'")) is None:
            await asyncio.sleep(0.01)
    ledger = Ledger(office.database, worker_id=new_id())
    assert (await ledger.settle_calls([Ending(call_id, "void", "worker_lost")]))[0].won


@pytest.mark.parametrize(
    ("usage", "state", "accuracy"),
    [
        (USAGE, "settled", "exact"),
        ({**USAGE, "total_tokens": 1050}, "settled", "estimated"),
        (None, "void", "exact"),
    ],
    ids=["usage", "usage that does not add up", "counted here"],
)
async def test_what_the_provider_said_is_a_correction_and_a_guess_is_none(
    settings: Settings,
    provider: Scripted,
    office: Office,
    payer: Payer,
    usage: Any,
    state: str,
    accuracy: str,
) -> None:
    async def script(turn: Turn) -> None:
        await end_without_it(office)
        await turn.plain(completion(usage=usage))

    async with running(settings, provider, office, payer) as case:
        assert (await case.ask(script))[0] == 200
        call = await case.call()
        assert (call["state"], call["accuracy"]) == (state, accuracy)
        assert (call["charge_nano"] or 0) >= (210_000 if state == "settled" else 0)
        assert state == "settled" or not call["charge_nano"]
