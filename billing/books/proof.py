"""The books' own proof: invariants I1 to I8 (DESIGN section 4) and the sums of usage, on a live system, without blocking it.

Everything in Postgres is read in one repeatable-read snapshot. What Redis and the provider say is read beside it; where
calls are in flight, differences that they explain are allowed for, and the check says so.
"""

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from billing.books.proved_days import NOTHING_PROVED, DayBook, Proved, read_proved
from billing.books.totals import compare_totals
from billing.books.usage_proof import LAST_ID, compare_usage
from billing.errors import BrokenInvariantError, ProviderUnavailableError, RedisUnavailableError
from billing.holds.holds import Holds
from billing.money import format_amount, format_usd
from billing.postgres.database import Database
from billing.provider.records import Provider

_TIMEOUT_S = 3600.0
_TOTALS = "SELECT currency, sum(amount_nano) AS total FROM journal_entry WHERE tx_id >= $1 GROUP BY currency"
_UNBALANCED = """
SELECT tx_id, currency, sum(amount_nano) AS off FROM journal_entry
WHERE tx_id >= $1 OR ($1::uuid > '00000000-0000-0000-0000-000000000000' AND tx_id IN (SELECT tx_id FROM late_postings))
GROUP BY tx_id, currency HAVING sum(amount_nano) <> 0 LIMIT 20
"""
# posted = what its entries sum to: in proved days, posted late into them, and since.
_SHADOW = "SELECT coalesce(sum(amount_nanousd), 0) FROM shadow_usd_ledger WHERE kind <> 'opening'"
_OWN_KEYS = "SELECT coalesce(sum(amount_nanousd), 0) FROM shadow_usd_ledger WHERE kind = 'own_key'"
_WALLETS_OFF = """
SELECT w.id, w.currency, w.posted_nano, coalesce(v.amount_nano, 0) + coalesce(e.total, 0) AS entries
FROM wallets w
LEFT JOIN (SELECT * FROM verified_wallets WHERE $1::uuid > '00000000-0000-0000-0000-000000000000') v ON v.wallet_id = w.id
LEFT JOIN (SELECT wallet_id, sum(amount_nano) AS total, min(currency) AS lowest, max(currency) AS highest
           FROM (SELECT wallet_id, currency, amount_nano FROM journal_entry WHERE wallet_id IS NOT NULL AND tx_id >= $1
                 UNION ALL
                 SELECT wallet_id, currency, amount_nano FROM journal_entry
                 WHERE wallet_id IS NOT NULL AND tx_id < $1 AND tx_id IN (SELECT tx_id FROM late_postings)) rows
           GROUP BY wallet_id) e ON e.wallet_id = w.id
WHERE w.posted_nano <> coalesce(v.amount_nano, 0) + coalesce(e.total, 0)
   OR e.lowest <> w.currency OR e.highest <> w.currency LIMIT 20
"""
_STALE = """
SELECT c.id FROM calls c LEFT JOIN workers w ON w.id = c.worker_id
WHERE c.state = 'open' AND coalesce(w.stopped_at, w.lease_until, c.opened_at) < now() - make_interval(secs => $1) LIMIT 20
"""
_HELD_OFF = """
SELECT w.id, w.held_nano, coalesce(c.holds, 0) AS holds
FROM wallets w LEFT JOIN (SELECT wallet_id, sum(hold_nano) AS holds FROM calls
                          WHERE state IN ('open', 'review') GROUP BY wallet_id) c ON c.wallet_id = w.id
WHERE w.held_nano <> coalesce(c.holds, 0) LIMIT 20
"""
# Windows of caps, counted anew from their calls; beyond so many a check takes some at random. A window that began before
# the last proved day whose month was detached (docs/archiving.md) has spent at least what the calls that are left say.
_CAPS_OFF = """
WITH days AS (
    SELECT d.day, d.entries, d.end_id, lag(d.end_id, 1, '00000000-0000-0000-0000-000000000000') OVER (ORDER BY d.day) AS first_id
    FROM verified_days d
), detached AS (
    SELECT (max(d.day) + 1)::timestamp AT TIME ZONE 'UTC' AS until FROM days d
    WHERE d.entries > 0 AND NOT EXISTS (SELECT FROM journal_tx t WHERE t.id >= d.first_id AND t.id < d.end_id)
)
SELECT k.scope_id, k.period, k.starts_at, k.held_nano, k.spent_nano, u.held_nano AS calls_hold, u.spent_nano AS calls_spent
FROM (SELECT w.*, s.scope FROM cap_windows w JOIN spending_caps s ON s.scope_id = w.scope_id AND s.period = w.period
      WHERE $1 OR w.ends_at > now() ORDER BY random() LIMIT CASE WHEN $1 THEN NULL ELSE $2::bigint END) k
CROSS JOIN detached d
CROSS JOIN LATERAL cap_usage(k.scope, k.scope_id, k.starts_at, k.ends_at) u
WHERE k.held_nano <> u.held_nano OR k.spent_nano < u.spent_nano
   OR (k.spent_nano > u.spent_nano AND NOT coalesce(k.starts_at < d.until, false)) LIMIT 20
"""
# Per currency: what payments say, and what was posted of it. What a provider keeps as its fee is posted apart.
_PAYMENTS = """
WITH posted AS (
    SELECT e.currency,
           coalesce(sum(e.amount_nano) FILTER (WHERE e.account = 'psp_clearing'), 0) AS clearing,
           coalesce(sum(e.amount_nano) FILTER (WHERE e.account = 'suspense'), 0) AS suspense,
           coalesce(sum(e.amount_nano) FILTER (WHERE e.account = 'wallet'), 0) AS wallets
    FROM journal_tx t JOIN journal_entry e ON e.tx_id = t.id
    WHERE t.kind IN ('topup', 'reversal', 'dispute') GROUP BY e.currency
), stray AS (
    SELECT e.currency, sum(e.amount_nano) AS amount FROM journal_entry e JOIN journal_tx t ON t.id = e.tx_id
    WHERE e.account = 'psp_clearing' AND t.kind NOT IN ('topup', 'reversal', 'dispute', 'payment_fee') GROUP BY e.currency
), said AS (
    SELECT p.currency, sum(p.amount) AS paid, count(*) FILTER (WHERE p.review) AS review
    FROM (SELECT c.currency, c.paid_nano AS amount, c.state <> 'credited' AND c.paid_nano - c.credited_nano > coalesce((
              SELECT sum(r.suspense_nano) FROM payment_reversals r
              WHERE r.state <> 'undone' AND (r.provider, r.provider_txn_id) = (c.provider, c.provider_txn_id)), 0) AS review
          FROM payment_credits c
          UNION ALL
          SELECT c.currency, -r.amount_nano, false FROM payment_reversals r JOIN payment_credits c USING (provider, provider_txn_id)
          WHERE r.state <> 'undone') p
    GROUP BY p.currency
)
SELECT currency, coalesce(s.paid, 0) AS paid, coalesce(s.review, 0) AS review,
       coalesce(p.clearing, 0) + coalesce(x.amount, 0) AS clearing, coalesce(p.wallets, 0) AS wallets,
       coalesce(p.suspense, 0) AS suspense
FROM posted p FULL JOIN said s USING (currency) FULL JOIN stray x USING (currency) ORDER BY currency
"""
_CAPS_SAMPLE = 1_000
_NAMED = 5  # differences that a detail names
_TRIES = 3
_PAUSE_S = 0.3


@dataclass(frozen=True, slots=True)
class Check:
    """One invariant: whether it holds, and the figures or the differences."""

    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class _Snapshot:
    proved: Proved
    unbalanced: list[Any]
    totals: list[Any]
    wallets_off: list[Any]
    states: dict[str, int]
    stale: list[Any]
    settled_nanousd: int
    shadow_nanousd: int
    quota_nanousd: int
    own_key_nanousd: int
    cost_nanousd: int
    payments: list[Any]
    held_off: list[Any]
    over: list[Any]
    caps_off: list[Any]
    caps: int
    capped: list[Any]
    wallets: list[Any]
    usage_off: list[str]


class Books:
    """Checks the books.

    Args:
        database: the truth.
        holds: what Redis admits by.
        provider: whose own bill I8 compares with.
        sweep_grace_s: how long past its worker's lease a call may stay open.
    """

    def __init__(self, database: Database, holds: Holds, provider: Provider, *, sweep_grace_s: float) -> None:
        self._database = database
        self._holds = holds
        self._provider = provider
        self._grace_s = sweep_grace_s

    async def check(self, *, full: bool = False) -> dict[str, Check]:
        """Evaluate I1 to I8, and whether the sums of usage are those of the calls.

        Days that were proved before are not read again; those that are over and were not are proved first.

        Args:
            full: read everything all the same.

        Raises:
            PostgresUnavailableError: there is nothing to check against.
        """
        if not full:
            with contextlib.suppress(BrokenInvariantError):  # such a day stays among what is read below
                await DayBook(self._database).verify_all()
        snapshot = await self._read(full=full)
        return {
            "I1": _check_balance(snapshot),
            "I2": _check_wallets(snapshot),
            "I3": _check_states(snapshot),
            "I4": _check_usd(snapshot),
            "I5": _check_payments(snapshot),
            "I6": await self._check_mirrors(snapshot),
            "I7": _check_admission(snapshot),
            "I8": await self._check_provider(),
            "usage": _check_usage(snapshot),
        }

    async def _read(self, *, full: bool) -> _Snapshot:
        async with self._database.transaction(isolation="repeatable_read", readonly=True) as connection:
            proved = NOTHING_PROVED if full else await read_proved(connection)
            cut = proved.cut

            async def fetch(query: str, *args: object) -> list[Any]:
                return list(await connection.fetch(query, *args, timeout=_TIMEOUT_S))

            async def total(query: str, *args: object) -> int:
                return int(await connection.fetchval(query, *args, timeout=_TIMEOUT_S))

            states = await fetch(
                "SELECT state, count(*) AS calls FROM calls WHERE id >= $1 OR state IN ('open', 'review') GROUP BY state",
                cut,
            )
            return _Snapshot(
                proved=proved,
                unbalanced=await fetch(_UNBALANCED, cut),
                totals=await fetch(_TOTALS, cut),
                wallets_off=await fetch(_WALLETS_OFF, cut),
                states={row["state"]: row["calls"] for row in states},
                stale=await fetch(_STALE, self._grace_s),
                settled_nanousd=proved.settled_nanousd
                + await total(
                    "SELECT coalesce(sum(cost_nanousd), 0) FROM calls WHERE state = 'settled' AND id >= $1",
                    cut,
                )
                + await total(
                    "SELECT coalesce(-sum(e.amount_nano), 0) FROM journal_tx t JOIN journal_entry e ON e.tx_id = t.id"
                    " WHERE t.kind = 'house_loss' AND t.call_id IS NULL AND e.account = 'provider_cost' AND t.id >= $1",
                    cut,
                ),
                shadow_nanousd=await total(_SHADOW),
                quota_nanousd=await total("SELECT sum(spent_nanousd) FROM quota_slabs"),
                own_key_nanousd=await total(_OWN_KEYS),
                cost_nanousd=proved.cost_nanousd
                + await total(
                    "SELECT coalesce(-sum(amount_nano), 0) FROM journal_entry WHERE account = 'provider_cost' AND tx_id >= $1",
                    cut,
                ),
                payments=await fetch(_PAYMENTS),
                held_off=await fetch(_HELD_OFF),
                over=await fetch(
                    "SELECT id FROM calls WHERE id >= $1 AND (available_after_nano < 0"
                    " OR (available_after_nano IS NULL AND hold_nano > 0)) LIMIT 20",
                    cut,
                ),
                caps_off=await fetch(_CAPS_OFF, full, _CAPS_SAMPLE),
                caps=await total("SELECT count(*) FROM spending_caps"),
                capped=await fetch(
                    "SELECT DISTINCT user_id FROM wallets WHERE capped LIMIT CASE WHEN $1 THEN NULL ELSE $2::bigint END",
                    full,
                    _CAPS_SAMPLE,
                ),
                wallets=await fetch(
                    "SELECT id, user_id, posted_nano::numeric + overdraft_nano - held_nano AS available, held_nano FROM wallets"
                ),
                usage_off=await compare_usage(connection, cut, LAST_ID),
            )

    async def _check_mirrors(self, snapshot: _Snapshot) -> Check:
        """I6: posted + overdraft - open holds is what Redis admits by, wallet by wallet, wherever nothing is moving."""
        if snapshot.held_off:
            return Check(False, "held differs from the open holds: " + _names(snapshot.held_off))
        try:
            left = snapshot.wallets
            for attempt in range(_TRIES):
                left, warm, moving = await self._compare_mirrors(left)
                if not left or attempt == _TRIES - 1:
                    break
                await asyncio.sleep(_PAUSE_S)
            caps_off = await self._compare_caps(snapshot.capped)
        except RedisUnavailableError as error:
            return Check(False, str(error))
        if left or caps_off:
            return Check(
                False, "Redis differs from Postgres: " + "; ".join([_names(left), *caps_off[:_NAMED]])
            )
        return Check(True, f"{warm} warm mirrors equal Postgres; {moving} wallets have calls in flight")

    async def _compare_caps(self, users: list[Any]) -> list[str]:
        """Return the users of whose caps Redis counts otherwise than Postgres though nothing of theirs is in flight."""
        left = [row["user_id"] for row in users]
        for attempt in range(_TRIES):
            found = await asyncio.gather(*(self._are_caps_off(user_id) for user_id in left))
            left = [user_id for user_id, off in zip(left, found, strict=True) if off]
            if left and attempt < _TRIES - 1:
                await asyncio.sleep(_PAUSE_S)
        return [f"caps of user {user_id}" for user_id in left]

    async def _are_caps_off(self, user_id: UUID) -> bool:
        mirror = await self._holds.read_mirror(user_id)
        if not mirror or any(name.startswith("hold:") for name in mirror):
            return False
        async with self._database.connection() as connection:
            rows = await connection.fetch("SELECT field, value FROM read_mirror($1, now())", user_id)
        truth = {row["field"]: row["value"] for row in rows}
        windows = {name: value for name, value in truth.items() if name.startswith("caps:")}
        if windows != {name: value for name, value in mirror.items() if name.startswith("caps:")}:
            return False  # of another day, or of other caps: the next call has it filled anew
        return any(value != mirror.get(name) for name, value in truth.items() if name.startswith("left:"))

    async def _compare_mirrors(self, wallets: list[Any]) -> tuple[list[Any], int, int]:
        """Return the wallets that differ though nothing is in flight, how many agree, and how many are moving."""
        off, warm, moving = [], 0, 0
        mirrors = await asyncio.gather(
            *(self._holds.find_available(row["user_id"], row["id"]) for row in wallets)
        )
        suspects = [
            row
            for row, mirror in zip(wallets, mirrors, strict=True)
            if mirror is not None and mirror != row["available"]
        ]
        warm = sum(mirror is not None for mirror in mirrors) - len(suspects)
        fresh = await self._fresh(suspects)
        for row in suspects:
            mirror = await self._holds.find_available(row["user_id"], row["id"])
            holds = await self._holds.list_holds(row["user_id"])
            now = fresh[row["id"]]
            if holds or now["held_nano"] > 0:
                moving += 1
            elif mirror is not None and mirror != now["available"]:
                off.append(now)
            else:
                warm += 1
        return off, warm, moving

    async def _fresh(self, rows: list[Any]) -> dict[Any, Any]:
        if not rows:
            return {}
        async with self._database.connection() as connection:
            found = await connection.fetch(
                "SELECT id, user_id, posted_nano::numeric + overdraft_nano - held_nano AS available, held_nano"
                " FROM wallets WHERE id = ANY ($1)",
                [row["id"] for row in rows],
            )
        return {row["id"]: row for row in found}

    async def _check_provider(self) -> Check:
        """I8: our provider cost is the provider's own bill, as far as calls in flight allow to say."""
        check = Check(False, "never asked")
        for attempt in range(_TRIES):
            try:
                sums = await compare_totals(self._database, self._provider)
            except ProviderUnavailableError as error:
                return Check(False, str(error))
            if sums is None:
                return Check(True, "this provider does not say what it billed in total")
            check = Check(sums.agree, str(sums))
            if check.ok or attempt == _TRIES - 1:
                break
            await asyncio.sleep(_PAUSE_S)
        return check


def _names(rows: list[Any]) -> str:
    return "; ".join(", ".join(f"{key} {value}" for key, value in row.items()) for row in rows[:_NAMED])


def _check_balance(snapshot: _Snapshot) -> Check:
    off = [row for row in snapshot.totals if row["total"] != 0]
    if snapshot.unbalanced or off:
        return Check(False, "not balanced: " + _names([*snapshot.unbalanced, *off]))
    detail = f"every transaction sums to zero, in {len(snapshot.totals)} currencies"
    if snapshot.proved.days:
        detail += f", after {snapshot.proved.days} days with {snapshot.proved.calls} calls proved before"
    return Check(True, detail)


def _check_wallets(snapshot: _Snapshot) -> Check:
    if snapshot.wallets_off:
        return Check(False, "posted differs from the entries: " + _names(snapshot.wallets_off))
    return Check(True, f"{len(snapshot.wallets)} wallets equal their entries")


def _check_states(snapshot: _Snapshot) -> Check:
    if snapshot.stale:
        return Check(False, "open past their lease and the sweep: " + _names(snapshot.stale))
    return Check(
        True,
        ", ".join(f"{count} {state}" for state, count in sorted(snapshot.states.items())) or "no calls yet",
    )


def _check_usd(snapshot: _Snapshot) -> Check:
    """I4: what calls cost is what the shadow ledger says was billed: to our account, of whose quota it was taken, or to our own keys."""
    own = snapshot.own_key_nanousd
    sums = (
        snapshot.settled_nanousd,
        snapshot.shadow_nanousd,
        snapshot.cost_nanousd,
        snapshot.quota_nanousd + own,
    )
    texts = [format_usd(value) for value in (*sums[:3], snapshot.quota_nanousd)]
    return Check(
        len(set(sums)) == 1,
        f"calls {texts[0]} USD, shadow ledger {texts[1]} USD, provider cost {texts[2]} USD, quota {texts[3]} USD"
        + (f", own keys {format_usd(own)} USD" if own else ""),
    )


def _check_payments(snapshot: _Snapshot) -> Check:
    """I5: what payment providers said was paid is in wallets and suspense, less what they took back; and nothing else is."""
    off = [
        row
        for row in snapshot.payments
        if row["clearing"] != -row["paid"] or row["wallets"] + row["suspense"] != row["paid"]
    ]
    if off:
        named = "; ".join(
            f"{row['currency']}: payments say {format_amount(int(row['paid']))}, clearing {format_amount(-int(row['clearing']))},"
            f" wallets {format_amount(int(row['wallets']))}, suspense {format_amount(int(row['suspense']))}"
            for row in off
        )
        return Check(False, f"money from payment providers is not what was paid: {named}")
    said = ", ".join(f"{format_amount(int(row['paid']))} {row['currency']}" for row in snapshot.payments)
    waiting = sum(row["review"] for row in snapshot.payments)
    return Check(True, f"paid, less reversals: {said or 'nothing yet'}; {waiting} payments in review")


def _check_usage(snapshot: _Snapshot) -> Check:
    """What ``GET /v1/usage`` shows is what the calls say."""
    if snapshot.usage_off:
        return Check(
            False, "the sums of usage differ from the calls: " + "; ".join(snapshot.usage_off[:_NAMED])
        )
    return Check(True, "the sums of usage are what the calls say")


def _check_admission(snapshot: _Snapshot) -> Check:
    if snapshot.over:
        return Check(False, "admitted beyond the balance: " + _names(snapshot.over))
    if snapshot.caps_off:
        return Check(False, "a cap counts otherwise than its calls: " + _names(snapshot.caps_off))
    return Check(
        True,
        f"every hold fitted its wallet when it was opened; {snapshot.caps} caps count what their calls say",
    )
