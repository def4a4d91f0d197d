"""Rounds of calls on the sides in turns, and the books compared after them."""

from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from billing.books.usage_proof import FIRST_ID
from scripts.bench.books import NOTHING, BenchError, Standing, compare
from scripts.bench.results import Measured, Options
from scripts.bench.scenarios import Scenario
from scripts.bench.stand import FLOOR, FLOORS, Side, Stand
from scripts.office import Office

ROUNDS_MAX = 40
BESIDE = "beside_cpu_ms"
OTHERS = "others_percent"
_FLOOR_TIMES = 4
_STORES = ("postgres_cpu_ms", "redis_cpu_ms")


class Rounds:
    """Makes calls on a stand, demands that all of them succeed, and counts them for the books.

    Args:
        stand: what runs.
        options: how much of it.
        say: tells people what is being done.
    """

    def __init__(self, stand: Stand, options: Options, say: Callable[[str], None]) -> None:
        self.stand = stand
        self.options = options
        self.say = say
        self._made: dict[str, int] = {}  # calls that were answered, by the provider's key of their books
        self._before: dict[str, tuple[Standing, UUID]] = {}

    async def measure(self, scenario: Scenario, sides: Sequence[Side]) -> Measured:
        """Make rounds on all sides in turns, and more where ``options.unsure`` says that they are too few to judge by."""
        self.say(f"{scenario.name}: {scenario.about}")
        options = self.options
        calls = options.calls(scenario)
        found = Measured(scenario.name, scenario.about, calls)
        # A floor's round would else be over in an instant, and as long as its neighbours' slices of time.
        often = {
            side: calls if scenario.paced or side.name not in FLOORS else calls * _FLOOR_TIMES
            for side in sides
        }
        for side in sides:
            await self.once(side, scenario, max(calls // 4, 1))
        rate = None
        if scenario.half:
            rate = (await self.once(self.stand.tuma, scenario, calls))["calls_per_s"] / 2
            often = dict.fromkeys(sides, calls)
        number = 0
        while number < options.rounds_of(scenario) or (
            number < ROUNDS_MAX and options.unsure is not None and options.unsure(found)
        ):
            if scenario.paced or scenario.half or options.unsure is None:
                # The other way round every second time: who comes first finds another machine than who comes last.
                for side in sides if number % 2 == 0 else sides[::-1]:
                    found.add(side.name, await self.once(side, scenario, often[side], rate=rate))
            if not scenario.paced and not scenario.half:
                await self._beside(found, scenario, calls)
            number += 1
        add_differences(found)
        return found

    async def _beside(self, found: Measured, scenario: Scenario, calls: int) -> None:
        """Make a round on Tuma, and for each of its calls one on the floor in the same moment.

        A process that mostly waits takes more CPU time per call on a machine that others use, as its caches are theirs. The
        floor, at the pace of its own, hardly waits; at Tuma's pace it feels the neighbours as Tuma does.
        """
        floor, tuma = self.stand.floors[0], self.stand.tuma
        clocks = {side.name: self.stand.clocks(side) for side in (floor, tuma)}
        said = await self.stand.load(
            tuma,
            scenario,
            do="calls",
            calls=calls,
            connections=min(scenario.connections, calls),
            beside=floor.target(scenario),
        )
        spent = {name: clock.ms() for name, clock in clocks.items()}
        ours_ms = sum(spent[tuma.name].values()) + spent[floor.name]["cpu_ms"]
        for name, ms in spent.items():
            found.add(name, {BESIDE: ms["cpu_ms"] / calls})
        found.add(tuma.name, {OTHERS: clocks[tuma.name].others_percent(ours_ms)})
        self.demand(tuma, said, calls)
        self.demand(floor, said.get("beside", said), calls)

    async def once(
        self, side: Side, scenario: Scenario, calls: int, *, rate: float | None = None
    ) -> dict[str, float]:
        """Make one round, of so many calls per second if a rate is given; return its figures."""
        clocks = self.stand.clocks(side)
        connections = min(scenario.connections, calls)
        said = await self.stand.load(
            side, scenario, do="calls", calls=calls, connections=connections, rate=rate
        )
        spent, seconds = clocks.ms(), clocks.seconds()
        self.demand(side, said, calls)
        figures: dict[str, float] = said["figures"]
        figures["cores_busy"] = sum(spent.values()) / 1000 / seconds
        figures[OTHERS] = clocks.others_percent(sum(spent.values()))
        for name, ms in spent.items():
            if side.billed_to or name not in _STORES:
                figures[name] = ms / calls
        return figures

    def demand(self, side: Side, said: dict[str, Any], calls: int) -> None:
        """Note so many answers.

        Raises:
            BenchError: not all calls were answered as they must be.
        """
        if said["errors"] or said["calls"] != calls:
            raise BenchError(f"{side.name}: {said['errors']} of {calls} calls failed, first: {said['error']}")
        if side.billed_to:
            self._made[side.billed_to] = self._made.get(side.billed_to, 0) + calls

    async def bill(self, billed_to: str, calls: int, cost_nanousd: int) -> None:
        """Tell the provider, and note for the books, of calls that were settled and never were with it."""
        told = {"calls": calls, "nanousd": calls * cost_nanousd}
        await self.stand.ask_upstream("/bench/bill", billed_to, told)
        self._made[billed_to] = self._made.get(billed_to, 0) + calls

    def begin_after(self, billed_to: str, before: Standing, since: UUID) -> None:
        """Note what books say of all calls whose ids are less than ``since``: they have ended, and are not read again."""
        self._before[billed_to] = (before, since)

    async def compare(self, office: Office, billed_to: str) -> Standing:
        """Tuma's books, the provider's count and sum, and the client's count are one.

        Raises:
            BenchError: they are not.
        """
        before, since = self._before.get(billed_to, (NOTHING, FIRST_ID))
        answered = self._made.get(billed_to, 0)
        return await compare(
            self.stand.ask_upstream, office, billed_to, answered=answered, before=before, since=since
        )


def add_differences(found: Measured) -> None:
    """Note how much later than at the floor the first byte and the chunks came, round by round."""
    floor = found.sides.get(FLOOR, {})
    for name, figures in found.sides.items():
        if name == FLOOR:
            continue
        for figure in ("first_byte_p50_ms", "first_byte_p99_ms", "chunk_delay_p50_ms", "chunk_delay_p99_ms"):
            ours, theirs = figures.get(figure), floor.get(figure)
            if ours and theirs:
                figures[f"added_{figure}"] = [late - soon for late, soon in zip(ours, theirs, strict=True)]
