"""How many settlements a second go into Postgres, by the ledger itself: of many wallets, and of one."""

import time
from dataclasses import dataclass
from uuid import UUID

from billing.ids import new_id
from billing.ledger import Ending, Ledger, Opening
from billing.migrate import migrate
from billing.money import NANO
from billing.opening import record_openings
from scripts.bench.books import compare, prove
from scripts.bench.stand import SETTLE_KEY, Stand
from scripts.office import Office, open_office

_DATABASE = "tuma_settle"
_WALLETS = 200
_HOLD_NANO, _COST_NANO = 2_000, 1_000


@dataclass(frozen=True, slots=True)
class _Payer:
    user_id: UUID
    wallet_id: UUID


async def measure_settle(stand: Stand, *, rounds: int, batches: int) -> dict[str, list[float]]:
    """Settle batches in turns; return settlements per second of each round, by way.

    They go into a database of their own, as their calls never were at the provider, which is told what they cost.

    Raises:
        BenchError: the books do not hold afterwards.
    """
    stand.add_database(_DATABASE)
    async with open_office(stand.settings(database=_DATABASE, upstream_key=SETTLE_KEY)) as office:
        await migrate(office.database)
        await record_openings(office.database, office.upstream)
        payers = [await _make_payer(office, number) for number in range(_WALLETS + 1)]
        ways = {"many wallets": payers[1:], "one wallet": payers[:1]}
        ledger = Ledger(office.database, worker_id=new_id())
        rows = office.settings.batch.settle_rows
        found: dict[str, list[float]] = {name: [] for name in ways}
        settled = 0
        for number in range(rounds + 1):
            for name, chosen in ways.items():
                took_s = sum([await _batch(ledger, chosen, rows) for _ in range(batches)])
                settled += rows * batches
                if number:  # the first is for warming up
                    found[name].append(rows * batches / took_s)
        await stand.ask_upstream(
            "/bench/bill", SETTLE_KEY, {"calls": settled, "nanousd": settled * _COST_NANO}
        )
        await compare(stand.ask_upstream, office, SETTLE_KEY, answered=settled)
        await prove(office)
    return found


async def _make_payer(office: Office, number: int) -> _Payer:
    user_id = await office.wallets.create_user(f"settle{number}@tuma.example")
    wallet_id = await office.wallets.create_wallet(str(user_id), currency="USD")
    await office.wallets.credit(wallet_id, 1_000 * NANO, reason="money for the bench")
    return _Payer(user_id, wallet_id)


async def _batch(ledger: Ledger, payers: list[_Payer], rows: int) -> float:
    """Open calls and settle them; return the seconds of the settling."""
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
    await ledger.open_calls(calls)
    began = time.perf_counter()
    await ledger.settle_calls(
        [
            Ending(
                call.call_id,
                "settled",
                "completed",
                cost_nanousd=_COST_NANO,
                provider_cost_nanousd=_COST_NANO,
                charge_nano=_COST_NANO,
            )
            for call in calls
        ]
    )
    return time.perf_counter() - began
