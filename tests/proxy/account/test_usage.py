"""``GET /v1/usage`` over HTTP: what was used, as JSON and CSV, by key and by token, and of nobody else."""

import csv
import io
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import aiohttp
import pytest

from billing.calls.ledger import Ledger
from billing.calls.outcome import Ending
from billing.ids import new_id
from billing.pricing.cost import Usage
from billing.wallets.caps import Caps
from config.settings import Settings
from proxy.account.usage import USAGE_COLUMNS
from scripts.office import Office
from tests.billing.calls.test_ledger import opening
from tests.proxy.account.test_keys import Client
from tests.proxy.account.test_transactions import fetch, spend
from tests.proxy.identity.test_sign_ins import token_of, with_tokens
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, set_rate
from tests.support.running import Running, run_proxy


@pytest.fixture
async def payer(office: Office) -> Payer:
    await set_rate(office, "NGN", "1600", 250)
    return await make_payer(office, amount="5000", currency="NGN")


@pytest.fixture
async def client(
    payer: Payer, proxy: Running
) -> AsyncIterator[Client]:  # in this order: it starts with their rate
    async with aiohttp.ClientSession() as session:
        yield Client(session, proxy.base_url, payer.secret)


async def add_call(office: Office, payer: Payer, **more: Any) -> None:
    """Settle a call as of another model, key or time than the proxy's own."""
    ledger = Ledger(office.database, worker_id=new_id())
    call = replace(opening(payer, 1_000_000), **more)
    assert await ledger.open_calls([call]) == ["opened"]
    ending = Ending(
        call.call_id, "settled", "completed", cost_nanousd=5, charge_nano=8_000, usage=Usage(1, 2)
    )
    await ledger.settle_calls([ending])


@pytest.mark.calendar
async def test_what_calls_used_and_cost(client: Client, proxy: Running, payer: Payer, office: Office) -> None:
    await spend(client, proxy, 4)
    status, answer = await client.ask("GET", "/v1/usage")
    assert status == 200
    (row,) = answer["data"]
    _, listed = await client.ask("GET", "/v1/wallet/transactions?kind=settlement")
    charge = -sum(Decimal(line["amount"]) for line in listed["data"])
    assert Decimal(row["charge"]) == charge == Decimal(answer["totals"]["charge"])
    assert Decimal(row["cost_usd"]) == sum(Decimal(line["cost_usd"]) for line in listed["data"])
    assert row["tokens_prompt"] == sum(line["tokens_prompt"] for line in listed["data"])
    assert row["tokens_completion"] == sum(line["tokens_completion"] for line in listed["data"])
    assert (row["calls"], row["calls_exact"], row["calls_void"], row["currency"]) == (4, 4, 0, "NGN")
    assert row["model"] == "openai/gpt-4o-mini"
    assert row["period"] == str(datetime.now(UTC).date())
    markup = Decimal(row["markup"])
    assert charge * Decimal("0.0243") < markup < charge * Decimal("0.0245")  # 250 of 10,250 parts
    assert row["duration_average_ms"] > 0
    assert row["duration_p95_below_ms"] >= row["duration_p50_below_ms"] >= 100
    checks = await check_books(office)
    assert checks["usage"].ok


@pytest.mark.calendar
async def test_by_hour_and_key_and_as_csv(client: Client, payer: Payer, office: Office) -> None:
    await Caps(office.database).set_clock(payer.user_id, timezone="Asia/Kathmandu", week_starts=1)
    noon = datetime(2026, 3, 1, 12, tzinfo=UTC)
    for minutes in (0, 14, 15, 60):
        at_ms = round((noon + timedelta(minutes=minutes)).timestamp() * 1000)
        await add_call(office, payer, call_id=new_id(at_ms=at_ms), model='=2+5+"a,\nb"', key_id=None)
    path = "/v1/usage?since=2026-03-01&until=2026-03-02T00:00:00Z&group_by=hour,model,key"
    status, answer = await client.ask("GET", path)
    assert status == 200
    assert [(row["period"], row["calls"]) for row in answer["data"]] == [
        ("2026-03-01T17:00:00+05:45", 2),
        ("2026-03-01T18:00:00+05:45", 2),
    ]
    assert answer["timezone"] == "Asia/Kathmandu"
    assert answer["since"] == "2026-02-28T18:15:00+00:00"
    for shown, headers in ((f"{path}&format=csv", {}), (path, {"Accept": "text/csv"})):
        status, text, head = await fetch(client, shown, **headers)
        assert (status, head["Content-Type"]) == (200, "text/csv; charset=utf-8")
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        assert tuple(rows[0]) == USAGE_COLUMNS
        assert [row["calls"] for row in rows] == ["2", "2"]
        assert rows[0]["model"] == '\'=2+5+"a,\nb"'  # no formula
        assert (rows[0]["charge"], rows[0]["key_id"], rows[0]["currency"]) == ("0.000016", "", "NGN")
    _, one = await client.ask(
        "GET", "/v1/usage?since=2026-03-01T12:15:00Z&until=2026-03-01T12:30:00Z&group_by="
    )
    assert [(row["period"], row["model"], row["calls"]) for row in one["data"]] == [(None, None, 1)]


@pytest.mark.calendar
async def test_what_is_asked_is_read_strictly(client: Client) -> None:
    for wrong in (
        "since=yesterday",
        "since=2026-11-01T00:07:00Z",
        "since=2026-11-02&until=2026-11-01",
        "since=2020-01-01",
        "since=1999-01-01&until=1999-02-01",
        "until=9999-12-31",
        "since=0001-01-01T00:00:00%2B23:00",
        "group_by=day,hour",
        "group_by=year",
        "group_by=model,model",
        "format=html",
        "group_by=day&group_by=model",
        "granularity=hour",
        "model=x",
    ):
        status, answer = await client.ask("GET", f"/v1/usage?{wrong}")
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error"), wrong
    assert (await client.ask("GET", "/v1/usage"))[1]["data"] == []


@pytest.mark.calendar
async def test_an_answer_has_its_bounds(settings: Settings, office: Office, payer: Payer) -> None:
    for model in "abc":
        await add_call(office, payer, model=model)
    limits = settings.limits.model_copy(update={"usage_rows": 2, "usage_days": 3})
    async with (
        run_proxy(settings.model_copy(update={"limits": limits})) as proxy,
        aiohttp.ClientSession() as session,
    ):
        client = Client(session, proxy.base_url, payer.secret)
        assert (await client.ask("GET", "/v1/usage?since=2026-01-01&until=2026-01-20"))[0] == 400
        today = datetime.now(UTC).date()
        status, answer = await client.ask("GET", f"/v1/usage?since={today}")
        assert (status, answer["error"]["message"][:27]) == (400, "that is more than 2 rows: a")
        status, answer = await client.ask("GET", f"/v1/usage?since={today}&group_by=day")
        assert (status, answer["totals"]["calls"]) == (200, 3)
        status, text, _ = await fetch(client, f"/v1/usage?since={today}&format=csv")
        assert (status, len(text.splitlines())) == (200, 4)


async def test_nobody_sees_anothers(client: Client, payer: Payer, office: Office) -> None:
    await add_call(office, payer)
    other = await make_payer(office)
    _, theirs = await client.with_secret(other.secret).ask("GET", "/v1/usage")
    assert (theirs["data"], theirs["totals"]["calls"], theirs["totals"]["currency"]) == ([], 0, "USD")
    assert (await client.ask("GET", "/v1/usage"))[1]["totals"]["calls"] == 1
    assert (await client.with_secret("sk-tuma-none").ask("GET", "/v1/usage"))[0] == 401


async def test_who_signed_in_names_the_wallet(settings: Settings, office: Office, payer: Payer) -> None:
    async with run_proxy(with_tokens(settings)) as proxy, aiohttp.ClientSession() as session:
        ada = Client(session, proxy.base_url, token_of("ada"))
        _, first = await ada.ask("GET", "/v1/wallet")
        async with office.database.connection() as connection:
            user = await connection.fetchval(
                "SELECT user_id FROM wallets WHERE id = $1::text::uuid", first["id"]
            )
        second = await office.wallets.create_wallet(str(user), currency="USD")
        mine = replace(payer, user_id=user, wallet_id=second)
        await office.wallets.credit(second, 10**9, reason="test")
        await add_call(office, mine, key_id=None)
        for wallet, calls in ((first["id"], 0), (str(second), 1)):
            _, answer = await ada.ask("GET", "/v1/usage?group_by=key", **{"x-tuma-wallet": wallet})
            assert (answer["wallet_id"], answer["totals"]["calls"]) == (wallet, calls)
            assert [row["key_id"] for row in answer["data"]] == [None] * calls
        assert (await ada.ask("GET", "/v1/usage", **{"x-tuma-wallet": str(payer.wallet_id)}))[0] >= 400
