"""Streams that end otherwise than by themselves: clients that leave, wallets that run dry, servers that stop."""

import asyncio
import json
from collections import Counter
from decimal import Decimal
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI

from billing.money import format_amount
from config.settings import Settings
from scripts.office import Office, open_office
from scripts.programs.embedded import EmbeddedPostgres, EmbeddedRedis
from scripts.sim.provider import SimulatedProvider
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, sync_models
from tests.support.running import Running, run_proxy

MODEL = "openai/gpt-4o"
HELLO: Any = [{"role": "user", "content": "Count to twenty, slowly."}]


def body(**told: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": HELLO, "stream": True, "sim": told}


def auth(payer: Payer) -> dict[str, str]:
    return {"Authorization": f"Bearer {payer.secret}"}


async def charged(office: Office, payer: Payer, *, of: str = "10") -> Decimal:
    wallet = await office.wallets.get_wallet(payer.wallet_id)
    return Decimal(of) - Decimal(wallet.as_json()["posted"])


def billed(sim: SimulatedProvider) -> Decimal:
    return Decimal(sim.books.total_nanousd).scaleb(-9)


@pytest.mark.parametrize("cancellable", [True, False])
@pytest.mark.parametrize("policy", ["abort", "drain"])
async def test_client_gone_after_every_chunk(
    settings: Settings, office: Office, sim: SimulatedProvider, policy: str, cancellable: bool
) -> None:
    """Each call is charged exactly what the provider billed for it, wherever the client hung up."""
    await sync_models(office)
    upstream = settings.upstream.model_copy(update={"on_client_gone": policy})
    async with run_proxy(settings.model_copy(update={"upstream": upstream})) as proxy:
        payers = [await make_payer(office) for _ in range(21)]

        async def leave_after(chunks: int, payer: Payer) -> None:
            told = body(chunk_delay_ms=8, cancellable=cancellable, usage="after_finish")
            async with aiohttp.ClientSession(headers=auth(payer)) as session:
                response = await session.post(f"{proxy.base_url}/v1/chat/completions", json=told)
                seen = 0
                while seen < chunks:
                    seen += (await response.content.readline()).startswith(b"data:")
                response.close()

        await asyncio.gather(*(leave_after(index, payer) for index, payer in enumerate(payers)))
        await proxy.quiet()
        await sim.books.wait_quiet()
        assert len(sim.books.generations) == len(payers)
        by_request = {entry.request_id: entry.cost_nanousd for entry in sim.books.generations.values()}
        async with office.database.connection() as connection:
            rows = await connection.fetch("SELECT id, charge_nano, accuracy, state, wallet_id FROM calls")
        assert len(rows) == len(payers)
        for row in rows:
            assert (row["state"], row["accuracy"]) == ("settled", "exact")
            assert row["charge_nano"] == by_request[str(row["id"])] > 0
        if policy == "abort" and cancellable:
            assert len(set(by_request.values())) > 5, (
                "hanging up early is cheaper where the provider allows it"
            )
        await check_books(office)


async def test_plain_client_gone_is_charged(proxy: Running, office: Office, sim: SimulatedProvider) -> None:
    payer = await make_payer(office)
    told = {**body(first_delay_ms=2000), "stream": False}
    before = len(sim.requests)
    async with aiohttp.ClientSession(headers=auth(payer)) as session:
        call = asyncio.ensure_future(session.post(f"{proxy.base_url}/v1/chat/completions", json=told))
        async with asyncio.timeout(20):
            while len(sim.requests) == before:  # the provider is at work
                await asyncio.sleep(0.02)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    async with asyncio.timeout(20):
        while not billed(sim):
            await asyncio.sleep(0.05)
    await proxy.quiet()
    assert await charged(office, payer) == billed(sim) > 0
    await check_books(office)


async def test_a_stalled_stream_is_given_up_when_its_client_leaves(
    proxy: Running, office: Office, sim: SimulatedProvider
) -> None:
    payer = await make_payer(office)
    async with aiohttp.ClientSession(headers=auth(payer)) as session:
        response = await session.post(
            f"{proxy.base_url}/v1/chat/completions", json=body(stall_after=3, stall_s=60)
        )
        for _ in range(6):
            await response.content.readline()
        response.close()
    await proxy.quiet(5)
    assert await charged(office, payer) == billed(sim) > 0
    await check_books(office)


async def test_the_hold_grows_with_the_answer(proxy: Running, office: Office, sim: SimulatedProvider) -> None:
    payer = await make_payer(office)
    client: Any = AsyncOpenAI(base_url=f"{proxy.base_url}/v1", api_key=payer.secret, max_retries=0)
    stream: Any = await client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        stream=True,
        extra_body={"sim": {"chunks": 3000, "events_per_write": 50, "stall_after": 2500, "stall_s": 0.2}},
    )
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert len(text.split()) == 3000
    await proxy.quiet()  # on a busy machine the stream may end before its settlement is posted
    async with office.database.connection() as connection:
        row = await connection.fetchrow("SELECT hold_nano, charge_nano FROM calls")
    assert row["hold_nano"] >= row["charge_nano"] == sim.books.total_nanousd
    await check_books(office)


async def test_the_hold_grows_at_the_price_of_the_dearest_that_may_answer(
    proxy: Running, office: Office, sim: SimulatedProvider
) -> None:
    payer = await make_payer(office)
    dear = "anthropic/claude-sonnet-4.5"
    ask = {
        **body(chunks=3000, events_per_write=50, stall_after=2500, stall_s=0.2),
        "model": "openai/gpt-4o-mini",
        "models": [dear],
    }
    async with (
        aiohttp.ClientSession(headers=auth(payer)) as session,
        session.post(f"{proxy.base_url}/v1/chat/completions", json=ask) as response,
    ):
        assert "[DONE]" in await response.text()
    await proxy.quiet()
    async with office.database.connection() as connection:
        held_nano = await connection.fetchval("SELECT hold_nano FROM calls")
    assert held_nano >= 3000 * sim.models[dear].completion_femtousd // 10**6
    await check_books(office)


async def test_an_empty_wallet_ends_the_answer_cleanly(
    proxy: Running, office: Office, sim: SimulatedProvider
) -> None:
    payer = await make_payer(office, amount="0.011")
    client: Any = AsyncOpenAI(base_url=f"{proxy.base_url}/v1", api_key=payer.secret, max_retries=0)
    stream: Any = await client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"sim": {"chunks": 4000, "chunk_delay_ms": 1}},
    )
    chunks = [chunk async for chunk in stream]
    finish = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert finish == ["length"]
    usage = chunks[-1].usage
    assert usage is not None
    assert 500 < usage.completion_tokens < 2000
    await proxy.quiet()
    wallet = await office.wallets.get_wallet(payer.wallet_id)
    assert wallet.posted_nano >= 0
    assert await charged(office, payer, of="0.011") == billed(sim) > 0
    await check_books(office)


async def test_a_thousand_calls_on_a_wallet_for_ten(
    proxy: Running, office: Office, sim: SimulatedProvider
) -> None:
    probe = await make_payer(office)
    told = {**body(first_delay_ms=1500), "stream": False, "max_tokens": 20}
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=60)
    ) as session:

        async def attempt(payer: Payer) -> int:
            while True:
                async with session.post(
                    f"{proxy.base_url}/v1/chat/completions", json=told, headers=auth(payer)
                ) as response:
                    await response.read()
                    if (
                        response.status != 503
                    ):  # a busy machine's Redis was too late for this one: as SDKs, again
                        return response.status
                await asyncio.sleep(0.1)

        assert await attempt(probe) == 200
        async with office.database.connection() as connection:
            hold = await connection.fetchval("SELECT hold_nano FROM calls")
        payer = await make_payer(office, amount=format_amount(10 * hold))
        statuses = await asyncio.gather(*(attempt(payer) for _ in range(1000)))
    assert Counter(statuses) == {200: 10, 402: 990}
    await proxy.quiet()
    wallet = await office.wallets.get_wallet(payer.wallet_id)
    assert wallet.posted_nano >= 0
    assert await charged(office, payer, of=format_amount(10 * hold)) + await charged(office, probe) == billed(
        sim
    )
    await check_books(office)


async def test_a_slow_client_slows_the_provider(
    proxy: Running, office: Office, sim: SimulatedProvider
) -> None:
    """Backpressure: what a client does not take is not read, so it is not kept in memory either."""
    payer = await make_payer(office)
    port = int(proxy.base_url.rpartition(":")[2])
    _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    chunks = 200_000  # some 50 MB; the sockets' own buffers hold a few
    data = json.dumps({**body(chunks=chunks, events_per_write=100), "max_tokens": chunks}).encode()
    writer.write(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {payer.secret}\r\n"
        f"Content-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    read = -1
    for _ in range(50):
        await asyncio.sleep(0.2)
        live = list(proxy.services.calls._live.values())
        progress = live[0].progress if live else None
        now = int(progress(True)["completion_tokens"]) if progress is not None else 0
        if read == now > 0:
            break
        read = now
    assert 0 < read < chunks // 2
    writer.transport.abort()
    await proxy.quiet(20)
    assert await charged(office, payer) == billed(sim) > 0
    await check_books(office)


async def test_a_client_that_takes_no_byte_is_let_go(
    settings: Settings, office: Office, sim: SimulatedProvider
) -> None:
    await sync_models(office)
    limits = settings.limits.model_copy(update={"write_timeout_s": 0.5})
    payer = await make_payer(office)
    async with run_proxy(settings.model_copy(update={"limits": limits})) as proxy:
        dropping = asyncio.get_running_loop().create_task(proxy.server.drop_slow_clients())
        port = int(proxy.base_url.rpartition(":")[2])
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        data = json.dumps(body(chunks=100_000, events_per_write=1000)).encode()
        writer.write(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {payer.secret}\r\n"
            f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        await asyncio.sleep(0.5)
        assert len(proxy.services.calls) == 1
        await proxy.quiet(10)
        writer.close()
        dropping.cancel()
        assert await charged(office, payer) == billed(sim) > 0
        await check_books(office)


async def test_redis_away_refuses_and_charges_nothing(
    settings: Settings, office: Office, sim: SimulatedProvider, folder: Any
) -> None:
    await sync_models(office)
    with EmbeddedRedis(folder / f"redis-{sim.base_url.rpartition(':')[2].split('/')[0]}") as server:
        own = settings.model_copy(
            update={"redis": settings.redis.model_copy(update={"url": _secret(server.url), "timeout_s": 0.5})}
        )
        async with open_office(own) as own_office:
            payer = await make_payer(own_office)
            async with run_proxy(own) as proxy:
                client: Any = AsyncOpenAI(
                    base_url=f"{proxy.base_url}/v1", api_key=payer.secret, max_retries=0
                )
                await client.chat.completions.create(model=MODEL, messages=HELLO)
                await proxy.quiet()  # the hold is released after the answer's end
                server.kill()
                with pytest.raises(openai.InternalServerError) as caught:
                    await client.chat.completions.create(model=MODEL, messages=HELLO)
                assert (caught.value.status_code, caught.value.code) == (503, "metering_unavailable")
                assert caught.value.response.headers["retry-after"]
                server.restart()
                await client.chat.completions.create(model=MODEL, messages=HELLO)
                await proxy.quiet()
                async with asyncio.timeout(15):  # a release that Redis answered too late for is the sweeper's
                    while await own_office.holds.find_leases(expired=False, limit=1):
                        await asyncio.sleep(0.1)
            assert await charged(own_office, payer) == billed(sim) > 0
            await check_books(own_office)


async def test_postgres_away_and_back(settings: Settings, sim: SimulatedProvider, folder: Any) -> None:
    """Streams in flight end and are settled when Postgres is back; new calls wait a bounded time, then 503."""
    name = f"postgres-{sim.base_url.rpartition(':')[2].split('/')[0]}"
    with EmbeddedPostgres(folder / name, fast=True) as server:
        own = settings.model_copy(
            update={
                "postgres": settings.postgres.model_copy(update={"dsn": _secret(server.dsn())}),
                "batch": settings.batch.model_copy(update={"open_wait_s": 0.7, "settle_wait_s": 0.3}),
            }
        )
        async with open_office(own) as office:
            from billing.postgres.migrate import migrate

            await migrate(office.database)
            await sync_models(office)
            payer = await make_payer(office)
            async with run_proxy(own) as proxy:
                client: Any = AsyncOpenAI(
                    base_url=f"{proxy.base_url}/v1", api_key=payer.secret, max_retries=0
                )
                stream: Any = await client.chat.completions.create(
                    model=MODEL, messages=HELLO, stream=True, extra_body={"sim": {"chunk_delay_ms": 40}}
                )
                chunks = [await anext(aiter(stream))]
                server.kill()
                chunks += [chunk async for chunk in stream]
                assert len(chunks) >= 20
                for _ in range(2):
                    with pytest.raises(openai.InternalServerError) as caught:
                        await client.chat.completions.create(model=MODEL, messages=HELLO)
                    assert (caught.value.status_code, caught.value.code) == (503, "metering_unavailable")
                server.restart()
                await proxy.quiet(20)
                await client.chat.completions.create(model=MODEL, messages=HELLO)
                await proxy.quiet()
                async with office.database.connection() as connection:
                    states = await connection.fetch(
                        "SELECT state, outcome, charge_nano > 0 AS paid FROM calls ORDER BY id"
                    )
                assert [row["paid"] for row in states].count(True) == 2
                house = (
                    "SELECT coalesce(-sum(amount_nano), 0) FROM journal_entry WHERE account = 'house_loss'"
                )
                async with office.database.connection() as connection:
                    loss = Decimal(int(await connection.fetchval(house))).scaleb(-9)
                assert await charged(office, payer) + loss == billed(sim)
            await check_books(office)


def _secret(text: str) -> Any:
    from pydantic import SecretStr

    return SecretStr(text)


async def test_shutdown_lets_streams_finish(
    settings: Settings, office: Office, sim: SimulatedProvider
) -> None:
    from proxy.server import bind, serve_worker

    await sync_models(office)
    payer = await make_payer(office)
    listener = bind(settings)
    port = listener.getsockname()[1]
    ready, stop = asyncio.Event(), asyncio.Event()
    serving = asyncio.get_running_loop().create_task(
        serve_worker(settings, listener, on_ready=ready.set, stop=stop)
    )
    await ready.wait()
    client: Any = AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=payer.secret, max_retries=0)
    stream: Any = await client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, extra_body={"sim": {"chunk_delay_ms": 30}}
    )
    await anext(aiter(stream))
    stop.set()
    rest = [chunk async for chunk in stream]
    assert len(rest) >= 19
    with pytest.raises(openai.APIConnectionError):
        late: Any = AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=payer.secret, max_retries=0)
        await late.chat.completions.create(model=MODEL, messages=HELLO)
    await serving
    assert await charged(office, payer) == billed(sim) > 0
    await check_books(office)


async def test_shutdown_ends_what_does_not_finish(
    settings: Settings, office: Office, sim: SimulatedProvider
) -> None:
    from proxy.server import bind, serve_worker

    await sync_models(office)
    payer = await make_payer(office)
    own = settings.model_copy(update={"shutdown_s": 0.5})
    listener = bind(own)
    port = listener.getsockname()[1]
    ready, stop = asyncio.Event(), asyncio.Event()
    serving = asyncio.get_running_loop().create_task(
        serve_worker(own, listener, on_ready=ready.set, stop=stop)
    )
    await ready.wait()
    client: Any = AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=payer.secret, max_retries=0)
    stream: Any = await client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, extra_body={"sim": {"stall_after": 3, "stall_s": 100}}
    )
    await anext(aiter(stream))
    stop.set()
    with pytest.raises((openai.APIError, aiohttp.ClientError, Exception)):
        async for _ in stream:
            pass
        raise ConnectionError
    async with asyncio.timeout(10):
        await serving
    assert await charged(office, payer) == billed(sim) > 0
    await check_books(office)


@pytest.mark.parametrize("stream", [True, False])
async def test_no_byte_reaches_the_client_before_the_call_is_open(
    proxy: Running, office: Office, sim: SimulatedProvider, stream: bool
) -> None:
    """Postgres goes away between the hold and the commit: 503, and what the provider billed is the house's loss."""
    from billing.errors import PostgresUnavailableError

    payer = await make_payer(office)
    opens: Any = proxy.services.calls._opens
    commit, away = opens._commit, True

    async def failing(batch: Any) -> Any:
        if away:
            raise PostgresUnavailableError("away")
        return await commit(batch)

    opens._commit = failing
    told = {**body(chunk_delay_ms=5), "stream": stream}
    async with aiohttp.ClientSession(headers=auth(payer)) as session:
        async with session.post(f"{proxy.base_url}/v1/chat/completions", json=told) as response:
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "metering_unavailable"
            assert response.headers["Retry-After"]
    away = False
    await proxy.quiet()
    assert await charged(office, payer) == 0
    async with office.database.connection() as connection:
        loss = await connection.fetchval(
            "SELECT -sum(amount_nano) FROM journal_entry WHERE account = 'house_loss'"
        )
    assert loss == sim.books.total_nanousd > 0
    await check_books(office)
