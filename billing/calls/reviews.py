"""Calls in review: what they cost could not be learned, so people decide.

A provider without records, a record that never comes, a figure beyond what any amount can be: such a call keeps its hold, and
no sweep ends it. An operator looks at the provider's own pages, and says what it cost.

How this may be interrupted and abused: asked for twice (the second finds the call ended), beside the sweeper that learns the
figure after all (the wallet's lock lets one of both end it), or with a figure that the wallet never agreed to (more than was
held for the call is refused, unless the house pays).
"""

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from billing.errors import InputError, NotFoundError
from billing.fx.quote import FxQuote
from billing.ids import new_id
from billing.money import AMOUNT_MAX_NANO, ATTO_PER_NANO, format_amount
from billing.postgres.database import Database

_STATES = {"open": "still under way", "settled": "settled", "void": "void"}


@dataclass(frozen=True, slots=True)
class Decision:
    """What an operator decided: amounts in nano units of USD and of the wallet's currency."""

    call_id: UUID
    wallet_id: UUID
    cost_nanousd: int
    charge_nano: int


class CallReviews:
    """Ends calls that are in review.

    Args:
        database: where the books are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def end(self, call_id: UUID, *, cost_nanousd: int, reason: str, house: bool = False) -> Decision:
        """End a call at what it cost; at nothing it is void.

        Args:
            call_id: in review.
            cost_nanousd: what the provider billed for it.
            reason: kept in the audit log.
            house: the house pays, and the wallet nothing.

        Raises:
            NotFoundError: there is no such call.
            InputError: it is not in review, no amount, more than was held for it, or no reason is given.
        """
        if not reason.strip():
            raise InputError("a decision needs a reason")
        if not 0 <= cost_nanousd <= AMOUNT_MAX_NANO:
            raise InputError(f"{format_amount(cost_nanousd)} USD is no cost")
        row = await self._read(call_id)
        fx = FxQuote(row["fx_quote_id"], row["currency"], row["rate"], row["markup_bps"])
        charge = fx.charge(0 if house else cost_nanousd * ATTO_PER_NANO)
        if charge.charge_nano > row["hold_nano"]:
            raise InputError(
                f"that is {format_amount(charge.charge_nano)} {fx.currency}, and {format_amount(row['hold_nano'])} are held for the"
                " call: the wallet pays that at most. Let the house pay, or settle it at less"
            )
        async with self._database.transaction() as connection:
            found = await connection.fetchval(
                "SELECT end_review($1, $2, $3, $4, $5, $6, $7)",
                new_id(),
                call_id,
                cost_nanousd,
                charge.charge_nano,
                charge.spread_nano,
                cost_nanousd if house else 0,
                reason,
            )
            if found != "ended":
                raise _not_in_review(call_id, found)
        return Decision(call_id, row["wallet_id"], cost_nanousd, charge.charge_nano)

    async def _read(self, call_id: UUID) -> Any:
        async with self._database.connection() as connection:
            row = await connection.fetchrow(
                "SELECT c.wallet_id, c.state, c.hold_nano, c.fx_quote_id, c.currency, f.rate, f.markup_bps"
                " FROM calls c JOIN fx_quotes f ON f.id = c.fx_quote_id WHERE c.id = $1",
                call_id,
            )
        if row is None:
            raise NotFoundError(f"there is no call {call_id}")
        if row["state"] != "review":
            raise _not_in_review(call_id, row["state"])
        return row


def _not_in_review(call_id: UUID, state: str) -> InputError:
    return InputError(f"call {call_id} is {_STATES[state]}: only calls in review are decided on")
