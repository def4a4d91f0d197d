"""Nobody stops the others: what one caller sends costs them, or is refused before it costs anybody anything."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self
from uuid import UUID

import aiohttp
import pytest

from config.settings import Settings
from proxy.call import chat
from proxy.http.body_budget import BODIES
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, sync_models
from tests.support.running import Running, run_proxy

MODEL = "openai/gpt-4o-mini"
GOOD: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
LONG = {
    **GOOD,
    "messages": [{"role": "user", "content": "wallet money time people " * 2_000}],
    "max_tokens": 10,
}
LARGE = 16 * 1024 * 1024


@asynccontextmanager
async def limited(settings: Settings, **limits: float) -> AsyncIterator[Running]:
    changed = settings.limits.model_copy(update=limits)
    async with run_proxy(settings.model_copy(update={"limits": changed})) as proxy:
        yield proxy


async def post(
    proxy: Running, payer: Payer, body: bytes, path: str = "/v1/chat/completions"
) -> tuple[int, Any]:
    head = {"Authorization": f"Bearer {payer.secret}", "Content-Type": "application/json"}
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{proxy.base_url}{path}", data=body, headers=head) as response:
            return response.status, await response.json()


class Announced:
    """A request of which the head is sent, and of the body what the test sends."""

    def __init__(self, proxy: Running, payer: Payer, *fields: str) -> None:
        self._port = int(proxy.base_url.rpartition(":")[2])
        lines = (
            "POST /v1/chat/completions HTTP/1.1",
            "Host: x",
            "Content-Type: application/json",
            f"Authorization: Bearer {payer.secret}",
            *fields,
        )
        self._head = "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n"

    async def __aenter__(self) -> Self:
        self._reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port)
        self.writer.write(self._head)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    async def answer(self) -> tuple[int, dict[str, str]]:
        """Read the head of what is answered."""
        async with asyncio.timeout(10):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        return int(first.split()[1]), dict(line.lower().split(": ", 1) for line in lines)


# -- JSON


@pytest.mark.parametrize("piece", [b"[],", b"{},", b'{"type":"x"},'])
async def test_many_values_are_refused_and_stop_nobody(
    proxy: Running, office: Office, sim: SimulatedProvider, piece: bytes
) -> None:
    """16 MiB of ``[],`` took 2.2 s of the event loop, and of ``{}`` 31 s of the thread that counts."""
    attacker, other = await make_payer(office), await make_payer(office)
    parts = piece * ((LARGE - 200) // len(piece))
    body = b'{"model":"%b","messages":[{"role":"user","content":[%b0]}]}' % (MODEL.encode(), parts)
    status, answer = await post(proxy, attacker, body)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert "takes too long to read" in answer["error"]["message"]
    assert not sim.requests
    assert (await post(proxy, other, json.dumps(GOOD).encode()))[0] == 200


async def test_nested_too_deep(settings: Settings, office: Office) -> None:
    payer = await make_payer(office)
    await sync_models(office)
    async with limited(settings, json_depth=20) as proxy:
        for depth, expected in ((17, 200), (18, 400)):  # within the object, its messages and the message
            nested: Any = "x"
            for _ in range(depth):
                nested = [nested]
            body = {**GOOD, "messages": [{"role": "user", "content": "hi", "more": nested}]}
            status, answer = await post(proxy, payer, json.dumps(body).encode())
            assert status == expected, answer


async def test_a_form_is_small(proxy: Running, office: Office) -> None:
    payer = await make_payer(office)
    status, answer = await post(proxy, payer, b'{"name": "' + b"a" * 300_000 + b'"}', "/v1/keys")
    assert (status, answer["error"]["code"]) == (413, "request_too_large")


async def test_a_large_body_is_read_beside_the_loop(
    proxy: Running, office: Office, sim: SimulatedProvider
) -> None:
    payer = await make_payer(office, amount="1000")
    text = 'wallet [money] {time} \\ " people ' * 20_000
    body = {**GOOD, "messages": [{"role": "user", "content": text}]}
    status, _ = await post(proxy, payer, json.dumps(body).encode())
    assert status == 200
    assert sim.requests[-1].body_bytes > len(json.dumps(body))  # as it came: the simulator keeps no large one


# -- before the body is read


async def test_an_empty_wallet_is_refused_before_its_body_comes(proxy: Running, office: Office) -> None:
    empty = await make_payer(office, amount="0")
    for fields in (
        [f"Content-Length: {LARGE}"],
        [f"Content-Length: {LARGE}", "Expect: 100-continue"],
        ["Transfer-Encoding: chunked"],
    ):
        async with Announced(proxy, empty, *fields) as request:
            status, headers = await request.answer()
            assert (status, headers["connection"]) == (402, "close")
    # A small body comes with its head; it is looked at only once a call was refused.
    assert (await post(proxy, empty, json.dumps(GOOD).encode()))[0] == 402
    async with Announced(proxy, empty, "Content-Length: 100") as request:
        assert (await request.answer())[0] == 402
    assert proxy.app[BODIES].bytes == 0


async def test_who_was_refused_is_served_once_there_is_money(proxy: Running, office: Office) -> None:
    payer = await make_payer(office, amount="0")
    assert (await post(proxy, payer, json.dumps(GOOD).encode()))[0] == 402
    await office.wallets.credit(payer.wallet_id, 10**9, reason="test")
    async with asyncio.timeout(10):  # until the worker has heard of it
        while (await post(proxy, payer, json.dumps(GOOD).encode()))[0] != 200:
            await asyncio.sleep(0.05)
    await proxy.quiet()
    await check_books(office)


async def test_a_frozen_wallet_and_full_windows_are_refused_before_the_body_comes(
    proxy: Running, office: Office
) -> None:
    frozen, capped = await make_payer(office), await make_payer(office, requests_per_min=1)
    await office.wallets.set_wallet(frozen.wallet_id, status="frozen", reason="test")
    assert (await post(proxy, capped, json.dumps(GOOD).encode()))[0] == 200
    for payer, expected in ((frozen, 403), (capped, 429)):
        async with Announced(proxy, payer, f"Content-Length: {LARGE}") as request:
            status, headers = await request.answer()
            assert status == expected
            if status == 429:
                assert int(headers["retry-after"]) > 0
                assert headers["x-ratelimit-remaining-requests"] == "0"


async def test_who_can_pay_is_told_to_go_on(proxy: Running, office: Office) -> None:
    payer = await make_payer(office)
    body = json.dumps(LONG).encode()
    fields = (f"Content-Length: {len(body)}", "Expect: 100-continue")
    async with Announced(proxy, payer, *fields) as request:
        assert (await request.answer())[0] == 100
        request.writer.write(body)
        status, headers = await request.answer()
        assert (status, headers.get("connection")) == (200, None)


async def test_bodies_under_way_are_bounded(settings: Settings, office: Office) -> None:
    first, second, third = [await make_payer(office) for _ in range(3)]
    await sync_models(office)
    async with limited(settings, user_bodies_bytes=200_000, bodies_bytes=360_000) as proxy:
        budget = proxy.app[BODIES]

        async def until_read(count: int) -> None:
            async with asyncio.timeout(10):
                while budget.bytes < count:
                    await asyncio.sleep(0.01)

        async with (
            Announced(proxy, first, "Content-Length: 190000") as one,
            Announced(proxy, second, "Content-Length: 190000") as two,
        ):
            one.writer.write(b" " * 150_000)
            await until_read(150_000)
            async with Announced(proxy, first, "Content-Length: 60000") as more:
                status, headers = await more.answer()
                assert (status, headers["retry-after"]) == (429, "1")  # the user's own
            two.writer.write(b" " * 180_000)
            await until_read(330_000)
            async with Announced(proxy, third, "Transfer-Encoding: chunked") as more:
                more.writer.write(b"c350\r\n" + b" " * 50_000 + b"\r\n")
                status, headers = await more.answer()
                assert (status, headers["retry-after"]) == (503, "1")  # everybody's
            assert (await post(proxy, first, json.dumps(GOOD).encode()))[0] == 200
        async with asyncio.timeout(10):
            while budget.bytes:
                await asyncio.sleep(0.01)
        assert not budget._of_users


# -- counting


async def held_of(office: Office) -> int:
    async with office.database.connection() as connection:
        return int(await connection.fetchval("SELECT hold_nano FROM calls ORDER BY id DESC LIMIT 1"))


async def test_a_prompt_is_counted_only_where_that_decides(
    settings: Settings, office: Office, sim: SimulatedProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wallet that covers it anyway pays the same to the nano, and nothing was counted for it."""
    await sync_models(office)
    async with run_proxy(settings) as proxy:
        counter = proxy.services.runtime.counter
        counted: list[int] = []
        count = counter._counting

        def spy(*args: Any) -> Any:
            counted.append(1)
            return count(*args)

        monkeypatch.setattr(counter, "_counting", spy)
        body = json.dumps(LONG).encode()
        rich = await make_payer(office, amount="100")
        assert (await post(proxy, rich, body))[0] == 200
        assert counted == []
        bound = await held_of(office)
        _, told = await post(proxy, rich, body, "/v1/estimate")
        exact = round(float(told["hold"]) * 10**9)
        assert 2 * exact < bound < 8 * exact
        assert len(counted) == 1
        # One that the exact hold just fits is admitted by it.
        poor = await make_payer(office, amount=told["hold"])
        assert (await post(proxy, poor, body))[0] == 200
        assert len(counted) == 2
        assert await held_of(office) == exact
        # And one that is short of it is refused.
        short = await make_payer(office, amount=f"{(exact - 1) / 10**9:.9f}")
        assert (await post(proxy, short, body))[0] == 402
        await proxy.quiet()
        charges = [await charged(office, payer, of) for payer, of in ((rich, "100"), (poor, told["hold"]))]
        assert charges[0] == charges[1] > 0
        await check_books(office)


async def charged(office: Office, payer: Payer, of: str) -> int:
    wallet = await office.wallets.get_wallet(payer.wallet_id)
    assert wallet.held_nano == 0
    return round(float(of) * 10**9) - wallet.posted_nano


async def test_many_calls_at_once_are_not_refused_for_bounds(
    proxy: Running, office: Office, sim: SimulatedProvider
) -> None:
    """A wallet that covers thirty calls as counted admits thirty, though their bounds are four times as much."""
    sim.set_behaviour(first_delay_ms=500)
    body = json.dumps(LONG).encode()
    _, told = await post(proxy, await make_payer(office), body, "/v1/estimate")
    for calls in (8, 30):
        payer = await make_payer(office, amount=f"{float(told['hold']) * calls:.9f}")
        found = await asyncio.gather(*(post(proxy, payer, body) for _ in range(calls)))
        assert [status for status, _ in found] == [200] * calls
    payer = await make_payer(office, amount=f"{float(told['hold']) * 150:.9f}")
    found = await asyncio.gather(*(post(proxy, payer, body) for _ in range(60)))
    assert [status for status, _ in found] == [200] * 60
    await proxy.quiet()
    await check_books(office)


@pytest.mark.parametrize("stream", [False, True])
async def test_what_no_provider_counted_is_counted_in_the_end(
    settings: Settings, office: Office, sim: SimulatedProvider, stream: bool
) -> None:
    """A bound is for the hold: a call without usage costs what its prompt counts."""
    await sync_models(office)
    sim.set_behaviour(usage="missing")
    upstream = settings.upstream.model_copy(update={"kind": "openai"})
    async with run_proxy(settings.model_copy(update={"upstream": upstream})) as proxy:
        rich = await make_payer(office, amount="100")
        counter = proxy.services.runtime.counter
        exact = counter.count_prompt(LONG, MODEL).tokens
        head = {"Authorization": f"Bearer {rich.secret}"}
        async with aiohttp.ClientSession(headers=head) as session:
            url = f"{proxy.base_url}/v1/chat/completions"
            async with session.post(url, json={**LONG, "stream": stream}) as response:
                assert response.status == 200
                await response.read()
        await proxy.quiet()
        async with asyncio.timeout(10), office.database.connection() as connection:
            while (found := await connection.fetchval("SELECT prompt_tokens FROM usage")) is None:
                await asyncio.sleep(0.05)
        assert found == exact


async def test_a_call_of_another_is_not_behind_all_that_one_has_counted(
    proxy: Running, office: Office
) -> None:
    """One user's many large prompts wait for each other; another's waits for a slice of each user's."""
    threads = proxy.services.runtime.threads
    greedy, modest = await make_payer(office, amount="1000"), await make_payer(office, amount="0.1")
    words = "wallet money time people way day man thing woman life child world "
    texts = [words * 20_000 + str(number) for number in range(12)]
    bodies = [
        json.dumps({**GOOD, "messages": [{"role": "user", "content": text}]}).encode() for text in texts
    ]
    left = [asyncio.ensure_future(post(proxy, greedy, body, "/v1/estimate")) for body in bodies]
    async with asyncio.timeout(30):
        while len(threads) < 2:
            await asyncio.sleep(0.005)
    status, _ = await post(proxy, modest, json.dumps({**LONG, "max_tokens": 1}).encode())
    assert status == 200
    waiting = [task for task in left if not task.done()]
    assert waiting, "it came behind everything that the other had sent before"
    for task in waiting:
        task.cancel()
    await asyncio.wait(left)
    async with asyncio.timeout(30):  # nobody waits for these any more: they are dropped
        while len(threads):
            await asyncio.sleep(0.01)


async def test_a_bound_that_others_overtook_is_counted(
    proxy: Running, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was room for the bound when it was looked at, and is none when it is reserved."""
    monkeypatch.setattr(chat, "is_covered", lambda *_, **__: True)
    body = json.dumps(LONG).encode()
    _, told = await post(proxy, await make_payer(office), body, "/v1/estimate")
    assert (await post(proxy, await make_payer(office, amount=told["hold"]), body))[0] == 200
    await proxy.quiet()
    await check_books(office)


async def test_a_bound_is_not_what_is_noted(
    settings: Settings, office: Office, sim: SimulatedProvider
) -> None:
    """The sweeper settles by what is noted, should the worker die: at what the prompt counts, not four times that."""
    await sync_models(office)
    sim.set_behaviour(chunks=60, chunk_delay_ms=50)
    upstream = settings.upstream.model_copy(update={"kind": "openai"})
    async with run_proxy(settings.model_copy(update={"upstream": upstream})) as proxy:
        rich = await make_payer(office, amount="100")
        exact = proxy.services.runtime.counter.count_prompt(LONG, MODEL).tokens
        noted: set[int] = set()
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {rich.secret}"}) as session:
            url = f"{proxy.base_url}/v1/chat/completions"
            async with session.post(url, json={**LONG, "max_tokens": 60, "stream": True}) as response:
                call_id = UUID(response.headers["x-request-id"])
                async with asyncio.timeout(10):
                    while exact not in noted:
                        notes = await office.holds.find_notes(rich.user_id, call_id)
                        noted |= {int(notes[name]) for name in ("prompt_tokens",) if name in notes}
                        await asyncio.sleep(0.05)
                await response.read()
        assert max(noted) < 2 * exact
        await proxy.quiet()
