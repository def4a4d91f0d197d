"""A provider that answers by a script, and somebody who pays."""

from collections.abc import AsyncIterator

import pytest

from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.proxy.call.scripted import Scripted, run_scripted
from tests.support.payers import Payer, make_payer, sync_models


@pytest.fixture
async def provider() -> AsyncIterator[Scripted]:
    async with run_scripted() as scripted:
        yield scripted


@pytest.fixture
async def payer(office: Office, sim: SimulatedProvider) -> Payer:
    await sync_models(office)
    return await make_payer(office)
