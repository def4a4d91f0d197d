"""Who receives alerts, and what is told to whom."""

import asyncio
import collections
import hashlib
import hmac
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from billing.monitoring.alerts import Alerts
from billing.postgres.database import Database
from config.settings import AlertSettings, Settings
from proxy.outbound.alert_webhook import make_messenger

SECRET = "a secret that signs alerts"


PATIENCE_S = 60


class Receiver:
    """Somebody's webhook, on a real socket; each request is answered in the next of its ways, or well."""

    def __init__(self) -> None:
        self.ways: list[str] = []
        self.dice: random.Random | None = None
        self.always = "ok"
        self.got: list[dict[str, Any]] = []  # every message that came in whole, acknowledged or not
        self.bodies: collections.defaultdict[str, set[bytes]] = collections.defaultdict(set)
        self.taken: list[str] = []
        self.redirected = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.splitlines()
            headers = {
                name.lower(): value.strip()
                for name, _, value in (line.partition(":") for line in lines if ":" in line)
            }
            body = await reader.readexactly(int(headers["content-length"]))
            if "/elsewhere" in first:
                self.redirected += 1
            self.verify(headers, body)
            message = json.loads(body)
            assert headers["tuma-message"] == message["id"]
            self.got.append(message)
            self.bodies[message["id"]].add(body)
            await self.answer(self.next_way(), message["id"], writer)
        writer.close()

    @staticmethod
    def verify(headers: dict[str, str], body: bytes) -> None:
        """As the documentation tells a receiver to do it."""
        moment, given = (part.split("=", 1)[1] for part in headers["tuma-signature"].split(","))
        mac = hmac.new(SECRET.encode(), digestmod=hashlib.sha256)
        mac.update(moment.encode() + b"." + body)
        assert mac.hexdigest() == given
        assert abs(time.time() - int(moment)) < 300

    def next_way(self) -> str:
        if self.ways:
            return self.ways.pop(0)
        if self.dice is not None:
            return self.dice.choice(("500", "reset", "hang", "slow", "redirect", "big", "ok", "ok", "lost"))
        return self.always

    async def answer(self, way: str, message_id: str, writer: asyncio.StreamWriter) -> None:
        match way:
            case "hang":
                await asyncio.sleep(3)
            case "reset":
                writer.transport.abort()
            case "500":
                writer.write(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")
            case "redirect":
                place = self.url.replace("/hook", "/elsewhere").encode()
                writer.write(b"HTTP/1.1 307 There\r\nLocation: " + place + b"\r\nContent-Length: 0\r\n\r\n")
            case "big":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n" + b"x" * 100_000)
            case "lost":  # it was taken, and the answer is lost
                self.taken.append(message_id)
                writer.transport.abort()
            case "slow" | "ok":
                if way == "slow":
                    writer.write(b"HTTP/1.1 2")
                    await asyncio.sleep(0.2)
                    writer.write(b"00 OK\r\nContent-Length: 2\r\n\r\nok")
                else:
                    writer.write(b"HTTP/1.1 204 Thanks\r\n\r\n")
                await writer.drain()
                self.taken.append(message_id)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.got if message["type"] == kind]

    async def wait(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while len(self.got) < count:
                await asyncio.sleep(0.02)


def told(settings: Settings, receiver: Receiver, **more: Any) -> Settings:
    fields = {
        "url": receiver.url,
        "secret": SECRET,
        "period_s": 0.2,
        "quiet_s": 0,
        "look_s": 0.1,
        "timeout_s": 1,
        "pause_s": 0.05,
        "pause_max_s": 0.2,
        **more,
    }
    return settings.model_copy(update={"alerts": AlertSettings(**fields)})


@asynccontextmanager
async def alerts_of(settings: Settings) -> AsyncIterator[Alerts]:
    """As a worker has them: by the keeper's role."""
    database = Database(settings.postgres, role="keeper")
    yield Alerts(database, settings, make_messenger(settings.alerts))
    await database.close()
