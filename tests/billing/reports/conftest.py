"""A payer, and the calls that they make."""

import pytest

from scripts.office import Office
from tests.billing.reports.spender import Spender
from tests.support.payers import Payer, make_payer


@pytest.fixture
async def payer(office: Office) -> Payer:
    return await make_payer(office)


@pytest.fixture
def spender(office: Office, payer: Payer) -> Spender:
    return Spender(office, payer)
