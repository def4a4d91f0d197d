"""When a batch leaves. Times are either next to nothing or far beyond any test: none is measured."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest
import uvloop

from billing.postgres.group_commit import Batcher

NEVER_MS = 3_600_000.0
SOON_MS = 1.0


class Bench:
    """A batcher, what it committed, and how many are said to be coming."""

    def __init__(self, *, delay_ms: float = NEVER_MS, rows_max: int = 100) -> None:
        self.coming = 0
        self.batches: list[list[int]] = []
        self.under_way = 0
        self.open = asyncio.Event()
        self.open.set()
        self.batcher = Batcher[int, int](
            self._commit,
            name="test",
            rows_max=rows_max,
            delay_ms=delay_ms,
            queue_max=1_000,
            coming=lambda: self.coming,
        )

    async def _commit(self, batch: Sequence[int]) -> list[int]:
        assert self.under_way == 0, "one batch at a time"
        self.under_way += 1
        self.batches.append(list(batch))
        await self.open.wait()
        self.under_way -= 1
        return [item * 2 for item in batch]


async def turns() -> None:
    """Let everything happen that waits for no clock."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_who_is_alone_waits_for_nobody() -> None:
    bench = Bench()
    assert await bench.batcher.submit(1) == 2
    assert await bench.batcher.submit(2) == 4
    assert bench.batches == [[1], [2]]


async def test_what_comes_in_one_turn_leaves_together() -> None:
    bench = Bench()
    assert await asyncio.gather(*(bench.batcher.submit(number) for number in range(5))) == [0, 2, 4, 6, 8]
    assert bench.batches == [[0, 1, 2, 3, 4]]


async def test_a_batch_waits_for_who_is_coming() -> None:
    bench = Bench()
    bench.coming = 2
    first = bench.batcher.submit(1)
    await turns()
    bench.coming = 1
    second = bench.batcher.submit(2)
    await turns()
    assert bench.batches == []
    bench.coming = 0
    third = bench.batcher.submit(3)
    assert list(await asyncio.gather(first, second, third)) == [2, 4, 6]
    assert bench.batches == [[1, 2, 3]]


async def test_who_was_coming_and_is_not_is_told() -> None:
    bench = Bench()
    bench.coming = 1
    answer = bench.batcher.submit(1)
    await turns()
    bench.batcher.reconsider()
    await turns()
    assert bench.batches == []
    bench.coming = 0
    bench.batcher.reconsider()
    assert await answer == 2


async def test_nobody_waits_for_ever_for_who_is_coming() -> None:
    bench = Bench(delay_ms=SOON_MS)
    bench.coming = 1
    assert await bench.batcher.submit(1) == 2


async def test_a_full_batch_leaves() -> None:
    bench = Bench(rows_max=2)
    bench.coming = 1
    answers = [bench.batcher.submit(number) for number in range(4)]
    assert await asyncio.gather(*answers) == [0, 2, 4, 6]
    assert bench.batches == [[0, 1], [2, 3]]


async def test_who_is_left_behind_by_a_full_batch_hurries() -> None:
    bench = Bench(rows_max=2)
    answers = [bench.batcher.submit(number, patience_ms=NEVER_MS) for number in range(3)]
    assert await asyncio.gather(*answers) == [0, 2, 4]
    assert bench.batches == [[0, 1], [2]]


async def test_what_nobody_waits_for_waits_for_company() -> None:
    bench = Bench()
    answer = bench.batcher.submit(1, patience_ms=NEVER_MS)
    await turns()
    assert bench.batches == []
    bench.batcher.hurry(answer)
    assert await answer == 2


async def test_what_is_hurried_takes_the_others_along() -> None:
    bench = Bench()
    patient = bench.batcher.submit(1, patience_ms=NEVER_MS)
    await turns()
    assert await bench.batcher.submit(2) == 4
    assert patient.result() == 2
    assert bench.batches == [[1, 2]]


async def test_patience_ends() -> None:
    bench = Bench()
    assert await bench.batcher.submit(1, patience_ms=SOON_MS) == 2


async def test_the_least_patient_decides() -> None:
    bench = Bench()
    first = bench.batcher.submit(1, patience_ms=NEVER_MS)
    await turns()
    second = bench.batcher.submit(2, patience_ms=SOON_MS)
    third = bench.batcher.submit(3, patience_ms=NEVER_MS)
    assert list(await asyncio.gather(first, second, third)) == [2, 4, 6]
    assert bench.batches == [[1, 2, 3]]


async def test_who_waits_for_what_is_under_way_hurries_nobody() -> None:
    bench = Bench()
    bench.open.clear()
    first = bench.batcher.submit(1)
    await turns()
    second = bench.batcher.submit(2, patience_ms=NEVER_MS)
    bench.batcher.hurry(first)
    bench.open.set()
    assert await first == 2
    await turns()
    assert bench.batches == [[1]]
    bench.batcher.hurry(second)
    assert await second == 4


async def test_closing_commits_what_waits() -> None:
    bench = Bench()
    answer = bench.batcher.submit(1, patience_ms=SOON_MS)
    assert await bench.batcher.close(60) == []
    assert answer.result() == 2


async def test_closing_tells_what_could_not_be_committed() -> None:
    bench = Bench()
    answer = bench.batcher.submit(1, patience_ms=NEVER_MS)
    await turns()
    assert await bench.batcher.close(0.01) == [1]
    assert answer.cancelled()


@pytest.mark.parametrize(
    "case",
    [
        test_nobody_waits_for_ever_for_who_is_coming,
        test_patience_ends,
        test_the_least_patient_decides,
        test_closing_commits_what_waits,
    ],
)
def test_a_clock_of_milliseconds_loses_nobody(case: Any) -> None:
    """uvloop rounds: a timer may ring a little before its time."""

    async def often() -> None:
        for _ in range(50):
            case_under_way: Coroutine[Any, Any, None] = case()
            await asyncio.wait_for(case_under_way, 60)

    uvloop.run(often())
