"""The fault campaign in its short form; ``--minutes 20`` runs the long one."""

import pytest

from tests.faults.campaign.campaign import Campaign, draw_seed
from tests.faults.campaign.faults import ROUND


@pytest.mark.timeout(0)
async def test_the_books_survive_the_campaign(request: pytest.FixtureRequest) -> None:
    minutes = request.config.getoption("--minutes")
    seed = draw_seed()
    print(f"FAULT_SEED={seed}")
    campaign = Campaign(seed, seconds=minutes * 60 if minutes else 0, outage_s=20 if minutes else 4)
    result = await campaign.run()
    print(*result.log, sep="\n")
    print(result)
    assert result.violations == []
    assert all(result.faults[name] >= count for name, count in ROUND.items())
    assert result.ended["exact"] > 100
    assert sum(result.answers.values()) > 500
