"""The cache of callers: what a refresh renews, and what it must not bring back."""

import asyncio
import itertools
import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import pytest

from billing.identity.caller import Caller, FoundCaller
from billing.identity.caller_cache import CallerCache
from billing.ids import new_id
from billing.limits import Limits

_LIMITS = Limits(60, 1_000)


def _caller() -> Caller:
    return Caller(new_id(), new_id(), new_id(), "NGN", _LIMITS)


def _cache(*, ttl_s: float = 60.0) -> CallerCache[str]:
    return CallerCache(ttl_s=ttl_s, entries_max=100, wait_s=0)


class _Books:
    """What Postgres would know, and how often it was asked."""

    def __init__(self, **callers: Caller) -> None:
        self.callers = callers
        self.single = 0
        self.asked: list[list[str]] = []

    async def find(self, cache: CallerCache[str], name: str) -> Caller | None:
        async def look_up() -> FoundCaller | None:
            self.single += 1
            found = self.callers.get(name)
            return None if found is None else FoundCaller(found)

        return await cache.find(name, look_up)

    async def find_many(self, names: Sequence[str]) -> Mapping[str, FoundCaller]:
        self.asked.append(list(names))
        return {name: FoundCaller(self.callers[name]) for name in names if name in self.callers}


async def test_only_who_came_since_is_asked_about_and_all_at_once() -> None:
    books, cache = _Books(a=_caller(), b=_caller(), c=_caller()), _cache()
    for name in "abc":
        await books.find(cache, name)
    assert await cache.refresh(books.find_many) == 3
    await books.find(cache, "b")
    assert await cache.refresh(books.find_many) == 1
    assert await cache.refresh(books.find_many) == 0
    assert books.asked == [["a", "b", "c"], ["b"]]
    assert books.single == 3


async def test_a_refresh_puts_the_next_look_up_off(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = itertools.count(0, 0.05)
    clock = SimpleNamespace(monotonic=lambda: next(now_s))  # the test's own, however busy this machine is
    monkeypatch.setattr("billing.identity.caller_cache.time", clock)
    books, cache = _Books(a=_caller()), _cache(ttl_s=0.5)
    for _ in range(100):
        await books.find(cache, "a")
        await cache.refresh(books.find_many)
    assert clock.monotonic() > 5  # many times as long as an entry lasts
    assert books.single == 1


async def test_nobody_is_believed_for_longer_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody told of a change and no refresh came: they fail while Postgres is away, and there is none of who is unknown."""
    now_s = 0.0
    clock = SimpleNamespace(monotonic=lambda: now_s)
    monkeypatch.setattr("billing.identity.caller_cache.time", clock)
    books, cache = _Books(revoked=_caller()), _cache(ttl_s=0.5)
    assert await books.find(cache, "revoked") is not None
    assert await books.find(cache, "new") is None
    books.callers = {"new": _caller()}
    now_s = 0.49
    assert await books.find(cache, "revoked") is not None
    assert await books.find(cache, "new") is None
    now_s = 0.5
    assert await books.find(cache, "revoked") is None
    assert await books.find(cache, "new") is not None


async def test_who_is_gone_is_looked_up_alone_and_refused() -> None:
    books, cache = _Books(a=_caller()), _cache()
    assert await books.find(cache, "a") is not None
    del books.callers["a"]
    await cache.refresh(books.find_many)
    assert await books.find(cache, "a") is None
    assert books.single == 2


async def test_what_was_dropped_during_a_refresh_is_not_brought_back() -> None:
    kept, revoked = _caller(), _caller()
    books, cache = _Books(kept=kept, revoked=revoked), _cache()
    await books.find(cache, "kept")
    await books.find(cache, "revoked")

    async def find_many(names: Sequence[str]) -> Mapping[str, FoundCaller]:
        found = await books.find_many(names)
        cache.drop(lambda caller: caller.key_id == revoked.key_id)  # it was read before, and told meanwhile
        del books.callers["revoked"]

        # Somebody comes with it before the refresh is done, and is told by Postgres; a late row of the refresh says otherwise.
        assert await books.find(cache, "revoked") is None
        return found

    await cache.refresh(find_many)
    assert await books.find(cache, "revoked") is None
    assert await books.find(cache, "kept") == kept
    assert books.single == 3


async def test_a_changed_caller_is_taken_over_with_its_end() -> None:
    before, after = _caller(), _caller()
    books, cache = _Books(a=before), _cache()
    await books.find(cache, "a")

    async def find_many(_: Sequence[str]) -> Mapping[str, FoundCaller]:
        return {"a": FoundCaller(after, 0.05)}

    await cache.refresh(find_many)
    assert await books.find(cache, "a") == after
    await asyncio.sleep(0.06)
    assert await books.find(cache, "a") is None  # the key has expired
    assert before.good_until_s == math.inf


async def test_a_refresh_that_fails_changes_nothing() -> None:
    books, cache = _Books(a=_caller()), _cache()
    await books.find(cache, "a")

    async def fail(_: Sequence[str]) -> Mapping[str, FoundCaller]:
        raise ConnectionError

    try:
        await cache.refresh(fail)
    except ConnectionError:
        pass
    else:
        raise AssertionError("it was swallowed")
    assert await books.find(cache, "a") is not None
    assert books.single == 1
    assert await cache.refresh(books.find_many) == 1
