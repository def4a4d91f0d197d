"""Repairing ended calls: corrections towards the provider's figure, and refunds. Nothing posted is ever rewritten."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

import asyncpg

from billing.calls.outcome import Ending
from billing.errors import BrokenInvariantError, InputError, NotFoundError
from billing.fx.quote import FxQuote
from billing.ids import new_id
from billing.money import AMOUNT_MAX_NANO, attousd_from_decimal, format_usd, nanousd_from_attousd
from billing.postgres.database import Database
from billing.provider.records import Bill

_TRIES = 5


@dataclass(frozen=True, slots=True)
class Figures:
    """How an ended call stands: USD in nano-dollars, the charge in nano units of the wallet's currency."""

    cost_nanousd: int
    provider_cost_nanousd: int | None
    charge_nano: int
    spread_nano: int
    house_nanousd: int
    accuracy: str | None


@dataclass(frozen=True, slots=True)
class Adjustment:
    """What a correction or refund did to a call; ``tx_id`` is None where nothing had to be posted."""

    call_id: UUID
    before: Figures
    after: Figures
    tx_id: UUID | None


class Corrections:
    """Posts corrections and refunds.

    Args:
        database: where the books are.
        charge_estimates_upward: whether a wallet pays more when an *estimated* charge turns out too low. An exact
            charge is never raised, and every charge is lowered.
    """

    def __init__(self, database: Database, *, charge_estimates_upward: bool) -> None:
        self._database = database
        self._upward = charge_estimates_upward

    async def correct(self, call_id: UUID, bill: Bill) -> Adjustment:
        """Bring a call to what the provider says it billed: our cost always, the wallet by the policy.

        What the wallet does not pay is the house's loss. Repeating it posts nothing.

        Args:
            call_id: which call.
            bill: the provider's figure.

        Raises:
            NotFoundError: there is no such call.
            InputError: the figure is beyond what any amount can be.
            BrokenInvariantError: it is still live, or kept changing.
        """
        memo = f"the provider billed {bill.cost_usd:f} USD for {bill.generation_id}"
        exact = attousd_from_decimal(bill.cost_usd)
        cost_nanousd = nanousd_from_attousd(exact)

        def decide(row: Any, before: Figures) -> Figures:
            charge = _quote(row).charge(exact)
            if max(cost_nanousd, charge.charge_nano) > AMOUNT_MAX_NANO:
                raise InputError(f"a bill of {bill.cost_usd:.3E} USD is beyond what any amount can be")
            return self._corrected(
                before,
                cost_nanousd=cost_nanousd,
                billed_nanousd=cost_nanousd - nanousd_from_attousd(attousd_from_decimal(bill.own_key_usd)),
                charge_nano=charge.charge_nano,
                spread_nano=charge.spread_nano,
                estimate=row["state"] == "settled" and before.accuracy == "estimated",
            )

        return await self._correct(call_id, decide, memo=memo, generation=bill.generation_id)

    async def correct_late(self, ending: Ending) -> Adjustment:
        """Bring a call to what its own worker learned of its cost, after the sweeper took that for dead.

        What the sweeper posted, a void included, was an estimate then. Of a call whose client was told that it is not
        answered the wallet pays nothing: the house does.

        Args:
            ending: by the provider's figure or by its usage at the price book. Usage that does not add up is an estimate
                still, and changes nothing of a call that was settled exactly.

        Raises:
            NotFoundError: there is no such call.
            BrokenInvariantError: it is still live, or kept changing.
        """
        by_provider = ending.provider_cost_nanousd is not None
        billed_nanousd = ending.cost_nanousd  # less what was billed to a key of our own
        if ending.provider_cost_nanousd is not None:
            billed_nanousd = ending.provider_cost_nanousd

        def decide(row: Any, before: Figures) -> Figures:
            if ending.accuracy != "exact" and (row["state"], before.accuracy) == ("settled", "exact"):
                return before
            if ending.house_nanousd:
                after = Figures(ending.cost_nanousd, billed_nanousd, 0, 0, ending.house_nanousd, "exact")
            else:
                # As it was charged by the worker: the same call, settled twice as its answer was lost, differs in nothing.
                after = self._corrected(
                    before,
                    cost_nanousd=ending.cost_nanousd,
                    billed_nanousd=billed_nanousd,
                    charge_nano=ending.charge_nano,
                    spread_nano=ending.spread_nano,
                    estimate=True,
                )
            keeps = (
                before.provider_cost_nanousd == after.cost_nanousd
            )  # the sweeper had the provider's figure
            after = replace(after, accuracy=ending.accuracy)
            return after if by_provider or keeps else replace(after, provider_cost_nanousd=None)

        source = "the provider billed" if by_provider else "by the price book it cost"
        memo = f"{source} {format_usd(ending.cost_nanousd)} USD, as its own worker learned late"
        return await self._correct(ending.call_id, decide, memo=memo, generation=ending.generation_id)

    async def _correct(
        self, call_id: UUID, decide: Callable[[Any, Figures], Figures], *, memo: str, generation: str | None
    ) -> Adjustment:
        for _ in range(_TRIES):
            row = await self._read(call_id)
            before = _figures(row)
            after = decide(row, before)
            # Of the call as it stands: the same figures may come again after others.
            key = f"correction:{call_id}:#{row['adjustments']}:{after.cost_nanousd}:{after.charge_nano}"
            done = await self._adjust(
                call_id, before, after, kind="correction", memo=memo, key=key, generation=generation
            )
            if done is not None:
                return done
        raise BrokenInvariantError(f"call {call_id} kept changing while it was corrected")

    def _corrected(
        self,
        before: Figures,
        *,
        cost_nanousd: int,
        billed_nanousd: int,
        charge_nano: int,
        spread_nano: int,
        estimate: bool,
    ) -> Figures:
        lower = charge_nano < before.charge_nano
        higher = charge_nano > before.charge_nano and estimate and self._upward
        # Down always, though the house bears a part: a wallet never pays more than its call cost.
        if lower or (higher and before.house_nanousd == 0):
            return Figures(cost_nanousd, billed_nanousd, charge_nano, spread_nano, 0, "exact")
        # The wallet pays what it paid; the house pays the difference, or is relieved of it.
        paid_nanousd = before.cost_nanousd - before.house_nanousd
        house_nanousd = max(cost_nanousd - paid_nanousd, 0)
        return Figures(
            cost_nanousd, billed_nanousd, before.charge_nano, before.spread_nano, house_nanousd, "exact"
        )

    async def refund(
        self, call_id: UUID, *, amount_nano: int | None, reason: str, key: str | None = None
    ) -> Adjustment:
        """Give a charge back, whole or in part; what it had cost becomes the house's loss.

        Args:
            call_id: which call.
            amount_nano: how much, in nano units of the wallet's currency; all that is left, when None.
            reason: shown to the user.
            key: idempotency key; without one, the same refund of the same call posts once.

        Raises:
            NotFoundError: there is no such call.
            InputError: more than was charged, nothing to give back, or no reason.
        """
        if not reason.strip():
            raise InputError("a refund needs a reason")
        for _ in range(_TRIES):
            row = await self._read(call_id)
            before = _figures(row)
            amount = before.charge_nano if amount_nano is None else amount_nano
            if key is None and (amount <= 0 or amount > before.charge_nano):
                raise InputError("the call has no charge of that size to give back")
            after = _refunded(before, min(amount, before.charge_nano))
            done = await self._adjust(
                call_id,
                before,
                after,
                kind="refund",
                memo=reason,
                key=key or f"refund:{call_id}:{before.charge_nano}:{amount}",
                generation=None,
                input_text=f"{call_id}|{amount_nano}|{reason}",
            )
            if done is not None:
                return done
        raise BrokenInvariantError(f"call {call_id} kept changing while it was refunded")

    async def _read(self, call_id: UUID) -> Any:
        async with self._database.connection() as connection:
            row = await connection.fetchrow(
                "SELECT c.*, f.rate, f.markup_bps, (SELECT count(*) FROM journal_tx t WHERE t.call_id = c.id"
                " AND t.kind <> 'settlement') AS adjustments"
                " FROM calls c JOIN fx_quotes f ON f.id = c.fx_quote_id WHERE c.id = $1",
                call_id,
            )
        if row is None:
            raise NotFoundError(f"there is no call {call_id}")
        if row["state"] not in ("settled", "void"):
            raise BrokenInvariantError(f"call {call_id} is {row['state']}: the sweeper ends it first")
        return row

    async def _adjust(
        self,
        call_id: UUID,
        before: Figures,
        after: Figures,
        *,
        kind: str,
        memo: str,
        key: str,
        generation: str | None,
        input_text: str = "",
    ) -> Adjustment | None:
        """Post the difference; None when the call changed meanwhile."""
        if before == after:
            return Adjustment(call_id, before, after, None)
        tx_id = new_id()
        try:
            async with self._database.transaction() as connection:
                verdict = await connection.fetchval(
                    "SELECT adjust_call($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)",
                    tx_id,
                    call_id,
                    kind,
                    memo,
                    key,
                    hashlib.sha256((input_text or key).encode()).digest(),
                    before.cost_nanousd,
                    before.charge_nano,
                    after.cost_nanousd,
                    after.provider_cost_nanousd,
                    after.charge_nano,
                    after.spread_nano,
                    after.house_nanousd,
                    after.accuracy,
                    generation,
                )
        except asyncpg.UniqueViolationError as error:
            raise InputError(str(error)) from None
        match verdict:
            case "posted":
                return Adjustment(call_id, before, after, tx_id)
            case "repeated":
                return Adjustment(call_id, before, before, None)
            case _:
                return None


def _figures(row: Any) -> Figures:
    return Figures(
        row["cost_nanousd"],
        row["provider_cost_nanousd"],
        row["charge_nano"],
        row["spread_nano"] or 0,
        row["house_nanousd"],
        row["accuracy"],
    )


def _quote(row: Any) -> FxQuote:
    return FxQuote(row["fx_quote_id"], row["currency"], row["rate"], row["markup_bps"])


def _refunded(before: Figures, amount_nano: int) -> Figures:
    """Take a part of the charge back, and the same part of its markup and of what the wallet paid in USD."""
    if before.charge_nano == 0:
        return before
    spread_nano = before.spread_nano - before.spread_nano * amount_nano // before.charge_nano
    paid_nanousd = before.cost_nanousd - before.house_nanousd
    house_nanousd = before.house_nanousd + paid_nanousd * amount_nano // before.charge_nano
    charge_nano = before.charge_nano - amount_nano
    return Figures(
        before.cost_nanousd,
        before.provider_cost_nanousd,
        charge_nano,
        min(spread_nano, charge_nano),
        house_nanousd,
        before.accuracy,
    )
