"""The audit log, for each test of this room."""

import pytest

from scripts.office import Office
from tests.billing.monitoring.audit_log import Log


@pytest.fixture
async def log(office: Office) -> Log:
    return Log(office)
