"""How many settlements a second go into Postgres, by the ledger itself: of many wallets, and of one."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from billing.books.opening_balance import record_openings
from billing.calls.ledger import Ledger, Opening
from billing.calls.outcome import Ending
from billing.ids import new_id
from billing.money import NANO
from billing.postgres.migrate import migrate
from scripts.bench.books import BenchError, prove
from scripts.bench.results import Measured
from scripts.bench.rounds import Rounds
from scripts.bench.scenarios import SETTLE
from scripts.bench.stand import SETTLE_KEY
from scripts.office import Office, open_office

MANY, ONE = "many wallets", "one wallet"
_DATABASE = "tuma_settle"
_WALLETS = 200
_HOLD_NANO, COST_NANO = 2_000, 1_000


@dataclass(frozen=True, slots=True)
class Payer:
    """Who pays in a batch."""

    user_id: UUID
    wallet_id: UUID


async def measure_settle(rounds: Rounds) -> Measured:
    """Settle batches in turns.

    They go into a database of their own, as their calls never were at the provider, which is told what they cost.

    Raises:
        BenchError: the books do not hold afterwards.
    """
    stand, options = rounds.stand, rounds.options
    rounds.say(f"{SETTLE}: settlements into Postgres, in batches")
    found = Measured(SETTLE, "settlements in batches, by the ledger", options.batches)
    stand.add_database(_DATABASE)
    async with open_office(stand.settings(database=_DATABASE, upstream_key=SETTLE_KEY)) as office:
        await migrate(office.database)
        await record_openings(office.database, office.upstream)
        payers = await make_payers(office, _WALLETS + 1, name="settle")
        ways = {MANY: payers[1:], ONE: payers[:1]}
        ledger = Ledger(office.database, worker_id=new_id())
        rows = office.settings.batch.settle_rows
        settled = 0
        for number in range(options.rounds + 1):
            for name, chosen in ways.items():
                took_s = sum([await settle_batch(ledger, chosen, rows) for _ in range(options.batches)])
                settled += rows * options.batches
                if number:  # the first is for warming up
                    found.add(name, {"settlements_per_s": rows * options.batches / took_s})
        await rounds.bill(SETTLE_KEY, settled, COST_NANO)
        await rounds.compare(office, SETTLE_KEY)
        await prove(office)
    return found


async def make_payers(office: Office, count: int, *, name: str) -> list[Payer]:
    """Make so many wallets with money in them, of users whose addresses begin with ``name``."""
    made = []
    for number in range(count):
        user_id = await office.wallets.create_user(f"{name}{number}@tuma.example")
        wallet_id = await office.wallets.create_wallet(str(user_id), currency="USD")
        await office.wallets.credit(wallet_id, 1_000 * NANO, reason="money for the bench")
        made.append(Payer(user_id, wallet_id))
    return made


async def settle_batch(ledger: Ledger, payers: Sequence[Payer], rows: int) -> float:
    """Open calls of the payers in turns, and settle them; return the seconds of the settling."""
    calls = await open_batch(ledger, payers, rows)
    began = time.perf_counter()
    await settle_calls(ledger, calls)
    return time.perf_counter() - began


async def open_batch(ledger: Ledger, payers: Sequence[Payer], rows: int) -> list[Opening]:
    """Open so many calls of the payers in turns."""
    calls = [
        Opening(
            new_id(),
            payer.user_id,
            payer.wallet_id,
            None,
            "bench/fast",
            stream=False,
            price_id=new_id(),
            fx_quote_id=UUID(int=0),
            hold_nano=_HOLD_NANO,
            hold_nanousd=_HOLD_NANO,
        )
        for payer in (payers[number % len(payers)] for number in range(rows))
    ]
    verdicts = set(await ledger.open_calls(calls))
    if verdicts != {"opened"}:
        raise BenchError(f"calls to be settled were refused: {', '.join(sorted(verdicts))}")
    return calls


async def settle_calls(ledger: Ledger, calls: Sequence[Opening]) -> None:
    """Settle calls that were opened, at ``COST_NANO`` each."""
    await ledger.settle_calls(
        [
            Ending(
                call.call_id,
                "settled",
                "completed",
                cost_nanousd=COST_NANO,
                provider_cost_nanousd=COST_NANO,
                charge_nano=COST_NANO,
            )
            for call in calls
        ]
    )
