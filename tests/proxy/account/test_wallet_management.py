"""``POST /api/wallet-management``: every action answers as its path of /v1 does, and allows no more than that."""

import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import jwt
import pytest
from pydantic import SecretStr

from config.settings import Settings
from proxy.account.forms import WALLET_ACTIONS
from scripts.office import Office
from scripts.sim.payments.server import SimulatedPayments
from tests.proxy.account.test_keys import Client
from tests.support.payers import Payer, make_payer, sync_models
from tests.support.running import run_proxy

SECRET = "a secret of the frontend's, long enough"
TOPUP = {"action": "topup", "provider": "paystack", "amount": "5000", "currency": "NGN"}


@pytest.fixture
async def payer(office: Office) -> Payer:
    return await make_payer(office, amount="100", currency="NGN")


@pytest.fixture
async def client(settings: Settings, office: Office, payer: Payer) -> AsyncIterator[Client]:
    await sync_models(office)
    async with SimulatedPayments() as psp, aiohttp.ClientSession() as session:
        changed = settings.model_copy(
            update={
                "auth": settings.auth.model_copy(update={"jwt_secret": SecretStr(SECRET)}),
                "paystack": settings.paystack.model_copy(
                    update={
                        "secret_key": SecretStr(psp.secrets.paystack_key),
                        "base_url": psp.paystack_url,
                    }
                ),
            }
        )
        async with run_proxy(changed) as proxy:
            yield Client(session, proxy.base_url, payer.secret)


async def do(client: Client, body: Any, **headers: str) -> tuple[int, Any]:
    return await client.ask("POST", "/api/wallet-management", body, **headers)


async def test_each_action_is_its_path(client: Client, office: Office, payer: Payer) -> None:
    assert await do(client, {"action": "balance"}) == await client.ask("GET", "/v1/wallet")
    once = {"Idempotency-Key": "mine"}
    status, made = await do(client, TOPUP, **once)
    assert (status, made["state"], made["amount"]) == (201, "pending", "5000")
    assert await do(client, TOPUP, **once) == (201, made)
    form = {name: value for name, value in TOPUP.items() if name != "action"}
    assert await client.ask("POST", "/v1/wallet/topups", form, **once) == (201, made)
    status, seen = await do(client, {"action": "topup_status", "id": made["id"]})
    assert (status, seen) == (200, made)
    status, caps = await do(client, {"action": "cap", "day": "500", "month": 9000})
    assert (status, caps["caps"]["day"]["limit"], caps["caps"]["month"]["limit"]) == (200, "500", "9000")
    status, caps = await do(client, {"action": "cap", "day": None})
    assert caps["caps"].keys() == {"month"}
    assert await do(client, {"action": "caps"}) == await client.ask("GET", "/v1/wallet/caps") == (200, caps)
    status, listed = await do(client, {"action": "transactions"})
    assert (status, listed) == await client.ask("GET", "/v1/wallet/transactions")
    assert [row["kind"] for row in listed["data"]] == ["grant"]


async def test_who_signed_in_may_do_it_too(client: Client, office: Office) -> None:
    other = await office.wallets.create_user("grace@example.com", subject="grace")
    wallet_id = await office.wallets.create_wallet(str(other), currency="NGN")
    token = jwt.encode({"sub": "grace", "exp": time.time() + 600}, SECRET, algorithm="HS256")
    person = client.with_secret(token)
    status, wallet = await do(person, {"action": "balance"})
    assert (status, wallet["id"], wallet["available"]) == (200, str(wallet_id), "0")
    _, mine = await do(client, TOPUP)
    status, answer = await do(person, {"action": "topup_status", "id": mine["id"]})
    assert (status, answer["error"]["code"]) == (404, "not_found")


async def test_a_bound_key_may_look_and_no_more(client: Client, office: Office, payer: Payer) -> None:
    _, made = await client.ask("POST", "/v1/keys", {"manages": False})
    bound = client.with_secret(made["secret"])
    for body in (TOPUP, {"action": "cap", "day": "1"}, {"action": "cap"}):
        status, answer = await do(bound, body)
        assert (status, answer["error"]["code"]) == (403, "not_permitted"), body
    for body in ({"action": "balance"}, {"action": "caps"}, {"action": "transactions"}):
        assert (await do(bound, body))[0] == 200
    assert (await client.code("POST", "/api/wallet-management", b"{}"))[0] == 400
    assert (await client.with_secret("sk-tuma-x").code("POST", "/api/wallet-management", b"{}"))[0] == 401


async def test_forms_are_strict(client: Client) -> None:
    for body in (b"", b"[]", {}, {"action": None}, {"action": "steal"}, {"action": ["balance"]}):
        status, answer = await do(client, body)
        assert (status, answer["error"]["param"]) == (400, "action"), body
        assert all(name in answer["error"]["message"] for name in WALLET_ACTIONS)
    for wrong, param in (
        ({"action": "balance", "day": "5"}, "day"),
        ({**TOPUP, "amount": 50.5}, "amount"),
        ({**TOPUP, "provider": "paypal"}, "provider"),
        ({**TOPUP, "return_url": "javascript:alert(1)"}, "return_url"),
        ({"action": "topup_status"}, "id"),
        ({"action": "cap", "year": "5"}, "year"),
        ({"action": "cap", "day": 0.5}, "day"),
        ({"action": "transactions", "limit": 5}, "limit"),
    ):
        status, answer = await do(client, wrong)
        assert (status, answer["error"]["param"]) == (400, param), (wrong, answer)
    status, answer = await do(client, {"action": "topup_status", "id": "x"})
    assert status == 404
