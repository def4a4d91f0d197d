"""A person finds a call and reads how its charge came about, over HTTP; an operator by the command."""

import asyncio
import json
from collections.abc import AsyncIterator
from decimal import Decimal

import aiohttp
import pytest
from click.testing import CliRunner

from billing.calls.corrections import Corrections
from billing.ids import parse_id
from billing.reports.call_view import describe_call
from scripts.cli.main import main
from scripts.office import Office
from tests.billing.reports.test_explain import charged, follow
from tests.proxy.account.test_keys import CHAT, Client
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, set_rate
from tests.support.running import Running


@pytest.fixture
async def payer(office: Office) -> Payer:
    await set_rate(office, "NGN", "1612.345678", 275)
    return await make_payer(office, amount="5000", currency="NGN")


@pytest.fixture
async def client(
    payer: Payer, proxy: Running
) -> AsyncIterator[Client]:  # in this order: it starts with their rate
    async with aiohttp.ClientSession() as session:
        yield Client(session, proxy.base_url, payer.secret)


async def call_id_of_one(client: Client, **more: object) -> str:
    head = {"Authorization": f"Bearer {client.secret}"}
    url = client._base_url + "/v1/chat/completions"
    async with client._session.post(url, json={**CHAT, **more}, headers=head) as response:
        await response.read()
        assert response.status == 200
        return response.headers["x-request-id"]


async def test_a_charge_is_explained_to_who_paid_it(
    client: Client, proxy: Running, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    call_id = await call_id_of_one(client)
    await proxy.quiet()
    status, shown = await client.ask("GET", f"/v1/calls/{call_id}")
    assert status == 200
    assert follow(shown["explanation"]) == Decimal(shown["charge"]) > 0
    assert any("1612.345678 NGN per USD" in line for line in shown["explanation"])
    assert any(f"answer: {shown['generation_id']}." in line for line in shown["explanation"])

    corrections = Corrections(office.database, charge_estimates_upward=True)
    await corrections.refund(parse_id(call_id, "call"), amount_nano=None, reason="it was slow")
    _, shown = await client.ask("GET", f"/v1/calls/{call_id}")
    assert follow(shown["explanation"]) == Decimal(shown["charge"]) == 0
    assert [(item["kind"], item["description"]) for item in shown["changes"]] == [("refund", "it was slow")]

    monkeypatch.setenv("TUMA_POSTGRES__DSN", office.settings.postgres.dsn.get_secret_value())
    for flags in ([], ["--json"]):
        done = await asyncio.to_thread(CliRunner().invoke, main, ["calls", "show", call_id, *flags])
        assert done.exit_code == 0, done.output
        words = json.loads(done.stdout)["explanation"] if flags else done.stdout.splitlines()
        assert follow(words) == 0
    contract = (
        "id state cost_usd charge currency accuracy provider_cost_usd generation_id model tokens_prompt"
    )
    assert {*contract.split(), "tokens_completion"} <= json.loads(done.stdout).keys()
    await check_books(office)


async def test_another_finds_nothing(client: Client, proxy: Running, office: Office) -> None:
    call_id = await call_id_of_one(client)
    await proxy.quiet()
    other = client.with_secret((await make_payer(office)).secret)
    assert (await other.ask("GET", f"/v1/calls/{call_id}"))[0] == 404
    assert (await other.ask("GET", "/v1/calls"))[1]["data"] == []
    assert (await client.ask("GET", "/v1/calls/nonsense"))[0] == 404
    assert (await client.with_secret("").ask("GET", f"/v1/calls/{call_id}"))[0] == 401


@pytest.mark.calendar
async def test_a_call_is_found(client: Client, proxy: Running, payer: Payer) -> None:
    ids = [await call_id_of_one(client, stream=number % 2 == 0) for number in range(5)]
    await proxy.quiet()
    ids.reverse()

    async def listed(query: str = "") -> list[str]:
        status, answer = await client.ask("GET", f"/v1/calls?{query}")
        assert status == 200, answer
        return [item["id"] for item in answer["data"]]

    assert await listed() == ids
    pages, after = [], ""
    while True:
        _, answer = await client.ask("GET", f"/v1/calls?limit=2{after}")
        pages += [item["id"] for item in answer["data"]]
        if not answer["has_more"]:
            break
        after = f"&after={answer['last_id']}"
    assert pages == ids
    assert await listed(f"model={CHAT['model']}") == await listed(f"key={payer.key_id}") == ids
    assert await listed("model=another") == await listed(f"key={payer.user_id}") == []
    assert await listed("since=2020-01-01") == await listed("until=2100-01-01T00:00:00Z") == ids
    assert await listed("since=1950-01-01") == ids
    assert await listed("since=2100-01-01") == await listed("until=2020-01-01") == []
    for wrong in ("limit=0", "limit=101", "since=yesterday", "after=x", "limit=1&limit=2"):
        assert (await client.ask("GET", f"/v1/calls?{wrong}"))[0] in (400, 404), wrong


async def test_a_call_under_way_is_found_too(client: Client, proxy: Running, payer: Payer) -> None:
    head = {"Authorization": f"Bearer {client.secret}"}
    body = {**CHAT, "stream": True, "sim": {"chunks": 200, "chunk_delay_ms": 20}}
    url = client._base_url + "/v1/chat/completions"
    async with client._session.post(url, json=body, headers=head) as response:
        await response.content.readany()
        call_id = response.headers["x-request-id"]
        _, answer = await client.ask("GET", "/v1/calls")
        assert [(item["id"], item["state"]) for item in answer["data"]] == [(call_id, "open")]
        _, shown = await client.ask("GET", f"/v1/calls/{call_id}")
        assert any("until the call ends" in line for line in shown["explanation"])
        assert shown["charge"] is None
    await proxy.quiet()


async def test_a_void_call_says_so(client: Client, proxy: Running, office: Office, payer: Payer) -> None:
    from billing.calls.ledger import Ledger
    from billing.calls.outcome import Ending
    from billing.ids import new_id
    from tests.billing.calls.test_ledger import opening

    ledger, call = Ledger(office.database, worker_id=new_id()), opening(payer, 5)
    await ledger.open_calls([call])
    await ledger.settle_calls([Ending(call.call_id, "void", "worker_lost")])
    shown = await describe_call(office.database, call.call_id)
    assert "Nothing was answered, so it cost nothing." in shown["explanation"]
    assert any("the sweeper" in line for line in shown["explanation"])
    assert follow(shown["explanation"]) == await charged(office, call.call_id) == 0
