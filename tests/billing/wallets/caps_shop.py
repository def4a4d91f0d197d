"""A few workers on one database, and what Redis and Postgres count of a caller's caps."""

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from billing.books.proof import Books
from billing.calls.assessment import Evidence
from billing.calls.ledger import Opening
from billing.calls.live_call import LiveCall
from billing.calls.outcome import Ending
from billing.errors import CapExceededError
from billing.identity.caller import Caller
from billing.ids import new_id
from billing.money import NANO
from billing.wallets.caps import Caps, Scope
from tests.stateful.world import (
    MODEL,
    House,
    LittleProvider,
    Worker,
    ending_of,
    make_caller,
    quote_of,
)

NGN_RATE = 1_600
SCOPES: tuple[Scope, ...] = ("wallet", "key", "user")
PERIODS = ("day", "week", "month", "total")


@dataclass
class Shop:
    """A database with a few workers on it."""

    workers: list[Worker]
    provider: LittleProvider
    house: House

    @property
    def caps(self) -> Caps:
        return Caps(self.workers[0].database)

    async def make_caller(self, *, amount: int = 1_000, currency: str = "USD") -> Caller:
        caller = await make_caller(self.workers[0].connections, currency=currency)
        await self.workers[0].wallets.credit(caller.wallet_id, amount * NANO, reason="test")
        return caller

    async def begin(
        self, caller: Caller, nanousd: int, *, worker: int = 0, at: datetime | None = None
    ) -> LiveCall:
        """Reserve, open and confirm a call that arrived at a moment."""
        calls = self.workers[worker].calls
        call_id = new_id() if at is None else new_id(at_ms=int(at.timestamp() * 1000))
        quote = quote_of(self.house, caller, nanousd)
        call = await calls.reserve(caller, quote, call_id=call_id, model=MODEL, stream=False)
        calls.open(call)
        try:
            await calls.confirm_open(call)
        except BaseException:
            await asyncio.wait((calls.end(call, Ending(call.call_id, "void", "test")),))
            raise
        return call

    async def end(self, call: LiveCall, nanousd: int, *, worker: int = 0) -> None:
        """Let the provider bill so much for it."""
        calls = self.workers[worker].calls
        generation_id = self.provider.answer(nanousd)
        bill = self.provider.bills[generation_id]
        ending = ending_of(
            call, Evidence(generation_id=generation_id, billed_usd=bill.cost_usd, usage=bill.usage)
        )
        task = calls.end(call, ending)
        await asyncio.wait((task,))
        task.result()

    async def pay(self, caller: Caller, nanousd: int, **when: Any) -> LiveCall:
        call = await self.begin(caller, nanousd, **when)
        await self.end(call, nanousd)
        return call

    async def refuses(self, caller: Caller, nanousd: int, *, at: datetime | None = None) -> None:
        """Redis refuses, and so would Postgres alone; neither has changed."""
        with pytest.raises(CapExceededError):
            await self.begin(caller, nanousd, at=at)
        before = await self.look(caller)  # the mirror is warm now
        with pytest.raises(CapExceededError):
            await self.begin(caller, nanousd, at=at)
        assert await self.open_unreserved(caller, nanousd, at=at) == "cap_exceeded"
        assert await self.look(caller) == before

    def opening_of(self, caller: Caller, nanousd: int, *, at: datetime | None = None) -> Opening:
        quote = quote_of(self.house, caller, nanousd)
        return Opening(
            new_id() if at is None else new_id(at_ms=int(at.timestamp() * 1000)),
            caller.user_id,
            caller.wallet_id,
            caller.key_id,
            MODEL,
            False,
            quote.price.id,
            quote.fx.id,
            quote.hold_nano,
            quote.hold_nanousd,
        )

    async def open_unreserved(self, caller: Caller, nanousd: int, *, at: datetime | None = None) -> str:
        opening = self.opening_of(caller, nanousd, at=at)
        return (await self.workers[0].ledger.open_calls([opening]))[0]

    async def look(self, caller: Caller) -> tuple[Any, ...]:
        """What Redis and Postgres count of a caller."""
        mirror = await self.workers[0].holds.read_mirror(caller.user_id)
        scopes = (caller.user_id, caller.wallet_id, *([caller.key_id] if caller.key_id else []))
        async with self.workers[0].database.connection() as connection:
            rows = await connection.fetch(
                "SELECT scope_id, period, starts_at, held_nano, spent_nano FROM cap_windows"
                " WHERE scope_id = ANY ($1) ORDER BY 1, 2, 3",
                list(scopes),
            )
        return mirror, [tuple(row) for row in rows]

    async def counts_hold(self, caller: Caller, moment: datetime | None = None) -> None:
        """What is counted as calls come and go is what counting them anew gives, in Postgres and in Redis."""
        checks = await Books(
            self.workers[0].database, self.workers[0].holds, self.provider, sweep_grace_s=60
        ).check(full=True)
        assert checks["I7"].ok, checks["I7"].detail
        assert checks["I6"].ok, checks["I6"].detail
        mirror = await self.workers[0].holds.read_mirror(caller.user_id)
        if mirror:
            assert mirror == await self.workers[0].ledger.read_mirror(
                caller.user_id, moment or datetime.now(UTC)
            )

    async def events(self, caller: Caller) -> list[tuple[str, int]]:
        async with self.workers[0].database.connection() as connection:
            rows = await connection.fetch(
                "SELECT body->>'period' AS period, (body->>'percent')::int AS percent FROM events"
                " WHERE user_id = $1 ORDER BY id",
                caller.user_id,
            )
        return [(row["period"], row["percent"]) for row in rows]


def scope_id(caller: Caller, scope: Scope) -> UUID:
    found = {"wallet": caller.wallet_id, "key": caller.key_id, "user": caller.user_id}[scope]
    assert found is not None
    return found
