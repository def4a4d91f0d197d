"""Users and wallets: made, credited, shown."""

import hashlib
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import asyncpg
from pydantic import Field
from typing_extensions import TypedDict

from billing.errors import InputError, NotFoundError
from billing.ids import new_id, parse_id
from billing.money import AMOUNT_MAX_NANO, SUM_MAX_NANO, format_amount, get_currency
from billing.postgres.database import Database
from billing.shapes import Amount, Id, Moment

Status = Literal["active", "frozen"]
UserStatus = Literal["active", "disabled"]
_EMAIL = re.compile(r"[^@\s]{1,64}@[^@\s]{1,255}")


class WalletFields(TypedDict):
    """A wallet as it is shown; major units of its currency. ``available`` = posted + overdraft - held."""

    id: Id
    currency: str
    posted: Amount
    held: Amount
    available: Amount
    overdraft: Amount
    status: Status


class UserJson(TypedDict):
    """A person as an operator sees them; limits over all their keys, and the clock that their caps follow."""

    id: Id
    email: str | None
    subject: str | None
    status: UserStatus
    timezone: str
    week_starts: Annotated[int, Field(ge=1, le=7, description="ISO 8601's number of a day, 1 for Monday.")]
    requests_per_min: int | None
    tokens_per_min: int | None
    calls_in_flight: int | None
    created_at: Moment


@dataclass(frozen=True, slots=True)
class Wallet:
    """A wallet as Postgres has it; nano units of its currency. ``available`` = posted + overdraft - held."""

    id: UUID
    user_id: UUID
    currency: str
    posted_nano: int
    held_nano: int
    overdraft_nano: int
    status: Status

    @property
    def available_nano(self) -> int:
        """What a new call may set aside."""
        return self.posted_nano + self.overdraft_nano - self.held_nano

    def as_json(self) -> WalletFields:
        """Return the contract's shape: amounts as decimal strings in major units."""
        return {
            "id": str(self.id),
            "currency": self.currency,
            "posted": format_amount(self.posted_nano),
            "held": format_amount(self.held_nano),
            "available": format_amount(self.available_nano),
            "overdraft": format_amount(self.overdraft_nano),
            "status": self.status,
        }


@dataclass(frozen=True, slots=True)
class User:
    """A person, with the limits over all their keys and the clock that their caps follow."""

    id: UUID
    email: str | None
    subject: str | None
    status: UserStatus
    timezone: str
    week_starts: int
    requests_per_min: int | None
    tokens_per_min: int | None
    calls_in_flight: int | None
    created_at: datetime

    def as_json(self) -> UserJson:
        """Return what an operator sees."""
        return {
            "id": str(self.id),
            "email": self.email,
            "subject": self.subject,
            "status": self.status,
            "timezone": self.timezone,
            "week_starts": self.week_starts,
            "requests_per_min": self.requests_per_min,
            "tokens_per_min": self.tokens_per_min,
            "calls_in_flight": self.calls_in_flight,
            "created_at": self.created_at.isoformat(),
        }


@dataclass(frozen=True, slots=True)
class Credit:
    """Money that came into a wallet, and the balance after it; nano units."""

    tx_id: UUID
    wallet: Wallet


PAGE_MAX = 1_000
_TOO_MUCH = f"a wallet's balance and overdraft are at most {format_amount(SUM_MAX_NANO)} together"
_LIMIT_MAX = 2**40
_USER = "id, email, subject, status, timezone, week_starts, requests_per_min, tokens_per_min, calls_in_flight, created_at"
_WALLET = "id, user_id, currency, posted_nano, held_nano, overdraft_nano, status"


class Wallets:
    """The registry of users and wallets.

    Args:
        database: where they are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create_user(self, email: str, *, subject: str | None = None) -> UUID:
        """Register a person by e-mail address.

        Args:
            email: to know them by; it proves nothing.
            subject: ``sub`` of the tokens that they sign in with, if they do.

        Raises:
            InputError: not an address, or it or the subject is taken.
        """
        if not _EMAIL.fullmatch(email):
            raise InputError(f"{email!r} is not an e-mail address")
        user_id = new_id()
        try:
            async with self._database.transaction() as connection:
                await connection.execute("SELECT create_user($1, $2, $3)", user_id, email, subject)
        except asyncpg.UniqueViolationError as error:
            taken = f"with the subject {subject!r}" if "subject" in str(error) else email
            raise InputError(f"there is a user {taken} already") from None
        except asyncpg.CheckViolationError:
            raise InputError("a subject has 1 to 255 characters") from None
        return user_id

    async def find_own_low(self, owner: UUID, wallet_id: UUID) -> int | None:
        """Return below which balance a person wants to be told of their wallet; None: never."""
        async with self._database.as_person(owner, readonly=True) as connection:
            low: int | None = await connection.fetchval(
                "SELECT low_nano FROM wallets WHERE id = $1", wallet_id
            )
        return low

    async def set_own_low(self, owner: UUID, wallet_id: UUID, low_nano: int | None) -> None:
        """Set below which balance a person is told of their wallet; None: never.

        Raises:
            NotFoundError: there is no such wallet, or it is another's.
        """
        try:
            async with self._database.as_person(owner) as connection:
                await connection.execute("SELECT own_set_low($1, $2)", wallet_id, low_nano)
        except asyncpg.NoDataFoundError:
            raise NotFoundError(f"there is no wallet {wallet_id}") from None

    async def find_user(self, email: str) -> UUID | None:
        """Return the id of the user with this address."""
        async with self._database.connection() as connection:
            found: UUID | None = await connection.fetchval(
                "SELECT id FROM users WHERE lower(email) = lower($1)", email
            )
        return found

    async def get_user(self, user: str) -> UUID:
        """Return the id of a user, given by id or e-mail address.

        Raises:
            NotFoundError: there is no such user.
        """
        user_id = await self.find_user(user) if "@" in user else parse_id(user, "user")
        async with self._database.connection() as connection:
            if await connection.fetchval("SELECT 1 FROM users WHERE id = $1", user_id) is None:
                raise NotFoundError(f"there is no user {user}")
        assert user_id is not None
        return user_id

    async def create_wallet(self, user: str, *, currency: str, overdraft_nano: int = 0) -> UUID:
        """Open a wallet for a user, given by id or e-mail address.

        Raises:
            UnknownCurrencyError: not an ISO 4217 code.
            NotFoundError: there is no such user.
            InputError: the overdraft is out of bounds.
        """
        get_currency(currency)
        if not 0 <= overdraft_nano <= AMOUNT_MAX_NANO:
            raise InputError("the overdraft must not be negative")
        user_id = await self.find_user(user) if "@" in user else parse_id(user, "user")
        wallet_id = new_id()
        try:
            async with self._database.transaction() as connection:
                await connection.execute(
                    "SELECT create_wallet($1, $2, $3, $4)", wallet_id, user_id, currency, overdraft_nano
                )
        except (asyncpg.ForeignKeyViolationError, asyncpg.NotNullViolationError):
            raise NotFoundError(f"there is no user {user}") from None
        return wallet_id

    async def get_wallet(self, wallet_id: UUID) -> Wallet:
        """Return a wallet.

        Raises:
            NotFoundError: there is no such wallet.
        """
        async with self._database.connection() as connection:
            return await _read(connection, wallet_id)

    async def get_own_wallet(self, user_id: UUID, wallet_id: UUID) -> Wallet:
        """Return a wallet of a user's own.

        Raises:
            NotFoundError: there is no such wallet, or it is another's.
        """
        async with self._database.as_person(user_id, readonly=True) as connection:
            return await _read(connection, wallet_id)

    async def find_owner(self, wallet_id: UUID) -> UUID | None:
        """Return whose wallet it is."""
        async with self._database.connection() as connection:
            owner: UUID | None = await connection.fetchval("SELECT find_owner($1)", wallet_id)
        return owner

    async def find_wallets(
        self, *, user_id: UUID | None = None, after: UUID | None = None, limit: int = PAGE_MAX
    ) -> list[Wallet]:
        """Return wallets by age, a user's or all, at most ``limit`` of them, after the wallet ``after``."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                f"SELECT {_WALLET} FROM wallets WHERE ($1::uuid IS NULL OR user_id = $1)"  # noqa: S608 - column names of this module
                " AND ($2::uuid IS NULL OR id > $2) ORDER BY id LIMIT $3",
                user_id,
                after,
                min(limit, PAGE_MAX),
            )
        return [Wallet(**row) for row in rows]

    async def find_users(
        self, *, email: str | None = None, after: UUID | None = None, limit: int = PAGE_MAX
    ) -> list[User]:
        """Return users by age, or the one with an address; at most ``limit`` of them, after the user ``after``."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                f"SELECT {_USER} FROM users WHERE ($1::text IS NULL OR lower(email) = lower($1))"  # noqa: S608 - column names of this module
                " AND ($2::uuid IS NULL OR id > $2) ORDER BY id LIMIT $3",
                email,
                after,
                min(limit, PAGE_MAX),
            )
        return [User(**row) for row in rows]

    async def describe_user(self, user_id: UUID) -> User:
        """Return a user with their limits and their clock.

        Raises:
            NotFoundError: there is no such user.
        """
        async with self._database.connection() as connection:
            row = await connection.fetchrow(f"SELECT {_USER} FROM users WHERE id = $1", user_id)  # noqa: S608 - column names of this module
        if row is None:
            raise NotFoundError(f"there is no user {user_id}")
        return User(**row)

    async def set_user(
        self,
        user_id: UUID,
        *,
        status: UserStatus | None = None,
        requests_per_min: int | None = None,
        tokens_per_min: int | None = None,
        calls_in_flight: int | None = None,
    ) -> User:
        """Disable or enable a user, or set limits over all their keys; what is None stays, 0 lifts a limit.

        Raises:
            NotFoundError: there is no such user.
            InputError: a limit is out of bounds.
        """
        limits = (requests_per_min, tokens_per_min, calls_in_flight)
        if any(limit is not None and not 0 <= limit < _LIMIT_MAX for limit in limits):
            raise InputError("a limit is a positive number, or 0 for none")
        async with self._database.transaction() as connection:
            if not await connection.fetchval("SELECT set_user($1, $2, $3, $4, $5)", user_id, status, *limits):
                raise NotFoundError(f"there is no user {user_id}")
        return await self.describe_user(user_id)

    async def set_wallet(
        self,
        wallet_id: UUID,
        *,
        status: Status | None = None,
        reason: str | None = None,
        overdraft_nano: int | None = None,
    ) -> Wallet:
        """Freeze or unfreeze a wallet, or set how far below zero it may go; what is None stays.

        Args:
            wallet_id: which.
            status: a frozen one admits no calls; those under way are settled.
            reason: for the status; operators see it, and the audit log.
            overdraft_nano: in nano units of its currency.

        Raises:
            NotFoundError: there is no such wallet.
            InputError: the overdraft is out of bounds.
        """
        if overdraft_nano is not None and not 0 <= overdraft_nano <= AMOUNT_MAX_NANO:
            raise InputError("the overdraft must not be negative")
        async with self._database.transaction() as connection:
            if not await connection.fetchval(
                "SELECT set_wallet($1, $2, $3, $4)", wallet_id, status, overdraft_nano, reason
            ):
                raise NotFoundError(f"there is no wallet {wallet_id}")
            return _bounded(await _read(connection, wallet_id))

    async def credit(
        self, wallet_id: UUID, amount_nano: int, *, reason: str, key: str | None = None
    ) -> Credit:
        """Put money into a wallet by an operator's hand, in one transaction.

        Args:
            wallet_id: whose.
            amount_nano: positive, in nano units of the wallet's currency.
            reason: shown to the user.
            key: idempotency key; a repeat with the same input posts nothing and returns the first credit.

        Raises:
            InputError: the amount is out of bounds, the reason is empty, or the key was used with another input.
            NotFoundError: there is no such wallet.
        """
        if not 0 < amount_nano <= AMOUNT_MAX_NANO:
            raise InputError("the amount to credit must be positive")
        if not reason.strip():
            raise InputError("a credit needs a reason")
        tx_id = new_id()
        digest = hashlib.sha256(f"{wallet_id}|{amount_nano}|{reason}".encode()).digest()
        try:
            async with self._database.transaction() as connection:
                posted = await connection.fetchrow(
                    "SELECT tx_id, posted_nano FROM grant_credit($1, $2, $3, $4, $5, $6)",
                    tx_id,
                    wallet_id,
                    amount_nano,
                    reason,
                    key or f"grant:{tx_id}",
                    digest,
                )
                return Credit(posted["tx_id"], _bounded(await _read(connection, wallet_id)))
        except asyncpg.NoDataFoundError:
            raise NotFoundError(f"there is no wallet {wallet_id}") from None
        except asyncpg.NumericValueOutOfRangeError:
            raise InputError(_TOO_MUCH) from None
        except asyncpg.UniqueViolationError as error:
            raise InputError(str(error)) from None


def _bounded(wallet: Wallet) -> Wallet:
    """Return a wallet as it would be; inside the transaction that changes it, so that what is too much is undone.

    Raises:
        InputError: what it holds and may owe is more than can be added up.
    """
    if wallet.posted_nano + wallet.overdraft_nano > SUM_MAX_NANO:
        raise InputError(_TOO_MUCH)
    return wallet


async def _read(connection: Any, wallet_id: UUID) -> Wallet:
    row = await connection.fetchrow(f"SELECT {_WALLET} FROM wallets WHERE id = $1", wallet_id)  # noqa: S608 - column names of this module
    if row is None:
        raise NotFoundError(f"there is no wallet {wallet_id}")
    return Wallet(**row)
