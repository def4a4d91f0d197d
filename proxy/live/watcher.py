"""Who watches which wallet on this worker: one reader of the feed in Postgres, however many clients hang on it."""

import asyncio
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from uuid import UUID

from billing.errors import (
    PostgresUnavailableError,
)
from billing.identity.caller import Caller
from billing.wallets.feed import WalletEventJson

_AGAIN_S = 0.2


class Frame:
    """What is sent to a client, made once for all who watch a wallet: an SSE event, and a WebSocket's text.

    Args:
        seq: the event's number; 0 for what has none.
        told: the event; None for a heartbeat.
    """

    __slots__ = ("seq", "sse", "text")

    def __init__(self, seq: int, told: WalletEventJson | None) -> None:
        self.seq = seq
        self.text = "" if told is None else json.dumps(told, separators=(",", ":"))
        self.sse = b": still here\n\n"
        if told is not None:
            number = f"id: {told['id']}\n" if "id" in told else ""
            self.sse = f"{number}event: {told['type']}\ndata: {self.text}\n\n".encode()


HEARTBEAT = Frame(0, None)


@dataclass(slots=True)
class _Place:
    """A wallet that somebody here watches. ``seq``: what was handed out up to; None: it was not read yet."""

    seq: int | None = None
    renew_at_s: float = 0.0
    watchers: set["Watcher"] = field(default_factory=set)


class Hub(Protocol):
    """Who reads the feed for its watchers."""

    def has_caught_up(self, watcher: "Watcher") -> bool:
        """Whether a watcher has all that was read."""

    async def read_on(self, watcher: "Watcher") -> None:
        """Read what a watcher is behind."""


class Watcher:
    """One client's place in a wallet's feed; ``Watchers.join`` makes it.

    Args:
        house: where it belongs.
        wallet_id: what it watches.
        caller: whose it is; None for the operator.
        recheck: raises once it may watch no more.
        queue_max: live frames that may wait; one more ends it.
    """

    __slots__ = (
        "_frames",
        "_house",
        "_live",
        "_queue_max",
        "_waiting",
        "caller",
        "cut_off",
        "ended",
        "position",
        "recheck",
        "recheck_at_s",
        "sent_at_s",
        "wallet_id",
    )

    def __init__(
        self,
        house: "Hub",
        wallet_id: UUID,
        *,
        caller: Caller | None,
        recheck: Callable[[], Awaitable[Caller]] | None,
        queue_max: int,
    ) -> None:
        self.wallet_id = wallet_id
        self.caller = caller
        self.recheck = recheck
        self.recheck_at_s = 0.0
        self.sent_at_s = time.monotonic()
        self.position: int | None = None  # of the newest event that the client was given or that waits for it
        self.ended: str | None = None  # why: gone, slow, refused, restart
        self.cut_off: Callable[[], None] | None = None  # closes its connection though a write is under way
        self._house = house
        self._live = False
        self._queue_max = queue_max
        self._frames: deque[Frame] = deque()
        self._waiting: asyncio.Future[None] | None = None

    @property
    def name(self) -> UUID | None:
        """Whose watchers are counted together: the key's, or the user's who signed in."""
        return None if self.caller is None else self.caller.key_id or self.caller.user_id

    @property
    def user_id(self) -> UUID | None:
        """Whose it is, whichever key they came with; None for the operator."""
        return None if self.caller is None else self.caller.user_id

    async def next(self) -> Sequence[Frame]:
        """Return what is next for the client, once there is something; nothing when it has ended."""
        while self.ended is None:
            if self._frames:
                frames = list(self._frames)
                self._frames.clear()
                return frames
            if not self._live and not self._house.has_caught_up(self):
                try:
                    await self._house.read_on(self)
                except PostgresUnavailableError:
                    await asyncio.sleep(_AGAIN_S)
                continue
            self._live = True
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        return ()

    def hand_out(self, frames: Sequence[Frame]) -> None:
        """Queue those of these events that the client has not, if it is live; it is ended if it does not keep up."""
        if not self._live or self.ended is not None:
            return
        for frame in frames:
            if self.position is None or frame.seq > self.position:
                if len(self._frames) >= self._queue_max:
                    self.end("slow")
                    return
                self.queue(frame)

    def queue(self, frame: Frame) -> None:
        """Queue a frame, however many there are."""
        if frame.seq:
            self.position = frame.seq
        self._frames.append(frame)
        self.sent_at_s = time.monotonic()
        self._wake()

    def beat(self, before_s: float) -> None:
        """Queue a heartbeat, if the client is live and was sent nothing since then."""
        if self._live and not self._frames and self.sent_at_s <= before_s:
            self.queue(HEARTBEAT)

    def end(self, reason: str) -> None:
        """Let the client go; what waits for it is dropped."""
        if self.ended is None:
            self.ended = reason
            self._frames.clear()
            self._wake()
            if reason == "slow" and self.cut_off is not None:
                self.cut_off()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
