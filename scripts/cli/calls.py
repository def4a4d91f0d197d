"""``tuma calls``: how a charge came about, refunds, and what a call cost where nobody else could tell."""

from typing import Any

import click

from billing.calls.corrections import Corrections
from billing.calls.reviews import CallReviews
from billing.ids import parse_id
from billing.money import format_amount, parse_amount
from billing.reports.answers import WholeCallJson
from billing.reports.call_view import describe_call
from scripts.command import office_command
from scripts.office import Office


@click.group()
def calls() -> None:
    """Calls."""


@office_command(calls, "show")
@click.argument("call")
async def calls_show(office: Office, *, call: str) -> dict[str, Any]:
    """Show everything known about a call, and how its charge came about."""
    shown = await describe_call(office.database, parse_id(call, "call"))
    return {"report": _write_call(shown), **shown}


def _write_call(shown: WholeCallJson) -> str:
    """Write a call for people: what it was, how its charge came about, and what was posted."""
    answered = "streamed" if shown["stream"] else "plain"
    by = "" if shown["key_id"] is None else f", key {shown['key_id']}"
    lines = [
        f"Call {shown['id']}: {shown['model']}, {answered}, {shown['state']}",
        f"wallet {shown['wallet_id']}{by}, opened {shown['opened_at']}",
        "",
        *shown["explanation"],
    ]
    if shown["postings"]:
        lines += ["", "Postings:"]
        lines += [
            f"  {row['at']}  {row['kind']:<10} {row['account']:<16} {row['amount']:>24} {row['currency']}  {row['memo']}".rstrip()
            for row in shown["postings"]
        ]
    return "\n".join(lines)


@office_command(calls, "refund")
@click.argument("call")
@click.option("--amount", default=None, help="In the wallet's currency; all of the charge, when left out.")
@click.option("--reason", required=True, help="Shown to the user.")
@click.option("--key", default=None, help="Idempotency key: a repeat with it posts nothing.")
async def calls_refund(
    office: Office, *, call: str, amount: str | None, reason: str, key: str | None
) -> dict[str, Any]:
    """Give a call's charge back."""
    call_id = parse_id(call, "call")
    policy = office.settings.reconcile
    corrections = Corrections(office.database, charge_estimates_upward=policy.charge_estimates_upward)
    done = await corrections.refund(
        call_id, amount_nano=None if amount is None else parse_amount(amount), reason=reason, key=key
    )
    shown = await describe_call(office.database, call_id)
    await office.cool(parse_id(shown["wallet_id"], "wallet"))
    refunded = format_amount(done.before.charge_nano - done.after.charge_nano)
    return {"transaction_id": None if done.tx_id is None else str(done.tx_id), "refunded": refunded, **shown}


@office_command(calls, "settle")
@click.argument("call")
@click.option("--cost-usd", required=True, metavar="USD", help="What the provider billed; 0 makes it void.")
@click.option("--house", is_flag=True, help="The house pays, and the wallet nothing.")
@click.option("--reason", required=True, help="Kept in the audit log.")
async def calls_settle(
    office: Office, *, call: str, cost_usd: str, house: bool, reason: str
) -> dict[str, Any]:
    """End a call that is in review at what it cost; its wallet pays at most what is held for it."""
    call_id = parse_id(call, "call")
    reviews = CallReviews(office.database)
    done = await reviews.end(call_id, cost_nanousd=parse_amount(cost_usd), reason=reason, house=house)
    await office.cool(done.wallet_id)
    return {**(await describe_call(office.database, call_id))}
