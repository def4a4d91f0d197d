"""Where a person's money went: every line, the running balance, months on their clock, and nobody else's."""

import asyncio
import csv
import io
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.calls.corrections import Corrections
from billing.errors import InputError
from billing.money import NANO, format_amount
from billing.reports.statement import PAGE_MAX, Filter, Statements, bounds_of
from billing.wallets.caps import Caps
from proxy.account.transactions import write_rows
from scripts.office import Office
from tests.proxy.account.test_keys import Client
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, set_rate
from tests.support.running import Running


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


async def spend(client: Client, proxy: Running, calls: int) -> None:
    for _ in range(calls):
        assert await client.call() == 200
    await proxy.quiet()


async def fetch(client: Client, path: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    head = {"Authorization": f"Bearer {client.secret}", **headers}
    async with client._session.get(client._base_url + path, headers=head) as response:
        return response.status, await response.text(), dict(response.headers)


async def test_every_line_and_the_balance_beside_it(
    client: Client, proxy: Running, payer: Payer, office: Office
) -> None:
    await spend(client, proxy, 5)
    await office.wallets.credit(payer.wallet_id, 7 * NANO, reason="=cmd()|'a thank-you'")
    _, listed = await client.ask("GET", "/v1/wallet/transactions")
    calls = [line for line in listed["data"] if line["kind"] == "settlement"]
    await Corrections(office.database, charge_estimates_upward=True).refund(
        UUID(calls[2]["call_id"]), amount_nano=None, reason="sorry"
    )
    status, listed = await client.ask("GET", "/v1/wallet/transactions")
    assert status == 200
    lines = listed["data"]
    assert [line["kind"] for line in lines] == ["refund", "grant", *["settlement"] * 5, "grant"]
    assert lines[0]["balance"] == (await client.ask("GET", "/v1/wallet"))[1]["posted"]
    balance = Decimal(0)
    for line in reversed(lines):
        balance += Decimal(line["amount"])
        assert Decimal(line["balance"]) == balance
        assert line["currency"] == "NGN"
    assert Decimal(calls[0]["amount"]) < 0
    assert calls[0]["model"] == "openai/gpt-4o-mini"
    assert calls[0]["tokens_completion"] > 0
    assert lines[0]["call_id"] == calls[2]["call_id"]
    assert (await client.ask("GET", "/v1/wallet/transactions"))[1] == listed
    await check_books(office)


@pytest.mark.calendar
async def test_pages_and_filters_keep_the_balance(client: Client, proxy: Running, payer: Payer) -> None:
    await spend(client, proxy, 7)
    _, whole = await client.ask("GET", "/v1/wallet/transactions")
    by_id = {line["id"]: line for line in whole["data"]}
    found: list[Any] = []
    after = ""
    while True:
        _, page = await client.ask("GET", f"/v1/wallet/transactions?limit=3{after}")
        found += page["data"]
        if not page["has_more"]:
            break
        after = f"&after={page['last_id']}"
    assert found == whole["data"]
    _, grants = await client.ask("GET", "/v1/wallet/transactions?kind=grant,topup")
    assert [line["balance"] for line in grants["data"]] == ["5000"]
    _, charges = await client.ask("GET", "/v1/wallet/transactions?kind=settlement&limit=4")
    assert [by_id[line["id"]] for line in charges["data"]] == charges["data"]
    assert len(charges["data"]) == 4
    soon = (datetime.now(UTC) + timedelta(hours=1)).isoformat().replace("+", "%2B")
    assert (await client.ask("GET", f"/v1/wallet/transactions?since={soon}"))[1]["data"] == []
    _, before = await client.ask("GET", f"/v1/wallet/transactions?until={soon}")
    assert before["data"] == whole["data"]
    for wrong in (
        "kind=theft",
        "since=yesterday",
        "until=9999-99-99",
        "limit=0",
        "limit=101",
        "format=pdf",
        "kind=grant&kind=topup",
        "since=0001-01-01T00:00:00%2B23:00",
    ):
        assert (await client.ask("GET", f"/v1/wallet/transactions?{wrong}"))[0] == 400, wrong
    assert (await client.ask("GET", "/v1/wallet/transactions?after=x"))[0] == 404


async def test_all_as_csv(client: Client, proxy: Running, payer: Payer, office: Office) -> None:
    await spend(client, proxy, 3)
    await office.wallets.credit(payer.wallet_id, NANO, reason='=1+1, "quoted"\nand a line')
    _, listed = await client.ask("GET", "/v1/wallet/transactions")
    for path, headers in (("?format=csv", {}), ("", {"Accept": "text/csv"})):
        status, text, shown = await fetch(client, f"/v1/wallet/transactions{path}", **headers)
        assert status == 200
        assert shown["Content-Type"] == "text/csv; charset=utf-8"
        rows = list(csv.DictReader(io.StringIO(text)))
        assert [row["id"] for row in rows] == [line["id"] for line in listed["data"]]
        assert [row["balance"] for row in rows] == [line["balance"] for line in listed["data"]]
        assert rows[0]["description"] == '\'=1+1, "quoted"\nand a line'  # no formula


@pytest.mark.calendar
async def test_a_month_to_print(client: Client, proxy: Running, payer: Payer, office: Office) -> None:
    await Caps(office.database).set_clock(payer.user_id, timezone="Pacific/Kiritimati", week_starts=1)
    await spend(client, proxy, 3)
    async with office.database.connection() as connection:
        await connection.execute(
            "UPDATE users SET email = '<script>alert(1)</script>@example.com' WHERE id = $1", payer.user_id
        )
    month = f"{datetime.now(ZoneInfo('Pacific/Kiritimati')):%Y-%m}"
    status, page, headers = await fetch(client, f"/v1/wallet/statements/{month}")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert "script-src" not in str(headers)
    assert "<script>" not in page
    wallet = await office.wallets.get_wallet(payer.wallet_id)
    assert "Opening balance: <strong>0 NGN" in page
    assert f"Closing balance: <strong>{format_amount(wallet.posted_nano)} NGN" in page
    assert "openai/gpt-4o-mini" in page
    found = await Statements(office.database).read_month(payer.user_id, payer.wallet_id, month)
    assert found.opening_nano + sum(line.amount_nano for line in found.lines) == found.closing_nano
    assert [(line.kind, line.rows) for line in found.lines] == [("grant", 1), ("settlement", 3)]
    status, text, _ = await fetch(client, f"/v1/wallet/statements/{month}?format=csv")
    assert len(list(csv.DictReader(io.StringIO(text)))) == 4
    _, empty, _ = await fetch(client, "/v1/wallet/statements/2024-02?format=csv")
    assert len(empty.splitlines()) == 1
    for wrong in ("2024", "2024-13", "2024-00", "1999-01", "x", "2024-1", "９９９９-01", "2024-02-01"):
        assert (await fetch(client, f"/v1/wallet/statements/{wrong}"))[0] == 400


@pytest.mark.calendar
async def test_a_month_begins_with_its_owners_clock(payer: Payer, office: Office) -> None:
    """Half an hour after midnight on the first, 14 hours ahead of UTC, it is still the month before in UTC.

    The month is long over: what made the payer would be in its opening balance while some clock still shows the month before.
    """
    month = "2024-03"
    begins, _ = bounds_of(month, "Pacific/Kiritimati")
    async with office.database.connection() as connection:
        await connection.execute(
            "SELECT grant_credit(uuid_floor($2), $1, 77, 'early', 'early', '')",
            payer.wallet_id,
            begins + timedelta(minutes=30),
        )
    statements, caps = Statements(office.database), Caps(office.database)
    for zone, there in (("Pacific/Kiritimati", True), ("UTC", False), ("Pacific/Midway", False)):
        await caps.set_clock(payer.user_id, timezone=zone, week_starts=1)
        found = await statements.read_month(payer.user_id, payer.wallet_id, month)
        assert found.opening_nano == (0 if there else 77), zone
        days = [line.day for line in found.lines if line.amount_nano % NANO == 77]
        assert days == ([f"{month}-01"] if there else []), zone


async def test_nobody_reads_anothers(client: Client, proxy: Running, payer: Payer, office: Office) -> None:
    await spend(client, proxy, 1)
    other = await make_payer(office)
    outsider = client.with_secret(other.secret)
    _, theirs = await outsider.ask("GET", "/v1/wallet/transactions")
    assert [line["kind"] for line in theirs["data"]] == ["grant"]
    statements = Statements(office.database)
    database = proxy.services.statements
    assert await database.list_page(other.user_id, payer.wallet_id, Filter(), limit=10) == []
    with pytest.raises(InputError):
        await database.read_month(other.user_id, payer.wallet_id, "2026-11")
    assert await statements.list_page(payer.user_id, payer.wallet_id, Filter(), limit=10)


async def test_more_than_a_page_while_money_moves(
    client: Client, proxy: Running, payer: Payer, office: Office
) -> None:
    async with office.database.connection() as connection:
        for _ in range(3):
            await connection.execute(
                "SELECT grant_credit(gen_random_uuid(), $1, 1, 'n', gen_random_uuid()::text, '') FROM generate_series(1, 400)",
                payer.wallet_id,
            )

    async def move() -> None:
        for _ in range(20):
            await office.wallets.credit(payer.wallet_id, 1, reason="more")

    reading = fetch(client, "/v1/wallet/transactions?format=csv")
    (status, text, _), _ = await asyncio.gather(reading, move())
    rows = list(csv.DictReader(io.StringIO(text)))
    assert status == 200
    assert len({row["id"] for row in rows}) == len(rows) >= PAGE_MAX + 200
    _, again, _ = await fetch(client, "/v1/wallet/transactions?format=csv")
    rows = list(csv.DictReader(io.StringIO(again)))
    balance = Decimal(0)
    for row in reversed(rows):
        balance += Decimal(row["amount"])
        assert Decimal(row["balance"]) == balance
    wallet = await office.wallets.get_wallet(payer.wallet_id)
    assert rows[0]["balance"] == format_amount(wallet.posted_nano)


@pytest.mark.calendar
@given(
    st.sampled_from(["UTC", "Africa/Lagos", "America/Sao_Paulo", "Pacific/Apia", "Africa/Cairo"]),
    st.integers(2020, 2199),
    st.integers(1, 12),
)
def test_months_follow_one_another(zone: str, year: int, number: int) -> None:
    starts, ends = bounds_of(f"{year}-{number:02}", zone)
    assert timedelta(days=27) < ends - starts < timedelta(days=32)
    local = starts.astimezone(ZoneInfo(zone))
    assert (local.year, local.month, local.day) == (year, number, 1)
    following = f"{year + (number == 12)}-{number % 12 + 1:02}"
    if year < 2199:
        assert bounds_of(following, zone)[0] == ends


def test_nothing_is_written_as_nothing() -> None:
    assert write_rows([]) == b""
