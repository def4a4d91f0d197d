"""Caps and limits under 200 callers at once on three worker processes: never passed, and not left unused."""

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
import jwt
import psutil
import pytest
from redis.asyncio import Redis

from billing.books.reconcile import Reconciler
from billing.identity.key import KeyRules
from billing.identity.keys import Keys
from billing.wallets.caps import Caps, Scope
from config.settings import Settings
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.faults.test_kill import MODEL, serving, settle_down
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, sync_models

WORKERS = 3
CALLERS = 200
SECRET = "a secret that the frontend's issuer shares with us"
ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 100}


@dataclass
class Crowd:
    """Callers with connections of their own, spread over all workers."""

    url: str
    master: int
    sessions: list[aiohttp.ClientSession]
    answers: Counter[tuple[int, str]] = field(default_factory=Counter)

    async def call(self, number: int, secret: str, **told: Any) -> tuple[int, str]:
        """Make one call, every second one as a stream; return its status and its error's code."""
        stream = number % 2 == 0
        body = {**ASK, "stream": stream, "sim": {"chunks": 5, **told}}
        head = {"Authorization": f"Bearer {secret}"}
        session = self.sessions[number % len(self.sessions)]
        try:
            async with session.post(f"{self.url}/v1/chat/completions", json=body, headers=head) as response:
                text = await response.text()
                code = "" if response.status == 200 else str(json.loads(text)["error"]["code"])
                if response.status == 429:
                    assert int(response.headers["retry-after-ms"]) > 0
                    assert int(response.headers["Retry-After"]) > 0
                if response.status in (200, 429):
                    assert "x-ratelimit-remaining-requests" in response.headers
                found = (response.status, code)
        except (aiohttp.ClientError, OSError):
            found = (0, "cut")  # its worker was killed
        self.answers[found] += 1
        return found

    def busy_workers(self) -> list[int]:
        """Which worker processes have connections from us."""
        port = int(self.url.rpartition(":")[2])
        return [
            worker.pid
            for worker in psutil.Process(self.master).children()
            if any(
                link.status == psutil.CONN_ESTABLISHED and link.laddr.port == port
                for link in worker.net_connections("tcp4")
            )
        ]


@asynccontextmanager
async def crowd(settings: Settings, callers: int = CALLERS) -> AsyncIterator[Crowd]:
    async with AsyncExitStack() as stack:
        more = {"TUMA_AUTH__JWT_SECRET": SECRET}
        master, url = await stack.enter_async_context(serving(settings, workers=WORKERS, more=more))
        sessions = [await stack.enter_async_context(aiohttp.ClientSession()) for _ in range(callers)]
        found = Crowd(url, master.pid, sessions)

        async def touch(session: aiohttp.ClientSession) -> None:
            async with session.get(f"{url}/healthz") as response:
                assert response.status == 200

        async with asyncio.timeout(60):
            await asyncio.gather(*(touch(session) for session in sessions))
            while len(found.busy_workers()) < WORKERS:  # a connection stays with who accepted it: make more
                more_of_them = [await stack.enter_async_context(aiohttp.ClientSession()) for _ in range(30)]
                await asyncio.gather(*(touch(session) for session in more_of_them))
                sessions[: len(more_of_them)] = more_of_them
        yield found


@dataclass
class Watch:
    """Looks all the time at what is held and spent, as Postgres has it."""

    office: Office
    most_nano: int = 0
    looks: int = 0

    async def run(self) -> None:
        while True:
            async with self.office.database.connection() as connection:
                windows, calls = await connection.fetchrow(
                    "SELECT (SELECT coalesce(max(held_nano + spent_nano), 0) FROM cap_windows)::bigint,"
                    " (SELECT coalesce(sum(coalesce(charge_nano, hold_nano)), 0) FROM calls)::bigint"
                )
            self.most_nano = max(self.most_nano, windows, calls)
            self.looks += 1
            await asyncio.sleep(0.01)


async def make_busy(office: Office, payer: Payer, scope: Scope, period: str, limit_nano: int) -> None:
    ids = {"wallet": payer.wallet_id, "key": payer.key_id, "user": payer.user_id}
    await Caps(office.database).set_caps(scope, ids[scope], {period: limit_nano})


async def kill_a_worker(master: int) -> None:
    os.kill(psutil.Process(master).children()[0].pid, signal.SIGKILL)


async def interfere(settings: Settings, callers: Crowd, fault: Literal["flush", "kill"] | None) -> None:
    """Flush Redis, or kill a worker, in the middle of it."""
    await asyncio.sleep(0.2)
    if fault == "flush":
        client = Redis.from_url(settings.redis.url.get_secret_value())
        await client.flushall()
        await client.aclose()
    elif fault == "kill":
        await kill_a_worker(callers.master)


async def call_until_refused(callers: Crowd, number: int, secret: str) -> None:
    """Call again and again, until a cap says no."""
    while True:
        status, code = await callers.call(number, secret, chunk_delay_ms=20)
        if status == 402:
            assert code == "cap_exceeded"
            return
        assert status in (200, 0, 503), (status, code)
        if status != 200:
            await asyncio.sleep(0.1)


@pytest.mark.parametrize(
    ("scope", "period", "fault"),
    [("wallet", "day", None), ("key", "total", "flush"), ("user", "month", "kill")],
)
async def test_a_cap_is_never_passed_and_is_used_up(
    settings: Settings,
    office: Office,
    sim: SimulatedProvider,
    scope: Scope,
    period: str,
    fault: Literal["flush", "kill"] | None,
) -> None:
    """All call until they are refused; then one alone, for as long as it is served."""
    await sync_models(office)
    payer = await make_payer(office)
    async with crowd(settings) as callers:
        assert await callers.call(0, payer.secret) == (200, "")
        await settle_down(office, sim)
        async with office.database.connection() as connection:
            hold, cost = await connection.fetchrow("SELECT hold_nano, charge_nano FROM calls")
        assert hold > cost > 0
        limit = cost + hold * 30 + hold // 2  # the first call counts, too
        await make_busy(office, payer, scope, period, limit)
        await office.cool_user(payer.user_id)
        watch = Watch(office)
        watching = asyncio.create_task(watch.run())

        try:
            await asyncio.gather(
                interfere(settings, callers, fault),
                *(call_until_refused(callers, number, payer.secret) for number in range(CALLERS)),
            )
            await settle_down(office, sim)  # what was held beyond its cost is free again
            async with asyncio.timeout(60):
                while (found := await callers.call(1, payer.secret))[0] != 402:
                    assert found[0] in (200, 0, 503)
                    await asyncio.sleep(0 if found[0] == 200 else 0.1)
            await settle_down(office, sim)
        finally:
            watching.cancel()
        assert watch.looks > 10
        assert watch.most_nano <= limit
        ids = {"wallet": payer.wallet_id, "key": payer.key_id, "user": payer.user_id}
        (cap,) = await Caps(office.database).find_caps(ids[scope])
        assert cap.held_nano == 0
        assert limit - hold < cap.spent_nano <= limit
        assert callers.answers[402, "cap_exceeded"] >= CALLERS
    await reconcile(office)
    await check_books(office)


async def test_a_cap_per_call(settings: Settings, office: Office, sim: SimulatedProvider) -> None:
    await sync_models(office)
    payer = await make_payer(office)
    async with crowd(settings, callers=60) as callers:
        assert await callers.call(0, payer.secret) == (200, "")
        await settle_down(office, sim)
        async with office.database.connection() as connection:
            hold = await connection.fetchval("SELECT hold_nano FROM calls")
        for limit, expected in ((hold - 1, (402, "cap_exceeded")), (hold, (200, ""))):
            await make_busy(office, payer, "wallet", "call", limit)
            await office.cool_user(payer.user_id)
            found = await asyncio.gather(*(callers.call(number, payer.secret) for number in range(60)))
            assert set(found) == {expected}
        await settle_down(office, sim)
    await check_books(office)


@pytest.mark.parametrize("whose", ["key", "user"])
async def test_requests_per_minute(
    settings: Settings, office: Office, sim: SimulatedProvider, whose: str
) -> None:
    """A minute's requests may come at once, then one after the other; two keys and a token are one user."""
    await sync_models(office)
    payer = await make_payer(office)
    room = Keys(office.database, office.settings.auth, office.settings.limits)
    per_min = 60
    if whose == "key":
        secrets = [(await room.create(payer.wallet_id, KeyRules(requests_per_min=per_min))).secret]
    else:
        async with office.database.connection() as connection:
            await connection.execute("UPDATE users SET subject = 'ada' WHERE id = $1", payer.user_id)
        await office.wallets.set_user(payer.user_id, requests_per_min=per_min)
        token = jwt.encode({"sub": "ada", "exp": time.time() + 600}, SECRET, algorithm="HS256")
        secrets = [payer.secret, (await room.create(payer.wallet_id)).secret, token]
    async with crowd(settings) as callers:
        began = time.monotonic()
        found = await asyncio.gather(
            *(callers.call(number, secrets[number % len(secrets)]) for number in range(CALLERS))
        )
        passed_s = time.monotonic() - began
        admitted = sum(answer == (200, "") for answer in found)
        assert set(found) == {(200, ""), (429, "rate_limit_exceeded")}
        assert per_min <= admitted <= per_min * (1 + passed_s / 60) + 1
        await settle_down(office, sim)
    await check_books(office)


async def test_tokens_per_minute(settings: Settings, office: Office, sim: SimulatedProvider) -> None:
    """Taken at the estimate, given back to what was used: in the end a window is used up to less than one estimate."""
    await sync_models(office)
    payer = await make_payer(office)
    per_min = 3_000
    room = Keys(office.database, office.settings.auth, office.settings.limits)
    made = await room.create(payer.wallet_id, KeyRules(tokens_per_min=per_min))
    async with crowd(settings) as callers:
        began = time.monotonic()
        for _ in range(3):  # what comes back at the settlements is there for others
            found = await asyncio.gather(*(callers.call(number, made.secret) for number in range(CALLERS)))
            assert set(found) <= {(200, ""), (429, "rate_limit_exceeded")}
            await settle_down(office, sim)
        assert callers.answers[429, "rate_limit_exceeded"] > 0
        async with asyncio.timeout(60):  # one alone is faster than time gives back
            while (await callers.call(1, made.secret))[0] == 200:
                pass
        await settle_down(office, sim)
        passed_s = time.monotonic() - began
        async with office.database.connection() as connection:
            used = await connection.fetchval(
                "SELECT sum(prompt_tokens + completion_tokens)::bigint FROM usage"
            )
        estimate = ASK["max_tokens"] + 20
        assert used <= per_min * (1 + passed_s / 60)
        assert used > per_min - estimate
    await check_books(office)


@pytest.mark.parametrize("fault", [None, "kill"])
async def test_calls_in_flight(
    settings: Settings, office: Office, sim: SimulatedProvider, fault: str | None
) -> None:
    await sync_models(office)
    payer = await make_payer(office)
    most = 10
    room = Keys(office.database, office.settings.auth, office.settings.limits)
    made = await room.create(payer.wallet_id, KeyRules(calls_in_flight=most))
    async with crowd(settings) as callers:
        answers = asyncio.gather(
            *(callers.call(number, made.secret, chunks=10, chunk_delay_ms=150) for number in range(CALLERS))
        )
        if fault is not None:
            await asyncio.sleep(1.0)
            await kill_a_worker(callers.master)
        found = await answers
        assert sum(answer == (200, "") for answer in found) <= most
        assert (429, "rate_limit_exceeded") in found
        await settle_down(office, sim)
        assert await overlap_of(office) == most
        async with asyncio.timeout(30):  # the places come back, those of the killed worker with its leases
            while True:
                found = await asyncio.gather(
                    *(callers.call(2 * number + 1, made.secret, first_delay_ms=500) for number in range(most))
                )
                if all(answer == (200, "") for answer in found):
                    break
                await asyncio.sleep(0.3)
        await settle_down(office, sim)
        assert await overlap_of(office) == most
    await reconcile(office)
    await check_books(office)


async def reconcile(office: Office) -> None:
    """Book what the provider billed for calls whose worker was killed before it noted their ids: the house's loss."""
    await Reconciler(office.database, office.upstream, office.settings.reconcile).run()


async def overlap_of(office: Office) -> int:
    """Return how many calls were open at one moment, at most. A place is taken before and given back after that."""
    async with office.database.connection() as connection:
        rows = await connection.fetch("SELECT opened_at, ended_at FROM calls")
    steps = sorted([(row["opened_at"], 1) for row in rows] + [(row["ended_at"], -1) for row in rows])
    most = now = 0
    for _, step in steps:
        now += step
        most = max(most, now)
    return most


async def test_who_waits_as_told_is_admitted(
    settings: Settings, office: Office, sim: SimulatedProvider
) -> None:
    await sync_models(office)
    payer = await make_payer(office)
    room = Keys(office.database, office.settings.auth, office.settings.limits)
    made = await room.create(payer.wallet_id, KeyRules(requests_per_min=30))
    head = {"Authorization": f"Bearer {made.secret}"}
    async with serving(settings, workers=WORKERS) as (_, url), aiohttp.ClientSession(headers=head) as session:

        async def ask() -> tuple[int, int]:
            async with session.post(f"{url}/v1/chat/completions", json=ASK) as response:
                await response.read()
                return response.status, int(response.headers.get("retry-after-ms", 0))

        await asyncio.gather(*(ask() for _ in range(31)))
        told = 0
        for _ in range(4):
            while (answer := await ask())[0] == 200:
                pass  # as slow as this machine is, the window may have room again
            told = answer[1]
            assert 0 < told <= 2_000
            refused = time.monotonic()
            await asyncio.sleep(told * 0.6 / 1000)
            status, left = await ask()
            if time.monotonic() - refused < told / 1000:  # else it came late
                assert status == 429
                assert left < told
                await asyncio.sleep(max(refused + told / 1000 - time.monotonic(), 0))
                assert (await ask())[0] == 200
        await settle_down(office, sim)
    await check_books(office)
