"""``tuma books``, ``sweep``, ``reconcile``, ``revenue``, ``migrate``: the proof, and what keeps it true."""

from datetime import UTC, datetime
from typing import Any

import click

from billing.books.proof import Books
from billing.books.reconcile import Reconciler
from billing.calls.sweeper import SweepCounts, Sweeper
from billing.postgres.migrate import load_migrations
from billing.postgres.migrate import migrate as run_migrations
from billing.reports.revenue import describe_revenue
from scripts.command import office_command
from scripts.office import Office


async def migrate(office: Office) -> dict[str, Any]:
    """Bring the database's schema and its functions up to this version."""
    before, after = await run_migrations(office.database)
    applied = sum(item.number > before for item in load_migrations())
    return {"version_before": before, "version": after, "applied": applied}


async def reconcile(office: Office) -> dict[str, Any]:
    """Compare with the provider's own bill, call by call and in total, and post what differs as corrections."""
    report = await Reconciler(office.database, office.upstream, office.settings.reconcile).run()
    return {**report.as_json()}


async def sweep(office: Office) -> dict[str, Any]:
    """End the calls whose worker died, by what the provider billed."""
    counts = await Sweeper(office.database, office.holds, office.upstream, office.settings.sweep).sweep()
    return {**(counts or SweepCounts()).as_json(), "busy": counts is None}


@click.option("--since", type=click.DateTime(), default=None, help="From this moment on, in UTC.")
@click.option("--until", type=click.DateTime(), default=None, help="Before this moment, in UTC.")
async def revenue(office: Office, *, since: datetime | None, until: datetime | None) -> dict[str, Any]:
    """Sum what the house earned and owes, per currency: sales, the markup (fx_spread), fees, losses, suspense, wallets."""
    found = await describe_revenue(
        office.late,
        since=None if since is None else since.replace(tzinfo=UTC),
        until=None if until is None else until.replace(tzinfo=UTC),
    )
    return {**found}


@click.group()
def books() -> None:
    """The books."""


@office_command(books, "check")
@click.option("--full", is_flag=True, help="Read also the days that were proved before.")
async def books_check(office: Office, *, full: bool) -> dict[str, Any]:
    """Prove I1 to I8 and the sums of usage; exits 1 with the differences if one does not hold."""
    sweep_settings = office.settings.sweep
    grace_s = office.settings.holds.lease_s + sweep_settings.period_s * 2 + sweep_settings.review_after_s
    found = await Books(office.database, office.holds, office.upstream, sweep_grace_s=grace_s).check(
        full=full
    )
    checks = {name: {"ok": check.ok, "detail": check.detail} for name, check in found.items()}
    return {"ok": all(check.ok for check in found.values()), "checks": checks}
