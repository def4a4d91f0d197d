"""The provider's account as an operator sees it: what was consumed, what is left, and what reconciliation found."""

from billing.books.answers import QuotaJson, ReconciliationsJson
from billing.money import format_usd
from billing.postgres.database import Database

_RUNS = 20
_DIFFERENCES = 200


async def describe_quota(database: Database) -> QuotaJson:
    """Return the shadow ledger's sums and the provider's quota; amounts are decimal strings in USD."""
    async with database.transaction(isolation="repeatable_read", readonly=True) as connection:
        quota = await connection.fetchrow("SELECT *, paused_until > now() AS paused FROM provider_quota")
        consumed = await connection.fetchval("SELECT coalesce(sum(spent_nanousd), 0) FROM quota_slabs")
        slabs = await connection.fetch(
            "SELECT worker_id, leased_nanousd, spent_nanousd FROM quota_slabs WHERE leased_nanousd > spent_nanousd"
        )
        held = await connection.fetchrow(
            "SELECT count(*) AS calls, coalesce(sum(hold_nanousd), 0) AS held FROM calls WHERE state IN ('open', 'review')"
        )
        kinds = await connection.fetch(
            "SELECT kind, count(*) AS rows, coalesce(sum(amount_nanousd), 0) AS amount FROM shadow_usd_ledger GROUP BY kind"
        )
    return {
        "object": "quota",
        "consumed_usd": format_usd(int(consumed)),
        "left_usd": None if quota["left_nanousd"] is None else format_usd(quota["left_nanousd"]),
        "granted_usd": None if quota["granted_nanousd"] is None else format_usd(quota["granted_nanousd"]),
        "low": quota["low"],
        "asked_at": None if quota["asked_at"] is None else quota["asked_at"].isoformat(),
        "paused": bool(quota["paused"]),
        "pause_reason": quota["pause_reason"] if quota["paused"] else None,
        "calls_in_flight": held["calls"],
        "held_usd": format_usd(int(held["held"])),
        "leases": [
            {
                "worker_id": str(row["worker_id"]),
                "left_usd": format_usd(row["leased_nanousd"] - row["spent_nanousd"]),
            }
            for row in slabs
        ],
        "shadow_ledger": {
            row["kind"]: {"rows": row["rows"], "amount_usd": format_usd(int(row["amount"]))} for row in kinds
        },
    }


async def describe_reconciliations(database: Database) -> ReconciliationsJson:
    """Return the latest runs, the newest first, with what the newest differences were and which of them were corrected."""
    async with database.transaction(isolation="repeatable_read", readonly=True) as connection:
        runs = await connection.fetch("SELECT * FROM reconciliation_runs ORDER BY id DESC LIMIT $1", _RUNS)
        differences = await connection.fetch(
            "SELECT * FROM reconciliation_diffs ORDER BY id DESC LIMIT $1", _DIFFERENCES
        )
    return {
        "object": "list",
        "data": [
            {
                "id": str(row["id"]),
                "started_at": row["started_at"].isoformat(),
                "ended_at": None if row["ended_at"] is None else row["ended_at"].isoformat(),
                "calls_checked": row["calls_checked"],
                "drift_usd": None if row["drift_nanousd"] is None else format_usd(row["drift_nanousd"]),
                "complete": row["ended_at"] is not None and not row["away"],
                "away": row["away"],
            }
            for row in runs
        ],
        "differences": [
            {
                "run_id": str(row["run_id"]),
                "call_id": None if row["call_id"] is None else str(row["call_id"]),
                "cause": row["cause"],
                "ours_usd": format_usd(row["ours_nanousd"]),
                "provider_usd": None
                if row["provider_nanousd"] is None
                else format_usd(row["provider_nanousd"]),
                "transaction_id": None if row["tx_id"] is None else str(row["tx_id"]),
                "note": row["note"],
            }
            for row in differences
        ],
    }
