"""Alerts, the audit log, the log level."""

from aiohttp import web

from billing.ids import parse_id
from billing.monitoring.alerts import AlertsJson, describe_alerts
from billing.monitoring.audit import VerdictJson
from billing.postgres.notifications import announce
from proxy.http.forms import read_moment, read_query
from proxy.http.typed_answer import JsonAnswer, answer
from proxy.operator.answers import AuditRowsJson, LogLevelJson
from proxy.operator.forms import LogLevelForm
from proxy.operator.requests import read_as, read_page, services_of


async def list_alerts(request: web.Request) -> JsonAnswer[AlertsJson]:
    """The alerts that last, the latest that ended, and the messages that nobody took yet."""
    return answer(request, await describe_alerts(services_of(request).database))


async def list_audit(request: web.Request) -> JsonAnswer[AuditRowsJson]:
    """The newest rows of the audit log; ``wallet``, ``user``, ``actor``, ``since`` and ``limit`` in the query."""
    services = services_of(request)
    limit, _ = read_page(request, "row")
    wallet, user = read_query(request, "wallet"), read_query(request, "user")
    rows = await services.audit.list_rows(
        wallet_id=None if wallet is None else parse_id(wallet, "wallet"),
        user_id=None if user is None else await services.wallets.get_user(user),
        actor=read_query(request, "actor"),
        since=read_moment(request, "since"),
        limit=limit,
    )
    return answer(request, {"object": "list", "data": rows})


async def verify_audit(request: web.Request) -> JsonAnswer[VerdictJson]:
    """Find altered, removed and reordered rows; ``expect``: a head noted before. Note the head that it returns."""
    return answer(
        request, (await services_of(request).audit.verify(expect=read_query(request, "expect"))).as_json()
    )


async def put_log_level(request: web.Request) -> JsonAnswer[LogLevelJson]:
    """Change how much every worker logs, on every machine, until it is started anew; nothing is restarted."""
    services = services_of(request)
    form = await read_as(request, LogLevelForm)
    await announce(services.database, "log", form.level)
    await services.metrics.hear_level(form.level)
    return answer(request, {"level": form.level})
