"""One campaign: servers, load, faults, then quiet, and the verdict."""

import asyncio
import os
import random
import time

from billing.postgres.migrate import migrate
from scripts.office import Office, open_office
from tests.faults.campaign.faults import Faults
from tests.faults.campaign.load import Load
from tests.faults.campaign.result import Result
from tests.faults.campaign.servers import Servers
from tests.faults.campaign.verdict import Verdict
from tests.support.payers import Payer, make_payer, set_rate, sync_models


class Campaign:
    """One campaign, in a folder of its own.

    Args:
        seed: of the schedule.
        seconds: how long faults are injected; at least one round of them is.
        outage_s: how long Postgres is away at most.
        verbose: whether each fault is printed as it happens.
    """

    def __init__(self, seed: int, *, seconds: float, outage_s: float = 4.0, verbose: bool = False) -> None:
        self._seed = seed
        self._seconds = seconds
        self._began_s = time.monotonic()
        self.result = Result(seed)
        self._servers = Servers(self.result.violations)
        self._faults = Faults(
            self._servers, random.Random(seed), self.result, outage_s=outage_s, verbose=verbose
        )

    async def run(self) -> Result:
        """Inject, let it settle, and look."""
        async with self._servers.running(), open_office(self._servers.settings) as office:
            payers = await self._prepare(office)
            load = Load(self._servers, payers, random.Random(self._seed + 1), self.result)
            await self._servers.serve()
            async with load.running():
                await asyncio.sleep(1.0)
                await self._faults.inject(self._seconds)
            verdict = Verdict(self._servers, load, self._faults, self.result)
            await verdict.settle_down(office)
            await verdict.look(office)
        self.result.seconds = time.monotonic() - self._began_s
        return self.result

    async def _prepare(self, office: Office) -> list[Payer]:
        await migrate(office.database)
        await sync_models(office)
        await set_rate(office, "NGN", "1600", 250)
        rich = [await make_payer(office, amount="1000") for _ in range(6)]
        naira = [await make_payer(office, amount="500000", currency="NGN") for _ in range(3)]
        poor = [await make_payer(office, amount="0.002") for _ in range(3)]
        later = [await make_payer(office, amount="0.001", overdraft="0.01")]
        return [*rich, *naira, *poor, *later]


def draw_seed() -> int:
    """Return FAULT_SEED from the environment, else a new seed."""
    return int(os.environ.get("FAULT_SEED", "0")) or random.SystemRandom().randrange(1, 10**9)
