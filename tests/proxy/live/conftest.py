"""What the tests of the feed stand on."""

from collections.abc import AsyncIterator

import pytest

from billing.calls.ledger import Ledger
from billing.ids import new_id
from config.settings import Settings
from scripts.office import Office
from tests.support.running import Running, run_proxy


@pytest.fixture
def ledger(office: Office) -> Ledger:
    return Ledger(office.database, worker_id=new_id())


@pytest.fixture
async def house(settings: Settings, office: Office) -> AsyncIterator[Running]:
    async with run_proxy(settings) as running:
        yield running
