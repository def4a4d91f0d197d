"""Calls hurry the batches that they wait for: with delays beyond any test, none waits."""

import asyncio

import aiohttp
import pytest

from config.settings import Settings
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.support.books import check_books
from tests.support.payers import make_payer, sync_models
from tests.support.running import Running, run_proxy
from tests.support.settings import make_settings

NEVER_MS = 3_600_000
MODEL = "openai/gpt-4o-mini"


@pytest.fixture
def settings(dsn: str, redis_url: str, sim: SimulatedProvider) -> Settings:
    return make_settings(
        postgres_dsn=dsn,
        redis_url=redis_url,
        upstream_url=sim.base_url,
        batch={
            "open_delay_ms": NEVER_MS,
            "settle_delay_ms": NEVER_MS,
            "open_wait_s": 60,
            "settle_wait_s": 60,
        },
    )


async def ask(proxy: Running, secret: str, *, stream: bool = False) -> int:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    head = {"Authorization": f"Bearer {secret}"}
    async with (
        aiohttp.ClientSession(headers=head, timeout=aiohttp.ClientTimeout(30)) as session,
        session.post(f"{proxy.base_url}/v1/chat/completions", json=body) as response,
    ):
        await response.read()
        return response.status


async def test_rows_wait_for_company_while_the_provider_thinks(
    office: Office, sim: SimulatedProvider, settings: Settings
) -> None:
    """Of one that answers at once none waits; one that took a second is remembered slowly, and forgotten quickly."""
    payer = await make_payer(office)
    await sync_models(office)
    async with run_proxy(settings) as proxy:
        calls = proxy.services.calls
        assert calls._thinks_s == 0
        sim.set_behaviour(first_delay_ms=1_000)
        assert await ask(proxy, payer.secret) == 200
        slow_s = calls._thinks_s
        assert slow_s >= 0.1
        sim.reset_behaviour()
        assert await ask(proxy, payer.secret) == 200
        assert calls._thinks_s < slow_s
        await proxy.quiet()


async def test_no_call_waits_for_who_does_not_come(
    office: Office, sim: SimulatedProvider, settings: Settings
) -> None:
    rich, poor = await make_payer(office), await make_payer(office, amount="0")
    await sync_models(office)
    async with run_proxy(settings) as proxy:
        calls = proxy.services.calls
        calls._thinks_s = (
            1e15  # of a provider that thinks for ever, rows wait for company until they are hurried
        )
        for stream in (False, True):
            assert await ask(proxy, rich.secret, stream=stream) == 200
        assert await ask(proxy, poor.secret) == 402, "one that is refused is not coming any more"
        assert await ask(proxy, rich.secret) == 200
        sim.set_behaviour(fail_status=500)
        assert await ask(proxy, rich.secret) == 502, (
            "one that fails before its first byte has a row all the same"
        )
        await proxy.quiet()
        sim.reset_behaviour()
        payers = [rich, rich, poor]
        found = await asyncio.gather(
            *(ask(proxy, payers[number % 3].secret, stream=bool(number % 2)) for number in range(24))
        )
        assert found == [402 if number % 3 == 2 else 200 for number in range(24)]
        await proxy.quiet()
        assert (calls._arriving, calls._leaving) == (0, set())
        await sim.books.wait_quiet()
        await check_books(office)
