"""The load of a campaign: clients that call, hang up, run dry, and ask for trouble."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from tests.faults.campaign.result import Result
from tests.faults.campaign.servers import Servers
from tests.support.payers import Payer

MODELS = ("openai/gpt-4o-mini", "openai/gpt-4o")
_HELLO = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100}
# What is asked, and where.
ASKS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": _HELLO,
    "/api/chat": _HELLO,
    "/v1/completions": {"prompt": "hi", "max_tokens": 100},
    "/v1/responses": {"input": "hi", "max_output_tokens": 100},
}
_CLIENTS = 24
KNOWN_S = 3.0  # so long after an answer's end the provider may still deny its id


class Load:
    """Clients that call until they are stopped.

    Args:
        dice: draw what is asked.
        result: counts the answers.
    """

    def __init__(self, servers: Servers, payers: list[Payer], dice: random.Random, result: Result) -> None:
        self._servers = servers
        self._payers = payers
        self._dice = dice
        self._result = result
        self._stopped = asyncio.Event()
        self.answered: set[str] = set()  # calls of which a client has had a byte

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Call, as long as the block lasts."""
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            clients = [asyncio.get_running_loop().create_task(self._load(session)) for _ in range(_CLIENTS)]
            try:
                yield
            finally:
                self._stopped.set()
                await asyncio.gather(*clients)

    async def _load(self, session: aiohttp.ClientSession) -> None:
        while not self._stopped.is_set():
            outcome = await self._call(session)
            self._result.answers[outcome] += 1
            await asyncio.sleep(0.2 if outcome == "refused connection" else 0.01)

    def _draw_body(self) -> dict[str, Any]:
        dice = self._dice
        told: dict[str, Any] = {
            "chunks": dice.randrange(1, 40),
            "chunk_delay_ms": dice.choice((0, 5, 20, 60)),
            "first_delay_ms": dice.choice((0, 0, 50)),
            "cancellable": dice.random() < 0.5,
            "generation_id_header": dice.random() < 0.3,
        }
        trouble = dice.random()
        if trouble < 0.05:
            told["fail_status"] = dice.choice((400, 429, 500, 503))
        elif trouble < 0.10:
            told["error_after"] = dice.randrange(10)
        elif trouble < 0.15:
            told["cut_after"] = dice.randrange(10)
        elif trouble < 0.20:
            told["usage"] = "missing"
        elif trouble < 0.23:
            told["error_before_first"] = True
        elif trouble < 0.26:
            told["generation_delay_s"] = dice.random() * KNOWN_S
        return {"model": dice.choice(MODELS), "stream": dice.random() < 0.75, "sim": told}

    async def _call(self, session: aiohttp.ClientSession) -> str:
        dice = self._dice
        payer = dice.choice(self._payers)
        leaves_after = dice.randrange(1, 20) if dice.random() < 0.15 else None
        path = dice.choices(list(ASKS), weights=(6, 1, 1, 2))[0]
        try:
            async with session.post(
                f"{self._servers.url}{path}",
                json={**self._draw_body(), **ASKS[path]},
                headers={"Authorization": f"Bearer {payer.secret}"},
            ) as response:
                read = 0
                async for _ in response.content.iter_any():
                    read += 1
                    if read == 1 and response.status == 200:
                        self.answered.add(response.headers["x-request-id"])
                    if read == leaves_after:
                        return "hung up"
                return str(response.status)
        except aiohttp.ClientConnectorError:
            return "refused connection"
        except (aiohttp.ClientError, OSError):
            return "cut off"
        except TimeoutError:
            return "timed out"
