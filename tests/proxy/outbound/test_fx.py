"""Exchange rates over real sockets: sources of both shapes, all the ways in which they fail, and a proxy that follows them."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import aiohttp
import pytest
import structlog
from aiohttp import web

from billing.errors import FxSourceError
from billing.fx import sync as fxfeed
from billing.fx.sync import FxFeed
from config.settings import FxSettings, Settings
from proxy.outbound.fx_sources import make_sources
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, sync_models
from tests.support.running import Running, run_proxy

APP_ID = "an-app-id-of-openexchangerates"
BODY: dict[str, Any] = {
    "model": "openai/gpt-4o-mini",
    "messages": [{"role": "user", "content": "Say hello, please."}],
    "max_tokens": 50,
}


class RateServer:
    """Serves open.er-api.com's document and openexchangerates.org's, or whatever it was told to."""

    def __init__(self) -> None:
        self.rates: dict[str, Any] = {"USD": 1, "NGN": 1600, "KES": 129.5, "XDR": 0.75}
        self.second: dict[str, Any] | None = None  # openexchangerates.org's, where they differ
        self.body: bytes | None = None
        self.status = 200
        self.headers: dict[str, str] = {}
        self.delay_s = 0.0
        self.asked: list[str] = []
        self.url = ""

    async def _answer(self, request: web.Request, document: dict[str, Any]) -> web.Response:
        self.asked.append(request.path_qs)
        await asyncio.sleep(self.delay_s)
        body = json.dumps(document).encode() if self.body is None else self.body
        return web.Response(status=self.status, body=body, headers=self.headers)

    async def er_api(self, request: web.Request) -> web.Response:
        now = int(time.time())
        document = {
            "result": "success",
            "provider": "https://www.exchangerate-api.com",
            "time_last_update_unix": now - 3600,
            "time_next_update_unix": now + 82_800,
            "time_eol_unix": 0,
            "base_code": "USD",
            "rates": self.rates,
        }
        return await self._answer(request, document)

    async def openexchangerates(self, request: web.Request) -> web.Response:
        if request.query.get("app_id") != APP_ID:
            error = {
                "error": True,
                "status": 401,
                "message": "invalid_app_id",
                "description": "Invalid App ID",
            }
            return web.json_response(error, status=401)
        document = {
            "disclaimer": "Usage subject to terms: https://openexchangerates.org/terms",
            "license": "https://openexchangerates.org/license",
            "timestamp": int(time.time()),
            "base": "USD",
            "rates": self.rates if self.second is None else self.second,
        }
        return await self._answer(request, document)


@pytest.fixture
async def rates() -> AsyncIterator[RateServer]:
    server = RateServer()
    app = web.Application()
    app.add_routes(
        [web.get("/v6/latest/USD", server.er_api), web.get("/api/latest.json", server.openexchangerates)]
    )
    runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield server
    await runner.cleanup()


def fx(rates: RateServer, **changes: Any) -> FxSettings:
    return FxSettings(**{"url": rates.url, "timeout_s": 30, "answer_bytes": 4096, "period_s": 0.2, **changes})


def with_fx(settings: Settings, rates: RateServer, **changes: Any) -> Settings:
    return settings.model_copy(update={"fx": fx(rates, **changes)})


async def fetch(rates: RateServer, **changes: Any) -> Any:
    return await make_sources(fx(rates, **changes))[0].fetch()


async def test_both_services(rates: RateServer) -> None:
    opened = await fetch(rates)
    keyed = await fetch(rates, app_id=APP_ID)
    assert opened.rates == keyed.rates == {"NGN": Decimal(1600), "KES": Decimal("129.5")}
    assert rates.asked == ["/v6/latest/USD", f"/api/latest.json?app_id={APP_ID}"]


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"status": 500}, "status 500"),
        ({"status": 429}, "status 429"),
        ({"status": 302, "headers": {"Location": "/api/latest.json"}}, "status 302"),
        ({"body": b"<html><body>Just a moment</body></html>"}, "no JSON"),
        ({"body": b""}, "no JSON"),
        ({"body": b" " * 5000}, "more than 4096 bytes"),
        ({"delay_s": 5}, "TimeoutError"),
        ({"rates": {"NGN": 0, "KES": -1}}, "no usable rate"),
        ({"body": b'{"result": "success", "base_code": "EUR", "rates": {"NGN": 1}}'}, "not for one USD"),
        ({"body": b'{"result": "error", "error-type": "unsupported-code"}'}, "unsupported-code"),
        ({"headers": {"Content-Encoding": "gzip"}}, "^127"),
    ],
    ids=str,
)
async def test_a_source_that_fails(rates: RateServer, told: dict[str, Any], says: str) -> None:
    for name, value in told.items():
        setattr(rates, name, value)
    if "Content-Encoding" in rates.headers:
        rates.body = b"\x1f\x8b"
    with pytest.raises(FxSourceError, match=says):
        await fetch(rates, timeout_s=0.3 if rates.delay_s else 30)


async def test_a_source_that_is_not_there(rates: RateServer) -> None:
    with pytest.raises(FxSourceError, match="does not answer"):
        await fetch(rates, url="http://127.0.0.1:1")


async def test_the_app_id_is_shown_to_nobody(
    rates: RateServer, office: Office, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An earlier test may have let loggers be kept as they were then.
    monkeypatch.setattr(fxfeed, "_log", structlog.get_logger("tuma.fx"))
    wrong = "an-app-id-that-is-wrong"
    cases: list[dict[str, Any]] = [
        {"app_id": wrong},
        {"app_id": wrong, "url": "http://127.0.0.1:1/api"},
        {"app_id": wrong, "url": rates.url + "/nowhere"},
    ]
    caplog.set_level(logging.DEBUG)
    with structlog.testing.capture_logs() as logs:
        for changes in cases:
            settings = fx(rates, **changes)
            with pytest.raises(FxSourceError) as caught:
                await FxFeed(office.database, make_sources(settings), settings).sync()
            assert wrong not in repr(caught.value)
            assert caught.value.__cause__ is None
            assert wrong not in repr(settings)
    assert len(logs) == 3
    assert wrong not in repr(logs)
    assert wrong not in caplog.text


async def post(proxy: Running, payer: Payer, **told: Any) -> tuple[int, str | None, dict[str, str]]:
    headers = {"Authorization": f"Bearer {payer.secret}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{proxy.base_url}/v1/chat/completions", json={**BODY, **told}) as response,
    ):
        answer = await response.json() if response.content_type == "application/json" else {}
        await response.read()
        return response.status, answer.get("error", {}).get("code"), dict(response.headers)


async def until(proxy: Running, payer: Payer, *expected: tuple[int, str | None]) -> dict[str, str]:
    async with asyncio.timeout(10):
        while True:
            status, code, headers = await post(proxy, payer)
            if (status, code) in expected:
                return headers
            await asyncio.sleep(0.05)


async def until_rate(proxy: Running, rate: str) -> None:
    async with asyncio.timeout(10):
        while "NGN" not in proxy.services.fx.quotes or proxy.services.fx.quotes["NGN"].rate != Decimal(rate):
            await asyncio.sleep(0.02)


async def test_a_server_follows_its_sources(
    settings: Settings, office: Office, rates: RateServer, sim: SimulatedProvider
) -> None:
    """At once when it starts, then at its pace; a jump waits for an operator, and the old rate goes on."""
    await sync_models(office)
    payer = await make_payer(office, amount="5000", currency="NGN")
    async with run_proxy(with_fx(settings, rates, markup_bps=250)) as proxy:
        await until_rate(proxy, "1600")
        headers = await until(proxy, payer, (200, None))
        spent = Decimal(sim.books.total_nanousd).scaleb(-9)
        assert Decimal(headers["x-tuma-charge"].split()[0]) == spent * 1600 * Decimal("1.025")
        rates.rates = {"NGN": 1650.5}
        await until_rate(proxy, "1650.5")
        rates.rates = {"NGN": 2000}
        asked = len(rates.asked)
        while len(rates.asked) < asked + 3:
            await asyncio.sleep(0.05)
        assert proxy.services.fx.get_quote("NGN").rate == Decimal("1650.5")
        await proxy_accepts(office, "NGN")
        await until_rate(proxy, "2000")
        await proxy.quiet()
        await check_books(office)


async def proxy_accepts(office: Office, currency: str) -> None:
    from billing.fx.book import FxBook

    await FxBook(office.database, FxSettings(markup_bps=250)).accept_rate(currency)


async def test_a_stale_rate_prices_no_new_call_and_running_ones_keep_theirs(
    settings: Settings, office: Office, rates: RateServer, sim: SimulatedProvider
) -> None:
    await sync_models(office)
    payer = await make_payer(office, amount="5000", currency="NGN")
    dollars = await make_payer(office)
    async with run_proxy(with_fx(settings, rates, stale_after_s=2.0)) as proxy:
        await until(proxy, payer, (200, None))
        billed = sim.books.total_nanousd
        streaming = asyncio.create_task(
            post(proxy, payer, stream=True, max_tokens=None, sim={"chunks": 100, "chunk_delay_ms": 50})
        )
        async with asyncio.timeout(5):
            while not len(proxy.services.calls):
                await asyncio.sleep(0.01)
        rates.status = 500
        sent = len(sim.requests)
        headers = await until(proxy, payer, (503, "fx_stale"))
        assert int(headers["Retry-After"]) > 0
        assert not streaming.done(), "the running call goes on"
        sent = len(sim.requests)
        for stream in (False, True):
            assert (await post(proxy, payer, stream=stream))[:2] == (503, "fx_stale")
        assert len(sim.requests) == sent, "nothing is sent"
        assert (await post(proxy, dollars))[0] == 200, "other currencies go on"
        assert (await streaming)[0] == 200
        rates.status = 200
        rates.rates = {"NGN": 1700}
        await until_rate(proxy, "1700")
        await until(proxy, payer, (200, None))
        await proxy.quiet()
        await check_books(office)
    async with office.database.connection() as connection:
        call = await connection.fetchrow(
            "SELECT c.charge_nano, c.cost_nanousd, q.rate FROM calls c JOIN fx_quotes q ON q.id = c.fx_quote_id"
            " WHERE c.stream AND c.wallet_id = $1",
            payer.wallet_id,
        )
    assert billed > 0
    assert (call["rate"], call["charge_nano"]) == (1600, call["cost_nanousd"] * 1600)


async def test_two_sources_over_sockets(settings: Settings, office: Office, rates: RateServer) -> None:
    await sync_models(office)
    payer = await make_payer(office, amount="5000", currency="NGN")
    two = {"second_url": f"{rates.url}/api", "second_app_id": APP_ID, "band_bps": 100}
    rates.second = {"NGN": 1700}
    async with run_proxy(with_fx(settings, rates, **two)) as proxy:
        async with asyncio.timeout(10):
            while len(rates.asked) < 6:
                await asyncio.sleep(0.02)
        assert (await post(proxy, payer))[:2] == (503, "metering_unavailable"), "nothing was ever agreed upon"
        rates.second = {"NGN": 1605}
        await until_rate(proxy, "1600")
        await until(proxy, payer, (200, None))
        await proxy.quiet()
        await check_books(office)


async def test_without_a_url_nothing_is_asked(settings: Settings) -> None:
    assert settings.fx.url == ""
    assert make_sources(settings.fx) == []
