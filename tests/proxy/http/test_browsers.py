"""What browsers are told: CORS for configured origins, and the headers that every response carries."""

import asyncio
from typing import Any

import aiohttp
import pytest

from config.settings import Settings, SettingsError, load_settings
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.support.payers import Payer, make_payer, sync_models
from tests.support.running import Running, run_proxy

PAGE = "https://app.example.com"
HELLO: dict[str, Any] = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "hi"}]}
USUAL = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Server": "tuma",
}


def with_settings(settings: Settings, **sections: dict[str, Any]) -> Settings:
    return settings.model_copy(
        update={
            name: type(getattr(settings, name)).model_validate(values) for name, values in sections.items()
        }
    )


@pytest.fixture
async def payer(office: Office) -> Payer:
    await sync_models(office)
    return await make_payer(office)


async def send(
    proxy: Running, method: str, path: str, *, body: Any = None, key: str | None = None, **headers: str
) -> tuple[int, Any]:
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with aiohttp.ClientSession() as session:
        async with session.request(method, proxy.base_url + path, json=body, headers=named) as response:
            await response.read()
            return response.status, response.headers


async def everything(proxy: Running, payer: Payer, **headers: str) -> list[tuple[int, Any]]:
    """One of each kind of response."""
    chat = "/v1/chat/completions"
    return [
        await send(proxy, "POST", chat, body=HELLO, key=payer.secret, **headers),
        await send(proxy, "POST", chat, body={**HELLO, "stream": True}, key=payer.secret, **headers),
        await send(proxy, "POST", chat, body={}, key=payer.secret, **headers),
        await send(proxy, "POST", chat, body=HELLO, key="wrong", **headers),
        await send(proxy, "GET", "/v1/models", key=payer.secret, **headers),
        await send(proxy, "GET", "/v1/nowhere", **headers),
        await send(proxy, "GET", chat, **headers),
    ]


async def test_no_origin_is_configured(settings: Settings, payer: Payer) -> None:
    async with run_proxy(settings) as proxy:
        answers = await everything(proxy, payer, Origin=PAGE)
        assert [status for status, _ in answers] == [200, 200, 400, 401, 200, 404, 405]
        answers.append(
            await send(proxy, "OPTIONS", "/v1/models", Origin=PAGE, Access_Control_Request_Method="GET")
        )
        assert answers[-1][0] == 405
        for _, headers in answers:
            assert not [name for name in headers if name.startswith("Access-Control")]
            assert "Vary" not in headers


async def test_a_page_of_a_configured_origin(
    settings: Settings, payer: Payer, sim: SimulatedProvider
) -> None:
    async with run_proxy(with_settings(settings, cors={"origins": (PAGE, "http://localhost:3000")})) as proxy:
        for page in (PAGE, "http://localhost:3000"):
            for _, headers in await everything(proxy, payer, Origin=page):
                assert headers["Access-Control-Allow-Origin"] == page
                assert headers.getall("Vary") == ["Origin"]
                assert "Access-Control-Allow-Credentials" not in headers
                exposed = headers["Access-Control-Expose-Headers"].split(", ")
                assert {"x-request-id", "retry-after-ms", "x-tuma-cost-usd", "x-ratelimit-reset-tokens"} <= {
                    *exposed
                }
                shown = {
                    name.lower() for name in headers if name.lower().startswith(("x-tuma", "x-ratelimit"))
                }
                assert shown <= {*exposed}
        called = len(sim.requests)
        for page in (
            "https://evil.example",
            "null",
            PAGE + ".evil.example",
            PAGE.upper(),
            "http://app.example.com",
            PAGE + ":443",
            "",
        ):
            for _, headers in await everything(proxy, payer, Origin=page):
                assert "Access-Control-Allow-Origin" not in headers
                assert headers["Vary"] == "Origin"
        assert len(sim.requests) > called  # CORS tells browsers; it keeps nobody with a key from calling
        for path in ("/healthz", "/admin/users", "/webhooks/stripe"):
            _, headers = await send(proxy, "GET", path, Origin=PAGE)
            assert "Access-Control-Allow-Origin" not in headers
            status, headers = await send(
                proxy, "OPTIONS", path, Origin=PAGE, Access_Control_Request_Method="GET"
            )
            assert status in {403, 404, 405}
            assert "Access-Control-Allow-Origin" not in headers


async def test_preflights(settings: Settings, payer: Payer, sim: SimulatedProvider) -> None:
    wanted = "authorization,content-type,x-stainless-lang,x-stainless-retry-count,idempotency-key"
    async with run_proxy(with_settings(settings, cors={"origins": (PAGE,), "max_age_s": 60})) as proxy:

        async def ask(
            path: str = "/v1/chat/completions", *, names: str = wanted, **headers: str
        ) -> tuple[int, Any]:
            told = {"Origin": PAGE, "Access_Control_Request_Method": "POST", **headers}
            return await send(proxy, "OPTIONS", path, Access_Control_Request_Headers=names, **told)

        status, headers = await ask()
        assert status == 204
        assert headers["Access-Control-Allow-Origin"] == PAGE
        assert headers["Access-Control-Allow-Methods"] == "POST"
        assert headers["Access-Control-Allow-Headers"] == wanted
        assert headers["Access-Control-Max-Age"] == "60"
        assert headers["x-request-id"]
        assert (await ask("/v1/models", Access_Control_Request_Method="GET"))[1][
            "Access-Control-Allow-Methods"
        ] == "GET, HEAD"
        for names in ("a b", "x:y", "ä", "a," * 100, "a" * 100, ",", "*"):
            status, headers = await ask(names=names)
            assert status == 204
            assert "Access-Control-Allow-Headers" not in headers, names
        assert (await ask("/v1/nowhere"))[0] == 404
        status, headers = await ask(Origin="https://evil.example")
        assert status == 405
        assert "Access-Control-Allow-Origin" not in headers
        status, _ = await send(
            proxy, "OPTIONS", "/v1/models", Origin=PAGE
        )  # no preflight: it asks for nothing
        assert status == 405
    assert not sim.requests


async def test_every_page(settings: Settings, payer: Payer) -> None:
    async with run_proxy(with_settings(settings, cors={"origins": ("*",)})) as proxy:
        for _, headers in await everything(proxy, payer, Origin="https://any.example"):
            assert headers["Access-Control-Allow-Origin"] == "*"
            assert "Vary" not in headers
            assert "Access-Control-Allow-Credentials" not in headers
        for _, headers in await everything(proxy, payer):
            assert "Access-Control-Allow-Origin" not in headers


def test_origins_are_exact() -> None:
    assert load_settings(cors={"origins": f"{PAGE}, http://[::1]:3000"}).cors.origins == (
        PAGE,
        "http://[::1]:3000",
    )
    assert load_settings(cors={"origins": f'["{PAGE}"]'}).cors.origins == (PAGE,)
    assert load_settings(cors={"origins": ""}).cors.origins == ()
    for wrong in (
        *(
            PAGE + "/",
            PAGE.upper(),
            "app.example.com",
            "*.example.com",
            "https://*.example.com",
            "null",
            "ftp://x",
        ),
        *(f"*,{PAGE}", "https://u@x", "https://x?y", "[", '["*", "https://x"]', "https://x:port"),
    ):
        with pytest.raises(SettingsError, match="TUMA_CORS__ORIGINS"):
            load_settings(cors={"origins": wrong})


async def test_the_usual_headers(settings: Settings, payer: Payer) -> None:
    async with run_proxy(settings) as proxy:
        answers = [
            *await everything(proxy, payer),
            await send(proxy, "GET", "/healthz"),
            await send(proxy, "GET", "/readyz"),
            await send(proxy, "HEAD", "/healthz"),
        ]
        reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.base_url.rpartition(":")[2]))
        writer.write(b"nonsense\r\n\r\n")
        head = (await reader.read()).partition(b"\r\n\r\n")[0].decode()
        writer.close()
        answers.append((400, dict(line.split(": ", 1) for line in head.split("\r\n")[1:])))
        for _, headers in answers:
            assert {name: headers.get(name) for name in USUAL} == USUAL
            assert "aiohttp" not in str(headers)
            assert "Strict-Transport-Security" not in headers
    async with run_proxy(with_settings(settings, http={"hsts_s": 31_536_000})) as proxy:
        for _, headers in await everything(proxy, payer):
            assert headers["Strict-Transport-Security"] == "max-age=31536000"
