"""The books' own proof: invariants I1 to I8 (DESIGN section 4) on a live system, without blocking it.

Everything in Postgres is read in one repeatable-read snapshot. What Redis and the provider say is read beside it; where
calls are in flight, differences that they explain are allowed for, and the check says so.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

from billing.db import Database
from billing.errors import ProviderUnavailableError, RedisUnavailableError
from billing.holds import Holds
from billing.money import attousd_from_decimal, format_amount, format_usd, nanousd_from_attousd
from billing.provider import Provider

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
    unbalanced: list[Any]
    totals: list[Any]
    wallets_off: list[Any]
    states: dict[str, int]
    stale: list[Any]
    settled_nanousd: int
    shadow_nanousd: int
    cost_nanousd: int
    opening_nanousd: int | None
    psp_nano: list[Any]
    held_off: list[Any]
    over: list[Any]
    wallets: list[Any]


class Books:
    """Checks the books.

    Args:
        database: the truth.
        holds: what Redis admits by; None when Redis is not to be asked.
        provider: whose own bill I8 compares with; None when it is not to be asked.
        sweep_grace_s: how long past its worker's lease a call may stay open.
    """

    def __init__(self, database: Database, holds: Holds, provider: Provider, *, sweep_grace_s: float) -> None:
        self._database = database
        self._holds = holds
        self._provider = provider
        self._grace_s = sweep_grace_s

    async def check(self) -> dict[str, Check]:
        """Evaluate I1 to I8.

        Raises:
            PostgresUnavailableError: there is nothing to check against.
        """
        snapshot = await self._read()
        return {
            "I1": _check_balance(snapshot),
            "I2": _check_wallets(snapshot),
            "I3": _check_states(snapshot),
            "I4": _check_usd(snapshot),
            "I5": _check_payments(snapshot),
            "I6": await self._check_mirrors(snapshot),
            "I7": _check_admission(snapshot),
            "I8": await self._check_provider(snapshot.opening_nanousd),
        }

    async def _read(self) -> _Snapshot:
        async with self._database.transaction(isolation="repeatable_read", readonly=True) as connection:
            states = await connection.fetch("SELECT state, count(*) AS calls FROM calls GROUP BY state")
            return _Snapshot(
                unbalanced=await connection.fetch(
                    "SELECT tx_id, currency, sum(amount_nano) AS off FROM journal_entry"
                    " GROUP BY tx_id, currency HAVING sum(amount_nano) <> 0 LIMIT 20"
                ),
                totals=await connection.fetch(
                    "SELECT currency, sum(amount_nano) AS total FROM journal_entry GROUP BY currency"
                ),
                wallets_off=await connection.fetch(
                    """
                    SELECT w.id, w.currency, w.posted_nano, coalesce(e.total, 0) AS entries
                    FROM wallets w LEFT JOIN (SELECT wallet_id, currency, sum(amount_nano) AS total FROM journal_entry
                                              WHERE wallet_id IS NOT NULL GROUP BY wallet_id, currency) e
                         ON e.wallet_id = w.id
                    WHERE w.posted_nano <> coalesce(e.total, 0) OR (e.currency IS NOT NULL AND e.currency <> w.currency) LIMIT 20
                    """
                ),
                states={row["state"]: row["calls"] for row in states},
                stale=await connection.fetch(
                    """
                    SELECT c.id FROM calls c LEFT JOIN workers w ON w.id = c.worker_id
                    WHERE c.state = 'open' AND coalesce(w.stopped_at, w.lease_until, c.opened_at)
                          < now() - make_interval(secs => $1) LIMIT 20
                    """,
                    self._grace_s,
                ),
                settled_nanousd=await connection.fetchval(
                    "SELECT coalesce(sum(cost_nanousd), 0) FROM calls WHERE state = 'settled'"
                )
                + await connection.fetchval(
                    "SELECT coalesce(-sum(e.amount_nano), 0) FROM journal_tx t JOIN journal_entry e ON e.tx_id = t.id"
                    " WHERE t.kind = 'house_loss' AND t.call_id IS NULL AND e.account = 'provider_cost'"
                ),
                shadow_nanousd=await connection.fetchval(
                    "SELECT coalesce(sum(amount_nanousd), 0) FROM shadow_usd_ledger WHERE kind <> 'opening'"
                ),
                cost_nanousd=await connection.fetchval(
                    "SELECT coalesce(-sum(amount_nano), 0) FROM journal_entry WHERE account = 'provider_cost'"
                ),
                opening_nanousd=await connection.fetchval(
                    "SELECT amount_nanousd FROM shadow_usd_ledger WHERE kind = 'opening'"
                ),
                psp_nano=await connection.fetch(
                    "SELECT currency, sum(amount_nano) AS total FROM journal_entry WHERE account = 'psp_clearing' GROUP BY currency"
                ),
                held_off=await connection.fetch(
                    """
                    SELECT w.id, w.held_nano, coalesce(c.holds, 0) AS holds
                    FROM wallets w LEFT JOIN (SELECT wallet_id, sum(hold_nano) AS holds FROM calls
                                              WHERE state IN ('open', 'review') GROUP BY wallet_id) c ON c.wallet_id = w.id
                    WHERE w.held_nano <> coalesce(c.holds, 0) LIMIT 20
                    """
                ),
                over=await connection.fetch(
                    "SELECT id FROM calls WHERE available_after_nano < 0 OR (available_after_nano IS NULL AND hold_nano > 0) LIMIT 20"
                ),
                wallets=await connection.fetch(
                    "SELECT id, user_id, posted_nano + overdraft_nano - held_nano AS available, held_nano FROM wallets"
                ),
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
        except RedisUnavailableError as error:
            return Check(False, str(error))
        if left:
            return Check(False, "Redis differs from Postgres: " + _names(left))
        return Check(True, f"{warm} warm mirrors equal Postgres; {moving} wallets have calls in flight")

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
            holds = await self._holds.list_holds(row["user_id"], row["id"])
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
                "SELECT id, user_id, posted_nano + overdraft_nano - held_nano AS available, held_nano"
                " FROM wallets WHERE id = ANY ($1)",
                [row["id"] for row in rows],
            )
        return {row["id"]: row for row in found}

    async def _check_provider(self, opening_nanousd: int | None) -> Check:
        """I8: our provider cost is the provider's own bill, as far as calls in flight allow to say."""
        check = Check(False, "never asked")
        for attempt in range(_TRIES):
            try:
                total_usd = await self._provider.find_total_usd()
            except ProviderUnavailableError as error:
                return Check(False, str(error))
            if total_usd is None:
                return Check(True, "this provider does not say what it billed in total")
            if opening_nanousd is None:
                return Check(False, "what the provider had billed before our first call was never recorded")
            check = await self._compare_bill(
                nanousd_from_attousd(attousd_from_decimal(total_usd)) - opening_nanousd
            )
            if check.ok or attempt == _TRIES - 1:
                break
            await asyncio.sleep(_PAUSE_S)
        return check

    async def _compare_bill(self, billed_nanousd: int) -> Check:
        async with self._database.connection() as connection:
            ours = await connection.fetchrow(
                "SELECT (SELECT coalesce(-sum(amount_nano), 0) FROM journal_entry WHERE account = 'provider_cost') AS cost,"
                " (SELECT count(*) FROM calls WHERE state IN ('open', 'review')) AS live"
            )
        drift = billed_nanousd - ours["cost"]
        detail = (
            f"ours {format_usd(int(ours['cost']))} USD, the provider's {format_usd(billed_nanousd)} USD,"
            f" drift {format_usd(int(drift))} USD, {ours['live']} calls not ended"
        )
        return Check(drift == 0 or (drift > 0 and ours["live"] > 0), detail)


def _names(rows: list[Any]) -> str:
    return "; ".join(", ".join(f"{key} {value}" for key, value in row.items()) for row in rows[:_NAMED])


def _check_balance(snapshot: _Snapshot) -> Check:
    off = [row for row in snapshot.totals if row["total"] != 0]
    if snapshot.unbalanced or off:
        return Check(False, "not balanced: " + _names([*snapshot.unbalanced, *off]))
    return Check(True, f"every transaction sums to zero, in {len(snapshot.totals)} currencies")


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
    sums = (snapshot.settled_nanousd, snapshot.shadow_nanousd, snapshot.cost_nanousd)
    texts = [format_usd(int(value)) for value in sums]
    return Check(
        len(set(sums)) == 1,
        f"calls {texts[0]} USD, shadow ledger {texts[1]} USD, provider cost {texts[2]} USD",
    )


def _check_payments(snapshot: _Snapshot) -> Check:
    off = [row for row in snapshot.psp_nano if row["total"] != 0]
    if off:
        named = "; ".join(f"{format_amount(int(row['total']))} {row['currency']}" for row in off)
        return Check(False, f"money from payment providers without a payment: {named}")
    return Check(True, "no payments posted, none claimed")


def _check_admission(snapshot: _Snapshot) -> Check:
    if snapshot.over:
        return Check(False, "admitted beyond the balance: " + _names(snapshot.over))
    return Check(True, "every hold fitted its wallet when it was opened")
