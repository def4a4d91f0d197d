"""``tuma alerts``, ``audit``, ``log-level``."""

from datetime import UTC, datetime
from typing import Any

import click

from billing.ids import parse_id
from billing.monitoring.alerts import Alerts, describe_alerts, describe_in_words
from billing.monitoring.audit import Audit, describe_row
from billing.postgres.notifications import announce
from config.logging import LEVELS
from config.settings import LogLevel
from proxy.outbound.alert_webhook import make_messenger
from scripts.command import office_command
from scripts.office import Office


@click.group()
def alerts() -> None:
    """What operators are told of."""


@office_command(alerts, "list")
async def alerts_list(office: Office) -> dict[str, Any]:
    """List the alerts that last, the latest that ended, and the messages that nobody took yet."""
    shown = await describe_alerts(office.database)
    return {"report": describe_in_words(shown), "alerts": shown["data"], "undelivered": shown["undelivered"]}


@office_command(alerts, "test")
async def alerts_test(office: Office) -> dict[str, Any]:
    """Send a test message to TUMA_ALERTS__URL; exits 1 if it is not taken."""
    settings = office.settings
    return await Alerts(office.database, settings, make_messenger(settings.alerts)).send_test()


@click.group()
def audit() -> None:
    """The audit log: who changed money or a permission."""


@office_command(audit, "verify")
@click.option("--expect", default=None, metavar="NUMBER:DIGEST", help="A head that was noted elsewhere.")
async def audit_verify(office: Office, *, expect: str | None) -> dict[str, Any]:
    """Find altered, removed and reordered rows; exits 1 if there are any. Note the head that it prints elsewhere."""
    return {**(await Audit(office.database).verify(expect=expect)).as_json()}


@office_command(audit, "seal")
async def audit_seal(office: Office) -> dict[str, Any]:
    """Seal what is not sealed yet; a running server does so every few seconds."""
    return {"blocks": await Audit(office.database).seal()}


@office_command(audit, "list")
@click.option("--wallet", default=None)
@click.option("--user", default=None, help="Id or e-mail address.")
@click.option("--actor", default=None, help="As operator:NAME, user:ID, key:ID, system.")
@click.option("--since", type=click.DateTime(), default=None, help="In UTC.")
@click.option("--limit", type=int, default=50, show_default=True)
async def audit_list(
    office: Office,
    *,
    wallet: str | None,
    user: str | None,
    actor: str | None,
    since: datetime | None,
    limit: int,
) -> dict[str, Any]:
    """List what was changed, the newest last."""
    rows = await Audit(office.database).list_rows(
        wallet_id=None if wallet is None else parse_id(wallet, "wallet"),
        user_id=None if user is None else await office.wallets.get_user(user),
        actor=actor,
        since=None if since is None else since.replace(tzinfo=UTC),
        limit=limit,
    )
    return {"report": "\n".join(map(describe_row, rows)), "rows": rows}


@click.argument("level", type=click.Choice(LEVELS))
async def log_level(office: Office, *, level: LogLevel) -> dict[str, Any]:
    """Change how much every running server logs, until it is started anew."""
    await announce(office.database, "log", level)
    return {"level": level}
