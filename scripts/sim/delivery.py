"""Sends one answer and closes its entry in the books, exactly once, whichever way the connection ends."""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import suppress

from aiohttp import web

from scripts.sim.answers import Answer, Event, Pause
from scripts.sim.behaviour import Behaviour
from scripts.sim.books import Books, Generation
from scripts.sim.exact_json import dumps, to_bytes

_WRITES_PER_TURN = 64
_JSON = "application/json"
_STREAM = "text/event-stream"


class Delivery:
    """One answer on its way to a caller, who may leave at any time.

    The server must cancel handlers when a connection is lost (``handler_cancellation``): that is how a departure is noticed
    while the answer pauses. A cancelled stream is billed for what was written to the socket. What is not streamed, and what
    is not cancellable, is generated to its end at its own pace and billed whole, as OpenRouter does.
    Source: https://openrouter.ai/docs/api-reference/streaming, stream cancellation.

    Args:
        request: whose connection it goes to.
        books: where it is billed.
        generation: its open entry.
        answer: what is sent.
        stopping: set when the server goes down; then nothing is generated on.
    """

    def __init__(
        self,
        request: web.Request,
        books: Books,
        *,
        generation: Generation,
        answer: Answer,
        stopping: asyncio.Event,
    ) -> None:
        self._request = request
        self._books = books
        self._generation = generation
        self._answer = answer
        self._stopping = stopping
        self._until_s = 0.0
        self._waiting: list[Event] = []
        self._writes = 0
        self._sent_tokens = 0
        self._sent_reasoning_tokens = 0

    async def send(self) -> web.StreamResponse:
        """Send the answer and bill it.

        Raises:
            ConnectionResetError: the caller left.
            asyncio.CancelledError: the caller left, or the server goes down.
        """
        self._until_s = asyncio.get_running_loop().time() + self._answer.duration_s
        try:
            return await (self._stream() if self._generation.streamed else self._plain())
        except (ConnectionResetError, asyncio.CancelledError):
            if not (self._answer.behaviour.cancellable and self._generation.streamed):
                await self._generate_on()
            raise
        finally:
            # Whoever was billed before is not billed again: this is for those who left, and for what went wrong.
            self._bill(self._sent_tokens, self._sent_reasoning_tokens, finish_reason=None, cancelled=True)

    async def _stream(self) -> web.StreamResponse:
        behaviour = self._answer.behaviour
        response = web.StreamResponse(headers=self._headers(_STREAM))
        await response.prepare(self._request)
        for step in self._answer.content():
            if isinstance(step, Event):
                await self._write(response, step)
                continue
            if step.stall:
                await self._flush(response)
            await asyncio.sleep(step.seconds)
        if self._answer.plan.ending == "cut":
            await self._flush(response)
            self._bill_whole()
            self._close()
            return response
        # Billed before its end is sent: whoever has read the end finds it in the books.
        self._bill_whole()
        for data in self._answer.tail():
            await self._write(response, Event(data))
        await self._flush(response)
        if not behaviour.done:
            response.force_close()
        return response

    async def _plain(self) -> web.StreamResponse:
        stalls = [step.seconds for step in self._answer.content() if isinstance(step, Pause) and step.stall]
        await asyncio.sleep(self._answer.duration_s + sum(stalls))
        body = self._answer.document()
        self._bill_whole()
        if self._answer.plan.ending != "cut":
            return web.Response(body=body, headers=self._headers(_JSON))
        response = web.StreamResponse(headers=self._headers(_JSON) | {"Content-Length": str(len(body))})
        await response.prepare(self._request)
        await response.write(body[: len(body) // 2])
        self._close()
        return response

    def _headers(self, content_type: str) -> dict[str, str]:
        headers = {"Content-Type": content_type}
        if content_type == _STREAM:
            headers["Cache-Control"] = "no-cache"
        if self._answer.behaviour.generation_id_header:
            headers["X-Generation-Id"] = self._generation.id
        return headers

    async def _write(self, response: web.StreamResponse, event: Event) -> None:
        self._waiting.append(event)
        if len(self._waiting) >= self._answer.behaviour.events_per_write:
            await self._flush(response)

    async def _flush(self, response: web.StreamResponse) -> None:
        """Send what waits; its tokens count once all of it is written."""
        split_bytes = self._answer.behaviour.split_bytes
        for piece in _pieces(b"".join(event.data for event in self._waiting), split_bytes):
            await response.write(piece)
            self._writes += 1
            if split_bytes is not None or self._writes % _WRITES_PER_TURN == 0:
                await asyncio.sleep(0)
        self._sent_tokens += sum(event.tokens for event in self._waiting)
        self._sent_reasoning_tokens += sum(event.reasoning_tokens for event in self._waiting)
        self._waiting.clear()

    def _close(self) -> None:
        # Not abort(): what counts as sent must reach the caller. The body's end is missing, and that is the cut.
        if self._request.transport is not None:
            self._request.transport.close()

    async def _generate_on(self) -> None:
        """Let the rest of the generation's time pass, then bill all of it, also when the server goes down meanwhile."""
        try:
            await self._pass_rest()
        except asyncio.CancelledError:
            # One departure may be noticed twice: by a write that fails, then by the handler's cancellation.
            await self._pass_rest()
            raise
        finally:
            self._bill_whole(cancelled=True)

    async def _pass_rest(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._until_s):
                await self._stopping.wait()

    def _bill_whole(self, *, cancelled: bool = False) -> None:
        answer = self._answer
        self._bill(
            answer.tokens, answer.reasoning_tokens, finish_reason=answer.finish_reason, cancelled=cancelled
        )

    def _bill(
        self, tokens: int, reasoning_tokens: int, *, finish_reason: str | None, cancelled: bool
    ) -> None:
        self._books.bill(
            self._generation,
            cost_nanousd=self._answer.cost_nanousd(tokens),
            completion_tokens=tokens,
            reasoning_tokens=reasoning_tokens,
            finish_reason=finish_reason,
            cancelled=cancelled,
        )


def _pieces(data: bytes, size_bytes: int | None) -> Iterator[bytes]:
    step = size_bytes or len(data) or 1
    for start in range(0, len(data), step):
        yield data[start : start + step]


async def fail_early(behaviour: Behaviour, *, stream: bool) -> web.Response:
    """Return the response of a request for which nothing is generated."""
    await asyncio.sleep(float(behaviour.first_delay_ms) / 1000)
    if behaviour.fail_status:
        told = behaviour.fail_body
        if told is None:
            told = {"error": {"code": behaviour.fail_status, "message": "Simulated failure"}}
        return _respond(told, status=behaviour.fail_status, headers=behaviour.fail_headers)
    if behaviour.null_body:
        return _respond("null")
    if behaviour.html_body:
        return _respond("<html><body>Bad gateway</body></html>", content_type="text/html")
    error = dumps({"error": {"code": behaviour.error_code, "message": "Provider returned error"}})
    if not stream:
        return _respond(error)
    line_end = "\r\n" if behaviour.crlf else "\n"
    return _respond(f"data: {error}{line_end}{line_end}", content_type=_STREAM)


def _respond(
    body: object, *, status: int = 200, content_type: str = _JSON, headers: Mapping[str, str] | None = None
) -> web.Response:
    text = body if isinstance(body, str) else dumps(body)
    return web.Response(
        body=to_bytes(text), status=status, headers={"Content-Type": content_type, **(headers or {})}
    )
