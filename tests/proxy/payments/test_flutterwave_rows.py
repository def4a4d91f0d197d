"""Flutterwave's rows as it publishes them, and lists that are not what was asked for: money is credited, and never sent back twice.

Rows by https://developer.flutterwave.com/v3.0/reference: ``GET /refunds`` has ``transaction_id`` and ``comment``, the answer to
``POST /transactions/{id}/refund`` has ``tx_id``; ``app_fee`` may be finer than its currency.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import UUID

import aiohttp
import pytest
from aiohttp import web

from billing.books.opening_balance import record_openings
from billing.errors import InputError, PaymentsUnavailableError
from billing.money import NANO
from billing.payments.refunds import Refunds
from billing.payments.reviews import Reviews
from config.settings import Settings
from scripts.office import Office
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, sync_models
from tests.support.running import Running, run_proxy

TXN = 285959875
NUMBER = str(TXN)


@dataclass
class Flutterwave:
    """Answers as told.

    Args:
        fee: ``app_fee`` of the one payment.
        lists: what ``GET /refunds`` shows: rows as published, as our simulator once had them, nothing at all, or those of others.
        answers: what a refund's POST says: its row, nothing, that it failed inside, or that all was refunded.
    """

    fee: Any = 70
    lists: str = "published"
    answers: str = "row"
    currency: str = "NGN"
    reference: str = ""
    sent: list[Any] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    asked: int = 0

    def add(self, number: int, amount: float, comment: str | None) -> None:
        """Have a refund."""
        self.rows.append({"id": number, "amount_refunded": amount, "status": "completed", "comment": comment})

    async def answer(self, request: web.Request) -> web.Response:
        path = request.path
        if path.endswith("/payments"):
            self.reference = (await request.json())["tx_ref"]
            return said({"link": "http://127.0.0.1/x"})
        if path.endswith("/refund"):
            return await self._refund(request)
        if path.endswith("/refunds"):
            return self._list(request)
        if path.endswith(("/chargebacks", "/transactions")):
            return page([])
        return said(self.transaction())

    def transaction(self) -> dict[str, Any]:
        """The payment."""
        row = {
            "id": TXN,
            "tx_ref": self.reference,
            "flw_ref": "FLWX1",
            "amount": 5000,
            "charged_amount": 5000,
        }
        return {**row, "app_fee": self.fee, "currency": self.currency, "status": "successful"}

    async def _refund(self, request: web.Request) -> web.Response:
        asked = json.loads(await request.read())
        self.sent.append(asked)
        if self.answers == "refused":
            message = {"status": "error", "message": "This transaction has been fully refunded", "data": None}
            return web.json_response(message, status=400)
        number = 70 + len(self.sent)
        self.add(number, float(asked["amount"]), asked["comments"])
        if self.answers == "fails":
            return web.json_response({"status": "error"}, status=500)
        row = {"id": number, "tx_id": TXN, "amount_refunded": float(asked["amount"]), "status": "completed"}
        return said(row if self.answers == "row" else {"tx_id": TXN})

    def _list(self, request: web.Request) -> web.Response:
        self.asked += 1
        assert request.query.keys() <= {"from", "to", "page", "status", "currency", "flw_ref", "id"}
        if self.lists == "nothing":
            return page([])
        if self.lists == "unfiltered" and "flw_ref" not in request.query:
            return page([{"id": 1, "transaction_id": TXN, "flw_ref": "FLWX1"}])
        if self.lists in ("others", "unfiltered"):
            number = int(request.query["page"])
            others = [{"id": number * 100 + at, "transaction_id": at, "flw_ref": "o"} for at in range(10)]
            return page(others, number=number, pages=600)
        if self.lists == "no rows":
            return web.json_response({"status": "success", "data": "none"})
        place = {"transaction_id": TXN} if self.lists == "published" else {"payment": TXN}
        return page([{**row, **place, "flw_ref": "FLWX1"} for row in self.rows])


def said(data: Any) -> web.Response:
    return web.json_response({"status": "success", "message": "ok", "data": data})


def page(rows: list[Any], *, number: int = 1, pages: int = 1) -> web.Response:
    info = {"total": len(rows) * pages, "current_page": number, "total_pages": pages, "page_size": 20}
    return web.json_response(
        {"status": "success", "message": "ok", "meta": {"page_info": info}, "data": rows}
    )


@dataclass
class Desk:
    """A proxy before it, and somebody who pays."""

    office: Office
    proxy: Running
    payer: Payer
    provider: Flutterwave
    client: aiohttp.ClientSession

    async def ask(self, method: str, path: str, **more: Any) -> Any:
        head = {"Authorization": f"Bearer {self.payer.secret}", **more.pop("headers", {})}
        async with self.client.request(method, self.proxy.base_url + path, headers=head, **more) as answer:
            return await answer.json() if answer.content_type == "application/json" else await answer.text()

    async def pay(self, amount: str = "5000") -> None:
        """Top up, and wait until the money is there."""
        await self.ask("POST", "/v1/wallet/topups", json={"provider": "flutterwave", "amount": amount})
        await self.tell({"event": "charge.completed", "data": self.provider.transaction()})
        await until(lambda: self.has(amount))

    async def tell(self, event: Any) -> None:
        await self.ask(
            "POST", "/webhooks/flutterwave", json=event, headers={"verif-hash": "whsec_fake-and-long"}
        )

    async def has(self, amount: str) -> bool:
        return bool((await self.ask("GET", "/v1/wallet"))["posted"] == amount)

    async def is_done(self) -> bool:
        """Whether the webhook is looked into to its end."""
        async with self.office.database.connection() as connection:
            return bool(await connection.fetchval("SELECT bool_and(state = 'done') FROM webhook_events"))

    async def refund(self, amount: int) -> str:
        made = await Refunds(self.office.database).begin(
            "flutterwave", NUMBER, amount_nano=amount * NANO, reason="asked"
        )
        return str(made.id)

    async def reversals(self) -> list[tuple[Any, ...]]:
        async with self.office.database.connection() as connection:
            rows = await connection.fetch(
                "SELECT provider_reversal_id, state, sent_at IS NOT NULL AS sent, polls FROM payment_reversals ORDER BY id"
            )
        return [tuple(row) for row in rows]

    async def look_often(self) -> None:
        """Have what is due asked about several times."""
        for _ in range(3):
            (*_, polls) = (await self.reversals())[-1]
            async with self.office.database.connection() as connection:
                await connection.execute(
                    "UPDATE payment_reversals SET poll_at = now() WHERE state IN ('requested', 'open')"
                )
            await until(partial(self._polled, polls))

    async def _polled(self, before: int) -> bool:
        _, state, _, polls = (await self.reversals())[-1]
        return bool(polls > before or state in ("final", "undone"))


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(15):
        while not await true():
            await asyncio.sleep(0.05)


@asynccontextmanager
async def desk_of(settings: Settings, office: Office, provider: Flutterwave) -> AsyncIterator[Desk]:
    await sync_models(office)
    await record_openings(office.database, office.upstream)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", provider.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    section = {
        "secret_key": "sk_fake-and-long-enough",
        "webhook_secret": "whsec_fake-and-long",
        "base_url": f"http://127.0.0.1:{runner.addresses[0][1]}",
    }
    changed = Settings.model_validate(
        {
            **settings.model_dump(),
            "flutterwave": section,
            "payments": {"look_s": 0.1, "poll_s": 0.1, "timeout_s": 3},
        }
    )
    payer = await make_payer(office, amount="0", currency=provider.currency)
    try:
        async with aiohttp.ClientSession() as client, run_proxy(changed) as proxy:
            yield Desk(office, proxy, payer, provider, client)
    finally:
        await runner.cleanup()


async def test_a_refund_from_the_dashboard_is_taken_from_the_wallet(
    settings: Settings, office: Office
) -> None:
    provider = Flutterwave()
    async with desk_of(settings, office, provider) as desk:
        await desk.pay()
        provider.add(1, 1000, "goodwill")
        await desk.tell({"event": "refund.completed", "data": {"id": 1, "tx_id": TXN}})
        await until(lambda: desk.has("4000"))
        await check_books(office)


@pytest.mark.parametrize("lists", ["published", "renamed", "nothing", "others", "no rows"])
async def test_a_refund_is_sent_once_whatever_the_list_shows(
    settings: Settings, office: Office, lists: str
) -> None:
    provider = Flutterwave()
    async with desk_of(settings, office, provider) as desk:
        await desk.pay()
        provider.lists = lists
        await desk.refund(500)
        await desk.look_often()
        await until(lambda: desk.has("4500"))
        assert [item["amount"] for item in provider.sent] == ["500"]
        assert [row[:2] for row in await desk.reversals()] == [("71", "final")], "by the answer's own id"
        await check_books(office)


@pytest.mark.parametrize("lists", ["nothing", "others"])
@pytest.mark.parametrize("answers", ["fails", "no id"])
async def test_one_whose_answer_was_lost_waits_for_a_person(
    settings: Settings, office: Office, lists: str, answers: str
) -> None:
    provider = Flutterwave(answers=answers)
    async with desk_of(settings, office, provider) as desk:
        await desk.pay()
        provider.lists = lists
        refund_id = await desk.refund(500)
        await desk.look_often()
        await desk.look_often()
        assert len(provider.sent) == 1
        assert [row[:3] for row in await desk.reversals()] == [(None, "requested", True)]
        assert await desk.has("4500"), "it is set aside"
        provider.lists, provider.answers = "published", "row"  # it shows after all
        await desk.look_often()
        await until(lambda: _is_final(desk))
        assert (len(provider.sent), await desk.has("4500")) == (1, True)
        reviews = Reviews(office.database)
        with pytest.raises(InputError, match="no refund that was sent"):
            await reviews.send_again((await office_ids(office))[0])
        assert str((await office_ids(office))[0]) == refund_id
        await check_books(office)


async def test_an_operator_who_saw_that_it_is_not_there_sends_it_again(
    settings: Settings, office: Office
) -> None:
    provider = Flutterwave(answers="fails")
    async with desk_of(settings, office, provider) as desk:
        await desk.pay()
        provider.lists = "nothing"
        refund_id = UUID(await desk.refund(500))
        await desk.look_often()
        provider.rows.clear()  # it was lost on its way
        with pytest.raises(InputError, match="minutes ago"):
            await Reviews(office.database).send_again(refund_id)  # a worker may be about it just now
        async with office.database.connection() as connection:
            await connection.execute("UPDATE payment_reversals SET sent_at = sent_at - interval '1 hour'")
        reviews, provider.answers = Reviews(office.database), "row"
        (unsure,) = await reviews.list_unsure()
        await reviews.send_again(unsure["id"])
        await until(lambda: _is_final(desk))
        assert (len(provider.sent), await desk.has("4500"), await reviews.list_unsure()) == (2, True, [])
        await check_books(office)


async def test_a_refusal_of_the_first_sending_gives_the_money_back(
    settings: Settings, office: Office
) -> None:
    provider = Flutterwave(answers="refused")
    async with desk_of(settings, office, provider) as desk:
        await desk.pay()
        await desk.refund(500)
        await desk.look_often()
        await until(lambda: desk.has("5000"))
        assert [row[1] for row in await desk.reversals()] == ["undone"]


@pytest.mark.parametrize(
    ("currency", "fee", "noted"),
    [
        ("RWF", 140.7, 140_700_000_000),
        ("NGN", "75.62625", 75_626_250_000),
        ("NGN", "much", None),
        ("NGN", None, None),
        ("NGN", -1, None),
    ],
)
async def test_a_fee_never_holds_up_a_credit(
    settings: Settings, office: Office, currency: str, fee: Any, noted: int | None
) -> None:
    async with desk_of(settings, office, Flutterwave(currency=currency, fee=fee)) as desk:
        await desk.pay()
        await until(desk.is_done)  # the fee is noted after the credit, in a transaction of its own
        async with office.database.connection() as connection:
            assert await connection.fetchval("SELECT fee_nano FROM payment_credits") == noted
        await check_books(office)


@pytest.mark.parametrize("lists", ["others", "no rows"])
async def test_a_list_that_cannot_be_read_never_holds_up_a_credit(
    settings: Settings, office: Office, lists: str
) -> None:
    provider = Flutterwave(lists=lists)
    async with desk_of(settings, office, provider) as desk:
        await desk.pay()
        assert provider.asked < 60, "not everybody's refunds are gone through"
        with pytest.raises(
            PaymentsUnavailableError
        ):  # it shows, in the alarm for payments that are not swept
            await desk.proxy.services.payments.sweep()
        async with office.database.connection() as connection:
            assert await connection.fetchval("SELECT state FROM webhook_events") == "new", (
                "it is asked about again"
            )


async def test_what_was_taken_back_and_cannot_be_read_shows_in_the_sweep(
    settings: Settings, office: Office
) -> None:
    provider = Flutterwave()
    async with desk_of(settings, office, provider) as desk:
        await desk.pay()
        await until(desk.is_done)
        provider.lists = "unfiltered"
        with pytest.raises(PaymentsUnavailableError, match="more than 5 pages of /refunds"):
            await desk.proxy.services.payments.sweep()
        assert await desk.has("5000")


async def _is_final(desk: Desk) -> bool:
    return bool((await desk.reversals())[-1][1] == "final")


async def office_ids(office: Office) -> list[Any]:
    async with office.database.connection() as connection:
        return [row["id"] for row in await connection.fetch("SELECT id FROM payment_reversals ORDER BY id")]
