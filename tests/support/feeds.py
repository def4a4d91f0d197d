"""A client of the live feed for tests: it reads server-sent events, and can be cut at any moment."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import aiohttp

from billing.calls.ledger import Ledger, Opening
from billing.calls.outcome import Ending
from billing.ids import new_id
from scripts.office import Office
from tests.support.payers import Payer


@dataclass
class Stream:
    """One connection to a feed. ``seen``: ids of what came with one, in order."""

    response: aiohttp.ClientResponse
    retries: list[int]

    async def next(self, timeout_s: float = 30) -> dict[str, Any] | None:
        """Return the next event; None at the stream's end."""
        fields: dict[str, str] = {}
        async with asyncio.timeout(timeout_s):
            while line := await self.response.content.readline():
                text = line.decode().rstrip("\n")
                if not text and "data" in fields:
                    event: dict[str, Any] = json.loads(fields["data"])
                    assert event["type"] == fields["event"]
                    assert event.get("id") == fields.get("id")
                    return event
                name, _, value = text.partition(": ")
                if name == "retry":
                    self.retries.append(int(value))
                elif name:
                    fields[name] = value
        return None

    async def take(self, count: int) -> list[dict[str, Any]]:
        """Return so many events."""
        found = []
        for _ in range(count):
            event = await self.next()
            assert event is not None
            found.append(event)
        return found


@asynccontextmanager
async def watching(
    url: str, secret: str, *, after: str | None = None, path: str = "/v1/wallet/events"
) -> AsyncIterator[Stream]:
    """Open a feed with a connection of its own."""
    headers = {"Authorization": f"Bearer {secret}", **({"Last-Event-ID": after} if after else {})}
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session,
        session.get(f"{url}{path}", headers=headers) as response,
    ):
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        yield Stream(response, [])


def opening(payer: Payer, hold_nano: int) -> Opening:
    """A call of a payer's, about to be opened."""
    return Opening(
        new_id(),
        payer.user_id,
        payer.wallet_id,
        payer.key_id,
        "a/model",
        stream=False,
        price_id=new_id(),
        fx_quote_id=UUID(int=0),
        hold_nano=hold_nano,
        hold_nanousd=hold_nano,
    )


def ending(call_id: UUID, cost_nano: int) -> Ending:
    """A settlement at this cost; void at none."""
    return Ending(
        call_id,
        "settled" if cost_nano else "void",
        "completed" if cost_nano else "client_gone",
        cost_nanousd=cost_nano,
        provider_cost_nanousd=cost_nano,
        charge_nano=cost_nano,
    )


async def pay(ledger: Ledger, payer: Payer, cost_nano: int) -> UUID:
    """Open a call and settle it: two events."""
    call = opening(payer, 2 * cost_nano)
    assert await ledger.open_calls([call]) == ["opened"]
    await ledger.settle_calls([ending(call.call_id, cost_nano)])
    return call.call_id


async def committed(office: Office, payer: Payer) -> list[str]:
    """The ids of all events of a wallet that are in Postgres, in order."""
    async with office.database.connection() as connection:
        rows = await connection.fetch(
            "SELECT seq FROM feed_events WHERE wallet_id = $1 ORDER BY seq", payer.wallet_id
        )
    return [f"{payer.wallet_id.hex[-8:]}-{row['seq']}" for row in rows]
