"""The conditions that an operator is told of, read from the books in one transaction."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from billing.money import format_amount, format_usd
from config.settings import Settings

Severity = Literal["warning", "critical"]
_NAMED = 5  # ids in a detail


@dataclass(frozen=True, slots=True)
class Condition:
    """Something that is wrong now.

    Args:
        kind: a word; see ``docs/operations.md``.
        subject: what has it, where there may be several.
        summary: a sentence for people.
        detail: figures, amounts as decimal strings in major units.
    """

    kind: str
    severity: Severity
    summary: str
    detail: dict[str, Any]
    subject: str = ""


async def find_conditions(connection: Any, settings: Settings) -> list[Condition]:
    """Return what is wrong now; each condition once.

    Args:
        connection: inside a transaction, by a role that reads the house's tables.
        settings: thresholds.
    """
    looks: tuple[Callable[[Any, Settings], Awaitable[list[Condition]]], ...] = (
        _look_at_provider,
        _look_at_differences,
        _look_at_reviews,
        _look_at_settle_lag,
        _look_at_payments,
        _look_at_webhooks,
        _look_at_rates,
        _look_at_wallets,
    )
    return [condition for look in looks for condition in await look(connection, settings)]


async def _look_at_provider(connection: Any, settings: Settings) -> list[Condition]:
    row = await connection.fetchrow(
        "SELECT low, left_nanousd, paused_until > now() AS paused, pause_reason, refused_reason,"
        " refused_at > now() - make_interval(secs => $1) AS refused FROM provider_quota",
        settings.quota.refusals_s,
    )
    found = []
    if row["low"]:
        left = format_usd(row["left_nanousd"] or 0)
        found.append(
            Condition(
                "provider_quota_low",
                "critical",
                f"The provider lets us consume {left} USD more: top up there.",
                {"left_usd": left, "low_usd": f"{settings.quota.low_usd:f}"},
            )
        )
    if row["paused"]:
        found.append(
            Condition(
                "provider_refuses_us",
                "critical",
                "The provider refuses our key or account; no calls are sent.",
                {"reason": row["pause_reason"]},
            )
        )
    elif row["refused"]:
        found.append(
            Condition(
                "provider_refuses_calls",
                "critical",
                "The provider refuses call after call with words about our key or account; nobody else is stopped.",
                {"reason": row["refused_reason"]},
            )
        )
    return found


async def _look_at_differences(connection: Any, settings: Settings) -> list[Condition]:
    rows = await connection.fetch(
        "SELECT d.cause, count(*) AS many, sum(coalesce(d.provider_nanousd, 0) - d.ours_nanousd)::bigint AS drift"
        " FROM reconciliation_diffs d WHERE d.id >= uuid_floor(now() - make_interval(secs => $1))"
        " AND d.tx_id IS NULL AND d.cause <> 'account_used_elsewhere' GROUP BY 1 ORDER BY 1",
        settings.alerts.differences_s,
    )
    if not rows:
        return []
    many = sum(row["many"] for row in rows)
    causes = {
        row["cause"]: {"differences": row["many"], "drift_usd": format_usd(row["drift"])} for row in rows
    }
    return [
        Condition(
            "drift",
            "critical",
            f"Differences to the provider's bill that reconciliation could not post: {many}.",
            {"causes": causes},
        )
    ]


async def _look_at_reviews(connection: Any, _: Settings) -> list[Condition]:
    row = await connection.fetchrow(
        "SELECT count(*) AS many, coalesce(sum(c.hold_nanousd), 0)::bigint AS held,"
        " (array_agg(c.id::text ORDER BY c.id))[:$1] AS ids FROM calls c WHERE c.state = 'review'",
        _NAMED,
    )
    if not row["many"]:
        return []
    held = format_usd(row["held"])
    return [
        Condition(
            "calls_in_review",
            "warning",
            f"Calls in review: {row['many']}. The provider does not know what it answered; {held} USD stay held.",
            {"calls": row["many"], "held_usd": held, "call_ids": row["ids"]},
        )
    ]


async def _look_at_settle_lag(connection: Any, settings: Settings) -> list[Condition]:
    row = await connection.fetchrow(
        "SELECT count(*) AS many, min(c.opened_at) AS since, (array_agg(c.id::text ORDER BY c.id))[:$2] AS ids"
        " FROM calls c LEFT JOIN workers w ON w.id = c.worker_id WHERE c.state = 'open'"
        " AND coalesce(least(w.stopped_at, w.lease_until), c.opened_at) < now() - make_interval(secs => $1)",
        *(settings.alerts.settle_lag_s, _NAMED),
    )
    if not row["many"]:
        return []
    return [
        Condition(
            "settle_lag",
            "critical",
            f"Calls of dead workers that are still not settled: {row['many']}. The sweeper does not come after.",
            {"calls": row["many"], "oldest_opened_at": row["since"].isoformat(), "call_ids": row["ids"]},
        )
    ]


async def _look_at_payments(connection: Any, _: Settings) -> list[Condition]:
    rows = await connection.fetch(
        """
        SELECT s.currency, count(*) AS many, sum(s.rest)::bigint AS amount
        FROM (SELECT c.currency, c.paid_nano - c.credited_nano - coalesce((
                         SELECT sum(r.suspense_nano) FROM payment_reversals r
                         WHERE (r.provider, r.provider_txn_id) = (c.provider, c.provider_txn_id) AND r.state <> 'undone'
                     ), 0) AS rest
              FROM payment_credits c WHERE c.state = 'review') s
        WHERE s.rest > 0 GROUP BY 1 ORDER BY 1
        """
    )
    if not rows:
        return []
    many = sum(row["many"] for row in rows)
    suspense = {row["currency"]: format_amount(row["amount"]) for row in rows}
    return [
        Condition(
            "payments_in_review",
            "warning",
            f"Payments that do not agree with what was asked for: {many}. Their money lies in suspense.",
            {"payments": many, "suspense": suspense},
        )
    ]


async def _look_at_webhooks(connection: Any, settings: Settings) -> list[Condition]:
    rows = await connection.fetch(
        "SELECT e.provider, count(*) FILTER (WHERE e.state = 'new') AS failing,"
        " count(*) FILTER (WHERE e.state = 'review') AS given_up FROM webhook_events e"
        " WHERE (e.state = 'new' AND e.tries >= $1)"
        " OR (e.state = 'review' AND e.received_at > now() - make_interval(secs => $2)) GROUP BY 1 ORDER BY 1",
        *(settings.alerts.webhook_tries, settings.alerts.differences_s),
    )
    return [
        Condition(
            "webhook_failures",
            "warning",
            f"Webhooks of {row['provider']} that could not be worked off: {row['failing'] + row['given_up']}.",
            {"provider": row["provider"], "failing": row["failing"], "given_up": row["given_up"]},
            subject=row["provider"],
        )
        for row in rows
    ]


async def _look_at_rates(connection: Any, settings: Settings) -> list[Condition]:
    rows = await connection.fetch(
        "SELECT q.currency, q.age_s, w.state AS waiting FROM list_fx_quotes() q JOIN fx_quotes f ON f.id = q.id"
        " LEFT JOIN last_rate(q.currency, false) w ON w.state IN ('held', 'disputed') AND w.id IS DISTINCT FROM f.fx_rate_id"
        " WHERE ((q.age_s IS NOT NULL AND q.age_s >= coalesce(q.good_for_s, $1)) OR w.state IS NOT NULL)"
        " AND EXISTS (SELECT FROM wallets o WHERE o.currency = q.currency) ORDER BY 1",
        settings.fx.stale_after_s,
    )
    found = []
    for row in rows:
        if row["waiting"] is not None:
            summary = (
                f"A rate of {row['currency']} is {row['waiting']} and waits for your word: `tuma fx show`."
            )
            detail = {"currency": row["currency"], "state": row["waiting"]}
            found.append(Condition("fx_waiting", "warning", summary, detail, subject=row["currency"]))
        else:
            summary = f"The rate of {row['currency']} is too old: new calls of its wallets are refused."
            detail = {"currency": row["currency"], "age_s": int(row["age_s"])}
            found.append(Condition("fx_stale", "critical", summary, detail, subject=row["currency"]))
    return found


async def _look_at_wallets(connection: Any, settings: Settings) -> list[Condition]:
    """By the posted balance: what calls hold comes and goes. All that are told of already, and so many more."""
    rows = await connection.fetch(
        "SELECT w.id, w.user_id, w.currency, w.posted_nano, w.low_nano FROM wallets w"
        " LEFT JOIN alerts a ON a.kind = 'wallet_low' AND a.subject = w.id::text AND a.state = 'firing'"
        " WHERE w.low_nano IS NOT NULL AND w.posted_nano < w.low_nano ORDER BY a.id IS NULL, w.id"
        " LIMIT $1 + (SELECT count(*) FROM alerts WHERE kind = 'wallet_low' AND state = 'firing')",
        settings.alerts.rows,
    )
    return [
        Condition(
            "wallet_low",
            "warning",
            f"A wallet is below the {format_amount(row['low_nano'])} {row['currency']} that its owner named.",
            {
                "wallet_id": str(row["id"]),
                "user_id": str(row["user_id"]),
                "currency": row["currency"],
                "balance": format_amount(row["posted_nano"]),
                "low": format_amount(row["low_nano"]),
            },
            subject=str(row["id"]),
        )
        for row in rows
    ]
