"""Who watches which wallet on this worker: one reader of the feed in Postgres, however many clients hang on it.

A commit tells every worker which wallets it moved (``billing/postgres/notifications.py``). A worker reads what is new of those that it has
watchers of, many of them in one query, and hands it to their watchers; while it reads, further news gather for the next
query. A watcher first reads by itself what it missed, and goes live once it has all that was handed out before.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Literal
from uuid import UUID

import structlog

from billing.errors import (
    FeedFullError,
    NotFoundError,
    PostgresUnavailableError,
    RateLimitError,
    RefusalError,
    TumaError,
)
from billing.identity.caller import Caller
from billing.wallets.feed import Feeds, Reading, Standing, parse_event_id
from config.settings import FeedSettings
from proxy.live.watcher import _AGAIN_S, Frame, Watcher, _Place

_log = structlog.get_logger("tuma.feed")
_TICK_S = 1.0
_JOINS_AT_ONCE = 2  # connections of the pool that watchers who come may use; the reader uses one more
_RENEW_TOGETHER = 500
_RETRY_AFTER_MS = 5_000


class Watchers:
    """All watchers of this worker.

    Args:
        feeds: where events are read.
        settings: the bounds.
    """

    def __init__(self, feeds: Feeds, settings: FeedSettings) -> None:
        self._feeds = feeds
        self._settings = settings
        self._places: dict[UUID, _Place] = {}
        self._counts: Counter[UUID | None] = Counter()  # by key, or by user who signed in
        self._counts_of_users: Counter[UUID | None] = Counter()
        self._count = 0
        self._news: set[UUID] = set()
        self._bell = asyncio.Event()
        self._doubts = asyncio.Event()
        self._joining = asyncio.Semaphore(_JOINS_AT_ONCE)
        self._closing = False

    def __len__(self) -> int:
        return self._count

    async def join(
        self,
        wallet_id: UUID,
        *,
        caller: Caller | None,
        after: str | None,
        recheck: Callable[[], Awaitable[Caller]] | None,
    ) -> Watcher:
        """Begin to watch a wallet; the caller sees to ``leave``.

        Args:
            wallet_id: which.
            caller: whose watcher it is; None for the operator.
            after: the id of the last event that the client has; None for one that begins.
            recheck: called now and then; raises a refusal once the client may watch no more.

        Raises:
            FeedFullError: there are too many watchers here, or the worker stops.
            RateLimitError: the caller has too many.
            NotFoundError: there is no such wallet.
            PostgresUnavailableError: Postgres is away.
        """
        settings = self._settings
        if self._closing:
            raise FeedFullError("This worker is stopping; come back at once.", retry_after_s=1)
        if self._count >= settings.watchers:
            raise FeedFullError("There are too many watchers here.", retry_after_s=_RETRY_AFTER_MS // 1000)
        watcher = Watcher(self, wallet_id, caller=caller, recheck=recheck, queue_max=settings.queue_events)
        if caller is not None:
            self._require_few(watcher, caller)
            self._trust(watcher, caller)
        self._count += 1
        self._counts[watcher.name] += 1
        self._counts_of_users[watcher.user_id] += 1
        place = self._places.setdefault(wallet_id, _Place())  # before it is read, so that no news is missed
        place.watchers.add(watcher)
        try:
            async with self._joining:
                if place.seq is None:
                    await self._feeds.watch([wallet_id])
                    place.renew_at_s = time.monotonic() + self._spread(self._feeds.renew_s)
                if after is not None:
                    watcher.position = parse_event_id(wallet_id, after)
                await self.read_on(watcher)
        except BaseException:
            self.leave(watcher)
            raise
        return watcher

    def _require_few(self, watcher: Watcher, caller: Caller) -> None:
        settings = self._settings
        for count, most in (
            (self._counts[watcher.name], settings.watchers_per_caller),
            (self._counts_of_users[caller.user_id], settings.watchers_per_user),
        ):
            if count >= most:
                raise RateLimitError(f"You watch {most} times already.", retry_after_ms=_RETRY_AFTER_MS)

    @staticmethod
    def _spread(period_s: float) -> float:
        return period_s * random.uniform(0.5, 1.0)  # noqa: S311 - so that not all come due at once

    def leave(self, watcher: Watcher) -> None:
        """Forget a watcher."""
        place = self._places.get(watcher.wallet_id)
        if place is None or watcher not in place.watchers:
            return
        watcher.end("gone")
        place.watchers.discard(watcher)
        if not place.watchers:
            del self._places[watcher.wallet_id]
            self._news.discard(watcher.wallet_id)
        self._count -= 1
        for counts, name in ((self._counts, watcher.name), (self._counts_of_users, watcher.user_id)):
            counts[name] -= 1
            if not counts[name]:
                del counts[name]

    def has_caught_up(self, watcher: Watcher) -> bool:
        """Tell whether a watcher has all that was handed out before."""
        seq = self._places[watcher.wallet_id].seq
        return seq is not None and watcher.position is not None and watcher.position >= seq

    async def read_on(self, watcher: Watcher) -> None:
        """Queue the next page of what a watcher missed: its wallet's standing, for one that begins."""
        begins = watcher.position is None
        reading = await self._read(watcher.wallet_id, watcher.position)
        place = self._places.get(watcher.wallet_id)
        if place is None:
            return  # it left meanwhile
        if place.seq is None:
            place.seq = reading.standing.seq
            if self._news:
                self._bell.set()
        for frame in _frames_of(reading, begins=begins):
            watcher.queue(frame)

    async def _read(self, wallet_id: UUID, after: int | None) -> Reading:
        reading = (await self._feeds.read({wallet_id: after})).get(wallet_id)
        if reading is None:
            raise NotFoundError(f"there is no wallet {wallet_id}")
        return reading if reading.agrees else await self._mend(wallet_id, after)

    async def _mend(self, wallet_id: UUID, after: int | None) -> Reading:
        _log.error("feed.disagreed", wallet_id=str(wallet_id))
        await self._feeds.mend(wallet_id)
        return (await self._feeds.read({wallet_id: after}))[wallet_id]

    async def hear(self, wallets: str) -> None:
        """Take note that wallets, their ids separated by commas, have news; ``*``: any may have."""
        heard = self._places.keys() if wallets == "*" else map(UUID, wallets.split(","))
        self._news.update(wallet_id for wallet_id in heard if wallet_id in self._places)
        if self._news:
            self._bell.set()

    async def run(self) -> None:
        """Read what is new and hand it out, until cancelled."""
        while True:
            await self._bell.wait()
            self._bell.clear()
            after: dict[UUID, int | None] = {}
            for wallet_id in self._news:
                seq = self._places[wallet_id].seq
                if seq is not None:
                    after[wallet_id] = seq
                    if len(after) >= self._settings.wallets:
                        break
            if not after:
                continue
            self._news -= after.keys()
            try:
                await self._hand_out(after)
            except PostgresUnavailableError:
                await asyncio.sleep(_AGAIN_S)
                self._news.update(after.keys() & self._places.keys())
            if self._news:
                self._bell.set()

    async def _hand_out(self, after: dict[UUID, int | None]) -> None:
        readings = await self._feeds.read(after)
        for wallet_id, seq in after.items():
            reading = readings.get(wallet_id)
            if reading is not None and not reading.agrees:
                reading = await self._mend(wallet_id, seq)
            place = self._places.get(wallet_id)
            if place is None or reading is None or place.seq != seq:
                continue
            frames = _frames_of(reading, begins=False)
            if frames:
                place.seq = frames[-1].seq
            if reading.more:
                self._news.add(wallet_id)
            for watcher in place.watchers:
                watcher.hand_out(frames)

    async def run_upkeep(self) -> None:
        """Keep wallets watched and connections alive, until cancelled."""
        while True:
            await asyncio.sleep(min(_TICK_S, self._settings.heartbeat_s, self._feeds.renew_s / 4))
            now = time.monotonic()
            for place in self._places.values():
                for watcher in place.watchers:
                    watcher.beat(now - self._settings.heartbeat_s)
            due = [wallet_id for wallet_id, place in self._places.items() if place.renew_at_s <= now]
            for begin in range(0, len(due), _RENEW_TOGETHER):
                some = due[begin : begin + _RENEW_TOGETHER]
                try:
                    await self._feeds.watch(some)
                except PostgresUnavailableError:
                    break  # at the next tick
                for wallet_id in some:
                    if wallet_id in self._places:
                        self._places[wallet_id].renew_at_s = now + self._spread(self._feeds.renew_s)
                        self._news.add(wallet_id)  # if it was watched no more in between, its number jumped
                self._bell.set()

    def doubt(self, meant: Callable[[Caller], bool] | None) -> None:
        """Look soon whether the watchers of these callers may still watch; None: of all."""
        for place in self._places.values():
            for watcher in place.watchers:
                if watcher.caller is not None and (meant is None or meant(watcher.caller)):
                    watcher.recheck_at_s = 0.0
                    self._doubts.set()

    async def run_checks(self) -> None:
        """End the watchers that may watch no more, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(_TICK_S):
                    await self._doubts.wait()
            except TimeoutError:
                pass
            self._doubts.clear()
            now = time.monotonic()
            due = [
                watcher
                for place in self._places.values()
                for watcher in place.watchers
                if watcher.recheck is not None and watcher.recheck_at_s <= now and watcher.ended is None
            ]
            for watcher in due:
                await self._check(watcher)

    async def _check(self, watcher: Watcher) -> None:
        assert watcher.recheck is not None
        try:
            self._trust(watcher, await watcher.recheck())
        except RefusalError as error:
            _log.info("watcher.refused", wallet_id=str(watcher.wallet_id), error=type(error).__name__)
            watcher.end("refused")
        except TumaError:
            watcher.recheck_at_s = 0.0  # it cannot be told just now

    def _trust(self, watcher: Watcher, caller: Caller) -> None:
        """Look at a watcher's key or token again after a while, and when it ends."""
        next_at_s = time.monotonic() + self._spread(self._settings.recheck_s)
        watcher.recheck_at_s = min(next_at_s, caller.good_until_s)

    def close(self) -> None:
        """Let everybody go, and nobody in: the worker stops."""
        self._closing = True
        for place in self._places.values():
            for watcher in place.watchers:
                watcher.end("restart")


def _frames_of(reading: Reading, *, begins: bool) -> list[Frame]:
    if begins:
        return [_standing_frame("balance", reading.standing)]
    if not reading.whole or not reading.agrees:
        return [_standing_frame("reset", reading.standing)]
    return [Frame(event.after.seq, event.as_json()) for event in reading.events]


def _standing_frame(kind: Literal["balance", "reset"], standing: Standing) -> Frame:
    return Frame(standing.seq, standing.as_event(kind))
