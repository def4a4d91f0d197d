"""The provider's quota and its refusals, seen from outside: one clear 503, nothing sent in vain, and recovery by itself."""

import asyncio
import time
from decimal import Decimal
from typing import Any

import aiohttp
import pytest

from config.settings import QuotaSettings, ReconcileSettings, Settings
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, sync_models
from tests.support.running import Running, run_proxy

MODEL = "openai/gpt-4o-mini"
BODY: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Say hello, please."}],
    "max_tokens": 50,
}


def with_quota(settings: Settings, **changes: Any) -> Settings:
    quota = QuotaSettings(**{"observe_s": 0.2, "idle_s": 0.3, "pause_s": 0.5, "pause_max_s": 1, **changes})
    return settings.model_copy(update={"quota": quota})


async def call(proxy: Running, payer: Payer, **told: Any) -> tuple[int, str | None, dict[str, str]]:
    headers = {"Authorization": f"Bearer {payer.secret}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{proxy.base_url}/v1/chat/completions", json={**BODY, **told}) as response,
    ):
        answer = await response.json() if response.content_type == "application/json" else {}
        await response.read()
        return response.status, answer.get("error", {}).get("code"), dict(response.headers)


async def ready(proxy: Running) -> dict[str, str]:
    async with aiohttp.ClientSession() as session, session.get(f"{proxy.base_url}/readyz") as response:
        checks: dict[str, str] = (await response.json())["checks"]
        return checks


async def until_served(proxy: Running, payer: Payer) -> None:
    async with asyncio.timeout(10):
        while (await call(proxy, payer))[0] != 200:
            await asyncio.sleep(0.05)


async def test_a_quota_that_is_used_up_is_a_503_and_nothing_is_sent(
    settings: Settings, office: Office, sim: SimulatedProvider
) -> None:
    await sync_models(office)
    payer = await make_payer(office)
    sim.set_credits(Decimal("0.001"))
    async with run_proxy(with_quota(settings)) as proxy:
        results = await asyncio.gather(*(call(proxy, payer) for _ in range(200)))
        statuses = [status for status, _, _ in results]
        assert set(statuses) == {200, 503}
        assert sim.books.total_nanousd <= 1_000_000, "never more than the quota"
        assert statuses.count(200) >= 10
        refused = next(result for result in results if result[0] == 503)
        assert refused[1] == "provider_quota_exhausted"
        assert int(refused[2]["Retry-After"]) > 0
        sim.set_credits(Decimal(0))
        await proxy.quiet()
        await asyncio.sleep(0.5)
        sent = len(sim.books.generations)
        assert (await call(proxy, payer))[1] == "provider_quota_exhausted"
        assert (await ready(proxy))["provider"] != "ok"
        assert len(sim.books.generations) == sent
        sim.set_credits(Decimal(100))
        await until_served(proxy, payer)
        await proxy.quiet()
        await check_books(office)
    async with office.database.connection() as connection:
        row = await connection.fetchrow("SELECT sum(leased_nanousd), sum(spent_nanousd) FROM quota_slabs")
    assert row[0] == row[1] == sim.books.total_nanousd, "slabs are returned at shutdown"


async def test_a_call_that_names_no_bound_is_told_what_the_quota_pays_for(
    settings: Settings, office: Office, sim: SimulatedProvider
) -> None:
    await sync_models(office)
    payer = await make_payer(office)
    sim.set_credits(Decimal("0.002"))
    async with run_proxy(with_quota(settings)) as proxy:
        status, _, _ = await call(
            proxy, payer, stream=True, max_tokens=None, sim={"chunks": 6000, "chunk_delay_ms": 0}
        )
        assert status == 200
        await proxy.quiet()
        async with office.database.connection() as connection:
            row = await connection.fetchrow("SELECT outcome, charge_nano, hold_nano FROM calls")
        assert row["outcome"] == "completed"
        assert row["charge_nano"] == sim.books.total_nanousd <= row["hold_nano"] <= 2_000_000
        await check_books(office)


@pytest.mark.parametrize("status", [401, 402])
@pytest.mark.parametrize("inside", [False, True])
async def test_a_provider_that_refuses_us_is_left_alone_for_a_while(
    settings: Settings, office: Office, sim: SimulatedProvider, status: int, inside: bool
) -> None:
    await sync_models(office)
    payer = await make_payer(office)
    async with run_proxy(with_quota(settings, pause_s=1, pause_max_s=1)) as proxy:
        if inside:
            told: dict[str, Any] = {"error_before_first": True, "error_code": status}
        else:
            told = {"fail_status": status}
        sim.set_behaviour(**told)
        key = sim._api_key
        if status == 401:  # its record agrees
            sim._api_key = "sk-another"
        else:
            sim.set_credits(Decimal(0))
        before = len(sim.requests)
        begun_s = time.monotonic()
        results = [await call(proxy, payer, stream=True) for _ in range(30)]
        pauses = int(time.monotonic() - begun_s) + 1
        assert {result[:2] for result in results} == {(503, "provider_quota_exhausted")}
        assert all(int(result[2]["Retry-After"]) > 0 for result in results)
        assert len(sim.requests) - before <= 2 * pauses + 2, (
            "one or two try again after each pause of a second"
        )
        assert (await ready(proxy))["provider"] != "ok"
        sim.reset_behaviour()
        sim._api_key = key
        sim.set_credits(Decimal(10**6))
        await until_served(proxy, payer)
        assert (await ready(proxy))["provider"] == "ok"
        assert (await call(proxy, payer))[0] == 200
        await proxy.quiet()
        await check_books(office)


async def test_a_serving_house_reconciles_by_itself(
    settings: Settings, office: Office, sim: SimulatedProvider
) -> None:
    """An answer whose record comes too late is charged by an estimate, and corrected without anybody's doing."""
    await sync_models(office)
    payer = await make_payer(office)
    upstream = settings.upstream.model_copy(update={"generation_wait_s": 0.1})
    reconcile = ReconcileSettings(period_s=0.4)
    async with run_proxy(settings.model_copy(update={"upstream": upstream, "reconcile": reconcile})) as proxy:
        told = {"usage": "missing", "generation_delay_s": 1}
        status, _, _ = await call(proxy, payer, stream=True, sim=told)
        assert status == 200
        await proxy.quiet()
        async with office.database.connection() as connection:
            assert await connection.fetchval("SELECT accuracy FROM calls") == "estimated"
            async with asyncio.timeout(10):
                while await connection.fetchval("SELECT accuracy FROM calls") != "exact":
                    await asyncio.sleep(0.05)
            charge = await connection.fetchval("SELECT charge_nano FROM calls")
        assert charge == sim.books.total_nanousd
        await check_books(office)


async def test_who_asks_for_more_than_they_have_uses_up_no_quota(
    settings: Settings, office: Office, sim: SimulatedProvider
) -> None:
    """Neither is the house called unready, nor is anybody else refused, as one wallet, or one call, is out of proportion."""
    await sync_models(office)
    sim.set_credits(Decimal(10))
    large = {"model": "openai/gpt-4o", "n": 128, "max_tokens": 1_000_000}
    poor, rich = await make_payer(office, amount="0.01"), await make_payer(office, amount="1000")
    async with run_proxy(with_quota(settings)) as proxy:
        assert (await call(proxy, poor, **large))[:2] == (402, "insufficient_funds")
        assert (await call(proxy, rich))[0] == 200
        assert (await call(proxy, rich, **large))[:2] == (503, "provider_quota_exhausted")
        assert (await ready(proxy))["provider"] == "ok", "smaller calls are served"
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {rich.secret}"}) as session:
            for told, code in (({}, None), (large, "provider_quota_exhausted")):
                async with session.post(f"{proxy.base_url}/v1/estimate", json={**BODY, **told}) as response:
                    refusal = (await response.json())["refusal"]
                assert (refusal and refusal["code"]) == code
        await proxy.quiet()
        await check_books(office)
