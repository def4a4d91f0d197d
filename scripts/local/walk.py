"""``./scripts/dev --walk``: money from people, from the payment page to the books, with plain HTTP as a person's own program would.

Everything happens in wallets of its own, so that it may be repeated, and run beside whoever tries the demo. After each step the
balance must be what it ought to be to the last digit, and the books must hold.
"""

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from html import unescape
from typing import Any
from uuid import UUID

import aiohttp

from billing.actor import acting
from billing.books.proof import Books
from billing.errors import TumaError
from billing.identity.key import KeyRules
from billing.identity.keys import Keys
from billing.money import parse_amount
from billing.payments.refunds import Refunds
from config.settings import Settings
from scripts.office import Office, open_office, operator_name
from scripts.sim.payments.currencies import PROVIDERS, Provider, to_minor

_CURRENCY = "NGN"
_AMOUNT = Decimal(5000)
_PART = Decimal(1000)
_MODEL = "openai/gpt-4o-mini"
_DEADLINE_S = 90.0  # for one thing to come about, on a busy machine too
_POLL_S = 0.05
_BUTTON = re.compile(r'<button[^>]*\bname="do"[^>]*\bvalue="pay"')


class WalkError(TumaError):
    """A step did not end as it should."""


@dataclass(frozen=True, slots=True)
class Dispute:
    """A dispute at a simulated provider, and about how much."""

    id: str
    amount: Decimal


@dataclass(frozen=True, slots=True)
class Purse:
    """A wallet made for the walk, and a key that pays from it."""

    wallet_id: UUID
    key: str


class Walk:
    """One walk.

    Args:
        details: as ``./scripts/dev --json`` prints them.
        office: where the operator works.
        client: for HTTP.
        openai: the SDK's asynchronous client; it is a development dependency.
        say: takes a line per step.
    """

    def __init__(
        self,
        details: dict[str, str],
        office: Office,
        client: aiohttp.ClientSession,
        openai: Any,
        say: Callable[[str], None],
    ) -> None:
        self._details = details
        self._office = office
        self._client = client
        self._openai = openai
        self._say = say
        self.steps: list[dict[str, str]] = []

    async def run(self, providers: tuple[Provider, ...]) -> None:
        """Walk through all of it.

        Raises:
            WalkError: at the first step that does not end as it should.
        """
        purse = await self._make_purse()
        paid = {provider: await self._top_up(purse, provider) for provider in providers}
        first, second, third = providers[0], providers[1 % len(providers)], providers[2 % len(providers)]
        await self._call(purse, "a paid call")
        await self._refund_by_provider(purse, first, paid[first])
        await self._refund_by_operator(purse, second, paid[second])
        dispute = await self._open_dispute(purse, third, paid[third])
        await self._be_refused(purse)
        await self._win(purse, dispute)
        await self._call(purse, "a paid call again")
        # A wallet whose dispute is lost stays frozen: this one has done its duty.
        other = await self._make_purse()
        topup = await self._top_up(other, first)
        dispute = await self._open_dispute(other, first, topup)
        await self._lose(other, dispute)
        await self._compare_books([*paid.values(), topup])

    # Steps

    async def _top_up(self, purse: Purse, provider: Provider) -> dict[str, Any]:
        before = await self._balance(purse)
        body = {"provider": provider, "amount": f"{_AMOUNT:f}", "currency": _CURRENCY}
        topup = await self._ask(purse, "POST", "/wallet/topups", json=body)
        async with self._client.get(topup["url"]) as page:
            text = unescape(await page.text())
        if _BUTTON.search(text) is None or f"{_AMOUNT:f} {_CURRENCY}" not in text:
            raise WalkError(f"the page {topup['url']} does not offer to pay {_AMOUNT:f} {_CURRENCY}")
        async with self._client.post(topup["url"], data={"do": "pay"}) as page:
            page.raise_for_status()

        async def is_paid() -> bool:
            state: str = (await self._ask(purse, "GET", f"/wallet/topups/{topup['id']}"))["state"]
            if state not in ("pending", "paid"):
                raise WalkError(f"the top-up {topup['id']} is {state}")
            return state == "paid"

        await _until(is_paid, f"the top-up by {provider} to be paid")
        await self._end_step(
            purse, f"top-up by {provider}, paid on its page", before + _AMOUNT, before=before
        )
        return topup

    async def _call(self, purse: Purse, name: str) -> None:
        before = await self._balance(purse)
        done: list[tuple[str, Decimal]] = []

        async def is_admitted() -> bool:
            """Workers hear within a moment that a wallet is free again."""
            try:
                done.append(await self._complete(purse))
            except RefusedCallError as error:
                if not error.frozen:
                    raise
            return bool(done)

        await _until(is_admitted, f"{name} to be admitted")
        ((cost_usd, charge),) = done
        await self._end_step(
            purse, name, before - charge, before=before, cost_usd=cost_usd, charge=f"{charge:f}"
        )

    async def _refund_by_provider(self, purse: Purse, provider: Provider, topup: dict[str, Any]) -> None:
        before = await self._balance(purse)
        part = {"payment": topup["reference"], "amount_minor": to_minor(provider, _PART, _CURRENCY)}
        await self._order("refund", part)
        await self._end_step(
            purse, f"refund of {_PART:f} from {provider}'s side", before - _PART, before=before
        )

    async def _refund_by_operator(self, purse: Purse, provider: Provider, topup: dict[str, Any]) -> None:
        before = await self._balance(purse)
        refund_id = await begin_refund(self._office, provider, UUID(topup["id"]), _PART)

        async def has_arrived() -> bool:
            async with self._office.database.connection() as connection:
                state = await connection.fetchval(
                    "SELECT state FROM payment_reversals WHERE id = $1", refund_id
                )
            return bool(state == "final")

        await _until(has_arrived, f"{provider} to refund what the operator asked for")
        name = f"refund of {_PART:f} by the operator, through {provider}"
        await self._end_step(purse, name, before - _PART, before=before)

    async def _open_dispute(self, purse: Purse, provider: Provider, topup: dict[str, Any]) -> Dispute:
        before = await self._balance(purse)
        left = await self._left_of(topup, provider)
        made = await self._order("dispute", {"payment": topup["reference"]})
        await self._until_status(purse, "frozen")
        name = f"dispute over {left:f} opened at {provider}: wallet frozen"
        await self._end_step(purse, name, before - left, before=before)
        return Dispute(made["dispute"], left)

    async def _be_refused(self, purse: Purse) -> None:
        """A call of a frozen wallet; workers hear of the freeze within a moment, and what they admit until then is paid."""
        before, charges = await self._balance(purse), Decimal(0)

        async def is_refused() -> bool:
            nonlocal charges
            try:
                charges += (await self._complete(purse))[1]
            except RefusedCallError as error:
                if not error.frozen:
                    raise
                return True
            return False

        await _until(is_refused, "a call of a frozen wallet to be refused")
        await self._end_step(purse, "a call: refused, 403 wallet_frozen", before - charges, before=before)

    async def _win(self, purse: Purse, dispute: Dispute) -> None:
        before = await self._balance(purse)
        await self._order("win", {"dispute": dispute.id})
        await self._until_status(purse, "active")
        await self._end_step(purse, "dispute won: wallet free again", before + dispute.amount, before=before)

    async def _lose(self, purse: Purse, dispute: Dispute) -> None:
        before = await self._balance(purse)
        await self._order("lose", {"dispute": dispute.id})

        async def is_over() -> bool:
            async with self._office.database.connection() as connection:
                left = await connection.fetchval(
                    "SELECT count(*) FROM payment_reversals r JOIN payment_credits c USING (provider, provider_txn_id)"
                    " WHERE c.wallet_id = $1 AND r.state <> 'final'",
                    purse.wallet_id,
                )
            return bool(left == 0)

        await _until(is_over, "the lost dispute to be noted")
        await self._until_status(purse, "frozen")
        name = "dispute lost, in a wallet of its own: stays frozen"
        await self._end_step(purse, name, before, before=before)

    async def _compare_books(self, topups: list[dict[str, Any]]) -> None:
        """The providers' own books must say of these payments what ours do."""
        theirs = {topup["reference"]: await self._left_of(topup, topup["provider"]) for topup in topups}
        async with self._office.database.connection() as connection:
            rows = await connection.fetch(
                "SELECT c.intent_id, c.paid_nano - coalesce(sum(r.amount_nano) FILTER (WHERE r.state <> 'undone'), 0) AS nano"
                " FROM payment_credits c LEFT JOIN payment_reversals r USING (provider, provider_txn_id)"
                " WHERE c.intent_id = ANY ($1) GROUP BY c.intent_id, c.paid_nano",
                [UUID(topup["id"]) for topup in topups],
            )
        found = {str(row["intent_id"]): int(row["nano"]) for row in rows}
        ours = {topup["reference"]: found.get(topup["id"]) for topup in topups}
        if ours != {name: parse_amount(f"{amount:f}") for name, amount in theirs.items()}:
            raise WalkError(f"the providers' books say {theirs}, ours {ours} nano")
        total = sum(theirs.values(), Decimal(0))
        self._note(f"the providers' own books say the same: {total:f} {_CURRENCY} of these payments are left")

    # What steps are made of

    async def _make_purse(self) -> Purse:
        office, email = self._office, f"walk-{secrets.token_hex(6)}@tuma.example"
        with acting(f"operator:{operator_name()}"):
            await office.wallets.create_user(email)
            wallet_id = await office.wallets.create_wallet(email, currency=_CURRENCY)
            keys = Keys(office.database, office.settings.auth, office.settings.limits)
            made = await keys.create(wallet_id, KeyRules(name="walk"))
        return Purse(wallet_id, made.secret)

    async def _ask(self, purse: Purse, method: str, path: str, **more: Any) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {purse.key}"}
        url = self._details["base_url"] + path
        async with self._client.request(method, url, headers=headers, **more) as answer:
            body: dict[str, Any] = await answer.json()
            if not answer.ok:
                raise WalkError(f"{method} {path}: {answer.status} {body.get('error', body)}")
            return body

    async def _order(self, command: str, said: dict[str, Any]) -> dict[str, Any]:
        """Have something happen at a simulated provider."""
        url = f"{self._details['payments_url']}/sim/{command}"
        async with self._client.post(url, json=said) as answer:
            body: dict[str, Any] = await answer.json()
            if not answer.ok:
                raise WalkError(f"the simulated payment providers refuse to {command}: {body}")
            return body

    async def _their_books(self) -> dict[str, Any]:
        async with self._client.get(f"{self._details['payments_url']}/sim/books") as answer:
            found: dict[str, Any] = await answer.json()
            return found

    async def _left_of(self, topup: dict[str, Any], provider: Provider) -> Decimal:
        """Return what of a top-up the provider's own books have not sent back or lost."""
        books = await self._their_books()
        ids = {row["id"] for row in books["payments"] if row["reference"] == topup["reference"]}
        paid = [row for row in books["payments"] if row["id"] in ids and row["status"] == "succeeded"]
        gone = [
            row
            for row in (*books["refunds"], *books["disputes"])
            if row["payment_id"] in ids and row["status"] not in ("failed", "won")
        ]
        left = sum(row["amount_minor"] for row in paid) - sum(row["amount_minor"] for row in gone)
        return Decimal(left) / to_minor(provider, 1, _CURRENCY)

    async def _complete(self, purse: Purse) -> tuple[str, Decimal]:
        """Make a call with the OpenAI SDK; return its cost in USD and its charge.

        Raises:
            RefusedCallError: it was not admitted.
        """
        from openai import APIStatusError  # noqa: PLC0415 - a development dependency

        client = self._openai.with_options(api_key=purse.key)
        try:
            raw = await client.chat.completions.with_raw_response.create(
                model=_MODEL, messages=[{"role": "user", "content": "What is a naira?"}], max_tokens=64
            )
        except APIStatusError as error:
            raise RefusedCallError(error.status_code, str(error.code)) from error
        charge, currency = raw.headers["x-tuma-charge"].split()
        if currency != _CURRENCY or Decimal(charge) <= 0:
            raise WalkError(f"the call was charged {charge} {currency}")
        return raw.headers["x-tuma-cost-usd"], Decimal(charge)

    async def _balance(self, purse: Purse) -> Decimal:
        return Decimal((await self._ask(purse, "GET", "/wallet"))["posted"])

    async def _until_status(self, purse: Purse, status: str) -> None:
        async def is_so() -> bool:
            return bool((await self._ask(purse, "GET", "/wallet"))["status"] == status)

        await _until(is_so, f"the wallet to be {status}")

    async def _end_step(
        self, purse: Purse, name: str, expected: Decimal, *, before: Decimal, **facts: str
    ) -> None:
        """Wait for the balance that a step leads to, then let the books prove themselves."""

        async def is_so() -> bool:
            return await self._balance(purse) == expected

        await _until(is_so, f"{name}: the balance to be {expected:f} {_CURRENCY}")
        checks = await self._make_books().check()
        wrong = "; ".join(f"{number} {check.detail}" for number, check in checks.items() if not check.ok)
        if wrong:
            raise WalkError(f"{name}: the books do not hold: {wrong}")
        cost = f", cost {facts['cost_usd']} USD, charged {facts['charge']} {_CURRENCY}" if facts else ""
        self._note(
            name + cost,
            balance_before=f"{before:f}",
            balance=f"{expected:f}",
            currency=_CURRENCY,
            books="ok",
            **facts,
        )

    def _note(self, name: str, **facts: str) -> None:
        self.steps.append({"step": name, **facts})
        money = (
            f"{facts['balance_before']:>14} → {facts['balance']:>14} {_CURRENCY}   books ok   "
            if facts
            else ""
        )
        self._say(money + name)

    def _make_books(self) -> Books:
        office, settings = self._office, self._office.settings
        grace_s = settings.holds.lease_s + settings.sweep.period_s * 2 + settings.sweep.review_after_s
        return Books(office.database, office.holds, office.upstream, sweep_grace_s=grace_s)


class RefusedCallError(WalkError):
    """A call was not admitted."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"a call was refused: {status} {code}")
        self.frozen = (status, code) == (403, "wallet_frozen")


async def begin_refund(office: Office, provider: Provider, intent_id: UUID, amount: Decimal) -> UUID:
    """Begin a refund of what an intent was paid with, as an operator does; return the refund's id."""
    async with office.database.connection() as connection:
        txn_id = await connection.fetchval(
            "SELECT provider_txn_id FROM payment_credits WHERE intent_id = $1", intent_id
        )
    with acting(f"operator:{operator_name()}"):
        begun = await Refunds(office.database).begin(
            provider, txn_id, amount_nano=parse_amount(f"{amount:f}"), reason="asked for in the walk"
        )
    return begun.id


async def _until(is_so: Callable[[], Awaitable[bool]], what: str) -> None:
    """Wait for a condition.

    Raises:
        WalkError: it did not come about.
    """
    try:
        async with asyncio.timeout(_DEADLINE_S):
            while not await is_so():
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise WalkError(f"waited {_DEADLINE_S:.0f} s for {what}") from None


@asynccontextmanager
async def _open_walk(
    details: dict[str, str], settings: Settings, say: Callable[[str], None]
) -> AsyncIterator[Walk]:
    from openai import AsyncOpenAI  # noqa: PLC0415 - a development dependency

    timeout = aiohttp.ClientTimeout(total=_DEADLINE_S)
    async with (
        open_office(settings) as office,
        aiohttp.ClientSession(timeout=timeout) as client,
        AsyncOpenAI(base_url=details["base_url"], api_key="each wallet's own") as openai,
    ):
        yield Walk(details, office, client, openai, say)


async def walk(
    details: dict[str, str],
    settings: Settings,
    say: Callable[[str], None],
    *,
    providers: tuple[Provider, ...] = PROVIDERS,
) -> dict[str, Any]:
    """Walk against a running server.

    Args:
        details: as ``./scripts/dev --json`` prints them.
        settings: as the server sees them.
        say: takes a line per step.
        providers: those that are simulated.

    Raises:
        WalkError: at the first step that does not end as it should; the lines say how far it came.
    """
    if not details.get("payments_url"):
        raise WalkError(
            "the walk pays at the simulated payment providers, and a real one is set up: unset TUMA_STRIPE__SECRET_KEY,"
            " TUMA_PAYSTACK__SECRET_KEY and TUMA_FLUTTERWAVE__SECRET_KEY"
        )
    try:
        async with _open_walk(details, settings, say) as one:
            await one.run(providers)
    except (aiohttp.ClientError, OSError) as error:
        raise WalkError(f"a server does not answer as it should: {error}") from error
    return {"ok": True, "providers": list(providers), "steps": one.steps}
