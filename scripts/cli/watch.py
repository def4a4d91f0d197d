"""``tuma watch``: follow a wallet's live feed in the terminal, through restarts of the proxy."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import aiohttp
import click
from aiohttp_sse_client.client import EventSource
from multidict import CIMultiDict
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from billing.errors import InputError, InvalidKeyError, NotPermittedError
from billing.ids import parse_id
from config.settings import Settings, load_settings
from scripts.command import plain_text, run_command

_PAUSE_FIRST_S = 0.25
_PAUSE_MAX_S = 5.0
_SILENCE_S = 60.0  # more than two heartbeats: the connection is dead, though nobody closed it
_EVENT_BYTES_MAX = 1024 * 1024
_LINES = 15
_REFUSALS = {401: InvalidKeyError, 403: NotPermittedError, 404: InputError, 400: InputError}


class Follower:
    """Follows a feed: reconnects for as long as the proxy is away, and goes on after the last event that it has.

    Args:
        url: of the feed.
        bearer: the key, or the operator's token.
        wallet_id: sent along, so that the key of another wallet is refused.
    """

    def __init__(self, url: str, bearer: str, wallet_id: UUID) -> None:
        self._url = url
        self._headers = {"Authorization": f"Bearer {bearer}", "x-tuma-wallet": str(wallet_id)}
        self._last_id = ""
        self.connected = False

    async def follow(self) -> AsyncGenerator[dict[str, Any] | None, None]:
        """Yield events, and None whenever the connection was lost.

        Raises:
            InvalidKeyError, NotPermittedError, InputError: the proxy refuses us: trying again does not help.
        """
        pause_s = _PAUSE_FIRST_S
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=_SILENCE_S)
        async with aiohttp.ClientSession(timeout=timeout, read_bufsize=_EVENT_BYTES_MAX) as session:
            while True:
                try:
                    async with aclosing(self._read(session)) as events:
                        async for event in events:
                            pause_s = _PAUSE_FIRST_S
                            yield event
                except (aiohttp.ClientError, ConnectionError, TimeoutError):
                    await self._require_welcome(session)
                if self.connected:
                    self.connected = False
                    yield None
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _PAUSE_MAX_S)

    async def _read(self, session: aiohttp.ClientSession) -> AsyncGenerator[dict[str, Any], None]:
        # The client comes back by itself once a stream ends, but gives up where the proxy is still away, or cut it off.
        headers = CIMultiDict(self._headers)
        if self._last_id:
            headers["Last-Event-ID"] = self._last_id
        source = EventSource(
            self._url, session=session, headers=headers, reconnection_time=timedelta(0), max_connect_retry=0
        )
        async with source:
            self.connected = True
            async for message in source:
                event = json.loads(message.data)
                if event["type"] == "end":
                    return
                self._last_id = message.last_event_id or self._last_id
                yield event

    async def _require_welcome(self, session: aiohttp.ClientSession) -> None:
        """Ask for the reason, which the client of events hides, and tell a refusal from a proxy that is away."""
        try:
            async with session.get(self._url, headers=self._headers) as response:
                if response.status in _REFUSALS:
                    error = json.loads(await response.read())["error"]
                    raise _REFUSALS[response.status](error["message"])
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError):
            return


class Screen:
    """What is shown: the balance as it is, and the latest events."""

    def __init__(self) -> None:
        self._now: dict[str, Any] = {}
        self._events: deque[dict[str, Any]] = deque(maxlen=_LINES)
        self._away = False

    def add(self, event: dict[str, Any] | None) -> None:
        """Take note of an event; None: the connection was lost."""
        self._away = event is None
        if event is not None:
            self._now = event
            self._events.append(event)

    def __rich__(self) -> Group:
        """Return what rich draws."""
        now = self._now
        if not now:
            return Group(Text("waiting for the proxy …", style="dim"))
        state = " · not connected, trying again …" if self._away else ""
        frozen = " · FROZEN" if now["status"] == "frozen" else ""
        head = Text.assemble(
            (f"{now['available']} {now['currency']}", "bold green" if not frozen else "bold red"),
            f" available   posted {now['posted']}   held {now['held']}",
            (frozen, "bold red"),
            (state, "yellow"),
        )
        table = Table(box=None, expand=False, header_style="dim")
        for name in ("when", "what", "change", "held", "posted after", ""):
            table.add_column(name, justify="right" if name in {"change", "held", "posted after"} else "left")
        for event in self._events:
            table.add_row(*map(plain_text, _cells(event)))
        return Group(head, Text(""), table)


def _cells(event: dict[str, Any]) -> tuple[str, ...]:
    return (
        event.get("created_at", "")[11:19],
        event["type"],
        _signed(event.get("posted_change", "")),
        _signed(event.get("held_change", "")),
        event["posted"],
        _about(event),
    )


def _signed(amount: str) -> str:
    if amount in {"", "0"}:
        return ""
    return amount if amount.startswith("-") else f"+{amount}"


def _about(event: dict[str, Any]) -> str:
    if event["type"] == "cap":
        cap = event["cap"]
        return f"{cap['percent']} % of the cap per {cap['period']} on the {cap['scope']} is spent"
    if event["type"] == "low":
        return f"the balance is below {event['low']['low']} {event['low']['currency']}"
    if event["type"] == "auto_topup":
        return f"the automatic top-up did not succeed: {event['auto_topup']['note']}"
    parts = [event.get("model", ""), event.get("description", "")]
    if "cost_usd" in event:
        parts.append(f"{event['cost_usd']} USD")
    if event["type"] == "wallet":
        parts.append(event["status"])
    return "  ".join(part for part in parts if part)


@click.command()
@click.argument("wallet")
@click.option("--url", default=None, help="Of the proxy; as the settings say, when left out.")
@click.option(
    "--key",
    envvar="TUMA_KEY",
    default=None,
    help="A key of this wallet; without one, TUMA_ADMIN__TOKEN. Better in the environment: TUMA_KEY.",
)
@click.option("--events", "count", type=click.IntRange(min=1), default=None, help="Stop after so many.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print each event as a JSON object on a line of stdout."
)
@click.pass_context
def watch(
    context: click.Context, *, wallet: str, url: str | None, key: str | None, count: int | None, as_json: bool
) -> None:
    """Follow a wallet: its balance and what moves it, as it happens; Ctrl-C ends it."""
    as_json = as_json or bool(context.find_root().obj)
    end: dict[str, Any] = {"report": ""}

    async def work() -> dict[str, Any]:
        follower = _make_follower(load_settings(), parse_id(wallet, "wallet"), url=url, key=key)
        await (_print_lines if as_json else _draw)(follower, count)
        return end

    with suppress(KeyboardInterrupt):
        run_command(work, as_json=False)


def _make_follower(settings: Settings, wallet_id: UUID, *, url: str | None, key: str | None) -> Follower:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    base = (url or f"http://{host}:{settings.port}").rstrip("/").removesuffix("/v1")
    if urlsplit(base).scheme not in {"http", "https"}:
        raise InputError("--url begins with http:// or https://")
    token = settings.admin.token.get_secret_value()
    if key:
        return Follower(f"{base}/v1/wallet/events", key, wallet_id)
    if token:
        return Follower(f"{base}/admin/wallets/{wallet_id}/events", token, wallet_id)
    raise InputError("set TUMA_KEY to a key of this wallet, or TUMA_ADMIN__TOKEN to the operator's token")


async def _print_lines(follower: Follower, count: int | None) -> None:
    async with aclosing(follower.follow()) as events:
        async for event in events:
            if event is None:
                click.echo("tuma: the proxy is away; trying again", err=True)
                continue
            click.echo(json.dumps(event))
            count = None if count is None else count - 1
            if count == 0:
                return


async def _draw(follower: Follower, count: int | None) -> None:
    screen = Screen()
    async with aclosing(follower.follow()) as events:
        with Live(screen, console=Console(), refresh_per_second=8) as live:
            async for event in events:
                screen.add(event)
                live.update(screen)
                count = count if count is None or event is None else count - 1
                if count == 0:
                    return
