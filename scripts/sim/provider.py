"""The simulated provider: OpenRouter's protocol over a real socket, for tests and ``./scripts/dev``."""

import argparse
import asyncio
import json
import signal
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from scripts.sim.answers import AnswerScript, dump, word
from scripts.sim.behaviour import Behaviour, BehaviourError
from scripts.sim.books import NANO, Books, Generation, SimModel

_PER_MILLION = 1_000_000
_MODELS = (
    SimModel("openai/gpt-4o-mini", "OpenAI: GPT-4o-mini", 150_000_000, 600_000_000, 75_000_000),
    SimModel("openai/gpt-4o", "OpenAI: GPT-4o", 2_500_000_000, 10_000_000_000, 1_250_000_000),
    SimModel(
        "openai/gpt-4.1-nano", "OpenAI: GPT-4.1 Nano", 100_000_000, 400_000_000, 25_000_000, 1_000_000, 32_768
    ),
    SimModel(
        "openai/o4-mini", "OpenAI: o4 Mini", 1_100_000_000, 4_400_000_000, 275_000_000, 200_000, 100_000
    ),
    SimModel(
        "anthropic/claude-sonnet-4.5",
        "Anthropic: Claude Sonnet 4.5",
        3_000_000_000,
        15_000_000_000,
        300_000_000,
        1_000_000,
        64_000,
    ),
    SimModel(
        "google/gemini-2.5-flash",
        "Google: Gemini 2.5 Flash",
        300_000_000,
        2_500_000_000,
        75_000_000,
        1_048_576,
        65_536,
    ),
    SimModel("meta-llama/llama-3.3-70b-instruct", "Meta: Llama 3.3 70B Instruct", 130_000_000, 390_000_000),
    SimModel("deepseek/deepseek-r1", "DeepSeek: R1", 400_000_000, 2_000_000_000, None, 163_840, 163_840),
    SimModel("mistralai/mistral-small-3.2", "Mistral: Small 3.2", 60_000_000, 180_000_000),
    SimModel("qwen/qwen3-32b", "Qwen: Qwen3 32B", 51_000_000, 217_000_000),
    SimModel("sim/echo", "Sim: repeats what was said last", 1_000_003, 3_000_007),
    SimModel("sim/slow", "Sim: 40 chunks, 50 ms apart", 1_000_000_000, 2_000_000_000),
)
_REQUESTS_KEPT = 200
_POLL_S = 0.01


class SimulatedProvider:
    """A provider with books of its own.

    Args:
        api_key: what callers must send as a bearer token.
        host: loopback.
        port: 0 picks a free one.
        books_path: where the books survive a restart; in memory only, when left out.
        credits_usd: what ``/credits`` says was bought.
    """

    def __init__(
        self,
        *,
        api_key: str = "sk-sim",
        host: str = "127.0.0.1",
        port: int = 0,
        books_path: Path | None = None,
        credits_usd: int = 1000,
    ) -> None:
        self.books = Books(books_path)
        self.models = {model.id: model for model in _MODELS}
        self.behaviours: dict[str, Behaviour] = {}
        self.default = Behaviour()
        self.requests: deque[dict[str, Any]] = deque(maxlen=_REQUESTS_KEPT)
        self._api_key = api_key
        self._host = host
        self._port = port
        self._credits_usd = credits_usd
        self._runner: web.AppRunner | None = None
        self._reset_models()

    def _reset_models(self) -> None:
        self.behaviours = {"sim/slow": Behaviour(chunks=40, chunk_delay_ms=50)}

    @property
    def origin(self) -> str:
        """The server's URL, without path."""
        return f"http://{self._host}:{self._port}"

    @property
    def base_url(self) -> str:
        """The URL under which OpenRouter's paths are."""
        return f"{self.origin}/api/v1"

    def set_behaviour(self, **changes: Any) -> None:
        """Change how every answer behaves from now on; without arguments, as at the start."""
        self.default = Behaviour().told(changes)

    async def __aenter__(self) -> Self:
        self.books.load()
        app = web.Application(client_max_size=64 * 1024 * 1024)
        api = {
            ("POST", "/chat/completions"): self._chat,
            ("GET", "/models"): self._list_models,
            ("GET", "/key"): self._key,
            ("GET", "/credits"): self._credits,
            ("GET", "/generation"): self._generation,
            ("GET", "/activity"): self._activity,
        }
        for (method, path), handler in api.items():
            app.router.add_route(method, f"/api/v1{path}", handler)
        app.router.add_get("/sim/books", self._show_books)
        app.router.add_get("/sim/books/{id}", self._show_entry)
        app.router.add_get("/sim/requests", self._show_requests)
        app.router.add_post("/sim/behaviour", self._tell)
        app.router.add_delete("/sim/behaviour", self._untell)
        app.router.add_get("/sim/health", self._health)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port, backlog=2048)
        await site.start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        self.books.close()

    # OpenRouter's protocol

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        if (refused := self._unauthorized(request)) is not None:
            return refused
        try:
            body = json.loads(await request.read())
        except ValueError:
            return _error(400, "the body is not JSON")
        self.requests.append({"headers": dict(request.headers), "body": body})
        model = self.models.get(body.get("model"))
        if model is None:
            return _error(400, f"{body.get('model')} is not a valid model ID")
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            return _error(400, "messages must be a non-empty array")
        try:
            behaviour = self.behaviours.get(model.id, self.default).told(body.get("sim") or {})
        except BehaviourError as error:
            return _error(400, str(error))
        if behaviour.fails_early:
            return await _fail(request, behaviour)
        generation, script = self._begin(request, body, model, behaviour)
        if body.get("stream"):
            return await self._stream(request, generation, script)
        return await self._plain(generation, script)

    def _begin(
        self, request: web.Request, body: dict[str, Any], model: SimModel, behaviour: Behaviour
    ) -> tuple[Generation, AnswerScript]:
        texts = [_text_of(message) for message in body["messages"]]
        prompt_tokens = sum(max(len(text.encode()) // 6, 1) for text in texts) + len(texts)
        generation = self.books.begin(
            model.id,
            streamed=bool(body.get("stream")),
            prompt_tokens=prompt_tokens,
            request_id=request.headers.get("X-Request-Id"),
        )
        generation.cached_tokens = min(behaviour.cached_tokens, prompt_tokens)
        generation.delay_s = behaviour.generation_delay_s
        generation.missing = behaviour.generation_missing
        words = [word(index) for index in range(behaviour.chunks)]
        if behaviour.text is not None:
            words = [behaviour.text]
        elif model.id == "sim/echo":
            words = [f" {part}" for part in texts[-1].split()] or [""]
        bound = (
            body.get("max_completion_tokens")
            or body.get("max_tokens")
            or len(words) * behaviour.tokens_per_chunk
        )
        kept = words[: max(bound // behaviour.tokens_per_chunk, 1)]
        script = AnswerScript(
            generation,
            model,
            behaviour,
            words=kept,
            choices=body.get("n") or 1,
            finish_reason="length" if len(kept) < len(words) else "stop",
        )
        return generation, script

    async def _plain(self, generation: Generation, script: AnswerScript) -> web.Response:
        behaviour = script.behaviour
        try:
            await asyncio.sleep(
                (behaviour.first_delay_ms + behaviour.chunk_delay_ms * len(script.words)) / 1000
            )
            _count(generation, script, len(script.words))
            generation.reasoning_tokens = min(behaviour.reasoning_chunks, generation.completion_tokens)
            body = script.plain()
        finally:
            self.books.bill(generation, script.model, cancelled=False, finish_reason=script.finish_reason)
        headers = {"X-Generation-Id": generation.id} if behaviour.generation_id_header else {}
        return web.Response(body=body, content_type="application/json", headers=headers)

    async def _stream(
        self, request: web.Request, generation: Generation, script: AnswerScript
    ) -> web.StreamResponse:
        behaviour = script.behaviour
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        if behaviour.generation_id_header:
            headers["X-Generation-Id"] = generation.id
        response = web.StreamResponse(headers=headers)
        writer = _Writer(request, response, behaviour)
        cancelled = True
        try:
            await response.prepare(request)
            cancelled = not await self._send_all(generation, script, writer)
        except ConnectionResetError:
            cancelled = True
        finally:
            if cancelled and not behaviour.cancellable:
                _count(generation, script, len(script.words))
            generation.reasoning_tokens = min(
                behaviour.reasoning_chunks * script.choices, generation.completion_tokens
            )
            self.books.bill(
                generation,
                script.model,
                cancelled=cancelled,
                finish_reason=None if cancelled else script.finish_reason,
            )
        return response

    async def _send_all(  # noqa: C901 - the script of an answer, read from top to bottom
        self, generation: Generation, script: AnswerScript, writer: "_Writer"
    ) -> bool:
        """Send the answer; False when the client left it before its end."""
        behaviour = script.behaviour
        alive = await writer.pause(behaviour.first_delay_ms / 1000)
        for index in range(len(script.words)):
            if not alive and behaviour.cancellable:
                return False
            if behaviour.cut_after == index:
                writer.cut()
                return True
            if behaviour.error_after == index:
                await writer.write(script.error(), last=True)
                return True
            if behaviour.stall_after == index:
                alive = await writer.pause(behaviour.stall_s)
                continue
            if behaviour.comments is not None and index % max(behaviour.comments, 1) == 0:
                await writer.write(script.frame(": OPENROUTER PROCESSING"))
            for event in script.chunk(index):
                alive = await writer.write(event) and alive
            if alive or not behaviour.cancellable:
                _count(generation, script, index + 1)
            alive = await writer.pause(behaviour.chunk_delay_ms / 1000) and alive
        generation.reasoning_tokens = min(
            behaviour.reasoning_chunks * script.choices, generation.completion_tokens
        )
        if not alive and behaviour.cancellable:
            return False
        # The answer is whole, so it is billed before its end is sent: whoever read [DONE] finds it in the books.
        self.books.bill(generation, script.model, cancelled=not alive, finish_reason=script.finish_reason)
        for event in script.ending():
            await writer.write(event)
        await writer.flush()
        return True

    async def _list_models(self, _request: web.Request) -> web.Response:
        data = []
        for model in self.models.values():
            pricing = {"prompt": _per_token(model.prompt), "completion": _per_token(model.completion)}
            pricing |= dict.fromkeys(("request", "image", "web_search", "internal_reasoning"), "0")
            if model.cached is not None:
                pricing["input_cache_read"] = _per_token(model.cached)
            data.append(
                {
                    "id": model.id,
                    "canonical_slug": model.id,
                    "name": model.name,
                    "created": 1_700_000_000,
                    "context_length": model.context_tokens,
                    "architecture": {
                        "modality": "text->text",
                        "input_modalities": ["text"],
                        "output_modalities": ["text"],
                    },
                    "pricing": pricing,
                    "top_provider": {
                        "context_length": model.context_tokens,
                        "max_completion_tokens": model.completion_tokens_max,
                        "is_moderated": False,
                    },
                    "supported_parameters": ["max_tokens", "temperature", "tools", "stop"],
                }
            )
        return web.json_response({"data": data})

    async def _key(self, request: web.Request) -> web.Response:
        if (refused := self._unauthorized(request)) is not None:
            return refused
        data = {
            "label": "sk-sim",
            "usage": "@cost@",
            "limit": None,
            "limit_remaining": None,
            "is_free_tier": False,
        }
        return _json(dump({"data": data}, self.books.total_nanousd))

    async def _credits(self, request: web.Request) -> web.Response:
        if (refused := self._unauthorized(request)) is not None:
            return refused
        return _json(
            dump(
                {"data": {"total_credits": self._credits_usd, "total_usage": "@cost@"}},
                self.books.total_nanousd,
            )
        )

    async def _generation(self, request: web.Request) -> web.Response:
        if (refused := self._unauthorized(request)) is not None:
            return refused
        generation_id = request.query.get("id", "")
        found = self.books.find_record(generation_id)
        if found is None:
            return _error(404, f"Generation {generation_id} not found")
        data = {
            "id": found.id,
            "upstream_id": found.id.replace("gen", "chatcmpl"),
            "model": found.model,
            "streamed": found.streamed,
            "cancelled": found.cancelled,
            "provider_name": "Sim",
            "finish_reason": found.finish_reason,
            "native_finish_reason": found.finish_reason,
            "tokens_prompt": found.prompt_tokens,
            "tokens_completion": found.completion_tokens,
            "native_tokens_prompt": found.prompt_tokens,
            "native_tokens_completion": found.completion_tokens,
            "native_tokens_reasoning": found.reasoning_tokens,
            "native_tokens_cached": found.cached_tokens,
            "total_cost": "@cost@",
            "usage": "@cost@",
        }
        return _json(dump({"data": data}, found.cost_nanousd))

    async def _activity(self, request: web.Request) -> web.Response:
        if (refused := self._unauthorized(request)) is not None:
            return refused
        rows = [dump({**row, "usage": "@cost@"}, row["usage"]) for row in self.books.activity()]
        return _json(f'{{"data":[{",".join(rows)}]}}')

    def _unauthorized(self, request: web.Request) -> web.Response | None:
        if request.headers.get("Authorization") == f"Bearer {self._api_key}":
            return None
        return _error(401, "No auth credentials found")

    # What tests and people look at

    async def _show_books(self, _request: web.Request) -> web.Response:
        entries = [generation.as_json() for generation in self.books.generations.values()]
        total = self.books.total_nanousd
        return web.json_response(
            {"total_nanousd": total, "open": self.books.open_count, "generations": entries}
        )

    async def _show_entry(self, request: web.Request) -> web.Response:
        found = self.books.generations.get(request.match_info["id"])
        return _error(404, "no such generation") if found is None else web.json_response(found.as_json())

    async def _show_requests(self, _request: web.Request) -> web.Response:
        return web.json_response(list(self.requests))

    async def _tell(self, request: web.Request) -> web.Response:
        try:
            changes = await request.json()
            if "model" in changes:
                self.behaviours[changes["model"]] = Behaviour().told(changes.get("behaviour") or {})
            else:
                self.default = Behaviour().told(changes)
        except (ValueError, TypeError) as error:
            return _error(400, str(error))
        return web.json_response({"ok": True})

    async def _untell(self, _request: web.Request) -> web.Response:
        self.default = Behaviour()
        self._reset_models()
        return web.json_response({"ok": True})

    async def _health(self, _request: web.Request) -> web.Response:
        return web.json_response({"ok": True})


class _Writer:
    """Writes events as the behaviour wants them written; knows when the client is gone."""

    def __init__(self, request: web.Request, response: web.StreamResponse, behaviour: Behaviour) -> None:
        self._request = request
        self._response = response
        self._behaviour = behaviour
        self._waiting: list[bytes] = []

    def _alive(self) -> bool:
        return self._request.transport is not None and not self._request.transport.is_closing()

    async def pause(self, seconds: float) -> bool:
        """Wait, but no longer than the client stays (if that ends the answer); whether it is still there."""
        if seconds <= 0:
            return self._alive()
        deadline = asyncio.get_running_loop().time() + seconds
        while (left := deadline - asyncio.get_running_loop().time()) > 0:
            if not self._alive() and self._behaviour.cancellable:
                return False
            await asyncio.sleep(min(left, _POLL_S))
        return self._alive()

    async def write(self, event: bytes, *, last: bool = False) -> bool:
        """Send an event, or keep it until there are enough for one write; whether the client is still there."""
        self._waiting.append(event)
        if last or len(self._waiting) >= self._behaviour.events_per_write:
            await self.flush()
        return self._alive()

    async def flush(self) -> None:
        """Send what is kept, in pieces if so told."""
        data = b"".join(self._waiting)
        self._waiting.clear()
        try:
            for piece in _pieces(data, self._behaviour.split_bytes):
                await self._response.write(piece)
                if self._behaviour.split_bytes:
                    await asyncio.sleep(0)
        except ConnectionResetError:
            if self._behaviour.cancellable:
                raise

    def cut(self) -> None:
        """Cut the connection without a word."""
        if self._request.transport is not None:
            self._request.transport.abort()


def _pieces(data: bytes, size: int | None) -> Iterator[bytes]:
    step = size or len(data) or 1
    for start in range(0, len(data), step):
        yield data[start : start + step]


def _count(generation: Generation, script: AnswerScript, chunks: int) -> None:
    generation.completion_tokens = chunks * script.behaviour.tokens_per_chunk * script.choices


def _text_of(message: object) -> str:
    content = message.get("content") if isinstance(message, dict) else None
    return content if isinstance(content, str) else json.dumps(content)


def _per_token(nanousd_per_million: int) -> str:
    """Write a price per token in USD, as OpenRouter lists it."""
    return f"{nanousd_per_million // (NANO * _PER_MILLION)}.{nanousd_per_million % (NANO * _PER_MILLION):015d}".rstrip(
        "0"
    )


async def _fail(request: web.Request, behaviour: Behaviour) -> web.StreamResponse:
    await asyncio.sleep(behaviour.first_delay_ms / 1000)
    if behaviour.fail_status:
        body = behaviour.fail_body or json.dumps(
            {"error": {"code": behaviour.fail_status, "message": "simulated failure"}}
        )
        return web.Response(
            status=behaviour.fail_status,
            text=body,
            content_type="application/json",
            headers=behaviour.fail_headers,
        )
    if behaviour.null_body:
        return web.Response(text="null", content_type="application/json")
    if behaviour.html_body:
        return web.Response(text="<html><body>Bad gateway</body></html>", content_type="text/html")
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await response.write(b'data: {"error":{"code":502,"message":"Provider returned error"}}\n\n')
    return response


def _json(text: str) -> web.Response:
    return web.Response(text=text, content_type="application/json")


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"code": status, "message": message}}, status=status)


async def _serve(arguments: argparse.Namespace) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    provider = SimulatedProvider(
        api_key=arguments.api_key,
        host=arguments.host,
        port=arguments.port,
        books_path=arguments.books,
        credits_usd=arguments.credits_usd,
    )
    async with provider:
        sys.stdout.write(f"simulated provider on {provider.base_url}\n")
        sys.stdout.flush()
        await stop.wait()


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(
        description="A provider that bills by its own books, for tests and demos."
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--api-key", default="sk-sim")
    parser.add_argument(
        "--books", type=Path, default=None, help="a file in which the books survive a restart"
    )
    parser.add_argument("--credits-usd", type=int, default=1000)
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
