"""The operator's API: nobody without the token, everything audited, and its effect on calls at once."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import pytest
from pydantic import SecretStr

from billing.errors import NotFoundError
from billing.monitoring.audit import Audit
from config.settings import Settings
from proxy.operator.endpoints import ADMIN
from scripts.office import Office
from tests.proxy.account.test_keys import CHAT, Client
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, sync_models
from tests.support.running import Running, run_proxy

TOKEN = "the operator's token, long enough"


def with_admin(settings: Settings, token: str = TOKEN) -> Settings:
    return settings.model_copy(
        update={
            "admin": settings.admin.model_copy(update={"token": SecretStr(token)}),
            "limits": settings.limits.model_copy(update={"auth_failures_per_min": 0}),
        }
    )


@pytest.fixture
async def proxy(settings: Settings, office: Office) -> AsyncIterator[Running]:
    await sync_models(office)
    async with run_proxy(with_admin(settings)) as running:
        yield running


@pytest.fixture
async def payer(office: Office) -> Payer:
    return await make_payer(office)


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as opened:
        yield opened


@pytest.fixture
async def admin(proxy: Running, session: aiohttp.ClientSession) -> Client:
    return Client(session, proxy.base_url, TOKEN)


@pytest.fixture
async def person(proxy: Running, session: aiohttp.ClientSession, payer: Payer) -> Client:
    return Client(session, proxy.base_url, payer.secret)


async def wait_for(client: Client, expected: tuple[int, str] | int) -> None:
    """Until a call is answered so; a change is at work on every worker within a moment."""
    async with asyncio.timeout(3):
        while True:
            status, answer = await client.ask("POST", "/v1/chat/completions", CHAT)
            found = status if isinstance(expected, int) else (status, answer.get("error", {}).get("code"))
            if found == expected:
                return
            await asyncio.sleep(0.02)


async def test_nobody_without_the_token(
    settings: Settings, proxy: Running, admin: Client, payer: Payer, office: Office
) -> None:
    """Every path, with no token, a wrong one, a person's key, and parts of the token."""
    assert len(ADMIN) > 25
    for route in ADMIN:
        path = (
            route.path.replace("{user}", str(payer.user_id))
            .replace("{wallet}", str(payer.wallet_id))
            .replace("{key}", str(payer.key_id))
            .replace("{call}", str(uuid4()))
        )
        for secret in ("", "wrong", payer.secret, TOKEN[:-1], TOKEN + "x", TOKEN.upper()):
            outsider = admin.with_secret(secret)
            assert await outsider.code(route.method, path, {}) == (401, "invalid_api_key"), (path, secret)
    for path in ("/admin", "/admin/", "/admin/nothing", "/%61dmin/users", "/admin/users/../users"):
        assert (await admin.with_secret("wrong").ask("GET", path))[0] in (401, 404), path
        assert "data" not in (await admin.with_secret("wrong").ask("GET", path))[1]
    assert (await admin.ask("GET", "/admin/nothing"))[0] == 404
    assert await admin.code("POST", "/v1/chat/completions", CHAT) == (401, "invalid_api_key")
    async with run_proxy(with_admin(settings, "")) as without:
        for secret in ("", TOKEN):
            outsider = Client(admin._session, without.base_url, secret)
            assert await outsider.code("GET", "/admin/users") == (403, "not_permitted")


async def test_a_person_from_nothing_to_a_call(admin: Client, office: Office, proxy: Running) -> None:
    status, user = await admin.ask("POST", "/admin/users", {"email": "ada@example.com", "subject": "ada"})
    assert (status, user["status"], user["subject"]) == (201, "active", "ada")
    status, wallet = await admin.ask(
        "POST", "/admin/wallets", {"user": "ada@example.com", "currency": "USD", "overdraft": "0.5"}
    )
    assert (status, wallet["overdraft"], wallet["user_id"]) == (201, "0.5", user["id"])
    path = f"/admin/wallets/{wallet['id']}"
    money = {"amount": "10", "reason": "welcome"}
    status, credit = await admin.ask("POST", f"{path}/credits", money, **{"Idempotency-Key": "one"})
    assert (status, credit["posted"]) == (201, "10")
    _, again = await admin.ask("POST", f"{path}/credits", money, **{"Idempotency-Key": "one"})
    assert (again["transaction_id"], again["posted"]) == (credit["transaction_id"], "10")
    status, key = await admin.ask(
        "POST", "/admin/keys", {"wallet_id": wallet["id"], "name": "first", "caps": {"day": "5"}}
    )
    assert status == 201
    ada = admin.with_secret(key["secret"])
    assert await ada.call() == 200
    await proxy.quiet()

    _, shown = await admin.ask("GET", f"/admin/users/{user['id']}")
    assert [item["id"] for item in shown["wallets"]] == [wallet["id"]]
    _, listed = await admin.ask("GET", f"/admin/keys?wallet={wallet['id']}")
    assert [item["id"] for item in listed["data"]] == [key["id"]]
    async with office.database.connection() as connection:
        call_id = await connection.fetchval("SELECT id FROM calls")
    _, call = await admin.ask("GET", f"/admin/calls/{call_id}")
    assert (call["state"], call["wallet_id"]) == ("settled", wallet["id"])
    assert float(call["charge"]) > 0
    status, refunded = await admin.ask("POST", f"/admin/calls/{call_id}/refund", {"reason": "sorry"})
    assert (status, refunded["refunded"], refunded["charge"]) == (200, call["charge"], "0")
    decided = {"cost_usd": "1", "reason": "settled already"}
    assert (await admin.ask("POST", f"/admin/calls/{call_id}/settle", decided))[0] == 400
    assert (await admin.ask("GET", path))[1]["posted"] == "10"
    _, quota = await admin.ask("GET", "/admin/quota")
    assert quota["consumed_usd"] == call["cost_usd"]
    status, report = await admin.ask("POST", "/admin/reconciliation")
    assert (status, report["drift_usd"]) == (200, "0")
    assert len((await admin.ask("GET", "/admin/reconciliation"))[1]["data"]) == 1
    status, turned = await admin.ask("POST", f"/admin/keys/{key['id']}/rotate", {"overlap_s": 0})
    assert (status, turned["id"]) == (200, key["id"])
    assert (await admin.ask("DELETE", f"/admin/keys/{key['id']}"))[0] == 200
    await wait_for(admin.with_secret(turned["secret"]), (401, "invalid_api_key"))
    await check_books(office)


async def test_a_frozen_wallet_admits_nothing(
    admin: Client, person: Client, payer: Payer, proxy: Running, office: Office
) -> None:
    path = f"/admin/wallets/{payer.wallet_id}"
    await wait_for(person, 200)
    status, wallet = await admin.ask("POST", f"{path}/freeze", {"reason": "a dispute"})
    assert (status, wallet["status"]) == (200, "frozen")
    await wait_for(person, (403, "wallet_frozen"))
    status, wallet = await admin.ask("POST", f"{path}/unfreeze")
    assert (status, wallet["status"]) == (200, "active")
    await wait_for(person, 200)
    rows = await Audit(office.database).list_rows(wallet_id=payer.wallet_id, actor="admin")
    reasons = [row["after"] and row["after"]["status_reason"] for row in rows]
    assert reasons == ["a dispute", ""]
    await proxy.quiet()
    await check_books(office)


async def test_an_overdraft_lets_a_wallet_go_below_zero(
    admin: Client, session: aiohttp.ClientSession, proxy: Running, office: Office
) -> None:
    poor = await make_payer(office, amount="0")
    client = Client(session, proxy.base_url, poor.secret)
    await wait_for(client, (402, "insufficient_funds"))
    path = f"/admin/wallets/{poor.wallet_id}"
    assert (await admin.ask("PATCH", path, {"overdraft": "5"}))[1]["overdraft"] == "5"
    await wait_for(client, 200)
    assert (await admin.ask("PATCH", path, {"overdraft": 0}))[0] == 200
    await wait_for(client, (402, "insufficient_funds"))
    await proxy.quiet()
    await check_books(office)


@pytest.mark.parametrize("scope", ["users", "wallets", "keys"])
async def test_ceilings_that_a_person_cannot_lift(
    admin: Client, person: Client, payer: Payer, scope: str, proxy: Running, office: Office
) -> None:
    ids = {"users": payer.user_id, "wallets": payer.wallet_id, "keys": payer.key_id}
    path = f"/admin/{scope}/{ids[scope]}/caps"
    status, shown = await admin.ask("PUT", path, {"total": "0"})
    assert (status, shown["caps"]["total"]["limit_by_operator"]) == (200, "0")
    await wait_for(person, (402, "cap_exceeded"))
    assert (await person.ask("PUT", "/v1/wallet/caps", {"total": None}))[0] in (200, 403)
    assert await person.code("POST", "/v1/chat/completions", CHAT) == (402, "cap_exceeded")
    assert (await admin.ask("GET", path))[1] == shown
    assert (await admin.ask("PUT", path, {"total": None}))[1]["caps"] == {}
    await wait_for(person, 200)
    await proxy.quiet()
    await check_books(office)


async def test_a_person_is_disabled_and_limited(admin: Client, person: Client, payer: Payer) -> None:
    path = f"/admin/users/{payer.user_id}"
    _, user = await admin.ask("PATCH", path, {"status": "disabled"})
    assert user["status"] == "disabled"
    await wait_for(person, (401, "invalid_api_key"))
    change = {"status": "active", "requests_per_min": 1, "timezone": "Africa/Lagos", "week_starts": 7}
    _, user = await admin.ask("PATCH", path, change)
    assert {name: user[name] for name in change} == change
    await wait_for(person, 200)
    await wait_for(person, (429, "rate_limit_exceeded"))
    _, user = await admin.ask("PATCH", path, {"requests_per_min": 0})
    assert user["requests_per_min"] is None
    await wait_for(person, 200)


async def test_every_change_is_audited_with_its_request(admin: Client, payer: Payer, office: Office) -> None:
    changes = [
        ("PATCH", f"/admin/users/{payer.user_id}", {"calls_in_flight": 7}),
        ("POST", f"/admin/wallets/{payer.wallet_id}/credits", {"amount": 1, "reason": "r"}),
        ("PUT", f"/admin/keys/{payer.key_id}/caps", {"day": "1"}),
        ("DELETE", f"/admin/keys/{payer.key_id}", None),
        ("POST", "/admin/users", {"email": "new@example.com"}),
    ]
    audit = Audit(office.database)
    for method, path, body in changes:
        before = len(await audit.list_rows(actor="admin"))
        url = admin._base_url + path
        async with admin._session.request(
            method, url, json=body, headers={"Authorization": f"Bearer {TOKEN}"}
        ) as response:
            assert response.status in (200, 201), await response.text()
            request_id = response.headers["x-request-id"]
        rows = (await audit.list_rows(actor="admin"))[before:]
        assert rows, path
        assert {row["request_id"] for row in rows} == {request_id}
        assert {row["db_role"] for row in rows} == {"tuma_operator"}
    _, shown = await admin.ask("GET", f"/admin/audit?wallet={payer.wallet_id}&actor=admin&limit=50")
    assert {row["subject"] for row in shown["data"]} == {"journal_tx", "spending_caps", "api_keys"}
    assert TOKEN not in str(shown)
    status, verdict = await admin.ask("GET", "/admin/audit/verify")
    assert (status, verdict["ok"]) == (200, True)
    status, again = await admin.ask("GET", f"/admin/audit/verify?expect={verdict['head']}")
    assert (status, again["ok"]) == (200, True)


async def test_what_a_person_does_is_audited_as_theirs(person: Client, payer: Payer, office: Office) -> None:
    _, made = await person.ask("POST", "/v1/keys", {"name": "mine"})
    await person.ask("PUT", "/v1/wallet/caps", {"day": "1"})
    rows = await Audit(office.database).list_rows(actor=f"key:{payer.key_id}")
    assert [(row["subject"], row["action"], row["db_role"]) for row in rows] == [
        ("api_keys", "created", "tuma_api"),
        ("spending_caps", "created", "tuma_api"),
    ]
    assert rows[0]["subject_id"] == made["id"]
    assert made["secret"] not in str(rows)
    assert all(row["request_id"] for row in rows)


BAD: list[tuple[str, str, Any]] = [
    ("POST", "/admin/users", {}),
    ("POST", "/admin/users", {"email": "nonsense"}),
    ("POST", "/admin/users", {"email": "x" * 400 + "@example.com"}),
    ("POST", "/admin/wallets", {"user": "nobody@example.com", "currency": "USD"}),
    ("POST", "/admin/wallets", {"user": "nobody", "currency": "USD"}),
    ("POST", "/admin/wallets", {"user": "{user}", "currency": "XXQ"}),
    ("POST", "/admin/wallets", {"user": "{user}", "currency": "usd"}),
    ("POST", "/admin/wallets", {"user": "{user}", "currency": "USD", "overdraft": -1}),
    ("PATCH", "/admin/wallets/{wallet}", {"overdraft": "1e3"}),
    ("PATCH", "/admin/wallets/{wallet}", {"posted": "5"}),
    ("PATCH", "/admin/wallets/{wallet}", {}),
    ("POST", "/admin/wallets/{wallet}/credits", {"amount": "0", "reason": "r"}),
    ("POST", "/admin/wallets/{wallet}/credits", {"amount": "5"}),
    ("POST", "/admin/wallets/{wallet}/credits", {"amount": "5", "reason": " "}),
    ("POST", "/admin/wallets/{wallet}/credits", {"amount": "9" * 20, "reason": "r"}),
    ("PATCH", "/admin/users/{user}", {"status": "gone"}),
    ("PATCH", "/admin/users/{user}", {"timezone": "Mars/Olympus"}),
    ("PATCH", "/admin/users/{user}", {"week_starts": 8}),
    ("PATCH", "/admin/users/{user}", {"requests_per_min": -1}),
    ("PUT", "/admin/wallets/{wallet}/caps", {"year": 1}),
    ("POST", "/admin/keys", {"name": "x"}),
    ("POST", "/admin/keys/{key}/rotate", {"overlap_s": -1}),
    ("GET", "/admin/users?limit=0", None),
    ("GET", "/admin/users?limit=", None),
    ("GET", "/admin/keys?limit=", None),
    ("GET", "/admin/wallets?user=nobody", None),
    ("GET", "/admin/audit?since=yesterday", None),
    ("GET", "/admin/audit?limit=100000", None),
    ("GET", "/admin/audit/verify?expect=nonsense", None),
    ("GET", "/admin/users?email=%00", None),
    ("GET", "/admin/audit?actor=%00", None),
    ("POST", "/admin/wallets/{wallet}/freeze", {"reason": "a\u0000b"}),
    ("POST", "/admin/users", {"email": "a\ud800@example.com"}),
    ("POST", "/admin/users", b'{"email": "a\\ud800@example.com"}'),
]


@pytest.mark.parametrize(("method", "path", "body"), BAD)
async def test_bad_input_changes_nothing(
    admin: Client, payer: Payer, office: Office, method: str, path: str, body: Any
) -> None:
    def filled(text: str) -> str:
        for name, value in (("user", payer.user_id), ("wallet", payer.wallet_id), ("key", payer.key_id)):
            text = text.replace("{" + name + "}", str(value))
        return text

    if isinstance(body, dict):
        body = {name: filled(value) if isinstance(value, str) else value for name, value in body.items()}
    status, answer = await admin.ask(method, filled(path), body)
    assert status in (400, 404), answer
    assert answer["error"]["message"]
    assert await Audit(office.database).list_rows(actor="admin") == []


async def test_what_is_not_there(admin: Client) -> None:
    nobody = uuid4()
    for route in ADMIN:
        path = route.path
        if "{" not in path:
            continue
        for name in ("user", "wallet", "key", "call"):
            path = path.replace("{" + name + "}", str(nobody))
        bodies: dict[str, Any] = {
            "credits": {"amount": "1", "reason": "r"},
            "refund": {"reason": "r"},
            "settle": {"cost_usd": "1", "reason": "r"},
            "caps": {"day": "1"},
        }
        body = bodies.get(path.rpartition("/")[2], {"overdraft": "1"} if "wallets" in path else {})
        if path.endswith(("freeze", "rotate")):
            body = {}
        if route.method == "PATCH" and "users" in path:
            body = {"status": "active"}
        found = await admin.code(route.method, path, None if route.method in ("GET", "DELETE") else body)
        assert found == (404, "not_found"), (route.method, path)


async def test_the_rooms_refuse_what_is_not_there(office: Office) -> None:
    for work in (
        office.wallets.set_wallet(uuid4(), status="frozen"),
        office.wallets.set_user(uuid4(), status="disabled"),
        office.wallets.describe_user(UUID(int=1)),
    ):
        with pytest.raises(NotFoundError):
            await work
