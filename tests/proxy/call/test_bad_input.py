"""Bad input: OpenAI-shaped 4xx, never a 500, nothing sent, nothing held, nothing charged."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from config.settings import Settings
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, sync_models
from tests.support.running import Running, run_proxy

HELLO = [{"role": "user", "content": "hi"}]
GOOD: dict[str, Any] = {"model": "openai/gpt-4o-mini", "messages": HELLO}


@pytest.fixture
async def payer(office: Office) -> Payer:
    return await make_payer(office)


@pytest.fixture
async def proxy(settings: Settings, office: Office) -> AsyncIterator[Running]:
    await sync_models(office)
    limits = settings.limits.model_copy(update={"body_timeout_s": 0.5})
    async with run_proxy(settings.model_copy(update={"limits": limits})) as running:
        yield running


@pytest.fixture
async def untouched(
    office: Office, payer: Payer, sim: SimulatedProvider, proxy: Running
) -> AsyncIterator[None]:
    """After the test: nothing went upstream, nothing is held, nothing was charged, no call was opened."""
    yield
    await proxy.quiet()
    wallet = await office.wallets.get_wallet(payer.wallet_id)
    assert (wallet.posted_nano, wallet.held_nano) == (10 * 10**9, 0)
    assert not sim.requests
    async with office.database.connection() as connection:
        assert await connection.fetchval("SELECT count(*) FROM calls") == 0
    assert await office.holds.find_available(payer.user_id, payer.wallet_id) in (None, 10 * 10**9)
    await check_books(office)


async def post(proxy: Running, payer: Payer, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    head = {"Authorization": f"Bearer {payer.secret}", "Content-Type": "application/json", **headers}
    async with aiohttp.ClientSession() as session:
        url = f"{proxy.base_url}/v1/chat/completions"
        async with session.post(url, data=body, headers=head) as response:
            assert response.headers["x-request-id"]
            return response.status, (await response.json())["error"]


BODIES: list[tuple[bytes, str | None]] = [
    (b"", None),
    (b"{", None),
    (b"null", None),
    (b"[]", None),
    (b'"text"', None),
    (b"{}", "model"),
    (b'{"model": "m", "messages": [{}], "temperature": NaN}', None),
    (b'{"model": "m"} trailing', None),
    (b'{"model": "\xff\xfe"}', None),
    (b'{"model": 5, "messages": [{}]}', "model"),
    (b'{"model": "", "messages": [{}]}', "model"),
    (b"{" + b'"a":' * 10 + b"[" * 100_000, None),
    (b'{"model": "m", "messages": [{}], "seed": ' + b"9" * 10_000 + b"}", None),
    (b'{"model": "openai/gpt-4o-mini", "model": "openai/gpt-4o", "messages": [{}]}', "model"),
    *[
        (json.dumps({**GOOD, name: value}).encode(), name)
        for name, value in [
            ("messages", []),
            ("messages", "hi"),
            ("messages", [1]),
            ("messages", None),
            ("max_tokens", -1),
            ("max_tokens", 0),
            ("max_tokens", 10**12),
            ("max_tokens", "many"),
            ("max_tokens", True),
            ("max_tokens", 1.5),
            ("max_completion_tokens", -5),
            ("n", 0),
            ("n", 10**6),
            ("n", "2"),
            ("stream", "yes"),
            ("stream", 1),
            ("stream_options", "x"),
            ("stream_options", {"include_usage": "x"}),
            ("models", "x"),
            ("models", [1]),
        ]
    ],
]


@pytest.mark.usefixtures("untouched")
async def test_bad_bodies(proxy: Running, payer: Payer) -> None:
    for body, param in BODIES:
        status, error = await post(proxy, payer, body)
        assert status == 400, (body[:80], error)
        assert error["type"] == "invalid_request_error"
        assert error["message"]
        assert error["param"] == param, (body[:80], error)


@pytest.mark.usefixtures("untouched")
async def test_unknown_models_are_refused_never_free(proxy: Running, payer: Payer) -> None:
    for more in (
        {"model": "no/such"},
        {"model": "gpt-4o-mini"},
        {"models": ["no/such"]},
        {"model": "x" * 5000},
    ):
        status, error = await post(proxy, payer, json.dumps({**GOOD, **more}).encode())
        assert (status, error["code"]) == (404, "model_not_found")
        assert len(error["message"]) < 1000


@pytest.mark.usefixtures("untouched")
async def test_a_body_too_large(proxy: Running, payer: Payer) -> None:
    status, error = await post(proxy, payer, b'{"x": "' + b"a" * 20_000_000 + b'"}')
    assert (status, error["code"]) == (413, "request_too_large")

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"a" * 1_000_000

    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {payer.secret}"}) as session:
        async with session.post(f"{proxy.base_url}/v1/chat/completions", data=pieces()) as response:
            assert response.status == 413


@pytest.mark.usefixtures("untouched")
async def test_wrong_keys(proxy: Running, payer: Payer, office: Office) -> None:
    body = json.dumps(GOOD).encode()
    for value in (
        "Bearer wrong",
        "Bearer sk-tuma-wrong",
        "Bearer ",
        "Basic abc",
        "",
        f"Bearer {payer.secret}x",
        "Bearer \xe4",
    ):
        status, error = await post(proxy, payer, body, Authorization=value)
        assert (status, error["code"]) == (401, "invalid_api_key")
        assert "sk-tuma" not in error["message"] or "sk-tuma-…" in error["message"]
    from billing.identity.keys import Keys

    assert (await post(proxy, payer, b"{}"))[0] == 400
    await Keys(office.database, office.settings.auth, office.settings.limits).revoke(payer.key_id)
    async with asyncio.timeout(1):
        while (await post(proxy, payer, b"{}"))[0] != 401:
            await asyncio.sleep(0.02)


@pytest.mark.usefixtures("untouched")
async def test_unknown_paths_and_methods(proxy: Running, payer: Payer) -> None:
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {payer.secret}"}) as session:
        for method, path, expected in (
            ("GET", "/v1/chat/completions", 405),
            ("GET", "/nowhere", 404),
            ("POST", "/v1/models", 405),
            ("GET", "/v1/models/%00", 404),
        ):
            async with session.request(method, proxy.base_url + path) as response:
                assert response.status == expected, path
                assert (await response.json())["error"]["message"]


async def raw(proxy: Running, data: bytes, *, half_close: bool = False, timeout_s: float = 3) -> bytes:
    port = int(proxy.base_url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    await writer.drain()
    if half_close:
        writer.write_eof()
    try:
        async with asyncio.timeout(timeout_s):
            return await reader.read()
    except (TimeoutError, ConnectionResetError):
        return b""
    finally:
        writer.close()


def head(payer: Payer, length: int, *more: str) -> bytes:
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: x",
        f"Authorization: Bearer {payer.secret}",
        "Content-Type: application/json",
        f"Content-Length: {length}",
        *more,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


@pytest.mark.usefixtures("untouched")
async def test_what_is_no_http_is_answered_in_shape(proxy: Running, payer: Payer) -> None:
    for data in (
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(5000)) + b"\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ):
        answer = await raw(proxy, data)
        status, _, body = answer.partition(b"\r\n\r\n")
        assert status.startswith(b"HTTP/1."), data[:60]
        assert b" 4" in status[:13], (data[:60], status[:60])
        assert json.loads(body)["error"]["type"] == "invalid_request_error"


@pytest.mark.usefixtures("untouched")
async def test_a_body_that_stalls_is_given_up(proxy: Running, payer: Payer) -> None:
    answer = await raw(proxy, head(payer, 1000) + b'{"model":', timeout_s=5)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"request_timeout" in answer


@pytest.mark.usefixtures("untouched")
async def test_a_socket_closed_within_the_body(proxy: Running, payer: Payer) -> None:
    answer = await raw(proxy, head(payer, 1000) + b'{"model":', half_close=True)
    assert answer == b"" or b" 400 " in answer.split(b"\r\n")[0]


async def test_pipelined_and_http_1_0(
    proxy: Running, payer: Payer, office: Office, sim: SimulatedProvider
) -> None:
    body = json.dumps(GOOD).encode()
    one = head(payer, len(body)) + body
    last = head(payer, len(body), "Connection: close") + body
    answer = await raw(proxy, one + b"" + last, timeout_s=5)
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    old = head(payer, len(body)).replace(b"HTTP/1.1", b"HTTP/1.0") + body
    answer = await raw(proxy, old, timeout_s=5)
    assert b" 200 OK" in answer.split(b"\r\n")[0]
    streamed = json.dumps({**GOOD, "stream": True}).encode()
    answer = await raw(
        proxy, head(payer, len(streamed)).replace(b"HTTP/1.1", b"HTTP/1.0") + streamed, timeout_s=5
    )
    assert b"data: [DONE]" in answer
    await proxy.quiet()
    wallet = await office.wallets.get_wallet(payer.wallet_id)
    assert 10 * 10**9 - wallet.posted_nano == sim.books.total_nanousd > 0
    await check_books(office)
