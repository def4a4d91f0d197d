"""Refunds of payments by the operator: money is set aside first, then the provider is asked to send it (``worker.py``)."""

import hashlib

import asyncpg

from billing.errors import InputError, InsufficientFundsError, NotFoundError
from billing.ids import new_id
from billing.payments.payment import Refund
from billing.payments.units import PaymentProvider, minor_units
from billing.postgres.database import Database


class Refunds:
    """Refunds of payments, begun by the operator.

    Args:
        database: by the operator's role.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def begin(
        self,
        provider: PaymentProvider,
        txn_id: str,
        *,
        amount_nano: int | None = None,
        reason: str,
        below_zero: bool = False,
        key: str | None = None,
    ) -> Refund:
        """Set money aside for a refund, before the provider is asked to send it.

        Args:
            provider: whose payment.
            txn_id: its id there.
            amount_nano: in nano units of its currency; all that is left, without one.
            reason: for the books.
            below_zero: though the wallet has spent it.
            key: idempotency key; a repeat with the same input returns the first refund.

        Raises:
            NotFoundError: no such payment.
            InputError: more than what is left of it, finer than the provider takes, no reason, or the key was used with another
                input.
            InsufficientFundsError: the wallet does not have as much.
        """
        if not reason.strip():
            raise InputError("a refund needs a reason")
        refund_id = new_id()
        digest = hashlib.sha256(f"{provider}|{txn_id}|{amount_nano}|{reason}|{below_zero}".encode()).digest()
        try:
            async with self._database.transaction() as connection:
                row = await connection.fetchrow(
                    "SELECT id, provider, provider_txn_id, amount_nano, state"
                    " FROM refund_payment($1, $2, $3, $4, $5, $6, $7, $8, $9)",
                    refund_id,
                    new_id(),
                    provider,
                    txn_id,
                    amount_nano,
                    reason,
                    below_zero,
                    key or f"payment_refund:{refund_id}",
                    digest,
                )
                currency = await connection.fetchval(
                    "SELECT currency FROM payment_credits WHERE provider = $1 AND provider_txn_id = $2",
                    provider,
                    txn_id,
                )
                minor_units(row["amount_nano"], currency, provider)
        except asyncpg.NoDataFoundError:
            raise NotFoundError(f"there is no payment {txn_id} of {provider}") from None
        except (asyncpg.InvalidParameterValueError, asyncpg.UniqueViolationError) as error:
            raise InputError(str(error)) from None
        except asyncpg.CheckViolationError:
            raise InsufficientFundsError("the wallet does not have as much as is to be refunded") from None
        return Refund(**row)
