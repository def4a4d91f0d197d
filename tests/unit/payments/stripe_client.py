"""Who asks the simulated Stripe, and what is asked of it."""

import dataclasses
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from billing.ids import new_id
from billing.money import NANO
from billing.payments.payment import Intent, Payment, SavedMethod
from proxy.payments.client import BoundedHttp
from proxy.payments.stripe import StripeApi
from scripts.sim.payments.books import Checkout
from scripts.sim.payments.server import SimulatedPayments

KEY = "sk_test_sim"


EMAIL = "ada@example.com"


class Counted(BoundedHttp):
    """Notes what is sent."""

    def __init__(self) -> None:
        super().__init__("stripe", timeout_s=5)
        self.headers: list[Mapping[str, str]] = []
        self.asked: list[str] = []

    async def send(self, method: str, url: str, **more: Any) -> tuple[int, bytes]:
        self.headers.append(more["headers"])
        self.asked.append(f"{method} {url.partition('/v1')[2].partition('?')[0]}")
        return await super().send(method, url, **more)


class Canned(BoundedHttp):
    """Answers the same to everything, and with nothing that was taken back."""

    def __init__(self, status: int, raw: bytes | Any) -> None:
        super().__init__("stripe", timeout_s=1)
        self.answer = status, raw if isinstance(raw, bytes) else json.dumps(raw).encode()

    async def send(self, method: str, url: str, **_more: Any) -> tuple[int, bytes]:  # noqa: ARG002 - as it is asked
        if "/refunds?" in url or "/disputes?" in url:
            return 200, b'{"object": "list", "data": [], "has_more": false}'
        return self.answer


class Counter:
    """Stripe with its books, and who asks it."""

    def __init__(self, psp: SimulatedPayments) -> None:
        self.psp = psp
        self.http = Counted()
        self.api = make_api(self.http, psp.stripe_url)

    async def open_page(self, intent: Intent) -> tuple[Intent, Checkout]:
        page = await self.api.create_page(intent, email=EMAIL, return_url=None)
        checkout = self.psp.till.find_checkout(page.id)
        assert page.url == checkout.given["url"]
        return dataclasses.replace(intent, provider_id=page.id, url=page.url, state="pending"), checkout

    async def save(self) -> SavedMethod:
        intent, checkout = await self.open_page(wish(method_due=True))
        self.psp.till.pay(checkout)
        (payment,) = await self.api.find(intent)
        method = await self.api.find_method(payment.id)
        assert method is not None
        return method

    async def look(self, intent: Intent) -> Payment:
        (found,) = await self.api.find(intent)
        return found


def make_api(http: BoundedHttp, base_url: str = "http://127.0.0.1:1") -> StripeApi:
    return StripeApi(http, KEY, base_url=base_url, return_url="https://shop.example/done")


def wish(**changes: Any) -> Intent:
    now = datetime.now(UTC)
    made = Intent(
        id=new_id(),
        wallet_id=new_id(),
        user_id=new_id(),
        kind="topup",
        provider="stripe",
        currency="USD",
        amount_nano=50 * NANO,
        state="creating",
        attempt=1,
        url=None,
        note="",
        created_at=now,
        expires_at=now + timedelta(hours=1),
        ended_at=None,
        method_due=False,
    )
    return dataclasses.replace(made, **changes)


def charge_of(method: SavedMethod, **changes: Any) -> Intent:
    return wish(kind="auto", provider_id=method.customer_id, method_id=method.method_id, **changes)
