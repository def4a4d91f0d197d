"""The commands for payments: what people paid, what waits for a decision, refunds, and webhooks."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import click

from billing.errors import PaymentsUnavailableError
from billing.ids import parse_id
from billing.money import format_amount, parse_amount
from billing.payments.payment import Refund
from billing.payments.refunds import Refunds
from billing.payments.reviews import Reviews
from billing.payments.views import EVENT_STATES, PAGE_MAX, STATES, PaymentFilter, PaymentViews, parse_provider
from billing.payments.worker import PaymentWorker
from billing.postgres.database import Database
from proxy.payments.providers import make_payment_apis
from scripts.command import office_command
from scripts.office import Office

_LIMIT = click.option("--limit", type=click.IntRange(1, PAGE_MAX), default=50, show_default=True)


@click.group()
def payments() -> None:
    """What people paid, what was taken back, and what waits for a decision."""


@office_command(payments, "list")
@click.option("--provider", default=None, help="stripe, paystack or flutterwave.")
@click.option("--wallet", default=None, help="Of this wallet only.")
@click.option("--user", default=None, help="Of this user only: id or e-mail address.")
@click.option("--state", type=click.Choice(STATES), default=None)
@click.option("--since", type=click.DateTime(), default=None, help="In UTC.")
@_LIMIT
async def payments_list(
    office: Office,
    *,
    provider: str | None,
    wallet: str | None,
    user: str | None,
    state: str | None,
    since: datetime | None,
    limit: int,
) -> dict[str, Any]:
    """List top-ups and what was paid for them, the newest first."""
    wanted = PaymentFilter(
        provider=provider,
        wallet_id=None if wallet is None else parse_id(wallet, "wallet"),
        user_id=None if user is None else await office.wallets.get_user(user),
        state=state,
        since=_utc(since),
    )
    return {"payments": await PaymentViews(office.database).list_payments(wanted, limit=limit)}


@office_command(payments, "show")
@click.argument("provider_or_topup")
@click.argument("txn", required=False)
async def payments_show(office: Office, *, provider_or_topup: str, txn: str | None) -> dict[str, Any]:
    """Show everything about a payment, named as PROVIDER TXN, or about a top-up, by its id or its reference."""
    views = PaymentViews(office.database)
    if txn is None:
        return {**await views.describe_intent(provider_or_topup)}
    return {**await views.describe(parse_provider(provider_or_topup), txn)}


@office_command(payments, "reviews")
async def payments_reviews(office: Office) -> dict[str, Any]:
    """List payments that wait for a decision: `payments accept` or `refund`; and refunds that may have been sent: `send-again`."""
    unsure = [
        {
            "refund": str(row["id"]),
            "provider": row["provider"],
            "payment": row["provider_txn_id"],
            "amount": format_amount(row["amount_nano"]),
            "currency": row["currency"],
            "sent_at": row["sent_at"].isoformat(),
        }
        for row in await Reviews(office.database).list_unsure()
    ]
    return {"reviews": await PaymentViews(office.database).list_reviews(), "unsure_refunds": unsure}


@office_command(payments, "accept")
@click.argument("provider")
@click.argument("txn")
@click.option("--wallet", default=None, help="Which wallet gets it; the top-up's, when left out.")
@click.option("--reason", required=True, help="For the books.")
async def payments_accept(
    office: Office, *, provider: str, txn: str, wallet: str | None, reason: str
) -> dict[str, Any]:
    """Give what of a payment lies in suspense to a wallet."""
    named = parse_provider(provider)
    accepted = await Reviews(office.database).accept(
        named, txn, wallet_id=None if wallet is None else parse_id(wallet, "wallet"), reason=reason
    )
    return {"accepted": accepted, **await _follow(office, named, txn)}


@office_command(payments, "refund")
@click.argument("provider")
@click.argument("txn")
@click.option("--amount", default=None, help="In the payment's currency; all that is left, when left out.")
@click.option("--reason", required=True, help="For the books.")
@click.option("--below-zero", is_flag=True, help="Though the wallet has spent it.")
@click.option("--key", default=None, help="Idempotency key: a repeat with it refunds nothing more.")
async def payments_refund(
    office: Office,
    *,
    provider: str,
    txn: str,
    amount: str | None,
    reason: str,
    below_zero: bool,
    key: str | None,
) -> dict[str, Any]:
    """Send a payment's money back: it is set aside at once, then the provider is asked to send it."""
    named = parse_provider(provider)
    refund = await Refunds(office.database).begin(
        named,
        txn,
        amount_nano=None if amount is None else parse_amount(amount),
        reason=reason,
        below_zero=below_zero,
        key=key,
    )
    await _follow(office, named, txn)
    sent = await _send(office, refund)
    shown = await _follow(office, named, txn)
    state = next(item["state"] for item in shown["reversals"] if item["id"] == str(refund.id))
    return {
        "id": str(refund.id),
        "refunded": "0" if state == "undone" else format_amount(refund.amount_nano),
        "refund_state": state,
        "sent": sent,
        **shown,
    }


async def _send(office: Office, refund: Refund) -> str:
    """Have the provider asked by this very command, so that the operator sees what it says; a server does so otherwise."""
    if refund.state != "requested":
        return "before: this is the refund that was begun with this key"
    async with _open_worker(office) as worker:
        try:
            refused = await worker.send_refund(refund.id)
        except PaymentsUnavailableError as error:
            return f"not yet: {error}; the money is set aside, and a running `tuma serve` asks again"
    if refused is None:
        return "not yet: the money is set aside, and a running `tuma serve` that knows this provider sends it"
    return f"no: {refused}; the money is the wallet's again" if refused else "yes"


@asynccontextmanager
async def _open_worker(office: Office) -> AsyncIterator[PaymentWorker]:
    settings = office.settings
    database = Database(settings.postgres, name="tuma command", role="webhook", connections_max=1)
    worker = PaymentWorker(database, make_payment_apis(settings), settings.payments)
    try:
        yield worker
    finally:
        await worker.close()
        await database.close()


async def _follow(office: Office, provider: Any, txn: str) -> dict[str, Any]:
    """Let Redis follow a payment's wallet, and return the payment."""
    shown = (await PaymentViews(office.database).describe(provider, txn))["payments"][0]
    if shown["wallet_id"] is not None:
        await office.cool(parse_id(shown["wallet_id"], "wallet"))
    return {**shown}


@office_command(payments, "send-again")
@click.argument("refund")
async def payments_send_again(office: Office, *, refund: str) -> dict[str, Any]:
    """Send a refund again that may have been sent before: first look at the provider's own pages that it is not there."""
    refund_id = parse_id(refund, "refund")
    await Reviews(office.database).send_again(refund_id)
    return {"id": str(refund_id), "state": "requested"}


@office_command(payments, "webhooks")
@click.option(
    "--state", type=click.Choice(EVENT_STATES), default=None, help="Waiting and in review, when left out."
)
@_LIMIT
async def payments_webhooks(office: Office, *, state: str | None, limit: int) -> dict[str, Any]:
    """List webhooks that wait or ended in review, the newest first."""
    return {"webhooks": await PaymentViews(office.database).list_events(state=state, limit=limit)}


@office_command(payments, "retry")
@click.argument("event")
async def payments_retry(office: Office, *, event: str) -> dict[str, Any]:
    """Let a webhook that ended in review, or was ignored, be looked at again by a running server, within seconds."""
    event_id = parse_id(event, "webhook")
    await Reviews(office.database).retry_event(event_id)
    return {"id": str(event_id), "state": "new"}


def _utc(moment: datetime | None) -> datetime | None:
    return None if moment is None else moment.replace(tzinfo=UTC)
