"""``GET /v1/usage``: what was used, by hour, day, week or month, by model and by key."""

from aiohttp import web

from billing.identity.caller import Caller
from billing.reports.usage import UsageQuery, UsageReport, parse_bound
from proxy.account.answers import UsageListJson
from proxy.account.requests import enter
from proxy.http.csv_answer import begin_csv, read_format, write_csv
from proxy.http.errors import BadRequestError
from proxy.http.forms import read_query
from proxy.http.request_facts import late_headers
from proxy.http.typed_answer import CsvAnswer, JsonAnswer

USAGE_COLUMNS = (
    *("period", "model", "key_id", "key_name", "calls", "calls_exact", "calls_estimated", "calls_void"),
    *("tokens_prompt", "tokens_completion", "tokens_cached", "tokens_cache_written", "tokens_reasoning"),
    *("cost_usd", "charge", "markup", "currency", "first_byte_average_ms", "first_byte_p50_below_ms"),
    *("first_byte_p95_below_ms", "duration_average_ms", "duration_p50_below_ms", "duration_p95_below_ms"),
)
_TEXTS = ("model", "key_name")
_WRITTEN_AT_ONCE = 500  # rows
_PARAMETERS = ("since", "until", "group_by", "format")


async def get_usage(request: web.Request) -> JsonAnswer[UsageListJson] | CsvAnswer:
    """What the wallet's calls used, cost and were charged, summed by period, model and key; as JSON or CSV.

    ``group_by`` (several by commas: one of hour, day, week, month; model; key) says by what; ``since`` and ``until`` are days on
    the person's clock or moments on a quarter of an hour, the second not included. A call is where it arrived.
    """
    services, caller = await enter(request)
    unknown = next((name for name in request.query if name not in _PARAMETERS), None)
    if unknown is not None:
        raise BadRequestError(
            f"There is no parameter {unknown[:40]!r}: it is one of {', '.join(_PARAMETERS)}.",
            param=unknown[:40],
        )
    as_csv = read_format(request, ("json", "csv")) == "csv"
    limits = services.settings.limits
    group_by, since, until = (read_query(request, name) for name in ("group_by", "since", "until"))
    wanted = UsageQuery(
        since=None if since is None else parse_bound(since),
        until=None if until is None else parse_bound(until),
        by=("day", "model") if group_by is None else tuple(filter(None, group_by.split(","))),
        days_max=limits.usage_days,
        rows_max=limits.usage_csv_rows if as_csv else limits.usage_rows,
    )
    report = await services.usage.read_own(caller.user_id, caller.wallet_id, wanted)
    if as_csv:
        return await _send_csv(request, report)
    return JsonAnswer(_as_json(report, caller, wanted), headers=late_headers(request, report.as_of))


def _as_json(report: UsageReport, caller: Caller, wanted: UsageQuery) -> UsageListJson:
    ((currency, total),) = report.totals.items()
    return {
        "object": "list",
        "wallet_id": str(caller.wallet_id),
        "since": report.starts_at.isoformat(),
        "until": report.ends_at.isoformat(),
        "timezone": report.timezone,
        "group_by": list(wanted.by),
        "data": [row.as_json() for row in report.rows],
        "totals": {"currency": currency, **total.as_json()},
    }


async def _send_csv(request: web.Request, report: UsageReport) -> CsvAnswer:
    response = await begin_csv(request, "usage", USAGE_COLUMNS, as_of=report.as_of)
    for start in range(0, len(report.rows), _WRITTEN_AT_ONCE):
        page = report.rows[start : start + _WRITTEN_AT_ONCE]
        await response.write(write_csv([row.as_json() for row in page], USAGE_COLUMNS, _TEXTS))
    await response.write_eof()
    return response
