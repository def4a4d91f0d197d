"""People who sign in: known on first sight, paying from their own wallets, managing what is theirs."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import jwt
import openai
import pytest
from pydantic import SecretStr

from billing.identity.keys import Keys
from billing.money import NANO
from billing.wallets.caps import Caps
from config.settings import Settings
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.proxy.account.test_keys import CHAT, MODEL, Client
from tests.support.books import check_books
from tests.support.payers import make_payer, set_rate, sync_models
from tests.support.running import Running, run_proxy

SECRET = "a secret that the frontend's issuer shares with us"


def token_of(subject: str, **claims: Any) -> str:
    return jwt.encode(
        {"sub": subject, "exp": time.time() + 600, "aud": "authenticated", "role": "authenticated", **claims},
        SECRET,
        algorithm="HS256",
    )


def with_tokens(settings: Settings, **more: Any) -> Settings:
    auth = {"jwt_secret": SecretStr(SECRET), "audience": "authenticated", "default_currency": "NGN", **more}
    return settings.model_copy(update={"auth": settings.auth.model_copy(update=auth)})


@pytest.fixture
async def proxy(settings: Settings, office: Office) -> AsyncIterator[Running]:
    await sync_models(office)
    await set_rate(office, "NGN", "1600")
    async with run_proxy(with_tokens(settings)) as running:
        yield running


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as opened:
        yield opened


async def test_somebody_new_has_a_wallet_and_pays(
    proxy: Running, session: aiohttp.ClientSession, office: Office, sim: SimulatedProvider
) -> None:
    subject = str(uuid4())
    ada = Client(session, proxy.base_url, token_of(subject, email="ada@example.com"))
    assert await ada.code("POST", "/v1/chat/completions", CHAT) == (402, "insufficient_funds")
    status, wallet = await ada.ask("GET", "/v1/wallet")
    assert (status, wallet["currency"], wallet["posted"]) == (200, "NGN", "0")
    assert str(await office.wallets.find_user("Ada@example.com")) == subject  # as auth.uid() would say
    await office.wallets.credit(UUID(wallet["id"]), 5_000 * NANO, reason="top-up")
    await office.cool(UUID(wallet["id"]))
    async with openai.AsyncOpenAI(
        base_url=f"{proxy.base_url}/v1", api_key=ada.secret, max_retries=0
    ) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], stream=True
        )
        assert [chunk async for chunk in stream]
    await proxy.quiet()
    _, wallet = await ada.ask("GET", "/v1/wallet")
    assert float(wallet["posted"]) < 5_000
    assert len(sim.requests) == 1
    await check_books(office)


@pytest.mark.parametrize("known", [False, True])
async def test_many_sign_in_at_once_as_one(
    settings: Settings, proxy: Running, session: aiohttp.ClientSession, office: Office, known: bool
) -> None:
    subject = str(uuid4())
    if known:  # and without a wallet
        await office.wallets.create_user("eve@example.com", subject=subject)
    async with run_proxy(with_tokens(settings)) as second:
        clients = [
            Client(session, running.base_url, token_of(subject, email="eve@example.com", nonce=index))
            for index in range(20)
            for running in (proxy, second)
        ]
        answers = await asyncio.gather(*(client.ask("GET", "/v1/wallet") for client in clients))
    assert {status for status, _ in answers} == {200}
    assert len({wallet["id"] for _, wallet in answers}) == 1
    async with office.database.connection() as connection:
        assert await connection.fetchval("SELECT count(*) FROM users") == 1
        assert await connection.fetchval("SELECT count(*) FROM wallets") == 1


async def test_a_wallet_that_another_sign_in_makes_is_waited_for(office: Office) -> None:
    """Of somebody known, who has none: the second one sees no wallet yet, and must not make its own."""
    await office.wallets.create_user("eve@example.com", subject="eve")
    sign_in = "SELECT wallet_id FROM sign_in('eve', NULL, NULL, 'NGN', $1, $2)"
    async with office.database.connection() as first, office.database.connection() as second:
        transaction = first.transaction()
        await transaction.start()
        made = await first.fetchval(sign_in, uuid4(), uuid4())
        waiting = asyncio.create_task(second.fetchval(sign_in, uuid4(), uuid4()))
        async with asyncio.timeout(30):
            while not waiting.done() and not await first.fetchval(
                "SELECT count(*) FROM pg_locks WHERE NOT granted"
            ):
                await asyncio.sleep(0.01)
        await transaction.commit()
        assert await waiting == made
        assert await first.fetchval("SELECT count(*) FROM wallets") == 1


async def test_an_address_is_nobodys_proof(
    proxy: Running, session: aiohttp.ClientSession, office: Office
) -> None:
    """Whoever signs in with the address of somebody known is not that somebody."""
    payer = await make_payer(office)
    async with office.database.connection() as connection:
        email = await connection.fetchval("SELECT email FROM users WHERE id = $1", payer.user_id)
    mallory = Client(session, proxy.base_url, token_of("mallory", email=email.upper()))
    _, wallet = await mallory.ask("GET", "/v1/wallet")
    assert wallet["id"] != str(payer.wallet_id)
    assert await office.wallets.find_user(email) == payer.user_id
    # Nor does a subject that looks like somebody's id make one that person.
    other = Client(session, proxy.base_url, token_of(str(payer.user_id)))
    _, second = await other.ask("GET", "/v1/wallet")
    assert second["id"] not in (str(payer.wallet_id), wallet["id"])


async def test_somebody_with_several_wallets_names_one(
    proxy: Running, session: aiohttp.ClientSession, office: Office
) -> None:
    ada = Client(session, proxy.base_url, token_of("ada"))
    _, first = await ada.ask("GET", "/v1/wallet")
    async with office.database.connection() as connection:
        user_id = await connection.fetchval("SELECT id FROM users WHERE subject = 'ada'")
    dollars = await office.wallets.create_wallet(str(user_id), currency="USD")
    await office.wallets.credit(dollars, 10 * NANO, reason="top-up")
    assert (await ada.ask("GET", "/v1/wallet"))[1]["id"] == first["id"]
    named = {"x-tuma-wallet": str(dollars)}
    assert (await ada.ask("GET", "/v1/wallet", None, **named))[1]["id"] == str(dollars)
    assert (await ada.ask("POST", "/v1/chat/completions", CHAT, **named))[0] == 200
    other = await make_payer(office)
    for wallet_id in (other.wallet_id, uuid4(), "nonsense"):
        named = {"x-tuma-wallet": str(wallet_id)}
        assert await ada.code("GET", "/v1/wallet", None, **named) == (404, "not_found")
        assert await ada.code("POST", "/v1/chat/completions", CHAT, **named) == (404, "not_found")
    with_key = Client(session, proxy.base_url, other.secret)
    named = {"x-tuma-wallet": str(other.wallet_id)}
    assert (await with_key.ask("GET", "/v1/wallet", None, **named))[0] == 200
    named = {"x-tuma-wallet": str(dollars)}
    assert await with_key.code("GET", "/v1/wallet", None, **named) == (403, "not_permitted")
    await proxy.quiet()
    await check_books(office)


async def test_keys_and_caps_are_managed_by_their_person(
    proxy: Running, session: aiohttp.ClientSession, office: Office
) -> None:
    ada = Client(session, proxy.base_url, token_of("ada"))
    status, made = await ada.ask("POST", "/v1/keys", {"name": "one"})
    assert status == 201
    async with office.database.connection() as connection:
        user_id = await connection.fetchval("SELECT id FROM users WHERE subject = 'ada'")
    dollars = await office.wallets.create_wallet(str(user_id), currency="USD")
    status, second = await ada.ask("POST", "/v1/keys", {"wallet_id": str(dollars)})
    assert (status, second["currency"]) == (201, "USD")
    listed = (await ada.ask("GET", "/v1/keys"))[1]["data"]
    assert [key["id"] for key in listed] == [made["id"], second["id"]]
    assert (await ada.ask("PUT", "/v1/wallet/caps", {"day": "100"}))[1]["caps"]["day"]["limit"] == "100"
    bob = Client(session, proxy.base_url, token_of("bob"))
    assert (await bob.ask("GET", "/v1/keys"))[1]["data"] == []
    for key_id in (made["id"], second["id"]):
        assert await bob.code("DELETE", f"/v1/keys/{key_id}") == (404, "not_found")
    assert (await ada.ask("DELETE", f"/v1/keys/{second['id']}"))[0] == 200


async def test_a_disabled_person_is_refused_at_once(
    proxy: Running, session: aiohttp.ClientSession, office: Office
) -> None:
    ada = Client(session, proxy.base_url, token_of("ada"))
    assert (await ada.ask("GET", "/v1/wallet"))[0] == 200
    async with office.database.connection() as connection:
        await connection.execute("UPDATE users SET status = 'disabled' WHERE subject = 'ada'")
    async with asyncio.timeout(1.5):
        while (await ada.ask("GET", "/v1/wallet"))[0] == 200:
            await asyncio.sleep(0.02)
    assert await ada.code("GET", "/v1/wallet") == (401, "invalid_api_key")


async def test_tokens_that_are_not_good(
    settings: Settings, proxy: Running, session: aiohttp.ClientSession, office: Office
) -> None:
    for token in (
        token_of("ada", exp=time.time() - 60),
        token_of("ada", aud="another"),
        token_of("ada", role="service_role"),
        token_of("ada")[:-4] + "AAAA",
        jwt.encode({"sub": "ada", "exp": time.time() + 60, "aud": "authenticated"}, "", algorithm="none"),
        "a.b.c",
        "..",
    ):
        ada = Client(session, proxy.base_url, token)
        assert await ada.code("POST", "/v1/chat/completions", CHAT) == (401, "invalid_api_key")
    async with office.database.connection() as connection:
        assert await connection.fetchval("SELECT count(*) FROM users") == 0
    # Where no secret is set, nobody signs in; without a default currency nobody is given a wallet.
    async with run_proxy(settings) as without:
        ada = Client(session, without.base_url, token_of("ada"))
        assert await ada.code("GET", "/v1/wallet") == (401, "invalid_api_key")
    async with run_proxy(with_tokens(settings, default_currency="")) as poor:
        ada = Client(session, poor.base_url, token_of("ada"))
        assert await ada.code("GET", "/v1/wallet") == (402, "insufficient_funds")


async def test_limits_and_caps_of_a_person_hold_without_a_key(
    proxy: Running, session: aiohttp.ClientSession, office: Office
) -> None:
    ada = Client(session, proxy.base_url, token_of("ada"))
    _, wallet = await ada.ask("GET", "/v1/wallet")
    async with office.database.connection() as connection:
        user_id = await connection.fetchval(
            "UPDATE users SET requests_per_min = 3 WHERE subject = 'ada' RETURNING id"
        )
    await office.wallets.credit(UUID(wallet["id"]), 5_000 * NANO, reason="top-up")
    await office.cool_user(user_id)
    async with asyncio.timeout(2):
        while (await ada.ask("GET", "/v1/models"))[0] != 200:
            await asyncio.sleep(0.02)
    await asyncio.sleep(0.9)  # what was cached before the limit was set
    statuses = [(await ada.ask("POST", "/v1/chat/completions", CHAT))[0] for _ in range(5)]
    assert statuses == [200, 200, 200, 429, 429]
    await Caps(office.database).set_caps("user", user_id, {"total": 0})
    room = Keys(office.database, office.settings.auth, office.settings.limits)
    made = await room.create(UUID(wallet["id"]))
    with_key = Client(session, proxy.base_url, made.secret)
    async with asyncio.timeout(3):
        while await with_key.code("POST", "/v1/chat/completions", CHAT) not in (
            (402, "cap_exceeded"),
            (429, "rate_limit_exceeded"),
        ):
            await asyncio.sleep(0.05)
    await proxy.quiet()
    await check_books(office)
