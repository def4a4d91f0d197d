"""The live feed of a wallet: ``/v1/wallet/events`` (server-sent events) and ``/v1/wallet/ws`` (WebSocket).

Both send what ``proxy/live/watchers.py`` hands out, and nothing else. What a watcher does not take in time is not kept for it:
it is let go, comes back and goes on from the last event that it has.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Annotated
from uuid import UUID

import structlog
from aiohttp import WSCloseCode, hdrs, web

from billing.identity.caller import Caller
from billing.ids import parse_id
from billing.wallets.feed import WalletEventJson
from proxy.http.connection import ClientWatch, watch_client
from proxy.http.errors import BadRequestError
from proxy.http.forms import read_query
from proxy.http.request_facts import standard_headers
from proxy.identity.authenticate import authenticate, recognise_again
from proxy.live.watcher import Frame, Watcher
from proxy.services.account import ACCOUNT, AccountServices

_log = structlog.get_logger("tuma.feed")
_PROTOCOL = "tuma"
_HEARD_BYTES_MAX = 4 * 1024  # of a WebSocket's client, to whom nobody listens
_CLOSE_TIMEOUT_S = 2.0
_CLOSE_CODES = {"restart": WSCloseCode.GOING_AWAY, "refused": WSCloseCode.POLICY_VIOLATION}
_SSE = {
    hdrs.CONTENT_TYPE: "text/event-stream",
    hdrs.CACHE_CONTROL: "no-store",
    "X-Accel-Buffering": "no",  # nginx would keep the events back
}


async def stream_events(request: web.Request) -> Annotated[web.StreamResponse, WalletEventJson]:
    """The wallet's live feed as server-sent events, from ``Last-Event-ID`` on; without one, its balance first."""
    caller = await authenticate(request)
    return await _stream(request, caller.wallet_id, caller, lambda: recognise_again(request))


async def stream_wallet_events(request: web.Request) -> Annotated[web.StreamResponse, WalletEventJson]:
    """The live feed of any wallet as server-sent events, from ``Last-Event-ID`` on."""
    return await _stream(request, parse_id(request.match_info["wallet"], "wallet"), None, None)


async def _stream(
    request: web.Request,
    wallet_id: UUID,
    caller: Caller | None,
    recheck: Callable[[], Awaitable[Caller]] | None,
) -> web.StreamResponse:
    services = request.app[ACCOUNT]
    watcher = await services.watchers.join(
        wallet_id, caller=caller, after=_read_last_id(request), recheck=recheck
    )
    watcher.cut_off = lambda: _cut_off(request, watcher)
    response = web.StreamResponse(headers={**_SSE, **standard_headers(request)})
    response.force_close()  # who comes back comes over a new connection, to a worker that is not stopping
    try:
        with watch_client(request, on_gone=lambda: watcher.end("gone")) as client:
            await response.prepare(request)
            await _send(services, watcher, client.write(response, _retry_line(services)))
            while frames := await watcher.next():
                data = b"".join([frame.sse for frame in frames])
                await _send(services, watcher, client.write(response, data))
            await _say_goodbye(services, watcher, client, response)
    finally:
        services.watchers.leave(watcher)
    return response


def _read_last_id(request: web.Request) -> str | None:
    """Return the id of the last event that the client has; pages say it in the query, as they cannot set headers."""
    return request.headers.get("Last-Event-ID") or read_query(request, "last_event_id") or None


def _retry_line(services: AccountServices, factor: float = 1.0) -> bytes:
    return b"retry: %d\n\n" % round(services.settings.feed.retry_s * factor * 1000)


async def _send(services: AccountServices, watcher: Watcher, sending: Awaitable[object]) -> None:
    """Send, as long as the client takes it; cut off one that does not."""
    try:
        async with asyncio.timeout(services.settings.feed.write_timeout_s):
            await sending
    except TimeoutError:
        watcher.end("slow")
    except ConnectionError:
        watcher.end("gone")


def _cut_off(request: web.Request, watcher: Watcher) -> None:
    _log.info("watcher.dropped", wallet_id=str(watcher.wallet_id))
    if request.transport is not None:
        request.transport.abort()


async def _say_goodbye(
    services: AccountServices,
    watcher: Watcher,
    client: ClientWatch,
    response: web.StreamResponse,
) -> None:
    """Say why it ends, to a client that still listens; spread over time those that a stopping worker sends away."""
    if watcher.ended in _CLOSE_CODES:
        pause = _retry_line(services, random.uniform(0.2, 2.0) if watcher.ended == "restart" else 1.0)  # noqa: S311
        await _send(services, watcher, client.write(response, pause + _end_frame(watcher).sse))


def _end_frame(watcher: Watcher) -> Frame:
    assert watcher.ended is not None
    return Frame(0, {"object": "wallet.event", "type": "end", "reason": watcher.ended})


async def open_socket(request: web.Request) -> Annotated[web.StreamResponse, WalletEventJson]:
    """The wallet's live feed over a WebSocket: the same events, each a text of JSON, from ``last_event_id`` on."""
    services = request.app[ACCOUNT]
    caller = await authenticate(request)
    socket = web.WebSocketResponse(
        timeout=_CLOSE_TIMEOUT_S,
        heartbeat=services.settings.feed.heartbeat_s,
        protocols=(_PROTOCOL,),
        compress=False,
        max_msg_size=_HEARD_BYTES_MAX,
    )
    # Before aiohttp looks at what is offered: it logs that, with the key in it, where it does not find what we know.
    offered = [
        name.strip() for name in request.headers.get(hdrs.SEC_WEBSOCKET_PROTOCOL, _PROTOCOL).split(",")
    ]
    if _PROTOCOL not in offered:
        raise BadRequestError(f"Of the WebSocket's protocols one must be {_PROTOCOL!r}.")
    if not socket.can_prepare(request).ok:
        raise BadRequestError("This is a WebSocket: ask for it with 'Upgrade: websocket'.")
    watcher = await services.watchers.join(
        caller.wallet_id,
        caller=caller,
        after=_read_last_id(request),
        recheck=lambda: recognise_again(request),
    )
    watcher.cut_off = lambda: _cut_off(request, watcher)
    try:
        with watch_client(request, on_gone=lambda: watcher.end("gone")):
            socket.headers.update(standard_headers(request))
            await socket.prepare(request)
            listening = services.tasks.start(_listen(socket, watcher), name="watcher's socket")
            try:
                await _serve_socket(services, socket, watcher)
            finally:
                listening.cancel()
    finally:
        services.watchers.leave(watcher)
    return socket


async def _serve_socket(services: AccountServices, socket: web.WebSocketResponse, watcher: Watcher) -> None:
    while frames := await watcher.next():
        for frame in frames:
            if frame.text:  # heartbeats are the WebSocket's own
                await _send(services, watcher, socket.send_str(frame.text))
            if watcher.ended is not None:
                break
    if watcher.ended in _CLOSE_CODES:
        await _send(services, watcher, socket.send_str(_end_frame(watcher).text))
        code = _CLOSE_CODES[watcher.ended]
        await _send(services, watcher, socket.close(code=code, message=watcher.ended.encode()))


async def _listen(socket: web.WebSocketResponse, watcher: Watcher) -> None:
    """Answer pings and notice the end; what a client says otherwise is not listened to."""
    async for _ in socket:
        pass
    watcher.end("gone")
