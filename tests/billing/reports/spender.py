"""Somebody who makes calls and remembers them, and what the sums of usage say of it."""

import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from billing.books.proof import Books
from billing.books.usage_proof import FIRST_ID, LAST_ID, compare_usage
from billing.calls.ledger import Ledger
from billing.calls.outcome import Ending
from billing.ids import new_id
from billing.postgres.database import Database
from billing.pricing.cost import Usage
from billing.reports.usage import Sums, UsageBook, UsageQuery, UsageRow
from scripts.office import Office
from tests.billing.calls.test_ledger import opening
from tests.support.payers import Payer

MODELS = ("maker/plain", "maker/modèle:free", "=cmd('x')|1", "a,b\"c'd")


class Spender:
    """Opens and ends calls of a payer, and remembers what it did of each."""

    def __init__(self, office: Office, payer: Payer, dice: random.Random | None = None) -> None:
        self.office = office
        self.payer = payer
        self.dice = dice or random.Random(1)
        self.ledger = Ledger(office.database, worker_id=new_id())
        self.endings: dict[UUID, Ending] = {}

    async def open(self, at: datetime | None = None, **more: Any) -> UUID:
        return (await self.open_all([at or datetime.now(UTC)], **more))[0]

    async def open_all(self, moments: Iterable[datetime], **more: Any) -> list[UUID]:
        calls = []
        for at in moments:
            fields = {
                "model": self.dice.choice(MODELS),
                "key_id": self.dice.choice((self.payer.key_id, None)),
                **more,
            }
            call_id = new_id(at_ms=round(at.timestamp() * 1000))
            calls.append(replace(opening(self.payer, 10_000), call_id=call_id, **fields))
        assert set(await self.ledger.open_calls(calls)) == {"opened"}
        return [call.call_id for call in calls]

    def ending(self, call_id: UUID, **more: Any) -> Ending:
        dice = self.dice
        if dice.random() < 0.2 and not more:
            return Ending(call_id, "void", "upstream_error")
        cost = dice.randrange(1, 9_000)
        fields: dict[str, Any] = {
            "accuracy": dice.choice(("exact", "estimated")),
            "cost_nanousd": cost,
            "charge_nano": cost,
            "spread_nano": cost // 40,
            "first_byte_ms": dice.choice((None, 0, 99, 100, dice.randrange(200_000))),
            "duration_ms": dice.choice((None, 102_399, 102_400, dice.randrange(200_000))),
            **more,
        }
        tokens = Usage(*(dice.randrange(5_000) for _ in range(5)))
        return Ending(call_id, "settled", "completed", generation_id="g", usage=tokens, **fields)

    async def settle(self, call_ids: Iterable[UUID], **more: Any) -> None:
        endings = [self.ending(call_id, **more) for call_id in call_ids]
        await self.ledger.settle_calls(endings)
        self.endings.update({item.call_id: item for item in endings})

    async def spend(self, at: datetime | None = None, **more: Any) -> UUID:
        call_id = await self.open(at)
        await self.settle([call_id], **more)
        return call_id


@asynccontextmanager
async def reading_as_person(office: Office) -> AsyncIterator[UsageBook]:
    """A book by the role that people read by."""
    database = Database(office.settings.postgres, role="api")
    try:
        yield UsageBook(database)
    finally:
        await database.close()


async def differences(office: Office, first: UUID = FIRST_ID, end: UUID = LAST_ID) -> list[str]:
    async with office.database.connection() as connection:
        return await compare_usage(connection, first, end)


async def check(office: Office, *, full: bool = False) -> tuple[bool, str]:
    books = Books(office.database, office.holds, office.upstream, sweep_grace_s=3600)
    found = (await books.check(full=full))["usage"]
    return found.ok, found.detail


async def read(office: Office, payer: Payer, *by: str, **more: Any) -> list[UsageRow]:
    async with reading_as_person(office) as book:
        report = await book.read_own(payer.user_id, payer.wallet_id, UsageQuery(by=by, **more))
    assert sum(report.totals.values(), Sums()) == sum((row.sums for row in report.rows), Sums())
    return list(report.rows)


async def totals(office: Office, payer: Payer) -> Sums:
    return sum((row.sums for row in await read(office, payer)), Sums())
