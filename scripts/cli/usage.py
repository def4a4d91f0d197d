"""``tuma usage``: what was used, as a table with a line of bars beside each row."""

import io
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import click
from rich.console import Console
from rich.table import Table

from billing.errors import InputError
from billing.ids import parse_id
from billing.reports.usage import GROUPS, Sums, UsageBook, UsageQuery, UsageReport, UsageRow, parse_bound
from scripts.command import plain_text
from scripts.office import Office

_WIDTH = 320  # no line is folded or cut for the sake of a terminal that is not known
_ROWS_MAX = 50_000
_BARS = "▁▂▃▄▅▆▇█"
_FINER = {"day": "hour", "week": "day", "month": "day", None: "day"}  # what the bars of a row are of
_TREND_MAX = 62  # bars; a row of more shows none
_Reader = Callable[[UsageQuery], Coroutine[Any, Any, UsageReport]]


def _usage_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of ``tuma usage``."""
    for option in reversed(
        (
            click.option("--wallet", default=None, help="Of this wallet alone."),
            click.option("--user", default=None, help="Of this user's wallets: id or e-mail address."),
            click.option("--since", default=None, help="A day as 2026-11-01; left out: 29 days ago."),
            click.option("--until", default=None, help="A day, not included; left out: the end of today."),
            click.option("--by", default="day", show_default=True, help=f"By commas: {', '.join(GROUPS)}."),
        )
    ):
        command = option(command)
    return command


@_usage_options
async def show_usage(
    office: Office, *, wallet: str | None, user: str | None, since: str | None, until: str | None, by: str
) -> dict[str, Any]:
    """Show what was used, on the owner's clock; of everybody in UTC."""
    read = await _reader(office, wallet=wallet, user=user)
    wanted = UsageQuery(
        since=None if since is None else parse_bound(since),
        until=None if until is None else parse_bound(until),
        by=tuple(filter(None, by.split(","))),
        rows_max=_ROWS_MAX,
    )
    report, trends = await _read_with_trends(read, wanted)
    return {
        "report": render(report, wanted, trends),
        "since": report.starts_at.isoformat(),
        "until": report.ends_at.isoformat(),
        "timezone": report.timezone,
        "as_of": None if report.as_of is None else report.as_of.isoformat(),
        "rows": [row.as_json() for row in report.rows],
        "totals": [{"currency": currency, **sums.as_json()} for currency, sums in report.totals.items()],
    }


async def _reader(office: Office, *, wallet: str | None, user: str | None) -> _Reader:
    book = UsageBook(office.late)
    if wallet is not None and user is not None:
        raise InputError("give a wallet or a user, not both")
    if wallet is not None:
        wallet_id = parse_id(wallet, "wallet")
        return lambda wanted: book.read_wallet(wallet_id, wanted)
    if user is not None:
        user_id = await office.wallets.get_user(user)
        return lambda wanted: book.read_user(user_id, wanted)
    return book.read_all


_Trends = Mapping[tuple[Any, ...], Sequence[int]]


async def _read_with_trends(read: _Reader, wanted: UsageQuery) -> tuple[UsageReport, _Trends]:
    """Return the rows, and what each cost step by step: a day by its hours, a week or month or the whole time by days.

    The steps are read, and added up here: everybody's sums are millions, and read once.
    """
    finer = _FINER.get(wanted.period)
    if finer is None:
        return await read(wanted), {}
    rest = [name for name in wanted.by if name != wanted.period]
    try:
        steps = await read(replace(wanted, by=(finer, *rest)))
    except InputError:  # too many of them, or what is said again
        return await read(wanted), {}
    rows: dict[tuple[Any, ...], UsageRow] = {}
    trends: dict[tuple[Any, ...], list[int]] = {}
    for step in steps.rows:
        assert step.period is not None
        begins, count = _span(step.period, wanted.period, steps)
        whole = replace(step, period=None if wanted.period is None else begins)
        group = _group(whole)
        found = rows.get(group)
        rows[group] = whole if found is None else replace(found, sums=found.sums + step.sums)
        costs = trends.setdefault(group, [0] * count)
        costs[_place(step.period, begins, ZoneInfo(steps.timezone))] += step.sums.cost_nanousd
    ordered = sorted(
        rows.values(), key=lambda row: tuple(map(str, (*_group(row)[:2], row.key_name, *_group(row)[2:])))
    )
    longest = max(map(len, trends.values()), default=0)
    return replace(steps, rows=ordered), trends if longest <= _TREND_MAX else {}


def _group(row: UsageRow) -> tuple[Any, ...]:
    return (row.period, row.model, row.key_id, row.currency)


def _span(step: date | datetime, period: str | None, report: UsageReport) -> tuple[date, int]:
    """Return the first day of the row that a step belongs to, and how many steps it has."""
    clock = ZoneInfo(report.timezone)
    if isinstance(step, datetime):
        midnights = [
            _midnight(step.astimezone(clock).date() + timedelta(days=more), clock) for more in (0, 1)
        ]
        return step.astimezone(clock).date(), -(-int((midnights[1] - midnights[0]).total_seconds()) // 3600)
    if period == "month":
        following = (step.replace(day=1) + timedelta(days=32)).replace(day=1)
        return step.replace(day=1), (following - step.replace(day=1)).days
    if period == "week":
        return step - timedelta(days=(step.isoweekday() - report.week_starts) % 7), 7
    last_moment = report.ends_at - timedelta(milliseconds=1)
    first, last = (moment.astimezone(clock).date() for moment in (report.starts_at, last_moment))
    return first, (last - first).days + 1


def _place(step: date | datetime, begins: date, clock: ZoneInfo) -> int:
    if isinstance(step, datetime):
        return max(int((step - _midnight(begins, clock)).total_seconds()) // 3600, 0)
    return (step - begins).days


def _midnight(day: date, clock: ZoneInfo) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=clock).astimezone(UTC)


def draw_bars(values: Sequence[int]) -> str:
    """Draw values as bars of eight heights, a blank for nothing."""
    most = max(values, default=0)
    return "".join(" " if value <= 0 else _BARS[(value * len(_BARS) - 1) // most] for value in values)


def render(report: UsageReport, wanted: UsageQuery, trends: _Trends) -> str:
    """Write a report as a table."""
    steps = _FINER.get(wanted.period)
    as_of = "" if report.as_of is None else f"; by a replica, as of {report.as_of:%Y-%m-%d %H:%M:%S} UTC"
    table = Table(
        title=f"{report.starts_at:%Y-%m-%d %H:%M} to {report.ends_at:%Y-%m-%d %H:%M} UTC, days in {report.timezone}{as_of}"
    )
    for name in wanted.by:
        table.add_column(name)
    for name in ("calls", "estimated", "void", "prompt", "completion", "cached", "reasoning"):
        table.add_column(name, justify="right")
    for name in ("cost USD", "charge", "markup", "first byte", "p95"):
        table.add_column(name, justify="right")
    table.add_column(f"cost by {steps}" if trends else "")
    for row in report.rows:
        trend = trends.get(_group(row), ())
        table.add_row(
            *(plain_text(_label(row, name)) for name in wanted.by),
            *_cells(row.sums, row.currency),
            draw_bars(trend),
        )
    table.add_section()
    for currency, sums in report.totals.items():
        table.add_row(*(["total"] + [""] * len(wanted.by))[: len(wanted.by)], *_cells(sums, currency), "")
    written = io.StringIO()
    Console(file=written, width=_WIDTH, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())


def _label(row: UsageRow, name: str) -> str:
    if name == "model":
        return row.model or ""
    if name == "key":
        return "(no key)" if row.key_id is None else row.key_name or str(row.key_id)
    return f"{row.period:%Y-%m-%d %H:%M %z}" if isinstance(row.period, datetime) else str(row.period)


def _cells(sums: Sums, currency: str) -> list[str]:
    shown = sums.as_json()
    first_ms, slow_ms = shown["first_byte_average_ms"], shown["first_byte_p95_below_ms"]
    return [
        *(f"{sums.calls:,}", f"{sums.calls - sums.exact:,}", f"{sums.voids:,}", f"{sums.prompt_tokens:,}"),
        *(f"{sums.completion_tokens:,}", f"{sums.cached_read_tokens:,}", f"{sums.reasoning_tokens:,}"),
        shown["cost_usd"],
        f"{shown['charge']} {currency}",
        shown["markup"],
        "" if first_ms is None else f"{first_ms:,} ms",
        "" if slow_ms is None else f"< {slow_ms:,} ms",
    ]
