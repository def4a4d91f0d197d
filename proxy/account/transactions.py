"""``/v1/wallet/transactions`` and ``/v1/wallet/statements/{month}``: where a person's money went."""

from html import escape
from uuid import UUID

from aiohttp import web

from billing.identity.caller import Caller
from billing.ids import parse_id
from billing.money import format_amount
from billing.reports.statement import Filter, Month, Transaction
from proxy.account.answers import TransactionsJson
from proxy.account.requests import enter
from proxy.http.csv_answer import begin_csv, read_format, write_csv
from proxy.http.forms import read_limit, read_moment, read_query
from proxy.http.request_facts import late_headers
from proxy.http.typed_answer import CsvAnswer, JsonAnswer, TextAnswer, answer
from proxy.services.account import AccountServices

PAGE = 100
_COLUMNS = (
    *("id", "created_at", "kind", "amount", "currency", "balance", "call_id", "model", "cost_usd"),
    *("tokens_prompt", "tokens_completion", "description"),
)
_TEXTS = ("model", "description")
_WORDS = {
    "settlement": "Calls",
    "grant": "Credit",
    "topup": "Top-up",
    "refund": "Refund",
    "correction": "Correction",
    "reversal": "Payment refunded",
    "dispute": "Payment disputed",
}
_STYLE = (
    "body{font:14px/1.5 system-ui,sans-serif;max-width:48em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.3em .6em;border-bottom:1px solid #ddd}"
    "td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}tfoot td{font-weight:600}"
    "@media print{body{margin:0;max-width:none}}"
)


async def list_transactions(request: web.Request) -> JsonAnswer[TransactionsJson] | CsvAnswer:
    """What came into the wallet and went out of it, newest first, with the running balance; as JSON, or all as CSV.

    ``kind`` (several by commas), ``since`` and ``until`` filter; ``limit`` and ``after`` page; ``format=csv`` gives all.
    """
    services, caller = await enter(request)
    wanted = _read_filter(request)
    if read_format(request, ("json", "csv")) == "csv":
        return await _send_csv(request, services, caller, wanted, "transactions")
    limit, after = read_limit(request, most=PAGE), read_query(request, "after")
    body = await describe_page(
        services,
        caller,
        wanted,
        after=None if after is None else parse_id(after, "transaction"),
        limit=limit,
    )
    return answer(request, body)


async def describe_page(
    services: AccountServices, caller: Caller, wanted: Filter, *, after: UUID | None, limit: int
) -> TransactionsJson:
    """Return a page of the caller's transactions, newest first."""
    found = await services.statements.list_page(
        caller.user_id, caller.wallet_id, wanted, after=after, limit=limit + 1
    )
    page = found[:limit]
    return {
        "object": "list",
        "data": [transaction.as_json() for transaction in page],
        "has_more": len(found) > limit,
        "first_id": str(page[0].id) if page else None,
        "last_id": str(page[-1].id) if page else None,
    }


async def get_statement(request: web.Request) -> TextAnswer | CsvAnswer:
    """A month on the person's clock, as ``2026-11``: a page to print, or with ``format=csv`` every transaction of it."""
    services, caller = await enter(request)
    month = await services.statements.read_month(
        caller.user_id, caller.wallet_id, request.match_info["month"]
    )
    if read_format(request, ("html", "csv")) == "csv":
        wanted = Filter(since=month.starts_at, until=month.ends_at)
        return await _send_csv(request, services, caller, wanted, month.name)
    return TextAnswer(
        text=render_month(month),
        content_type="text/html",
        headers={
            **late_headers(request, month.as_of),
            "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
        },
    )


async def _send_csv(
    request: web.Request, services: AccountServices, caller: Caller, wanted: Filter, name: str
) -> CsvAnswer:
    pages = services.statements.read_all(caller.user_id, caller.wallet_id, wanted)
    first: list[Transaction] = await anext(pages, [])  # before the head, so that an error is one
    response = await begin_csv(request, name, _COLUMNS)
    await response.write(write_rows(first))
    async for page in pages:
        await response.write(write_rows(page))
    await response.write_eof()
    return response


def write_rows(page: list[Transaction]) -> bytes:
    """Write transactions as CSV."""
    return write_csv([transaction.as_json() for transaction in page], _COLUMNS, _TEXTS)


def render_month(month: Month) -> str:
    """Write a month as a page to print."""
    total = sum(line.amount_nano for line in month.lines)
    body = "".join(
        f"<tr><td>{escape(line.day)}</td><td>{escape(_WORDS.get(line.kind, line.kind))}</td><td>{escape(line.model or '')}</td>"
        f'<td class="n">{line.rows}</td><td class="n">{format_amount(line.amount_nano)}</td></tr>'
        for line in month.lines
    )
    currency = escape(month.currency)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Statement {escape(month.name)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>Statement {escape(month.name)}</h1>"
        f"<p>{escape(month.email or '')}<br>Wallet in {currency}; days in {escape(month.timezone)}.</p>"
        f"<p>Opening balance: <strong>{format_amount(month.opening_nano)} {currency}</strong></p>"
        '<table><thead><tr><th>Day</th><th>What</th><th>Model</th><th class="n">How many</th>'
        f'<th class="n">{currency}</th></tr></thead><tbody>{body}</tbody>'
        f'<tfoot><tr><td colspan="4">Sum</td><td class="n">{format_amount(total)}</td></tr></tfoot></table>'
        f"<p>Closing balance: <strong>{format_amount(month.closing_nano)} {currency}</strong></p></body></html>\n"
    )


def _read_filter(request: web.Request) -> Filter:
    kinds = read_query(request, "kind")
    return Filter(
        kinds=None if kinds is None else kinds.split(","),
        since=read_moment(request, "since"),
        until=read_moment(request, "until"),
    )
