"""What a caller sends cannot choose where we send, nor see our key; what the provider sends comes back only as far as listed."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from config.settings import Settings
from proxy.upstream.adapter import _lines
from proxy.upstream.upstreams import make_upstream
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, sync_models
from tests.support.running import Running, run_proxy
from tests.support.settings import make_settings

HELLO: dict[str, Any] = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "hi"}]}
# All that the provider hears beside the body.
SENT = {
    *("host", "authorization", "content-type", "accept-encoding", "x-request-id"),
    *("accept", "user-agent", "content-length"),  # aiohttp's own
}


@pytest.fixture
async def payer(office: Office) -> Payer:
    return await make_payer(office)


async def ask(
    proxy: Running, payer: Payer, path: str = "/v1/chat/completions", body: Any = None, **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    async with aiohttp.ClientSession() as session:
        async with session.post(
            proxy.base_url + path,
            json=body or HELLO,
            headers={"Authorization": f"Bearer {payer.secret}", **headers},
        ) as response:
            return response.status, await response.read(), {k.lower(): v for k, v in response.headers.items()}


async def test_only_listed_headers_go_upstream(
    proxy: Running, payer: Payer, sim: SimulatedProvider, office: Office
) -> None:
    names = (
        *("Cookie", "X-Api-Key", "Api-Key", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"),
        *("Forwarded", "X-Original-URL", "X-Rewrite-URL", "Proxy-Authorization", "OpenAI-Organization"),
        *(
            "HTTP-Referer",
            "X-Title",
            "Idempotency-Key",
            "Range",
            "If-None-Match",
            "X-Stainless-Lang",
            "Origin",
        ),
        *(
            "X-Upstream-Url",
            "X-Base-Url",
            "User-Agent",
            "Accept",
            "Accept-Language",
            "X-Request-Id",
            "TE",
            "Via",
        ),
    )
    for body in (HELLO, {**HELLO, "stream": True}):
        status, _, _ = await ask(proxy, payer, body=body, **dict.fromkeys(names, "caller-canary"))
        assert status == 200
    await proxy.quiet()
    for request in sim.requests:
        assert set(request.headers) <= SENT, set(request.headers) - SENT
        assert request.headers["authorization"] == "Bearer sk-sim"
        shown = json.dumps(request.headers) + str(request.raw)
        assert "caller-canary" not in shown
        assert payer.secret not in shown
    await check_books(office)


async def test_the_caller_cannot_choose_the_url(
    proxy: Running, payer: Payer, sim: SimulatedProvider, office: Office
) -> None:
    """Members that other gateways obey are refused by name; a query is not passed on."""
    url = "http://127.0.0.1:9/evil"
    for name in ("api_base", "base_url", "url", "endpoint", "custom_llm_provider", "api_key", "webhook"):
        assert (await ask(proxy, payer, "/v1/chat/completions", {**HELLO, name: url}))[0] == 400
    for name in ("extra_headers", "extra_query", "extra_body"):
        assert (await ask(proxy, payer, "/v1/chat/completions", {**HELLO, name: {"a": "b"}}))[0] == 400
    assert not sim.requests
    status, _, _ = await ask(proxy, payer, "/v1/chat/completions?api_base=http://x&api-version=../..", HELLO)
    assert status == 200
    (request,) = sim.requests
    assert request.path == "/api/v1/chat/completions"
    assert {name: request.body[name] for name in HELLO} == HELLO
    assert request.headers["host"] == sim.origin.removeprefix("http://")
    sim.requests.clear()
    port = int(proxy.base_url.rpartition(":")[2])
    for target in (
        *("/v1/../api/v1/key", "/v1/%2e%2e/key", "/v1/chat/completions/../../key", "/v1/chat%2fcompletions"),
        *("//evil.example/v1/chat/completions", "/v1/chat/completions/", "/v1//chat/completions"),
        *(
            "/http://evil.example/v1/chat/completions",
            "/v1/chat/completions%00",
            "/v1/chat/completions%0d%0aX:y",
        ),
        *("/v1/chat/completions\\..\\key", "/v1/chat/completions;a=b", "/v1/CHAT/completions"),
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps(HELLO).encode()
        writer.write(
            f"POST {target} HTTP/1.1\r\nHost: evil.example\r\nAuthorization: Bearer {payer.secret}\r\n"
            f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        answer = await reader.read()
        writer.close()
        assert answer.split(b" ")[1] in {b"404", b"405", b"400"}, (target, answer)
    assert not sim.requests
    # One more spelling of the same path, and a target with another's name in it: ours all the same.
    for target in ("/v1/%63hat/completions", "http://evil.example:1/v1/chat/completions"):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            f"POST {target} HTTP/1.1\r\nHost: evil.example\r\nAuthorization: Bearer {payer.secret}\r\n"
            f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()
    await proxy.quiet()
    assert [request.path for request in sim.requests] == ["/api/v1/chat/completions"] * 2
    assert {request.headers["host"] for request in sim.requests} == {sim.origin.removeprefix("http://")}
    await check_books(office)


@asynccontextmanager
async def server(handler: Any) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_redirects_are_never_followed(
    settings: Settings, office: Office, payer: Payer, sim: SimulatedProvider
) -> None:
    await sync_models(office)
    seen: list[str] = []

    async def thief(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization", ""))
        return web.json_response({"data": []})

    async with server(thief) as thief_url:

        async def redirect(request: web.Request) -> web.Response:
            return web.Response(
                status=int(request.headers.get("X-Status", state["status"])),
                headers={"Location": f"{thief_url}{request.path}", "Set-Cookie": "a=b"},
            )

        state = {"status": "302"}
        async with server(redirect) as front:
            moved = settings.model_copy(
                update={"upstream": settings.upstream.model_copy(update={"base_url": front})}
            )
            async with run_proxy(moved) as proxy:
                for status in ("301", "302", "303", "307", "308", "300", "304", "204", "206"):
                    state["status"] = status
                    for body in (HELLO, {**HELLO, "stream": True}):
                        code, text, headers = await ask(proxy, payer, body=body)
                        assert (code, json.loads(text)["error"]["code"]) == (502, "upstream_error"), (
                            status,
                            text,
                        )
                        assert "location" not in headers
                        assert "set-cookie" not in headers
                upstream = proxy.services.upstream
                for path in ("/models", "/key", "/generation", "/credits", "/activity"):
                    code, _ = await upstream.get_record(path)
                    assert code == 206
                await proxy.quiet()
    assert seen == []
    assert (await office.wallets.get_wallet(payer.wallet_id)).posted_nano == 10 * 10**9


async def test_only_listed_headers_come_back(settings: Settings, office: Office, payer: Payer) -> None:
    await sync_models(office)
    theirs = {
        "Set-Cookie": "session=canary",
        "X-Canary": "canary",
        "Server": "canary",
        "Openai-Organization": "canary",
        "X-Ratelimit-Remaining-Requests": "canary",
        "X-Request-Id": "canary",
        "Access-Control-Allow-Origin": "canary",
        "Location": "http://canary",
        "Link": "canary",
        "Content-Disposition": "canary",
        "Refresh": "0; url=http://canary",
    }
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2, "cost": 0.00001}
    answer = {
        "id": "gen-1",
        "object": "chat.completion",
        "choices": [{"message": {"content": "x"}}],
        "usage": usage,
    }
    chunk = {"id": "gen-2", "choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": "stop"}]}

    async def provider(request: web.Request) -> web.Response:
        if request.method == "GET":
            return web.json_response({"error": {}}, status=404)
        asked = await request.json()
        if asked.get("status"):
            return web.json_response({"error": {"message": "no"}}, status=asked["status"], headers=theirs)
        if asked.get("stream"):
            text = "".join(f"data: {json.dumps(event)}\n\n" for event in (chunk, {**chunk, "usage": usage}))
            return web.Response(
                text=text + "data: [DONE]\n\n", content_type="text/event-stream", headers=theirs
            )
        return web.json_response(answer, headers=theirs)

    async with server(provider) as url:
        there = settings.model_copy(
            update={
                "upstream": settings.upstream.model_copy(update={"base_url": url, "generation_wait_s": 0.1})
            }
        )
        async with run_proxy(there) as proxy:
            for more in ({}, {"stream": True}, {"status": 400}, {"status": 429}, {"status": 500}):
                status, _, headers = await ask(proxy, payer, body={**HELLO, **more})
                assert status in {200, 400, 429, 502}
                assert "canary" not in json.dumps(headers)
                assert headers["server"] == "tuma"
                assert "set-cookie" not in headers
            await proxy.quiet()


async def test_proxies_of_the_environment_are_not_used(
    monkeypatch: pytest.MonkeyPatch, sim: SimulatedProvider
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    upstream = make_upstream(make_settings(postgres_dsn="", redis_url="", upstream_url=sim.base_url))
    await upstream.start()
    try:
        assert await upstream.list_models()
    finally:
        await upstream.close()


def test_a_base_url_has_no_more_than_a_place() -> None:
    for url in (
        "ftp://x",
        "https://u:p@x/v1",
        "https://x/v1?a=b",
        "https://x/v1#a",
        "https://x\\@y",
        "//x",
        "https://x y",
    ):
        with pytest.raises(ValueError, match="TUMA_UPSTREAM__BASE_URL"):
            make_settings(postgres_dsn="", redis_url="", upstream_url=url)


def test_no_header_of_ours_can_begin_another() -> None:
    assert _lines({"traceparent": "00-a", "tracestate": "b=c"}) == "traceparent: 00-a\r\ntracestate: b=c\r\n"
    for value in ("a\r\nX: y", "a\nX: y", "a\rX: y", "a\0"):
        with pytest.raises(ValueError, match="line's end"):
            _lines({"tracestate": value})
