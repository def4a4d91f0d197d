"""How much one user may do at once and per minute, whichever of their keys they come with."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest

from billing.identity.key import KeyRules
from billing.identity.keys import Keys
from config.settings import LimitSettings, Settings
from proxy.public import webhooks
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.support.payers import Payer, make_payer, sync_models
from tests.support.running import Running, run_proxy

GOOD = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "hi"}]}


async def ask(
    proxy: Running, secret: str, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, Any, Any]:
    head = {"Authorization": f"Bearer {secret}", **headers}
    async with aiohttp.ClientSession() as session:
        async with session.request(method, f"{proxy.base_url}{path}", json=body, headers=head) as response:
            return response.status, await response.json(), response.headers


async def another_key(office: Office, payer: Payer) -> str:
    keys = Keys(office.database, office.settings.auth, office.settings.limits)
    return (await keys.create(payer.wallet_id, KeyRules(manages=True))).secret


def with_limits(settings: Settings, **limits: int) -> Settings:
    return settings.model_copy(update={"limits": settings.limits.model_copy(update=limits)})


async def test_calls_in_flight_are_bounded_where_nobody_said_so(
    settings: Settings, office: Office, sim: SimulatedProvider
) -> None:
    assert LimitSettings().user_calls_in_flight == 100
    await sync_models(office)
    sim.set_behaviour(first_delay_ms=1_500)
    payer, other = await make_payer(office), await make_payer(office)
    second = await another_key(office, payer)
    async with run_proxy(with_limits(settings, user_calls_in_flight=2)) as proxy:
        path = "/v1/chat/completions"
        under_way = [
            asyncio.ensure_future(ask(proxy, secret, "POST", path, GOOD)) for secret in (payer.secret, second)
        ]
        async with asyncio.timeout(10):
            while len(sim.requests) < 2:
                await asyncio.sleep(0.01)
        status, answer, headers = await ask(proxy, second, "POST", path, GOOD)
        assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
        assert "2 calls at a time" in answer["error"]["message"]
        assert int(headers["retry-after"]) >= 1
        # Before its body comes, for one that was refused; and another user is served.
        assert (await ask(proxy, second, "POST", path, GOOD))[0] == 429
        assert (await ask(proxy, other.secret, "POST", path, GOOD))[0] == 200
        assert [(await task)[0] for task in under_way] == [200, 200]
        await proxy.quiet()
        assert (await ask(proxy, second, "POST", path, GOOD))[0] == 200


async def test_changes_have_a_rate_per_user(settings: Settings, office: Office) -> None:
    payer, other = await make_payer(office), await make_payer(office)
    second = await another_key(office, payer)
    async with run_proxy(with_limits(settings, user_writes_per_min=4)) as proxy:
        changes: list[tuple[str, str, str, Any]] = [
            (payer.secret, "PUT", "/v1/wallet/caps", {"day": "5"}),
            (second, "POST", "/v1/keys", {"name": "x"}),
            (payer.secret, "POST", "/api/wallet-management", {"action": "cap", "day": "6"}),
            (second, "POST", "/v1/wallet/topups", {"provider": "stripe", "amount": "5"}),
        ]
        found = [(await ask(proxy, *change))[0] for change in changes]
        assert found == [200, 201, 200, 400]  # nobody set a payment provider up
        for secret, method, path, body in changes:
            status, answer, headers = await ask(proxy, secret, method, path, body)
            assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded"), path
            assert int(headers["retry-after"]) >= 1
        assert (await ask(proxy, payer.secret, "GET", "/v1/keys"))[0] == 200
        assert (await ask(proxy, second, "DELETE", f"/v1/keys/{payer.key_id}"))[0] == 200  # always
        assert (await ask(proxy, other.secret, "PUT", "/v1/wallet/caps", {"day": "5"}))[0] == 200


async def test_watchers_are_counted_per_user(settings: Settings, office: Office) -> None:
    payer, other = await make_payer(office), await make_payer(office)
    second = await another_key(office, payer)
    feed = settings.feed.model_copy(update={"watchers_per_user": 3, "watchers_per_caller": 2})
    async with run_proxy(settings.model_copy(update={"feed": feed})) as proxy, AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())

        async def watch(secret: str) -> int:
            head = {"Authorization": f"Bearer {secret}"}
            url = f"{proxy.base_url}/v1/wallet/events"
            return (await stack.enter_async_context(session.get(url, headers=head))).status

        assert [await watch(secret) for secret in (payer.secret, payer.secret, second)] == [200] * 3
        assert await watch(second) == 429
        assert await watch(other.secret) == 200
        assert proxy.services.watchers._counts_of_users == {payer.user_id: 3, other.user_id: 1}


async def test_webhooks_that_nobody_signed(
    settings: Settings, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[dict[str, Any]] = []

    class Log:
        def warning(self, event: str, **facts: Any) -> None:
            lines.append({"event": event, **facts})

    monkeypatch.setattr(webhooks, "_log", Log())
    found = []
    async with (
        run_proxy(with_limits(settings, webhook_failures_per_min=3)) as proxy,
        aiohttp.ClientSession() as session,
    ):
        for _ in range(8):
            async with session.post(f"{proxy.base_url}/webhooks/stripe", data=b"{}") as response:
                found.append(response.status)
                retry_after = response.headers.get("Retry-After")
    assert found == [401] * 3 + [429] * 5
    assert retry_after is not None
    assert int(retry_after) > 0
    assert [(line["event"], line["since_the_last"]) for line in lines] == [("webhook.refused", 0)]
