"""The fault campaign: the real `tuma serve` under load, killed, flushed, stopped, cut and stalled; then the books are read.

Run it with ``python -m tests.faults.campaign --minutes 20`` from the checkout's environment. It starts every server itself and
touches no other process. The schedule of faults comes from the seed, which is printed; when exactly each of them hits a
call does not.

It exits 1 if a promise was broken: a call left open, one in review that the provider knows, a difference to the provider's
books that reconciliation does not explain, a wallet that paid for more than its calls cost, an invariant that fails.
"""

import argparse
import asyncio
import json
import sys
from pathlib import Path

from tests.faults.campaign.campaign import Campaign, draw_seed
from tests.faults.campaign.result import Result


def main() -> None:
    """Run a campaign from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--outage-s", type=float, default=20.0)
    parser.add_argument("--json", type=Path, help="write the result there, too")
    arguments = parser.parse_args()
    seed = arguments.seed or draw_seed()
    print(f"FAULT_SEED={seed}", flush=True)

    async def run() -> Result:
        return await Campaign(
            seed, seconds=arguments.minutes * 60, outage_s=arguments.outage_s, verbose=True
        ).run()

    result = asyncio.run(run())
    print(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result.as_json(), indent=1))
    sys.exit(bool(result.violations))


if __name__ == "__main__":
    main()
