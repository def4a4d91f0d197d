"""Payments that wait for a decision of the operator: what lies in suspense, and webhooks that ended in review."""

from typing import Any
from uuid import UUID

import asyncpg

from billing.errors import InputError, NotFoundError
from billing.ids import new_id
from billing.money import format_amount
from billing.payments.units import PaymentProvider
from billing.postgres.database import Database


class Reviews:
    """What an operator decides of payments.

    Args:
        database: by the operator's role.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def accept(
        self, provider: PaymentProvider, txn_id: str, *, wallet_id: UUID | None = None, reason: str
    ) -> str:
        """Give what of a payment lies in suspense to its wallet, or to the one named; returns the amount in major units.

        Raises:
            NotFoundError: no such payment.
            InputError: nothing of it is in suspense, no wallet is known, the wallet is in another currency, or no reason.
        """
        if not reason.strip():
            raise InputError("accepting a payment needs a reason")
        try:
            async with self._database.transaction() as connection:
                given_nano: int = await connection.fetchval(
                    "SELECT accept_payment($1, $2, $3, $4, $5)", new_id(), provider, txn_id, wallet_id, reason
                )
        except asyncpg.NoDataFoundError:
            raise NotFoundError(f"there is no payment {txn_id} of {provider}") from None
        except asyncpg.InvalidParameterValueError as error:
            raise InputError(str(error)) from None
        return format_amount(given_nano)

    async def retry_event(self, event_id: UUID) -> None:
        """Let a webhook that ended in review, or was ignored, be looked at again.

        Raises:
            InputError: there is none that ended so.
        """
        async with self._database.transaction() as connection:
            if not await connection.fetchval("SELECT retry_webhook($1)", event_id):
                raise InputError(f"there is no webhook {event_id} in review, and none that was ignored")

    async def list_waiting(self) -> list[dict[str, Any]]:
        """Return the payments of which something waits in suspense for a decision, oldest first; amounts in nano units."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                """
                SELECT c.provider, c.provider_txn_id, c.intent_id, c.wallet_id, c.currency, c.paid_nano, c.note, c.created_at,
                       c.paid_nano - c.credited_nano - coalesce(r.suspense_nano, 0) AS suspense_nano
                FROM payment_credits c LEFT JOIN LATERAL (
                    SELECT sum(t.suspense_nano)::bigint AS suspense_nano FROM payment_reversals t
                    WHERE (t.provider, t.provider_txn_id) = (c.provider, c.provider_txn_id) AND t.state <> 'undone') r ON true
                WHERE c.state <> 'credited' AND c.paid_nano - c.credited_nano > coalesce(r.suspense_nano, 0)
                ORDER BY c.created_at LIMIT 1000
                """
            )
        return [dict(row) for row in rows]

    async def list_unsure(self) -> list[dict[str, Any]]:
        """Return refunds of ours that were sent and of which the provider tells nothing, oldest first; amounts in nano units."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                """
                SELECT r.id, r.provider, r.provider_txn_id, c.currency, r.amount_nano, r.sent_at
                FROM payment_reversals r JOIN payment_credits c USING (provider, provider_txn_id)
                WHERE r.state = 'requested' AND r.sent_at < now() - interval '2 minutes' ORDER BY r.sent_at LIMIT 1000
                """
            )
        return [dict(row) for row in rows]

    async def send_again(self, refund_id: UUID) -> None:
        """Let a refund be sent again whose sending was never answered: somebody has seen that the provider does not have it.

        Raises:
            InputError: it is none of those.
        """
        async with self._database.transaction() as connection:
            if not await connection.fetchval("SELECT send_again($1)", refund_id):
                raise InputError(
                    f"{refund_id} is no refund that was sent, minutes ago, and of which nothing is known since"
                )
