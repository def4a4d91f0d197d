"""Webhooks as the simulated providers send them: in the background until they are accepted, or as a test commands.

Every event is kept with the bytes that it was made with, so that it can be sent again, at once, later, or forged.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal, get_args

from aiohttp import ClientError, ClientSession, ClientTimeout

from scripts.sim.exact_json import dumps, to_bytes
from scripts.sim.payments.currencies import Provider
from scripts.sim.payments.signatures import FlutterwaveSigns, Secrets, sign

Forgery = Literal["signature", "missing", "body", "amount", "old"]
FORGERIES: tuple[Forgery, ...] = get_args(Forgery)
Order = Literal["made", "reversed", "shuffled"]
ORDERS: tuple[Order, ...] = get_args(Order)

# Stripe's and Paystack's own pauses are minutes and hours; a test has no time for them.
RETRY_PAUSES_S = (0.05, 0.1, 0.2, 0.4, 0.8)
_TIMEOUT_S = 10
_OLD_S = 3600
_FORGED_FACTOR = 10
_EVENTS_MAX = 100_000
_OK_LEAST, _OK_MOST = 200, 299
_CONTENT_TYPE = {
    "stripe": "application/json; charset=utf-8",
    "paystack": "application/json",
    "flutterwave": "application/json",
}
_USER_AGENT = {
    "stripe": "Stripe/1.0 (+https://stripe.com/docs/webhooks)",
    "paystack": "Paystack/2.0",
    "flutterwave": "axios/1.6",
}


class WebhookError(ValueError):
    """An event that is not there, or a command that it cannot take."""


@dataclass(slots=True)
class Attempt:
    """One sending: when, in Unix seconds, and the status that came back; ``None`` if no answer came."""

    at_s: float
    status: int | None
    forged: bool = False


@dataclass(slots=True)
class Event:
    """One webhook, with the bytes of its body."""

    id: str
    provider: Provider
    kind: str
    body: bytes
    state: Literal["held", "waiting", "delivered", "given_up", "dropped"] = "held"
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def payload(self) -> Any:
        """The body as JSON, with exact numbers."""
        return json.loads(self.body, parse_float=Decimal)

    def as_json(self) -> dict[str, Any]:
        """Return what ``GET /sim/webhooks`` lists."""
        attempts = [{"status": attempt.status, "forged": attempt.forged} for attempt in self.attempts]
        return {
            "id": self.id,
            "provider": self.provider,
            "kind": self.kind,
            "state": self.state,
            "attempts": attempts,
            "payload": self.payload,
        }


class Webhooks:
    """Every event, and who is to hear of it.

    Args:
        secrets: what events are signed with.
        to: the origin to which ``/webhooks/{provider}`` is added; without one, events are held.
        signs: Flutterwave's header: ``v3``, ``v4`` or ``both``.
        retry_pauses_s: before each further try; then the event is given up.
        clock: Unix seconds.
    """

    def __init__(
        self,
        secrets: Secrets,
        *,
        to: str | None = None,
        signs: FlutterwaveSigns = "v3",
        retry_pauses_s: Sequence[float] = RETRY_PAUSES_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.events: dict[str, Event] = {}
        self.to = to
        self.signs: FlutterwaveSigns = signs
        self.holding = False
        self.delay_s = 0.0
        # How often each event is sent, all at once; a retry is sent once.
        self.copies = 1
        self._secrets = secrets
        self._retry_pauses_s = tuple(retry_pauses_s)
        self._clock = clock
        self._session: ClientSession | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Begin to send."""
        self._session = ClientSession(timeout=ClientTimeout(total=_TIMEOUT_S))

    async def stop(self) -> None:
        """Give up what is under way."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def wait_quiet(self, *, timeout_s: float = 10) -> None:
        """Wait until nothing is under way: each event is delivered, given up, dropped or held.

        Raises:
            TimeoutError: something still is.
        """
        async with asyncio.timeout(timeout_s):
            while self._tasks:
                await asyncio.wait(tuple(self._tasks))

    def get(self, event_id: str) -> Event:
        """Return an event.

        Raises:
            WebhookError: there is none.
        """
        found = self.events.get(event_id)
        if found is None:
            raise WebhookError(f"no event {event_id}")
        return found

    def of(self, kind: str, provider: Provider | None = None) -> list[Event]:
        """Return the events of one kind, oldest first."""
        return [
            event
            for event in self.events.values()
            if event.kind == kind and provider in (None, event.provider)
        ]

    def add(self, provider: Provider, kind: str, event_id: str, payload: object) -> Event:
        """Make an event of a payload, and send it unless events are held.

        Raises:
            WebhookError: too many events.
        """
        if len(self.events) >= _EVENTS_MAX:
            raise WebhookError(f"more than {_EVENTS_MAX} events")
        event = Event(event_id, provider, kind, to_bytes(dumps(payload)))
        self.events[event.id] = event
        if not self.holding and self.to is not None:
            self._spawn(self._deliver(event))
        return event

    # Commands

    def hold(self) -> None:
        """Send nothing that is made from now on."""
        self.holding = True

    async def release(self, order: Order | Sequence[str] = "made", *, seed: int = 0) -> list[Event]:
        """Send what is held, one after the other, each until it is accepted or given up; and hold no more.

        Args:
            order: as made, reversed, shuffled by ``seed``, or ids; what they do not name stays held.
            seed: of the shuffle.

        Raises:
            WebhookError: an id that is not there.
        """
        self.holding = False
        held = [event for event in self.events.values() if event.state == "held"]
        if order == "reversed":
            held.reverse()
        elif order == "shuffled":
            random.Random(seed).shuffle(held)  # noqa: S311
        elif not isinstance(order, str):
            held = [self.get(event_id) for event_id in order]
        for event in held:
            await self._deliver(event)
        return held

    async def deliver(self, event_id: str, *, times: int = 1) -> list[int | None]:
        """Send an event now, so many times at once, whatever was sent before, and return the statuses.

        Raises:
            WebhookError: there is no such event.
        """
        event = self.get(event_id)
        return await self._send_copies(event, times)

    def drop(self, event_id: str) -> None:
        """Never send an event, or not once more.

        Raises:
            WebhookError: there is no such event.
        """
        self.get(event_id).state = "dropped"

    async def forge(self, event_id: str, wrong: Forgery) -> int | None:
        """Send an event that is not what it was, and return the status.

        Args:
            event_id: which.
            wrong: ``signature``: of another secret; ``missing``: none; ``body``: ten times the amount, with the signature of
                the true body; ``amount``: ten times the amount, well signed; ``old``: signed an hour ago, which only
                Stripe's signature tells.

        Raises:
            WebhookError: there is no such event.
        """
        event = self.get(event_id)
        body = _with_other_amount(event.body) if wrong in ("body", "amount") else event.body
        secret = self._secrets.webhook_of(event.provider)
        headers = self._signed(
            event.provider,
            event.body if wrong == "body" else body,
            secret=f"{secret}-not" if wrong == "signature" else secret,
            age_s=_OLD_S if wrong == "old" else 0,
        )
        return await self._send(event, {} if wrong == "missing" else headers, body, forged=True)

    async def send_raw(self, provider: Provider, body: bytes, *, signed: bool = True) -> int | None:
        """Send any body as a provider would, and return the status; no event is kept."""
        event = Event("raw", provider, "raw", body)
        return await self._send(event, self._signed(provider, body) if signed else {}, body, forged=True)

    # Sending

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _deliver(self, event: Event) -> None:
        event.state = "waiting"
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        copies = self.copies
        for pause_s in (0.0, *self._retry_pauses_s):
            await asyncio.sleep(pause_s)
            if self._is_dropped(event):
                return
            if any(_is_ok(status) for status in await self._send_copies(event, copies)):
                event.state = "delivered"
                return
            copies = 1
        event.state = "given_up"

    @staticmethod
    def _is_dropped(event: Event) -> bool:
        return event.state == "dropped"  # meanwhile

    async def _send_copies(self, event: Event, times: int) -> list[int | None]:
        headers = [self._signed(event.provider, event.body) for _ in range(times)]
        return await asyncio.gather(*(self._send(event, signed, event.body) for signed in headers))

    def _signed(
        self, provider: Provider, body: bytes, *, secret: str | None = None, age_s: int = 0
    ) -> dict[str, str]:
        if secret is None:
            secret = self._secrets.webhook_of(provider)
        return sign(provider, body, secret, at_s=int(self._clock()) - age_s, signs=self.signs)

    async def _send(
        self, event: Event, headers: dict[str, str], body: bytes, *, forged: bool = False
    ) -> int | None:
        if self._session is None or self.to is None:
            raise WebhookError("webhooks are not started, or have nowhere to go")
        url = f"{self.to.rstrip('/')}/webhooks/{event.provider}"
        headers = {
            "Content-Type": _CONTENT_TYPE[event.provider],
            "User-Agent": _USER_AGENT[event.provider],
            **headers,
        }
        status = None
        try:
            # A redirect is a failure, as it is for the real ones.
            async with self._session.post(url, data=body, headers=headers, allow_redirects=False) as answer:
                await answer.read()
                status = answer.status
        except (ClientError, TimeoutError):
            pass
        event.attempts.append(Attempt(self._clock(), status, forged))
        return status


def _is_ok(status: int | None) -> bool:
    return status is not None and _OK_LEAST <= status <= _OK_MOST


def _with_other_amount(body: bytes) -> bytes:
    return to_bytes(dumps(_multiplied(json.loads(body, parse_float=Decimal))))


def _multiplied(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: item * _FORGED_FACTOR if _is_amount(key, item) else _multiplied(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_multiplied(item) for item in value]
    return value


def _is_amount(key: str, value: object) -> bool:
    return "amount" in key and isinstance(value, int | Decimal) and not isinstance(value, bool)
