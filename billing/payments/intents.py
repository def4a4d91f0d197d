"""Money from people, in the books: intents, what a payment provider says was paid, and what it took back."""

from datetime import timedelta
from uuid import UUID

import asyncpg

from billing.errors import InputError, NotFoundError, RateLimitError
from billing.ids import new_id
from billing.money import get_currency
from billing.payments.payment import Intent
from billing.payments.units import PaymentProvider, get_payment_unit, minor_units
from billing.postgres.database import Database

_LIVE_PAUSE_MS = 60_000


_INTENT = (
    "id, wallet_id, user_id, kind, provider, currency, amount_nano, state, attempt, url, note, created_at, expires_at,"
    " ended_at, method_due"
)


class Intents:
    """A person's own intents.

    Args:
        database: by the role that acts for people.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(
        self,
        owner: UUID,
        wallet_id: UUID,
        provider: PaymentProvider,
        *,
        amount_nano: int,
        currency: str,
        key: str | None = None,
        saves_method: bool = False,
        expires_after_s: float,
        poll_after_s: float,
        live_max: int,
    ) -> Intent:
        """Note a wish to pay, before any provider is asked.

        Args:
            owner: who wishes it.
            wallet_id: theirs.
            provider: who shall take the money.
            amount_nano: in nano units of ``currency``.
            currency: the wallet's.
            key: idempotency key; a repeat with the same input returns the first intent.
            saves_method: the payer lets us keep what they pay with.
            expires_after_s: when it is no longer waited for; money that comes later is credited all the same.
            poll_after_s: when the provider is asked about it first, in seconds.
            live_max: how many of the wallet's may wait to be paid at once.

        Raises:
            RateLimitError: as many wait already.
            InputError: another currency than the wallet's, an amount that the provider cannot take, or the key was used
                with another input.
            NotFoundError: the wallet is not theirs.
        """
        _check_amount(amount_nano, currency, provider)
        try:
            async with self._database.as_person(owner) as connection:
                row = await connection.fetchrow(
                    f"SELECT {_INTENT} FROM own_create_intent($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",  # noqa: S608 - column names of this module
                    new_id(),
                    wallet_id,
                    provider,
                    currency,
                    amount_nano,
                    key,
                    timedelta(seconds=expires_after_s),
                    timedelta(seconds=poll_after_s),
                    saves_method,
                    live_max,
                )
        except asyncpg.ProgramLimitExceededError as error:
            raise RateLimitError(str(error), retry_after_ms=_LIVE_PAUSE_MS) from None
        except asyncpg.NoDataFoundError:
            raise NotFoundError(f"there is no wallet {wallet_id}") from None
        except (asyncpg.UniqueViolationError, asyncpg.InvalidParameterValueError) as error:
            raise InputError(str(error)) from None
        return Intent(**row)

    async def get(self, owner: UUID, intent_id: UUID, *, wallet_id: UUID | None = None) -> Intent:
        """Return a person's intent, of the wallet named.

        Raises:
            NotFoundError: there is none of theirs.
        """
        async with self._database.as_person(owner, readonly=True) as connection:
            row = await connection.fetchrow(f"SELECT {_INTENT} FROM payment_intents WHERE id = $1", intent_id)  # noqa: S608 - column names of this module
        if row is None or wallet_id not in (None, row["wallet_id"]):
            raise NotFoundError(f"there is no top-up {intent_id}")
        return Intent(**row)


def _check_amount(amount_nano: int, currency: str, provider: PaymentProvider) -> None:
    """Refuse what the provider cannot take, before anything is noted."""
    get_currency(currency)
    get_payment_unit(currency, provider)
    minor_units(amount_nano, currency, provider)
    if amount_nano <= 0:
        raise InputError("the amount to pay must be positive")
