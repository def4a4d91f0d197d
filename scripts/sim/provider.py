"""The simulated provider: OpenRouter's protocol over a real socket, for tests and ``./scripts/dev``."""

import argparse
import asyncio
import json
import signal
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from scripts.sim import views
from scripts.sim.answers import Answer
from scripts.sim.behaviour import Behaviour, BehaviourError
from scripts.sim.books import Books
from scripts.sim.delivery import Delivery, fail_early
from scripts.sim.exact_json import dumps, to_bytes
from scripts.sim.kinds import CompletionAnswer, EmbeddingAnswer, ResponseAnswer
from scripts.sim.models import SimModel, embedding_models, sim_models
from scripts.sim.requests import Ask, RefusedError, read_ask, read_completion, read_embedding, read_response

_API = "/api/v1"
_BODY_BYTES_MAX = 64 * 1024 * 1024
_BACKLOG = 2048
_REQUESTS_KEPT = 200
_REQUEST_BYTES_KEPT = 256 * 1024
_SHUTDOWN_S = 0.5
_CLIENT_GONE = 499
# By path: what reads the request, and what makes the answer.
_KINDS: dict[str, tuple[Callable[[object, Mapping[str, SimModel]], Ask], type[Answer]]] = {
    "chat/completions": (read_ask, Answer),
    "completions": (read_completion, CompletionAnswer),
    "embeddings": (read_embedding, EmbeddingAnswer),
    "responses": (read_response, ResponseAnswer),
}


@dataclass(frozen=True, slots=True)
class ReceivedRequest:
    """A POST as it came. Header names are in lower case; a body above 256 KiB is not kept."""

    path: str
    headers: dict[str, str]
    body_bytes: int
    raw: bytes | None

    @property
    def body(self) -> Any:
        """The body read as JSON; ``None`` if it is not JSON or was not kept."""
        try:
            return None if self.raw is None else json.loads(self.raw)
        except (ValueError, RecursionError):
            return None

    def as_json(self) -> dict[str, Any]:
        """Return what ``GET /sim/requests`` lists."""
        return {"path": self.path, "headers": self.headers, "body_bytes": self.body_bytes, "body": self.body}


class SimulatedProvider:
    """A provider with books of its own, as an asynchronous context: it serves inside.

    Args:
        api_key: what callers must send as a bearer token.
        host: loopback.
        port: 0 picks a free one.
        books_path: where the books survive a restart; in memory only, when left out.
        credits_usd: what ``/credits`` says was bought; using more is not refused.
    """

    def __init__(
        self,
        *,
        api_key: str = "sk-sim",
        host: str = "127.0.0.1",
        port: int = 0,
        books_path: Path | None = None,
        credits_usd: Decimal | int = 1000,
    ) -> None:
        self.books = Books(books_path)
        self.models = sim_models()
        self.embedding_models = embedding_models()
        self.requests: deque[ReceivedRequest] = deque(maxlen=_REQUESTS_KEPT)
        self._default: dict[str, Any] = {}
        self._by_model: dict[str, dict[str, Any]] = {}
        self._standing: dict[str, Behaviour] = {}
        self._api_key = api_key
        self._host = host
        self._port = port
        self._credits_usd = Decimal(credits_usd)
        self._stopping = asyncio.Event()
        self._running: set[asyncio.Task[Any]] = set()
        self._runner: web.AppRunner | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return self._host, self._port

    @property
    def origin(self) -> str:
        """The server's URL without path, under which ``/sim/…`` is."""
        return f"http://{self._host}:{self._port}"

    @property
    def base_url(self) -> str:
        """The URL under which OpenRouter's paths are."""
        return f"{self.origin}{_API}"

    def set_credits(self, credits_usd: Decimal | int) -> None:
        """Say what ``/credits`` and ``/key`` say was bought, in all."""
        self._credits_usd = Decimal(credits_usd)

    def set_behaviour(self, *, model: str | None = None, **changes: Any) -> None:
        """Say how every answer, or every answer of one model, behaves from now on, in place of what was said before.

        What a request says goes before what its model's behaviour says, and that before the server's. ``changes`` are
        ``Behaviour``'s fields; without any, the server or model is as at the start.

        Raises:
            BehaviourError: an unknown field, or a value that it cannot have.
        """
        self._say(model, changes)

    def _say(self, model: str | None, changes: Any) -> None:
        Behaviour().told(changes)
        self._standing.clear()
        if model is None:
            self._default = changes
        else:
            self._by_model[model] = changes

    def reset_behaviour(self) -> None:
        """Forget all that was said by ``set_behaviour``."""
        self._default = {}
        self._by_model.clear()
        self._standing.clear()

    async def __aenter__(self) -> Self:
        self.books.load()
        app = web.Application(client_max_size=_BODY_BYTES_MAX, middlewares=[self._guard])
        app.add_routes(self._routes())
        app.on_shutdown.append(self._stop)
        # Cancellation is how a caller's departure is noticed at once, also while nothing is written.
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=_SHUTDOWN_S
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port, backlog=_BACKLOG).start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        self.books.close()

    async def _stop(self, _app: web.Application) -> None:
        self._stopping.set()
        for task in self._running:
            task.cancel()

    def _routes(self) -> list[web.RouteDef]:
        return [
            *(web.post(f"{_API}/{path}", self._answer) for path in _KINDS),
            web.get(f"{_API}/embeddings/models", self._embedding_models),
            web.get(f"{_API}/models", self._models),
            web.get(f"{_API}/key", self._key),
            web.get(f"{_API}/credits", self._credits),
            web.get(f"{_API}/generation", self._generation),
            web.get(f"{_API}/activity", self._activity),
            web.get("/sim/books", self._show_books),
            web.get("/sim/books/{id}", self._show_entry),
            web.get("/sim/requests", self._show_requests),
            web.post("/sim/behaviour", self._tell),
            web.delete("/sim/behaviour", self._untell),
            web.get("/sim/health", self._health),
        ]

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Note what came, check the key, and give errors OpenRouter's shape."""
        try:
            if request.path.startswith(_API):
                if request.method == "POST":
                    self._note(request, await request.read())
                # OpenRouter lists its models to everyone.
                if not request.path.endswith("/models"):
                    self._authenticate(request)
            return await handler(request)
        except RefusedError as error:
            return _json({"error": {"code": error.status, "message": error.message}}, error.status)
        except web.HTTPException as error:
            return _json({"error": {"code": error.status, "message": error.reason}}, error.status)
        except ConnectionResetError:
            return web.Response(status=_CLIENT_GONE)

    def _note(self, request: web.Request, raw: bytes) -> None:
        headers = {name.lower(): value for name, value in request.headers.items()}
        kept = raw if len(raw) <= _REQUEST_BYTES_KEPT else None
        self.requests.append(ReceivedRequest(request.path, headers, len(raw), kept))

    def _authenticate(self, request: web.Request) -> None:
        given = request.headers.get("Authorization")
        if given is None:
            raise RefusedError(401, "No auth credentials found")
        if given != f"Bearer {self._api_key}":
            raise RefusedError(401, "Invalid credentials")

    # OpenRouter's protocol

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        read, make = _KINDS[request.path.removeprefix(f"{_API}/")]
        models = self.embedding_models if make is EmbeddingAnswer else self.models
        ask = read(_parse(await request.read()), models)
        behaviour = self._behaviour_of(ask)
        if behaviour.fails_early:
            return await fail_early(behaviour, stream=ask.stream)
        generation = self.books.begin(
            ask.model.id,
            streamed=ask.stream,
            prompt_tokens=ask.prompt_tokens,
            cached_tokens=behaviour.cached_tokens,
            request_id=request.headers.get("X-Request-Id"),
            user=ask.user,
            delay_s=float(behaviour.generation_delay_s),
            missing=behaviour.generation_missing,
        )
        answer = make(generation, ask.model, ask, behaviour)
        delivery = Delivery(
            request, self.books, generation=generation, answer=answer, stopping=self._stopping
        )
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a handler runs in a task")
        self._running.add(task)
        try:
            return await delivery.send()
        finally:
            self._running.discard(task)

    def _behaviour_of(self, ask: Ask) -> Behaviour:
        model = ask.model
        standing = self._standing.get(model.id)
        if standing is None:
            said = {**self._default, **model.manners, **self._by_model.get(model.id, {})}
            standing = self._standing[model.id] = Behaviour().told(said)
        try:
            return standing.told(ask.behaviour)
        except BehaviourError as error:
            raise RefusedError(400, str(error)) from error

    async def _models(self, _request: web.Request) -> web.Response:
        return _json(views.show_models(self.models.values()))

    async def _embedding_models(self, _request: web.Request) -> web.Response:
        return _json(views.show_models(self.embedding_models.values()))

    async def _key(self, _request: web.Request) -> web.Response:
        return _json(views.show_key(self.books, self._credits_usd))

    async def _credits(self, _request: web.Request) -> web.Response:
        return _json(views.show_credits(self.books, self._credits_usd))

    async def _generation(self, request: web.Request) -> web.Response:
        generation_id = request.query.get("id", "")
        found = self.books.find_record(generation_id)
        if found is None:
            raise RefusedError(404, f"Generation {generation_id} not found")
        return _json(views.show_generation(found))

    async def _activity(self, request: web.Request) -> web.Response:
        return _json(views.show_activity(self.books, request.query.get("date")))

    # What tests and people look at

    async def _show_books(self, _request: web.Request) -> web.Response:
        return _json(views.show_books(self.books))

    async def _show_entry(self, request: web.Request) -> web.Response:
        found = self.books.generations.get(request.match_info["id"])
        if found is None:
            raise RefusedError(404, "no such generation")
        return _json(found.as_json())

    async def _show_requests(self, _request: web.Request) -> web.Response:
        return _json([received.as_json() for received in self.requests])

    async def _tell(self, request: web.Request) -> web.Response:
        said = _parse(await request.read())
        if not isinstance(said, dict):
            raise RefusedError(400, "a behaviour is an object")
        if "model" not in said:
            model, changes = None, said
        else:
            model, changes = said["model"], said.get("behaviour", {})
            if not (
                isinstance(model, str)
                and model in {**self.models, **self.embedding_models}
                and said.keys() <= {"model", "behaviour"}
            ):
                raise RefusedError(400, 'expected {"model": a known model, "behaviour": {…}}')
        try:
            self._say(model, changes)
        except BehaviourError as error:
            raise RefusedError(400, str(error)) from error
        return _json({"ok": True})

    async def _untell(self, _request: web.Request) -> web.Response:
        self.reset_behaviour()
        return _json({"ok": True})

    async def _health(self, _request: web.Request) -> web.Response:
        return _json({"ok": True, "open": self.books.open_count})


def _parse(raw: bytes) -> Any:
    try:
        # Exact numbers, so that an unknown field comes back as it was told.
        return json.loads(raw, parse_float=Decimal)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "the body is not JSON") from error


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(body=to_bytes(dumps(value)), status=status, content_type="application/json")


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
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.sim.provider",
        description="A provider that bills by its own books, for tests and demos.",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    parser.add_argument("--api-key", default="sk-sim")
    parser.add_argument(
        "--books", type=Path, default=None, help="a file in which the books survive a restart"
    )
    parser.add_argument("--credits-usd", type=Decimal, default=Decimal(1000))
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
