"""A provider that answers byte by byte what a test says, over a real socket; it knows no protocol but HTTP/1.1."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from config.settings import Settings
from scripts.office import Office
from tests.support.payers import Payer
from tests.support.running import Running, run_proxy

MODEL = "openai/gpt-4o-mini"  # at 0.15 and 0.60 USD per million, as the simulated provider lists it
USAGE = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
COST_NANO = 1000 * 150 + 100 * 600
DONE = b"data: [DONE]\n\n"


@dataclass
class Turn:
    """One call that came, and the way back to who sent it."""

    writer: asyncio.StreamWriter
    body: Any

    async def head(
        self, media_type: str = "application/json", *, length: int | None = None, status: int = 200
    ) -> None:
        """Send the head; without a length the body ends with the connection."""
        lines = [
            f"HTTP/1.1 {status} OK",
            f"Content-Type: {media_type}",
            "Connection: close",
            *([] if length is None else [f"Content-Length: {length}"]),
        ]
        await self.send(("\r\n".join(lines) + "\r\n\r\n").encode())

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.writer.write(data)
        await self.writer.drain()

    async def plain(self, answer: Any, *, status: int = 200) -> None:
        """Answer with a whole JSON document, or with bytes."""
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        await self.head(length=len(data), status=status)
        await self.send(data)

    async def stream(self, *events: Any, media_type: str = "text/event-stream") -> None:
        """Begin a stream with these events: bytes as they are, or objects."""
        await self.head(media_type)
        await self.send(b"".join(event if isinstance(event, bytes) else sse(event) for event in events))


Script = Callable[[Turn], Awaitable[None]]


@dataclass
class Scripted:
    """The provider.

    Args:
        base_url: of its API.
        script: answers each call; may be set anew.
        records: what ``/generation`` knows, by id.
    """

    base_url: str
    script: Script | None = None
    records: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    asked: list[Any] = field(default_factory=list)


def sse(event: Any) -> bytes:
    """Return one event."""
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def chunk(text: str | None = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    """Return a chunk of a chat completion; without a text and a reason, one without choices."""
    delta = {} if text is None else {"content": text}
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    empty = text is None and finish is None
    return {"id": "gen-1", "object": "chat.completion.chunk", "choices": [] if empty else choices, **more}


def completion(text: str = "Hello there.", **more: Any) -> dict[str, Any]:
    """Return a whole chat completion."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "gen-1", "object": "chat.completion", "model": "m", "choices": [choice], **more}


@asynccontextmanager
async def run_scripted() -> AsyncIterator[Scripted]:
    """Run one."""
    scripted = Scripted("")
    turns: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        turns.add(task)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await _serve(scripted, reader, writer)
        turns.discard(task)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    scripted.base_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield scripted
    finally:
        server.close()
        for task in list(turns):
            task.cancel()
        await asyncio.gather(*turns, return_exceptions=True)


async def _serve(scripted: Scripted, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    method, target, _ = head.split(" ", 2)
    if method == "POST":
        size = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
        body = json.loads(await reader.readexactly(size))
        scripted.asked.append(body)
        assert scripted.script is not None
        await scripted.script(Turn(writer, body))
        return
    record = scripted.records.get(target.partition("id=")[2]) if "/generation" in target else None
    data = json.dumps({"data": record} if record else {"error": {"message": "no", "code": 404}}).encode()
    status = "200 OK" if record else "404 Not Found"
    writer.write(
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    await writer.drain()


class Case:
    """A proxy before a scripted provider, and the wallet that pays."""

    def __init__(self, proxy: Running, provider: Scripted, office: Office, payer: Payer) -> None:
        self.proxy, self.provider, self.office, self.payer = proxy, provider, office, payer
        self.headers: dict[str, str] = {}

    async def ask(
        self, script: Script, *, path: str = "/v1/chat/completions", **members: Any
    ) -> tuple[int, bytes]:
        self.provider.script = script
        body = {"model": MODEL, "messages": [{"role": "user", "content": "word " * 500}], **members}
        async with (
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {self.payer.secret}"}) as session,
            session.post(self.proxy.base_url + path, json=body) as response,
        ):
            answer = response.status, await response.read()
            self.headers = {name.lower(): value for name, value in response.headers.items()}
        await self.proxy.quiet()
        return answer

    async def call(self) -> Any:
        """Return how the last call stands."""
        async with self.office.database.connection() as connection:
            return await connection.fetchrow(
                "SELECT c.state, c.outcome, c.accuracy, c.charge_nano, c.cost_nanousd, u.source"
                " FROM calls c LEFT JOIN usage u ON u.call_id = c.id ORDER BY c.id DESC LIMIT 1"
            )

    async def charged(self) -> int:
        return int((await self.call())["charge_nano"] or 0)


@asynccontextmanager
async def running(
    settings: Settings, provider: Scripted, office: Office, payer: Payer, **upstream: Any
) -> AsyncIterator[Case]:
    changes = {"kind": "openai", "base_url": provider.base_url, "end_wait_s": 0.3, **upstream}
    changed = settings.model_copy(update={"upstream": settings.upstream.model_copy(update=changes)})
    async with run_proxy(changed) as proxy:
        yield Case(proxy, provider, office, payer)
