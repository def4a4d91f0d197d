"""The same with many wallets and many millions of ended calls in the books: what of it grows with them."""

import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from billing.books.opening_balance import record_openings
from billing.calls.ledger import Ledger
from billing.ids import new_id
from config.settings import Settings
from scripts.bench.books import BenchError, Standing, prove
from scripts.bench.measures.fill import History, add_keys, fill, user_id, wallet_id
from scripts.bench.measures.settle import COST_NANO, Payer, make_payers, settle_batch
from scripts.bench.results import Measured
from scripts.bench.rounds import Rounds
from scripts.bench.scenarios import BIG, SCENARIOS, Scenario
from scripts.bench.stand import BIG_KEY, CURRENCY, PEPPER, RATE, SPREAD, TUMA, TUMA_KEY, Side, prepare
from scripts.office import Office, open_office
from scripts.programs.embedded import EmbeddedPostgres

FEW, FIRST, AGAIN = "big, 32 wallets", "big, first calls", "big, second calls"
SMALL = "small"
_NAME = "postgres-big"
_CALLS = ("plain-32", "stream-32")
_MANY = 200  # wallets of the small books that are settled
_STRIDE = 7919  # a prime
_BYTES_PER_CALL, _BYTES_SPARE = (
    1_900,
    4_000_000_000,
)  # with what sorting for the indexes and the log take meanwhile


class _Numbers:
    """Numbers of wallets, each once before any comes again, neighbours far apart."""

    def __init__(self, wallets: int) -> None:
        self._wallets = wallets
        self._stride = _STRIDE if math.gcd(_STRIDE, wallets) == 1 else 1
        self._taken = 0

    def take(self, count: int) -> list[int]:
        first, self._taken = self._taken, self._taken + count
        return [1 + number * self._stride % self._wallets for number in range(first, first + count)]


@dataclass(frozen=True, slots=True)
class _Big:
    """The large books, and what is needed to call with them."""

    postgres: EmbeddedPostgres
    office: Office
    keys: Sequence[str]
    numbers: _Numbers

    def callers(self, side: Side, count: int) -> Side:
        """Return the side as the next so many wallets call it."""
        return replace(side, keys=tuple(self.keys[number - 1] for number in self.numbers.take(count)))


async def measure_big(rounds: Rounds, small: Office) -> tuple[list[Measured], list[str]]:
    """Fill large books, prove them, and settle and call with them and with the small ones in turns; prove them again.

    Returns:
        the scenarios, and what else is to be said.

    Raises:
        BenchError: the books do not hold, before or afterwards, or a call failed, or the disk is too small.
    """
    options = rounds.options
    notes: list[str] = []
    rounds.say(f"{BIG}: {options.wallets:,} wallets and {options.filled:,} ended calls")
    async with _filled(rounds, notes) as big:
        found = [await _settle(rounds, small, big, one=False), await _settle(rounds, small, big, one=True)]
        settings = rounds.stand.settings(postgres=big.postgres, redis_number=1)
        side = rounds.stand.start_tuma(BIG, settings, (), billed_to=BIG_KEY, postgres=big.postgres)
        found.extend(
            [await _call(rounds, big, side, scenario) for scenario in SCENARIOS if scenario.name in _CALLS]
        )
        await rounds.compare(small, TUMA_KEY)
        await rounds.compare(big.office, BIG_KEY)
        began = time.monotonic()
        await prove(big.office)
        notes.append(
            f"The large books, proved again with the calls of the bench in them: {time.monotonic() - began:.0f} s."
        )
    return found, notes


@asynccontextmanager
async def _filled(rounds: Rounds, notes: list[str]) -> AsyncIterator[_Big]:
    """Have the large books, filled and proved, in a Postgres of their own."""
    stand, options = rounds.stand, rounds.options
    history = History(options.wallets, options.filled, CURRENCY, RATE + SPREAD, SPREAD)
    needed, free = options.filled * _BYTES_PER_CALL + _BYTES_SPARE, stand.free_bytes()
    if free < needed:
        raise BenchError(
            f"{options.filled:,} calls take up to {needed / 1e9:.0f} GB, and {free / 1e9:.0f} are free; set TMPDIR, or fewer --calls"
        )
    began = time.monotonic()
    with stand.quick_postgres(_NAME) as server:
        async with open_office(_settings(rounds, server)) as office:
            await prepare(office)
            await record_openings(office.database, office.upstream)
        await fill(server.dsn(), history, rounds.say)
        keys = await add_keys(server.dsn(), history, PEPPER)
    await stand.ask_upstream(
        "/bench/bill", BIG_KEY, {"calls": history.calls, "nanousd": history.cost_nanousd}
    )
    rounds.begin_after(BIG_KEY, Standing(history.calls, history.cost_nanousd), new_id())
    filled_s, began = time.monotonic() - began, time.monotonic()
    postgres = stand.start_postgres(_NAME)
    async with open_office(_settings(rounds, postgres)) as office:
        await prove(office)
        async with office.database.connection() as connection:
            stored = await connection.fetchval("SELECT pg_database_size(current_database())")
        notes.append(
            f"The large books, {options.wallets:,} wallets and {options.filled:,} calls, filled in {filled_s:.0f} s and"
            f" proved in {time.monotonic() - began:.0f} s: {stored / options.filled:,.0f} bytes stored per call, indexes and all."
        )
        rounds.say(notes[-1])
        yield _Big(postgres, office, keys, _Numbers(options.wallets))


def _settings(rounds: Rounds, postgres: EmbeddedPostgres) -> Settings:
    return rounds.stand.settings(postgres=postgres, redis_number=1, upstream_key=BIG_KEY)


async def _settle(rounds: Rounds, small: Office, big: _Big, *, one: bool) -> Measured:
    """Settle batches in both books in turns; in the large ones, of wallets that no batch before had, or of one."""
    options = rounds.options
    name = f"{BIG}-settle-one" if one else f"{BIG}-settle-many"
    about = "settlements in batches: of one wallet" if one else "settlements in batches: of many wallets"
    rounds.say(f"{name}: {about}")
    rows = small.settings.batch.settle_rows
    found = Measured(name, about, rows * options.batches, against=(SMALL,), compared=("settlements_per_s",))
    ledgers = {
        SMALL: Ledger(small.database, worker_id=new_id()),
        BIG: Ledger(big.office.database, worker_id=new_id()),
    }
    small_payers = await make_payers(small, 1 if one else _MANY, name=name)
    hot = _payers(big.numbers.take(1))
    for number in range(options.rounds + 1):
        for books, key in ((SMALL, TUMA_KEY), (BIG, BIG_KEY)):
            took_s = 0.0
            for _ in range(options.batches):
                large = hot if one else _payers(big.numbers.take(rows))
                took_s += await settle_batch(ledgers[books], small_payers if books == SMALL else large, rows)
            await rounds.bill(key, rows * options.batches, COST_NANO)
            if number:  # the first is for warming up
                found.add(books, {"settlements_per_s": rows * options.batches / took_s})
    return found


def _payers(numbers: Sequence[int]) -> list[Payer]:
    return [Payer(user_id(number), wallet_id(number)) for number in numbers]


async def _call(rounds: Rounds, big: _Big, side: Side, scenario: Scenario) -> Measured:
    """Call with both books in turns; with the large ones in three ways.

    Of as many wallets as the small ones have, all the time the same: only the size of the books differs. By wallets that
    never called: their keys are looked up in Postgres, their mirrors filled from there, and the rows and pages of the indexes
    that they settle into were not touched lately. And once more by each of those, which finds its mirror in Redis.
    """
    name = f"{BIG}-{scenario.name}"
    calls = rounds.options.calls(scenario)
    rounds.say(f"{name}: {scenario.about}")
    compared = ("cpu_ms", "postgres_cpu_ms", "redis_cpu_ms", "calls_per_s", "latency_p50_ms")
    found = Measured(name, scenario.about, calls, against=(TUMA,), compared=compared)
    found.sides = {TUMA: {}, FEW: {}, FIRST: {}, AGAIN: {}}
    few = big.callers(side, len(rounds.stand.tuma.keys))
    for number in range(rounds.options.rounds + 1):
        callers = big.callers(side, calls)
        turns = [(TUMA, rounds.stand.tuma), (FEW, few), (FIRST, callers), (AGAIN, callers)]
        for turn, which in turns if number % 2 == 0 else (turns[1], turns[0], *turns[2:]):
            figures = await rounds.once(which, scenario, calls)
            if number:  # the first is for warming up
                found.add(turn, figures)
    return found
