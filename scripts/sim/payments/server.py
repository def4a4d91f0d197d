"""The simulated payment providers over one real socket: their APIs, a page to pay on, and ``/sim`` for commands."""

import argparse
import asyncio
import base64
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from scripts.sim.exact_json import dumps
from scripts.sim.payments.api import ProviderApi
from scripts.sim.payments.books import Books, BooksError, Checkout
from scripts.sim.payments.books_file import BooksFile
from scripts.sim.payments.currencies import PROVIDERS, AmountError, Provider
from scripts.sim.payments.faults import AFTER_THE_WORK, Fault, Faults
from scripts.sim.payments.flutterwave import FlutterwaveApi, FlutterwaveVoice
from scripts.sim.payments.page import ACTIONS, show_checkout, show_message
from scripts.sim.payments.paystack import PaystackApi, PaystackVoice
from scripts.sim.payments.signatures import FlutterwaveSigns, Secrets
from scripts.sim.payments.stripe.api import StripeApi
from scripts.sim.payments.stripe.objects import StripeVoice
from scripts.sim.payments.till import Till, Voice
from scripts.sim.payments.webhooks import RETRY_PAUSES_S, WebhookError, Webhooks

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
# As patient as a demo needs, whose server may be starting again; then the poller sees to it.
_DEMO_PAUSES_S = (*RETRY_PAUSES_S, 2, 5, 10, 30)


class SimulatedPayments:
    """Payment providers with books of their own, as an asynchronous context: they serve inside.

    Args:
        secrets: what callers must show, and what webhooks are signed with.
        host: loopback.
        port: 0 picks a free one.
        webhooks_to: the origin that webhooks go to; ``webhooks.to`` says so later, too.
        flutterwave_signs: with which header.
        retry_pauses_s: between tries of a webhook.
        books_path: a file in which the books survive a restart; webhooks that were not delivered do not.
    """

    def __init__(
        self,
        *,
        secrets: Secrets | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        webhooks_to: str | None = None,
        flutterwave_signs: FlutterwaveSigns = "v3",
        retry_pauses_s: Sequence[float] = RETRY_PAUSES_S,
        books_path: Path | None = None,
    ) -> None:
        self.secrets = secrets or Secrets()
        self.books = Books()
        self._file = None if books_path is None else BooksFile(books_path, self.books)
        self.faults = Faults()
        self.webhooks = Webhooks(
            self.secrets, to=webhooks_to, signs=flutterwave_signs, retry_pauses_s=retry_pauses_s
        )
        self.stripe = StripeVoice(self.books)
        paystack, flutterwave = PaystackVoice(self.books), FlutterwaveVoice(self.books)
        voices: dict[Provider, Voice] = {
            "stripe": self.stripe,
            "paystack": paystack,
            "flutterwave": flutterwave,
        }
        self.till = Till(self.books, self.webhooks, voices)
        self.apis: dict[Provider, ProviderApi] = {
            "stripe": StripeApi(self.till, self.stripe, lambda: self.origin),
            "paystack": PaystackApi(self.till, paystack, lambda: self.origin),
            "flutterwave": FlutterwaveApi(self.till, flutterwave, lambda: self.origin),
        }
        self._host, self._port = host, port
        self._runner: web.AppRunner | None = None

    @property
    def origin(self) -> str:
        """The server's URL without path."""
        return f"http://{self._host}:{self._port}"

    @property
    def stripe_url(self) -> str:
        """Stripe's base URL, to which clients append ``/v1/…``."""
        return f"{self.origin}/stripe"

    @property
    def paystack_url(self) -> str:
        """Paystack's base URL."""
        return f"{self.origin}/paystack"

    @property
    def flutterwave_url(self) -> str:
        """Flutterwave's base URL."""
        return f"{self.origin}/flutterwave/v3"

    async def __aenter__(self) -> Self:
        if self._file is not None:
            self._file.open()
        app = web.Application(middlewares=[self._guard, self._keep])
        for api in self.apis.values():
            app.add_routes(api.routes())
        app.add_routes(
            [
                web.get("/pay/{checkout}", self._show_page),
                web.post("/pay/{checkout}", self._press),
                web.get("/sim/books", self._show_books),
                web.get("/sim/webhooks", self._show_webhooks),
                web.post("/sim/{command}", self._command),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()
        self._port = self._runner.addresses[0][1]
        await self.webhooks.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.webhooks.stop()
        if self._runner is not None:
            await self._runner.cleanup()
        if self._file is not None:
            self._file.close()

    @web.middleware
    async def _keep(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Write what a request changed before anybody hears of it: its answer, and its webhooks, come after this."""
        try:
            return await handler(request)
        finally:
            if self._file is not None:
                self._file.save()

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Ask for the provider's key, and fail as told."""
        name = request.path.split("/")[1]
        provider = next((item for item in PROVIDERS if item == name), None)
        if provider is None or provider not in self.apis:
            return await handler(request)
        api = self.apis[provider]
        if not self._shows_key(provider, request.headers.get("Authorization", "")):
            return api.refusal(401, "Invalid key")
        fault = self.faults.take(provider, request.method, request.path)
        if fault is not None and fault.kind not in AFTER_THE_WORK:
            await asyncio.sleep(fault.delay_s)
            if fault.kind != "slow":
                return api.refusal({"down": 503, "error": 500, "limited": 429}[fault.kind], fault.kind)
        answer = await handler(request)
        if fault is None or fault.kind == "slow":
            return answer
        if fault.kind == "error_after":
            return api.refusal(500, fault.kind)
        await asyncio.sleep(fault.delay_s)
        if request.transport is not None:
            request.transport.abort()
        return answer

    def _shows_key(self, provider: Provider, header: str) -> bool:
        """Stripe takes its key as a user's name, too."""
        key = self.secrets.key_of(provider)
        basic = f"Basic {base64.b64encode(f'{key}:'.encode()).decode()}"
        return header == f"Bearer {key}" or (provider == "stripe" and header == basic)

    # The page

    def _checkout(self, request: web.Request) -> Checkout:
        found = self.books.checkouts.get(request.match_info["checkout"])
        if found is None:
            raise web.HTTPNotFound(text="There is no such page.")
        return found

    async def _show_page(self, request: web.Request) -> web.Response:
        checkout = self._checkout(request)
        self.till.expire_due(checkout)
        payment = self.books.settled_of(checkout)
        back = checkout.cancel_url
        if payment is not None:
            back = self.apis[checkout.provider].return_url(checkout, payment)
        return _page(show_checkout(checkout, payment, back))

    async def _press(self, request: web.Request) -> web.Response:
        """Do what a button says, and show what came of it under the page's own address: to reload it pays nothing."""
        checkout, pressed = self._checkout(request), str((await request.post()).get("do"))
        self.till.expire_due(checkout)
        if pressed not in ACTIONS:
            return _page(show_message("Not understood", "There is no such button."), status=400)
        if pressed == "cancel":
            if checkout.cancel_url is not None:
                raise web.HTTPSeeOther(checkout.cancel_url)
            return _page(show_message("Nothing was paid", "You may close this page."))
        try:
            self._pay(checkout, pressed)
        except BooksError as error:
            return _page(show_message("That cannot be done", str(error)), status=409)
        raise web.HTTPSeeOther(request.path)

    def _pay(self, checkout: Checkout, pressed: str) -> None:
        parts = {"less": checkout.amount_minor // 2, "more": checkout.amount_minor * 2}
        if pressed == "decline":
            self.till.decline(checkout)
        elif pressed in ("arrive", "bounce"):
            tried = self.books.settled_of(checkout)
            if tried is None:
                raise BooksError("not_pending", "nothing is on its way")
            (self.till.settle if pressed == "arrive" else self.till.fail)(tried)
        else:
            self.till.pay(checkout, amount_minor=parts.get(pressed), pending=pressed == "pending")

    # Commands

    async def _show_books(self, _request: web.Request) -> web.Response:
        currencies = {payment.currency for payment in self.books.payments.values()}
        totals = {
            provider: {code: self.books.paid_total(provider, code) for code in sorted(currencies)}
            for provider in PROVIDERS
        }
        return _json({**self.books.as_json(), "totals_minor": totals})

    async def _show_webhooks(self, _request: web.Request) -> web.Response:
        return _json({"data": [event.as_json() for event in self.webhooks.events.values()]})

    async def _command(self, request: web.Request) -> web.Response:
        asked = await request.json() if request.can_read_body else {}
        try:
            return _json(await self._obey(request.match_info["command"], asked))
        except (BooksError, WebhookError, AmountError, KeyError, TypeError) as error:
            return _json({"error": str(error)}, status=400)

    async def _obey(self, command: str, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: C901, PLR0912 - a table
        till = self.till
        match command:
            case "pay":
                more = {key: asked[key] for key in ("amount_minor", "currency", "pending") if key in asked}
                return {"payment": till.pay(till.find_checkout(asked["checkout"]), **more).id}
            case "refund":
                return {
                    "refund": till.refund(till.find_payment(asked["payment"]), asked.get("amount_minor")).id
                }
            case "dispute":
                disputed = till.dispute(
                    till.find_payment(asked["payment"]),
                    asked.get("amount_minor"),
                    inquiry=bool(asked.get("inquiry")),
                )
                return {"dispute": disputed.id}
            case "escalate" | "drop":
                till.end_inquiry(self.books.disputes[asked["dispute"]], disputed=command == "escalate")
            case "settle" | "fail":
                getattr(till, command)(till.find_payment(asked["payment"]))
            case "decline_next":
                till.decline_next(**asked)
            case "win" | "lose":
                getattr(till, command)(self.books.disputes[asked["dispute"]])
            case "expire":
                till.expire(till.find_checkout(asked["checkout"]))
            case "fault":
                self.faults.tell(Fault(**asked))
            case "clear":
                self.faults.clear()
            case "webhooks_to":
                self.webhooks.to = str(asked["origin"])
            case "hold":
                self.webhooks.hold()
            case "release":
                await self.webhooks.release(asked.get("order", "made"), seed=asked.get("seed", 0))
            case "deliver":
                return {"statuses": await self.webhooks.deliver(asked["event"], times=asked.get("times", 1))}
            case "forge":
                return {"status": await self.webhooks.forge(asked["event"], asked["wrong"])}
            case _:
                raise WebhookError(f"no command {command}")
        return {"ok": True}


def _page(text: str, *, status: int = 200) -> web.Response:
    return web.Response(status=status, text=text, content_type="text/html")


def _json(body: dict[str, Any], *, status: int = 200) -> web.Response:
    return web.Response(status=status, text=dumps(body), content_type="application/json")


async def _serve(arguments: argparse.Namespace) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    payments = SimulatedPayments(
        host=arguments.host,
        port=arguments.port,
        webhooks_to=arguments.webhooks_to,
        retry_pauses_s=_DEMO_PAUSES_S,
        books_path=arguments.books,
    )
    async with payments:
        sys.stdout.write(f"simulated payment providers on {payments.origin}\n")
        sys.stdout.flush()
        await stop.wait()


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.sim.payments.server",
        description="Payment providers with books of their own, for tests and demos.",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    parser.add_argument(
        "--books", type=Path, default=None, help="a file in which the books survive a restart"
    )
    parser.add_argument(
        "--webhooks-to",
        metavar="ORIGIN",
        default=None,
        help="where Tuma is; until then (or /sim/webhooks_to) they are held",
    )
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
