"""Work in threads: in turn between owners, dropped when nobody waits for it."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from billing.threads import FairThreads, Work


@pytest.fixture
async def threads() -> AsyncIterator[FairThreads]:
    found = FairThreads(name="tests", slice_s=0.0)  # every step is a slice
    yield found
    found.close()


def steps(count: int, note: Callable[[], None]) -> Work[int]:
    for _ in range(count):
        note()
        yield
    return count


async def test_much_work_of_one_lets_the_other_have_its_turn(threads: FairThreads) -> None:
    done: list[str] = []
    greedy = [
        asyncio.ensure_future(threads.run("greedy", steps(50, lambda: done.append("greedy"))))
        for _ in range(5)
    ]
    await asyncio.sleep(0)
    assert await threads.run("modest", steps(3, lambda: done.append("modest"))) == 3
    # Each of its three steps waited for one slice of the other at most, and for the one under way.
    assert done.index("modest") <= 2
    assert [name for name in done if name == "modest"] == ["modest"] * 3
    assert len(done) <= 10
    assert await asyncio.gather(*greedy) == [50] * 5
    assert len(threads) == 0


async def test_owners_take_turns_one_after_the_other(threads: FairThreads) -> None:
    done: list[str] = []
    found = await asyncio.gather(
        *(threads.run(name, steps(30, lambda name=name: done.append(name))) for name in "abc")  # type: ignore[misc]
    )
    assert found == [30, 30, 30]
    for end in range(3, 91, 3):
        assert (
            max(done[:end].count(name) for name in "abc") - min(done[:end].count(name) for name in "abc") <= 1
        )


async def test_who_is_cancelled_takes_their_work_back(threads: FairThreads) -> None:
    done: list[int] = []
    began, go_on = threading.Event(), threading.Event()

    def block() -> Work[None]:
        began.set()
        go_on.wait(10)
        yield
        done.append(0)

    first = asyncio.ensure_future(threads.run("a", block()))
    second = asyncio.ensure_future(threads.run("a", steps(1, lambda: done.append(1))))
    await asyncio.to_thread(began.wait)
    first.cancel()
    second.cancel()
    await asyncio.wait({first, second})
    go_on.set()
    assert await threads.run("b", steps(1, lambda: done.append(2))) == 1
    assert done == [2]


async def test_what_nobody_wants_any_more_is_not_done(threads: FairThreads) -> None:
    done: list[int] = []

    def here() -> bool:
        return len(done) < 3

    with pytest.raises(asyncio.CancelledError):
        await threads.run("a", steps(1_000, lambda: done.append(1)), wanted=here)
    assert len(done) == 3
    assert await threads.run("b", steps(1, lambda: None)) == 1


async def test_what_work_raises_is_raised(threads: FairThreads) -> None:
    def fail() -> Work[None]:
        yield
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await threads.run("a", fail())
    assert await threads.run("a", steps(1, lambda: None)) == 1
