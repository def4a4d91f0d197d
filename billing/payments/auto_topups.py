"""Wallets that top themselves up: what their owners want. What is done about it: ``billing/payments/worker.py``."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated
from uuid import UUID

import asyncpg
from pydantic import Field
from typing_extensions import TypedDict

from billing.errors import InputError, NotFoundError
from billing.money import format_amount
from billing.payments.units import PaymentProvider
from billing.postgres.database import Database
from billing.shapes import Amount, Id, Moment


class AutoTopupFields(TypedDict):
    """When and how a wallet tops itself up; major units of its currency, seconds."""

    enabled: bool
    threshold: Amount | None
    amount: Amount | None
    pause_s: int | None
    provider: PaymentProvider | None
    method: Annotated[str | None, Field(description="What is charged, in words.")]
    failures: int
    note: str
    last_at: Moment | None
    last_topup_id: Id | None


@dataclass(frozen=True, slots=True)
class AutoTopup:
    """When and how a wallet tops itself up; nano units of its currency.

    Args:
        enabled: off until its owner says so.
        threshold_nano: a posted balance below it begins one; None as long as nobody has set it.
        amount_nano: how much.
        pause_s: from one to the next, at least.
        method: what is charged, in words; None when nothing is kept.
        failures: in a row; the third switches it off.
        note: why the last one failed, or why it is off.
    """

    enabled: bool = False
    threshold_nano: int | None = None
    amount_nano: int | None = None
    pause_s: int | None = None
    provider: PaymentProvider | None = None
    method: str | None = None
    failures: int = 0
    note: str = ""
    last_at: datetime | None = None
    last_intent_id: UUID | None = None

    def as_json(self) -> AutoTopupFields:
        """Return amounts as decimal strings in major units."""
        return {
            "enabled": self.enabled,
            "threshold": None if self.threshold_nano is None else format_amount(self.threshold_nano),
            "amount": None if self.amount_nano is None else format_amount(self.amount_nano),
            "pause_s": self.pause_s,
            "provider": self.provider,
            "method": self.method,
            "failures": self.failures,
            "note": self.note,
            "last_at": None if self.last_at is None else self.last_at.isoformat(),
            "last_topup_id": None if self.last_intent_id is None else str(self.last_intent_id),
        }


class AutoTopups:
    """A person's own.

    Args:
        database: by the role that acts for people.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, owner: UUID, wallet_id: UUID) -> AutoTopup:
        """Return how a person's wallet tops itself up.

        Raises:
            NotFoundError: the wallet is not theirs.
        """
        async with self._database.as_person(owner, readonly=True) as connection:
            row = await connection.fetchrow(
                "SELECT coalesce(a.enabled, false) AS enabled, a.threshold_nano, a.amount_nano,"
                " extract(epoch FROM a.pause)::bigint AS pause_s, m.provider, m.label AS method,"
                " coalesce(a.failures, 0) AS failures, coalesce(a.note, '') AS note, a.last_at, a.last_intent_id"
                " FROM wallets w LEFT JOIN auto_topups a ON a.wallet_id = w.id"
                " LEFT JOIN payment_methods m ON m.wallet_id = w.id WHERE w.id = $1",
                wallet_id,
            )
        if row is None:
            raise NotFoundError(f"there is no wallet {wallet_id}")
        return AutoTopup(**row)

    async def set(self, owner: UUID, wallet_id: UUID, wanted: AutoTopup) -> None:
        """Set it; failures are forgotten, and what was begun and not asked of the provider yet is let go when it is off.

        Args:
            owner: whose wallet.
            wallet_id: which.
            wanted: of it whether it is on, the threshold, the amount and the pause; without amounts nothing is kept.

        Raises:
            InputError: it is to be on, and nothing is kept to pay with.
            NotFoundError: the wallet is not theirs.
        """
        try:
            async with self._database.as_person(owner) as connection:
                await connection.execute(
                    "SELECT own_set_auto_topup($1, $2, $3, $4, $5)",
                    wallet_id,
                    wanted.enabled,
                    wanted.threshold_nano,
                    wanted.amount_nano,
                    timedelta(seconds=wanted.pause_s or 0),
                )
        except asyncpg.NoDataFoundError:
            raise NotFoundError(f"there is no wallet {wallet_id}") from None
        except asyncpg.InvalidParameterValueError:
            raise InputError(
                "nothing is kept to pay with: top up once with 'save_method', by a provider that can"
            ) from None

    async def forget_method(self, owner: UUID, wallet_id: UUID) -> bool:
        """Forget what the wallet pays with, and switch it off; False: nothing was kept.

        Raises:
            NotFoundError: the wallet is not theirs.
        """
        try:
            async with self._database.as_person(owner) as connection:
                there: bool = await connection.fetchval("SELECT own_forget_method($1)", wallet_id)
        except asyncpg.NoDataFoundError:
            raise NotFoundError(f"there is no wallet {wallet_id}") from None
        return there
