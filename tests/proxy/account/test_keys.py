"""Keys over HTTP: made, bound, rotated, revoked; nobody reaches another's, and a bound key cannot unbind itself."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import openai
import pytest

from billing.errors import NotFoundError
from billing.identity.key import KeyRules, Owner
from billing.identity.key_secret import is_well_formed, make_secret, name_pepper
from billing.identity.keys import Keys
from billing.wallets.caps import Caps
from config.settings import Settings
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, sync_models
from tests.support.running import Running, run_proxy
from tests.support.settings import PEPPER

MODEL = "openai/gpt-4o-mini"
OTHER = "openai/gpt-4o"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


class Client:
    """Calls the proxy with one secret."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, secret: str) -> None:
        self._session = session
        self._base_url = base_url
        self.secret = secret

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        head = {"Authorization": f"Bearer {self.secret}", **headers}
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        async with self._session.request(method, self._base_url + path, data=data, headers=head) as response:
            assert response.headers["x-request-id"]
            answer = await response.json()
            return response.status, answer

    async def code(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        status, answer = await self.ask(method, path, body, **headers)
        return status, answer["error"]["code"]

    async def call(self, **more: Any) -> int:
        status, _ = await self.ask("POST", "/v1/chat/completions", {**CHAT, **more})
        return status

    def with_secret(self, secret: str) -> "Client":
        return Client(self._session, self._base_url, secret)


@pytest.fixture
async def payer(office: Office) -> Payer:
    return await make_payer(office)


@asynccontextmanager
async def client_of(running: Running, secret: str) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session:
        yield Client(session, running.base_url, secret)


@pytest.fixture
async def client(proxy: Running, payer: Payer) -> AsyncIterator[Client]:
    async with client_of(proxy, payer.secret) as opened:
        yield opened


def room_of(office: Office) -> Keys:
    return Keys(office.database, office.settings.auth, office.settings.limits)


async def test_a_key_is_made_used_listed_and_revoked(client: Client, payer: Payer, office: Office) -> None:
    status, made = await client.ask(
        "POST", "/v1/keys", {"name": "laptop", "caps": {"day": "1.50", "call": 1}}
    )
    assert status == 201
    assert is_well_formed(made["secret"])
    assert made["caps"]["day"]["limit"] == "1.5"
    assert made["caps"]["day"]["limit_by_operator"] is None
    own = client.with_secret(made["secret"])
    assert await own.call() == 200

    status, listed = await client.ask("GET", "/v1/keys")
    assert status == 200
    assert [key["id"] for key in listed["data"]] == [str(payer.key_id), made["id"]]
    assert made["secret"] not in json.dumps(listed)
    assert listed["data"][1]["hint"] == made["secret"][:12] + "…"

    status, gone = await client.ask("DELETE", f"/v1/keys/{made['id']}")
    assert (status, gone["deleted"]) == (200, True)
    assert await own.code("POST", "/v1/chat/completions", CHAT) == (401, "invalid_api_key")
    assert (await client.ask("DELETE", f"/v1/keys?id={made['id']}"))[0] == 200
    assert [key["id"] for key in (await client.ask("GET", "/v1/keys"))[1]["data"]] == [str(payer.key_id)]
    everything = (await client.ask("GET", "/v1/keys?revoked=true"))[1]["data"]
    assert [key["status"] for key in everything] == ["active", "revoked"]
    async with office.database.connection() as connection:
        kept = await connection.fetch("SELECT row_to_json(k)::text FROM api_keys k")
    assert not any(made["secret"] in row[0] for row in kept)


async def test_pages_of_keys(client: Client) -> None:
    made = [(await client.ask("POST", "/v1/keys", {"name": str(i)}))[1]["id"] for i in range(3)]
    status, first = await client.ask("GET", "/v1/keys?limit=2")
    assert (status, first["has_more"], len(first["data"])) == (200, True, 2)
    _, second = await client.ask("GET", f"/v1/keys?limit=2&after={first['last_id']}")
    assert second["has_more"] is False
    assert [key["id"] for key in [*first["data"], *second["data"]]][1:] == made
    assert (await client.ask("GET", "/v1/keys?limit=1&limit=2"))[0] == 400
    for limit in ("0", "101", "x", "-1", "1e3", "9" * 50):
        assert (await client.ask("GET", f"/v1/keys?limit={limit}"))[0] == 400


@pytest.mark.parametrize(
    "form",
    [
        [],
        {"nonsense": 1},
        {"caps": {"year": "1"}},
        {"caps": {"day": "-1"}},
        {"caps": {"day": "1.0000000001"}},
        {"caps": {"day": True}},
        {"caps": {"day": "1e5"}},
        {"caps": {"day": "9" * 30}},
        {"caps": {"day": []}},
        {"name": "x" * 201},
        {"name": "line\nbreak"},
        {"name": 5},
        {"expires_at": "2001-01-01T00:00:00Z"},
        {"expires_at": "2999-01-01T00:00:00"},
        {"expires_at": "soon"},
        {"models": []},
        {"models": ["a*b"]},
        {"models": [""]},
        {"models": "openai/*"},
        {"networks": []},
        {"networks": ["10.0.0.1/8"]},
        {"networks": ["here"]},
        {"networks": [5]},
        {"networks": ["5"]},
        {"expires_at": 4102444800},
        {"expires_at": "4102444800"},
        {"requests_per_min": 0},
        {"requests_per_min": 1.5},
        {"requests_per_min": "5"},
        {"tokens_per_min": 2**40},
        {"calls_in_flight": -1},
        {"manages": "yes"},
        {"manages": True, "models": [MODEL]},
        {"wallet_id": "x"},
        b"{",
        b'{"name": "a", "name": "b"}',
        b'{"requests_per_min": NaN}',
        b"\xff",
        b"[" * 100_000,
    ],
)
async def test_forms_that_make_no_key(client: Client, form: Any) -> None:
    status, answer = await client.ask("POST", "/v1/keys", form)
    assert status == 400, answer
    assert answer["error"]["type"] == "invalid_request_error"
    assert len(answer["error"]["message"]) < 500
    assert len((await client.ask("GET", "/v1/keys"))[1]["data"]) == 1


BOUND: list[dict[str, Any]] = [
    {"models": [MODEL]},
    {"networks": ["127.0.0.0/8"]},
    {"expires_at": (datetime.now(UTC) + timedelta(days=1)).isoformat()},
    {"requests_per_min": 100},
    {"tokens_per_min": 100_000},
    {"calls_in_flight": 5},
    {"caps": {"day": "5"}},
    {"manages": False},
]


@pytest.mark.parametrize("bound", BOUND)
async def test_a_bound_key_cannot_unbind_itself(client: Client, payer: Payer, bound: dict[str, Any]) -> None:
    _, made = await client.ask("POST", "/v1/keys", bound)
    own = client.with_secret(made["secret"])
    assert await own.call() == 200
    for method, path, body in [
        ("POST", "/v1/keys", {}),
        ("GET", "/v1/keys", None),
        ("GET", f"/v1/keys/{payer.key_id}", None),
        ("DELETE", f"/v1/keys/{payer.key_id}", None),
        ("POST", f"/v1/keys/{payer.key_id}/rotate", {}),
        ("POST", f"/v1/keys/{made['id']}/rotate", {}),
        ("PUT", "/v1/wallet/caps", {"day": None}),
    ]:
        assert await own.code(method, path, body) == (403, "not_permitted"), (method, path)
    assert (await own.ask("GET", f"/v1/keys/{made['id']}"))[0] == 200
    assert (await own.ask("GET", "/v1/wallet/caps"))[0] == 200
    assert (await own.ask("DELETE", f"/v1/keys/{made['id']}"))[0] == 200  # whoever finds it may end it
    assert await client.call() == 200


async def test_a_key_that_is_bound_later_stops_managing(client: Client, payer: Payer, office: Office) -> None:
    assert (await client.ask("GET", "/v1/keys"))[0] == 200
    await Caps(office.database).set_caps("key", payer.key_id, {"day": 10**9})
    async with asyncio.timeout(2):
        while (await client.ask("GET", "/v1/keys"))[0] != 403:
            await asyncio.sleep(0.02)


async def test_nobody_reaches_the_keys_of_another(client: Client, payer: Payer, office: Office) -> None:
    other = await make_payer(office)
    second = await office.wallets.create_wallet(str(payer.user_id), currency="NGN")
    elsewhere = await room_of(office).create(second)  # the same person's, on another wallet than the key's
    for key_id in (other.key_id, elsewhere.id, uuid4()):
        for method, path in [
            ("GET", f"/v1/keys/{key_id}"),
            ("DELETE", f"/v1/keys/{key_id}"),
            ("POST", f"/v1/keys/{key_id}/rotate"),
        ]:
            assert await client.code(method, path) == (404, "not_found")
    for wallet_id in (other.wallet_id, second, uuid4()):
        assert await client.code("POST", "/v1/keys", {"wallet_id": str(wallet_id)}) == (404, "not_found")
    with pytest.raises(NotFoundError):
        await room_of(office).create(other.wallet_id, owner=Owner(payer.user_id))
    listed = (await client.ask("GET", "/v1/keys"))[1]["data"]
    assert [key["id"] for key in listed] == [str(payer.key_id)]
    everybodys = {key.id for key in await room_of(office).find_keys()}
    assert everybodys == {payer.key_id, other.key_id, elsewhere.id}  # none was made by the way
    assert await client.with_secret(other.secret).call() == 200
    for path in ("/v1/keys/x", "/v1/keys/%00", "/v1/keys/" + "9" * 300):
        assert await client.code("GET", path) == (404, "not_found")


async def test_a_user_has_so_many_keys(settings: Settings, office: Office, payer: Payer) -> None:
    await sync_models(office)
    few = settings.model_copy(update={"auth": settings.auth.model_copy(update={"keys_max": 3})})
    async with run_proxy(few) as running, client_of(running, payer.secret) as client:
        made = await asyncio.gather(*(client.ask("POST", "/v1/keys", {}) for _ in range(8)))
        assert sorted(status for status, _ in made) == [201, 201] + [400] * 6
        used = next(key["id"] for status, key in made if status == 201)
        assert (await client.ask("DELETE", f"/v1/keys/{used}"))[0] == 200
        assert (await client.ask("POST", "/v1/keys", {}))[0] == 201


async def test_a_rotated_key_overlaps(client: Client, payer: Payer, office: Office) -> None:
    _, made = await client.ask("POST", "/v1/keys", {"caps": {"day": "5"}})
    status, turned = await client.ask("POST", f"/v1/keys/{made['id']}/rotate", {"overlap_s": 1.2})
    assert status == 200
    assert turned["id"] == made["id"]
    assert turned["secret"] != made["secret"]
    assert turned["caps"]["day"]["limit"] == "5"
    old, new = client.with_secret(made["secret"]), client.with_secret(turned["secret"])
    assert [await old.call(), await new.call()] == [200, 200]
    ends = datetime.fromisoformat(turned["previous_secret_until"])
    await asyncio.sleep((ends - datetime.now(UTC)).total_seconds() + 0.05)
    assert [await old.call(), await new.call()] == [401, 200]

    _, again = await client.ask("POST", f"/v1/keys/{made['id']}/rotate", {"overlap_s": 0})
    async with asyncio.timeout(1):
        while await new.call() != 401:
            await asyncio.sleep(0.02)
    assert await client.with_secret(again["secret"]).call() == 200
    overlaps: list[Any] = [1e9, -1, True, "5", [], {}]
    for overlap in overlaps:
        assert (await client.ask("POST", f"/v1/keys/{made['id']}/rotate", {"overlap_s": overlap}))[0] == 400
    await client.ask("DELETE", f"/v1/keys/{made['id']}")
    assert (await client.ask("POST", f"/v1/keys/{made['id']}/rotate", {}))[0] == 400
    await check_books(office)


@pytest.mark.calendar
async def test_a_key_expires_to_the_second(client: Client, office: Office, payer: Payer) -> None:
    ends = datetime.now(UTC) + timedelta(seconds=1.5)
    made = await room_of(office).create(payer.wallet_id, KeyRules(expires_at=ends))
    own = client.with_secret(made.secret)
    late = 0
    while datetime.now(UTC) < ends + timedelta(seconds=0.3):
        before = datetime.now(UTC)
        status, _ = await own.ask("GET", "/v1/wallet")
        if before > ends + timedelta(milliseconds=20):  # the two clocks are one machine's
            assert status == 401
            late += 1
        elif datetime.now(UTC) < ends - timedelta(
            milliseconds=100
        ):  # by as much as a question to Postgres takes
            assert status == 200
        await asyncio.sleep(0.02)
    assert late > 3
    assert (await room_of(office).get_key(made.id)).status == "expired"


async def test_a_key_for_some_models(client: Client, proxy: Running, office: Office, payer: Payer) -> None:
    made = await room_of(office).create(payer.wallet_id, KeyRules(models=[MODEL, "anthropic/*"]))
    own = client.with_secret(made.secret)
    listed = {model["id"] for model in (await own.ask("GET", "/v1/models"))[1]["data"]}
    assert MODEL in listed
    assert all(name == MODEL or name.startswith("anthropic/") for name in listed)
    assert len(listed) < len((await client.ask("GET", "/v1/models"))[1]["data"])
    assert (await own.ask("GET", f"/v1/models/{MODEL}"))[0] == 200
    assert await own.code("GET", f"/v1/models/{OTHER}") == (403, "model_not_allowed")
    refused = (403, "model_not_allowed")
    assert await own.code("POST", "/v1/chat/completions", {**CHAT, "model": OTHER}) == refused
    assert await own.code("POST", "/v1/chat/completions", {**CHAT, "models": [OTHER]}) == refused
    assert await own.code("POST", "/v1/chat/completions", {**CHAT, "model": MODEL.upper()}) == refused
    assert await own.call(models=[MODEL]) == 200
    sdk = openai.AsyncOpenAI(base_url=f"{proxy.base_url}/v1", api_key=made.secret, max_retries=0)
    async with sdk:
        with pytest.raises(openai.PermissionDeniedError, match="may not call"):
            await sdk.chat.completions.create(model=OTHER, messages=[{"role": "user", "content": "hi"}])


async def test_a_key_for_some_networks(
    settings: Settings, client: Client, office: Office, payer: Payer
) -> None:
    from ipaddress import ip_network

    room = room_of(office)
    near = await room.create(payer.wallet_id, KeyRules(networks=[ip_network("127.0.0.0/8")]))
    far = await room.create(payer.wallet_id, KeyRules(networks=[ip_network("10.1.0.0/16")]))
    assert await client.with_secret(near.secret).call() == 200
    from_far = client.with_secret(far.secret)
    refused = (403, "ip_not_allowed")
    assert await from_far.code("POST", "/v1/chat/completions", CHAT) == refused
    assert await from_far.code("GET", "/v1/wallet", None, **{"X-Forwarded-For": "10.1.2.3"}) == refused

    behind = settings.model_copy(
        update={"auth": settings.auth.model_copy(update={"trusted_proxies": "127.0.0.1, 192.168.0.0/16"})}
    )
    async with run_proxy(behind) as running, client_of(running, far.secret) as proxied:
        for hops, allowed in [
            ("10.1.2.3", True),
            ("10.1.2.3, 192.168.4.4", True),
            ("10.1.2.3:4711", True),
            ("::ffff:10.1.2.3", True),
            ("10.1.2.3, 8.8.8.8", False),  # the first is what a client made up
            ("8.8.8.8, 192.168.4.4", False),
            ("10.1.2.3, nonsense", False),
            ("", False),
        ]:
            status, _ = await proxied.ask("GET", "/v1/wallet", None, **{"X-Forwarded-For": hops})
            assert status == (200 if allowed else 403), hops


async def test_peppers_are_changed_while_keys_work(settings: Settings, office: Office, payer: Payer) -> None:
    """A new pepper, the old one beside it: keys go on working, and are kept under the new one once used."""
    auth = settings.auth.model_copy(
        update={
            "key_pepper": type(settings.auth.key_pepper)("another pepper, as long as the first"),
            "old_key_peppers": (type(settings.auth.key_pepper)("one from long ago"),),
        }
    )
    without = Keys(office.database, auth, settings.limits)
    from billing.errors import InvalidKeyError

    with pytest.raises(InvalidKeyError):
        await without.authenticate(payer.secret)
    secret_type = type(settings.auth.key_pepper)
    with_old = Keys(
        office.database, auth.model_copy(update={"old_key_peppers": (secret_type(PEPPER),)}), settings.limits
    )
    assert (await with_old.get_key(payer.key_id)).pepper == name_pepper(PEPPER.encode())
    assert (await with_old.authenticate(payer.secret)).key_id == payer.key_id
    assert (await with_old.get_key(payer.key_id)).pepper == with_old.pepper
    await without.forget("*")
    assert (await without.authenticate(payer.secret)).key_id == payer.key_id
    with pytest.raises(InvalidKeyError):
        await room_of(office).authenticate(payer.secret)


async def test_a_mistyped_secret_asks_nothing_of_postgres(office: Office, payer: Payer) -> None:
    from billing.errors import InvalidKeyError

    room = room_of(office)
    asked = 0
    find = room._find

    async def counted(digests: list[bytes]) -> Any:
        nonlocal asked
        asked += 1
        return await find(digests)

    room._find = counted  # type: ignore[method-assign]
    for index in (10, 30, len(payer.secret) - 1):
        wrong = "A" if payer.secret[index] != "A" else "B"
        with pytest.raises(InvalidKeyError):
            await room.authenticate(payer.secret[:index] + wrong + payer.secret[index + 1 :])
    assert asked == 0
    with pytest.raises(InvalidKeyError):
        await room.authenticate(make_secret())
    assert asked == 1
    await asyncio.gather(*(room.authenticate(payer.secret) for _ in range(50)))
    assert asked == 2  # all of them waited for one answer


async def test_a_revocation_overtakes_a_lookup(office: Office, payer: Payer) -> None:
    """What was read before a key was revoked is not kept after."""
    room = room_of(office)
    find = room._find

    async def overtaken(digests: list[bytes]) -> Any:
        known = await find(digests)
        await room.revoke(payer.key_id)
        await room.forget(str(payer.key_id))
        return known

    room._find = overtaken  # type: ignore[method-assign]
    await room.authenticate(payer.secret)  # it began before
    assert not len(room.callers)


async def test_use_is_noted_to_the_minute(
    client: Client, proxy: Running, payer: Payer, office: Office
) -> None:
    assert await client.call() == 200
    await proxy.services.keys.note_used()
    first = (await room_of(office).get_key(payer.key_id)).last_used_at
    assert first is not None
    assert abs((datetime.now(UTC) - first).total_seconds()) < 5
    assert await client.call() == 200
    await proxy.services.keys.note_used()
    assert (await room_of(office).get_key(payer.key_id)).last_used_at == first


async def test_caps_of_ones_own_wallet(client: Client, payer: Payer, office: Office) -> None:
    await Caps(office.database).set_caps("wallet", payer.wallet_id, {"day": 5 * 10**9})
    status, shown = await client.ask("PUT", "/v1/wallet/caps", b'{"day": "7.5", "call": "0.25", "month": 30}')
    assert status == 200
    day = shown["caps"]["day"]
    assert (day["limit"], day["limit_by_user"], day["limit_by_operator"]) == ("5", "7.5", "5")
    assert shown["caps"]["call"]["limit"] == "0.25"
    _, shown = await client.ask("PUT", "/v1/wallet/caps", {"day": None, "call": None})
    assert (shown["caps"]["day"]["limit"], shown["caps"]["day"]["limit_by_user"]) == ("5", None)
    assert set(shown["caps"]) == {"day", "month"}
    assert (await client.ask("GET", "/v1/wallet/caps"))[1] == shown
    forms: list[Any] = [
        {"day": "x"},
        {"day": 7.5},
        {"year": "1"},
        {"day": -1},
        [],
        {"day": {"limit": "1"}},
        b"nonsense",
    ]
    for form in forms:
        assert (await client.ask("PUT", "/v1/wallet/caps", form))[0] == 400
    assert (await client.ask("PUT", "/v1/wallet/caps", {"call": "0"}))[0] == 200
    async with asyncio.timeout(2):
        while await client.code("POST", "/v1/chat/completions", CHAT) != (402, "cap_exceeded"):
            await asyncio.sleep(0.05)
    await check_books(office)


async def test_failures_of_an_address_are_limited(
    settings: Settings, office: Office, payer: Payer, sim: SimulatedProvider
) -> None:
    """Beyond the limit wrong keys are told when to come again; a good key from the same address is served."""
    await sync_models(office)
    few = settings.model_copy(
        update={"limits": settings.limits.model_copy(update={"auth_failures_per_min": 5})}
    )
    async with run_proxy(few) as one, run_proxy(few) as two, aiohttp.ClientSession() as session:
        statuses = []
        for index in range(12):
            url = f"{(one, two)[index % 2].base_url}/v1/models"
            head = {"Authorization": f"Bearer {make_secret()}"}
            async with session.get(url, headers=head) as response:
                statuses.append(response.status)
                if response.status == 429:
                    wait_ms = int(response.headers["retry-after-ms"])
                    assert 10_000 < wait_ms <= 12_001  # one of five per minute
                    assert int(response.headers["Retry-After"]) == -(-wait_ms // 1000)
        assert statuses == [401] * 5 + [429] * 7
        for running in (one, two):
            good = Client(session, running.base_url, payer.secret)
            assert await good.call() == 200
            answers = await asyncio.gather(
                *(good.with_secret(make_secret()).code("GET", "/v1/models") for _ in range(100)),
                *(good.ask("GET", "/v1/wallet") for _ in range(10)),
            )
            assert set(answers[:100]) == {(429, "rate_limit_exceeded")}


def test_secrets_have_a_checksum() -> None:
    secret = make_secret()
    assert len(secret) == 8 + 43 + 6
    assert is_well_formed(secret)
    assert not is_well_formed(secret[:-1] + ("a" if secret[-1] != "a" else "b"))
    assert is_well_formed(secret[:-6])  # as they were before
    assert not is_well_formed("sk-other-" + secret)
    assert not is_well_formed("sk-tuma-" + "x" * 500)


def test_an_id_is_no_secret() -> None:
    assert not is_well_formed(str(UUID(int=1)))
