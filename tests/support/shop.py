"""A proxy with simulated payment providers, over real sockets, and somebody who pays."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from billing.books.opening_balance import record_openings
from config.settings import Settings
from scripts.office import Office
from scripts.sim.payments.currencies import Provider, digits
from scripts.sim.payments.server import SimulatedPayments
from scripts.sim.payments.webhooks import Event
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, sync_models
from tests.support.running import Running, run_proxy


@dataclass(frozen=True)
class Shop:
    """A proxy with payment providers, and one payer with an empty wallet in naira."""

    office: Office
    proxy: Running
    psp: SimulatedPayments
    payer: Payer
    client: aiohttp.ClientSession

    async def ask(self, method: str, path: str, *, headers: dict[str, str] | None = None, **more: Any) -> Any:
        bearer = {"Authorization": f"Bearer {self.payer.secret}"}
        url = f"{self.proxy.base_url}{path}"
        async with self.client.request(method, url, headers={**bearer, **(headers or {})}, **more) as answer:
            return answer.status, await answer.json()

    async def begin(self, provider: Provider, amount: str = "5000", **more: Any) -> dict[str, Any]:
        body = {"provider": provider, "amount": amount}
        status, made = await self.ask("POST", "/v1/wallet/topups", json={**body, **more})
        assert status == 201, made
        assert made["state"] == "pending"
        return dict(made)

    async def see(self, topup: dict[str, Any]) -> dict[str, Any]:
        _, found = await self.ask("GET", f"/v1/wallet/topups/{topup['id']}")
        return dict(found)

    async def balance(self) -> str:
        _, found = await self.ask("GET", "/v1/wallet")
        return str(found["posted"])

    async def quiet(self) -> None:
        """Wait until every webhook is delivered and looked into."""
        await self.psp.webhooks.wait_quiet()
        async with asyncio.timeout(10):
            while await self.waiting():
                await asyncio.sleep(0.02)

    async def waiting(self) -> int:
        async with self.office.database.connection() as connection:
            found = await connection.fetchval("SELECT count(*) FROM webhook_events WHERE state = 'new'")
        return int(found)

    async def agree(self) -> None:
        """I5: what our books say was paid is what the providers' own say."""
        await check_books(self.office)
        async with self.office.database.connection() as connection:
            rows = await connection.fetch(
                "SELECT c.provider, c.currency, sum(c.paid_nano - coalesce(r.taken, 0)) AS nano FROM payment_credits c"
                " LEFT JOIN LATERAL (SELECT sum(r.amount_nano) AS taken FROM payment_reversals r WHERE r.state <> 'undone'"
                " AND (r.provider, r.provider_txn_id) = (c.provider, c.provider_txn_id)) r ON true GROUP BY 1, 2"
            )
        ours = {
            (row["provider"], row["currency"]): int(row["nano"])
            // 10 ** (9 - digits(row["provider"], row["currency"]))
            for row in rows
        }
        keys = {(item.provider, item.currency) for item in self.psp.books.payments.values()}
        theirs = {key: self.psp.books.paid_total(*key) for key in keys}
        assert {key: value for key, value in ours.items() if value} == {
            key: value for key, value in theirs.items() if value
        }

    def last_event(self) -> Event:
        """Stripe tells the same several times."""
        return list(self.psp.webhooks.events.values())[-1]

    def checkout(self, topup: dict[str, Any]) -> Any:
        return self.psp.till.find_checkout(topup["reference"])


@asynccontextmanager
async def open_shop(settings: Settings, office: Office, **payments: Any) -> AsyncIterator[Shop]:
    """Open it; ``payments`` are settings of that section."""
    await sync_models(office)
    await record_openings(office.database, office.upstream)
    payer = await make_payer(office, amount="0", currency="NGN")
    async with SimulatedPayments() as psp, aiohttp.ClientSession() as client:
        async with run_proxy(with_providers(settings, psp, **payments)) as proxy:
            psp.webhooks.to = proxy.base_url
            yield Shop(office, proxy, psp, payer, client)


def with_providers(settings: Settings, psp: SimulatedPayments, **payments: Any) -> Settings:
    """Return the settings with the simulated providers in them."""
    stripe = {
        "secret_key": psp.secrets.stripe_key,
        "webhook_secret": psp.secrets.stripe_webhook,
        "base_url": psp.stripe_url,
        "return_url": f"{psp.origin}/sim/books",
    }
    flutterwave = {
        "secret_key": psp.secrets.flutterwave_key,
        "webhook_secret": psp.secrets.flutterwave_webhook,
        "base_url": psp.flutterwave_url,
    }
    return Settings.model_validate(
        {
            **settings.model_dump(),
            "stripe": stripe,
            "paystack": {"secret_key": psp.secrets.paystack_key, "base_url": psp.paystack_url},
            "flutterwave": flutterwave,
            "payments": {"look_s": 0.2, "poll_s": 0.2, "timeout_s": 2, **payments},
        }
    )
