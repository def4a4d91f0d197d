"""What a simulated payment provider keeps, and the page that it shows."""

import asyncio
import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from scripts.sim.payments.books import KINDS, Books, Checkout, Customer
from scripts.sim.payments.books_file import BooksFile
from scripts.sim.payments.server import SimulatedPayments
from scripts.sim.payments.signatures import Secrets
from tests.support.paths import ROOT

KEY = {"Authorization": f"Bearer {Secrets().paystack_key}"}


def open_books(path: Path) -> tuple[Books, BooksFile]:
    books = Books()
    file = BooksFile(path, books)
    file.open()
    return books, file


def busy_books(books: Books) -> None:
    """Enter some of everything, each in a state of its own."""
    for number, amount in enumerate((500_000, 7, 100_000)):
        checkout = books.open_checkout(
            "paystack", checkout_id=f"c{number}", reference=f"r{number}", amount_minor=amount, currency="NGN"
        )
        payment = books.pay(checkout, pending=amount == 7)
    books.decline(
        books.open_checkout("stripe", checkout_id="c", reference="r", amount_minor=1, currency="USD"), "no"
    )
    books.end_refund(books.begin_refund(payment, 30_000))
    books.close_dispute(books.open_dispute(payment, 20_000), won=False)
    books.open_dispute(payment).reminders += 1
    books.customers["cus_1"] = Customer("cus_1", books.now_s())


def test_books_outlive_a_restart(tmp_path: Path) -> None:
    books, file = open_books(tmp_path / "books.jsonl")
    busy_books(books)
    file.close()
    again, second = open_books(tmp_path / "books.jsonl")
    assert again.as_json() == books.as_json()
    assert {kind: len(again.entries(kind)) for kind in KINDS} == {
        "checkouts": 4,
        "payments": 4,
        "refunds": 1,
        "disputes": 2,
        "customers": 1,
    }
    numbers = {
        item.number for kind in ("payments", "refunds", "disputes") for item in again.entries(kind).values()
    }
    assert again.pay(again.checkouts["c0"]).number > max(numbers)
    assert again.paid_total("paystack", "NGN") == 500_000 * 2 + 100_000 - 30_000 - 70_000
    second.save()
    third, last = open_books(tmp_path / "books.jsonl")
    assert third.as_json() == again.as_json()
    last.close()
    second.close()


def test_every_change_is_noticed_and_only_changes_are_written(tmp_path: Path) -> None:
    path = tmp_path / "books.jsonl"
    books, file = open_books(path)
    busy_books(books)
    file.save()
    size = path.stat().st_size
    file.save()
    assert path.stat().st_size == size
    for kind in KINDS:
        for entry in books.entries(kind).values():
            for field in dataclasses.fields(entry):
                if field.name == "id":
                    continue
                before = path.read_bytes()
                value = getattr(entry, field.name)
                if isinstance(value, list | dict):  # changed in place
                    value.append("x") if isinstance(value, list) else value.update(x="y")
                else:
                    setattr(entry, field.name, 12_345)
                file.save()
                (line,) = path.read_bytes().removeprefix(before).splitlines()
                assert [(name, [row["id"] for row in rows]) for name, rows in json.loads(line).items()] == [
                    (kind, [entry.id])
                ]
    file.close()


def test_a_request_is_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "books.jsonl"
    books, file = open_books(path)
    checkout = books.open_checkout("paystack", checkout_id="c", reference="r", amount_minor=5, currency="NGN")
    file.save()
    books.pay(checkout)
    file.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])  # a kill in the midst of the last line
    torn, second = open_books(path)
    assert (torn.checkouts["c"].status, torn.payments) == ("open", {})
    torn.pay(torn.checkouts["c"])
    second.close()
    healed, third = open_books(path)
    assert len(healed.payments) == 1
    third.close()


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"payments": [{}]}', '{"coins": []}', '{"payments": [{"id": "x"}]}']
)
def test_a_file_of_somebody_elses_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "books.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match="not of the simulated payment providers' books"):
        BooksFile(path, Books()).open()
    assert path.read_text() == line + "\n"


def test_books_that_begin_anew_repeat_no_number() -> None:
    def first_number(now_s: float) -> int:
        books = Books(clock=lambda: now_s)
        checkout = books.open_checkout(
            "paystack", checkout_id="c", reference="r", amount_minor=5, currency="NGN"
        )
        return books.pay(checkout).number

    assert 2**31 < first_number(0) < first_number(1.8e9) < first_number(1.8e9 + 0.001) < 2**53


# The process


@asynccontextmanager
async def run_simulator(books: Path) -> AsyncIterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "scripts.sim.payments.server", "--books", str(books)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = await asyncio.to_thread(process.stdout.readline)
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.wait()


async def verify(client: aiohttp.ClientSession, origin: str) -> Any:
    async with client.get(f"{origin}/paystack/transaction/verify/mine", headers=KEY) as answer:
        return (await answer.json())["data"]


async def test_a_killed_simulator_knows_what_was_paid(tmp_path: Path) -> None:
    path = tmp_path / "books.jsonl"
    async with aiohttp.ClientSession() as client:
        async with run_simulator(path) as (process, origin):
            asked = {"email": "ada@example.com", "amount": "500000", "reference": "mine"}
            made = client.post(f"{origin}/paystack/transaction/initialize", headers=KEY, json=asked)
            async with made as answer:
                page = (await answer.json())["data"]["authorization_url"]
            async with client.post(page, data={"do": "pay"}) as answer:
                assert "Paid: 5000 NGN" in await answer.text()
            paid = await verify(client, origin)
            process.kill()
            process.wait()
        async with run_simulator(path) as (process, origin):
            assert await verify(client, origin) == paid
            assert paid["status"] == "success"
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, 30) == 0


# The page


class _Form(HTMLParser):
    """The buttons of a page, what they are described by, its links, and every tag that a person cannot use."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.buttons: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.described: set[str] = set()
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        self.ids.add(given.get("id") or "")
        if tag == "button":
            self.buttons.append(given["value"] or "")
            self.described.add(given["aria-describedby"] or "")
        if tag == "a":
            self.links.append(given["href"] or "")


@pytest.fixture
async def psp() -> AsyncIterator[SimulatedPayments]:
    async with SimulatedPayments() as payments:
        yield payments


def open_page(psp: SimulatedPayments, **more: Any) -> Checkout:
    given = {"email": "ada@example.com", "success_url": "https://shop.example/thanks?a=1&b=2", **more}
    return psp.books.open_checkout(
        "paystack", checkout_id="c", reference="tuma_<1>", amount_minor=500_000, currency="NGN", **given
    )


async def press(psp: SimulatedPayments, action: str | None = None) -> tuple[int, str, _Form]:
    url = f"{psp.origin}/pay/c"
    async with aiohttp.ClientSession() as client:
        asked = client.get(url) if action is None else client.post(url, data={"do": action})
        async with asked as answer:
            text = await answer.text()
            return answer.status, text, _Form(text)


async def test_a_page_says_who_pays_what_and_what_each_button_does(psp: SimulatedPayments) -> None:
    open_page(psp)
    _, text, form = await press(psp)
    for part in (
        "Pay 5000 NGN",
        "ada@example.com",
        "simulated Paystack",
        "tuma_&lt;1&gt;",
        '<html lang="en">',
    ):
        assert part in text
    assert form.buttons == ["pay", "decline", "pending", "less", "more", "cancel"]
    assert form.described <= form.ids
    assert not form.tags & {"script", "img", "iframe", "link"}
    assert form.links == []


async def test_after_paying_a_page_says_so_and_pays_nothing_more_when_it_is_reloaded(
    psp: SimulatedPayments,
) -> None:
    open_page(psp)
    _, text, form = await press(psp, "pay")
    assert "Paid: 5000 NGN" in text
    assert form.links == ["https://shop.example/thanks?a=1&b=2&trxref=tuma_<1>&reference=tuma_<1>"]
    assert (await press(psp))[1] == text
    assert len(psp.books.payments) == 1


async def test_a_slow_bank_pays_or_refuses(psp: SimulatedPayments) -> None:
    open_page(psp, success_url=None)
    _, text, form = await press(psp, "pending")
    assert form.buttons == ["arrive", "bounce"]
    assert psp.books.paid_total("paystack", "NGN") == 0
    _, text, form = await press(psp, "arrive")
    assert ("Paid: 5000 NGN" in text, "close this page" in text) == (True, True)
    assert psp.books.paid_total("paystack", "NGN") == 500_000
    assert (await press(psp, "bounce"))[0] == 409


async def test_what_else_a_page_can_show(psp: SimulatedPayments) -> None:
    checkout = open_page(psp)
    _, text, form = await press(psp, "decline")
    assert "Not paid: card_declined" in text
    assert form.buttons[0] == "pay"
    assert (await press(psp, "arrive"))[0] == 409  # nothing is on its way
    assert (await press(psp, "give"))[0] == 400
    status, text, _ = await press(psp, "cancel")
    assert (status, "Nothing was paid" in text) == (200, True)
    psp.till.expire(checkout)
    _, text, form = await press(psp)
    assert ("expired" in text, form.buttons) == (True, [])
    assert (await press(psp, "pay"))[0] == 409
    assert psp.books.paid_total("paystack", "NGN") == 0
