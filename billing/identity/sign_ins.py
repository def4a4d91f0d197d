"""People who come with a token of the frontend's identity provider, instead of a key."""

from uuid import UUID

from billing.errors import InsufficientFundsError, InvalidKeyError, NotFoundError
from billing.identity.caller import Caller, FoundCaller, limits_of_user
from billing.identity.caller_cache import CallerCache
from billing.ids import new_id
from billing.limits import Limits
from billing.money import get_currency
from billing.postgres.database import REPEATABLE, Database
from config.settings import AuthSettings, LimitSettings

_TRIES = 3


class People:
    """Knows who a verified token names, and makes them known on first sight.

    Args:
        database: where users are.
        auth: the cache's bounds, and the currency of the wallet that somebody new is given.
        limits: for users without limits of their own.

    Raises:
        UnknownCurrencyError: the default currency is no ISO 4217 code.
    """

    def __init__(self, database: Database, auth: AuthSettings, limits: LimitSettings) -> None:
        if auth.default_currency:
            get_currency(auth.default_currency)
        self._database = database
        self._currency = auth.default_currency or None
        self._limits = limits
        self.callers: CallerCache[tuple[str, UUID | None]] = CallerCache(
            ttl_s=auth.cache_ttl_s, entries_max=auth.cache_entries, wait_s=auth.wait_s
        )

    async def sign_in(self, subject: str, *, email: str | None, wallet_id: UUID | None) -> Caller:
        """Return the caller that a verified token names.

        Args:
            subject: the token's ``sub``.
            email: for somebody new, if nobody has it.
            wallet_id: which of their wallets shall pay; None for the oldest.

        Raises:
            InvalidKeyError: the user is disabled.
            NotFoundError: the wallet is not theirs.
            InsufficientFundsError: they have no wallet.
            PostgresUnavailableError: they are not cached and Postgres is away.
        """
        caller = await self.callers.find(
            (subject, wallet_id), lambda: self._find(subject, email=email, wallet_id=wallet_id)
        )
        if caller is None:
            raise InvalidKeyError("The user is disabled.")
        return caller

    async def _find(self, subject: str, *, email: str | None, wallet_id: UUID | None) -> FoundCaller | None:
        for attempt in range(1, _TRIES + 1):
            try:
                async with self._database.transaction() as connection:
                    row = await connection.fetchrow(
                        "SELECT * FROM sign_in($1, $2, $3, $4, $5, $6)",
                        subject,
                        email,
                        wallet_id,
                        self._currency,
                        new_id(),
                        new_id(),
                    )
                break
            except REPEATABLE:
                if attempt == _TRIES:
                    raise
        if row["status"] != "active":
            return None
        if row["wallet_id"] is None:
            if wallet_id is not None:
                raise NotFoundError(f"there is no wallet {wallet_id}")
            raise InsufficientFundsError("You have no wallet yet.")
        user_limits = limits_of_user(row, self._limits)
        usual = Limits(self._limits.requests_per_min, self._limits.tokens_per_min)
        return FoundCaller(
            Caller(
                user_id=row["user_id"],
                wallet_id=row["wallet_id"],
                key_id=None,
                currency=row["currency"],
                limits=user_limits or usual,
                user_limits=user_limits,
                manages=True,
            )
        )
