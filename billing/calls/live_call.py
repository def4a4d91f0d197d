"""Calls in flight: reserve, open, note, extend, end. The proxy's view of money."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from billing.calls.ledger import Opening
from billing.calls.outcome import Ending, Settlement
from billing.holds.hold import Hold
from billing.identity.caller import Caller
from billing.limits import RateState
from billing.pricing.quote import Quote
from billing.stages import Stages


@dataclass(slots=True)
class LiveCall:
    """One call between its hold and its settlement."""

    call_id: UUID
    caller: Caller
    model: str
    stream: bool
    quote: Quote
    hold: Hold
    hold_nanousd: int
    rates: RateState
    quota_nanousd: int  # taken of the provider's quota
    opened: asyncio.Future[str] | None = None
    opening_s: float = 0.0  # when its row was queued, by the monotonic clock
    notes: dict[str, str] = field(default_factory=dict)
    noting: asyncio.Future[Any] | None = None  # under way, until the answer's first byte
    # Counts what passed so far, for the notes; cheaply, if it is not to be exact.
    progress: Callable[[bool], Mapping[str, str]] | None = None
    started_s: float = field(default_factory=time.monotonic)
    noted_in_postgres: bool = (
        False  # the provider's id, for the day that Redis and this worker are lost together
    )
    # One Redis command about this call at a time: a renewal that overtakes the release would bring the hold back.
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    ended: asyncio.Task[Settlement | None] | None = None
    ending: Ending | None = None
    epoch: int = 0  # of the worker's leases, in which it was last known to be this worker's own
    is_lost: bool = False  # the sweeper ended it, as this worker stood still
    stages: Stages = field(default_factory=Stages)
    on_ended: Callable[[], None] | None = None  # once it is settled and released

    @property
    def settlement(self) -> Settlement | None:
        """How it stands, once that is known."""
        task = self.ended
        known = task is not None and task.done() and not task.cancelled() and task.exception() is None
        return task.result() if task is not None and known else None

    @property
    def generation_id(self) -> str | None:
        """The provider's id of the answer, once known."""
        return self.notes.get("generation_id")


def hold_of(caller: Caller, quote: Quote, call_id: UUID) -> Hold:
    """Return what must be set aside for a quote."""
    return Hold(
        call_id=call_id,
        user_id=caller.user_id,
        wallet_id=caller.wallet_id,
        key_id=caller.key_id,
        amount_nano=quote.hold_nano,
        tokens=quote.window_tokens or quote.prompt.tokens + quote.completion_tokens,
        limits=caller.limits,
        amount_nanousd=quote.hold_nanousd,
        user_limits=caller.user_limits,
        currency=caller.currency,
        place=caller.place,
    )


def opening_of(call: LiveCall, *, hold_nano: int, hold_nanousd: int) -> Opening:
    """Return the row that opens a call in Postgres."""
    return Opening(
        call_id=call.call_id,
        user_id=call.caller.user_id,
        wallet_id=call.caller.wallet_id,
        key_id=call.caller.key_id,
        model=call.model,
        stream=call.stream,
        price_id=call.quote.price.id,
        fx_quote_id=call.quote.fx.id,
        hold_nano=hold_nano,
        hold_nanousd=hold_nanousd,
    )
