"""The floor: a bare aiohttp pass-through, which neither meters nor logs nor looks at anything; on uvloop or on asyncio's own loop."""

import argparse
import asyncio
import contextlib
import signal
import sys

import aiohttp
import uvloop
from aiohttp import web

_BODY_BYTES_MAX = 16 * 1024 * 1024
_BACKLOG = 4096


class _Floor:
    """Passes chat completions on.

    Args:
        base_url: the provider's.
        api_key: the provider's.
    """

    def __init__(self, base_url: str, api_key: str) -> None:
        self._url = f"{base_url}/chat/completions"
        self._headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        )

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Pass one call on."""
        body = await request.read()
        async with self._session.post(self._url, data=body, headers=self._headers) as answer:
            if answer.content_type != "text/event-stream":
                return web.Response(
                    status=answer.status, body=await answer.read(), content_type=answer.content_type
                )
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": "text/event-stream"})
            with contextlib.suppress(ConnectionResetError):  # the client has gone
                await response.prepare(request)
                async for piece in answer.content.iter_any():
                    await response.write(piece)
                await response.write_eof()
            return response

    async def close(self, _app: web.Application) -> None:
        """Close the connections to the provider."""
        await self._session.close()


async def _serve(base_url: str, api_key: str) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    floor = _Floor(base_url, api_key)
    app = web.Application(client_max_size=_BODY_BYTES_MAX)
    app.router.add_post("/v1/chat/completions", floor.complete)
    app.on_cleanup.append(floor.close)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=_BACKLOG).start()
    sys.stdout.write(f"bench floor on http://127.0.0.1:{runner.addresses[0][1]}/v1\n")
    sys.stdout.flush()
    await stop.wait()
    await runner.cleanup()


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.processes.floor", description=__doc__)
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--api-key", required=True)
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    given = parser.parse_args()
    run = uvloop.run if given.loop == "uvloop" else asyncio.run
    run(_serve(given.base_url, given.api_key))


if __name__ == "__main__":
    main()
