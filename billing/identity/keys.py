"""API keys: made once, shown once, kept as HMAC-SHA256 under a pepper, recognised by it.

A secret is ``sk-tuma-``, 43 characters of 256 random bits, and 6 of a checksum over them (CRC-32, base 62): what is
mistyped is refused without a question to Postgres, and a scanner for leaked secrets knows one when it sees it.
"""

import asyncio
import hmac
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import structlog

from billing.errors import InputError, InvalidKeyError, NotFoundError, PostgresUnavailableError
from billing.identity.caller import Caller, FoundCaller, limits_of_user
from billing.identity.caller_cache import CallerCache
from billing.identity.key import Key, KeyRules, NewKey, Owner
from billing.identity.key_secret import digest_secret, hint_of, is_well_formed, make_secret, name_pepper
from billing.ids import new_id
from billing.limits import Limits
from billing.postgres.database import Database
from config.settings import AuthSettings, LimitSettings

_log = structlog.get_logger("tuma.keys")
_NOTE_PERIOD_S = 10.0
PAGE_MAX = 1_000


class Keys:
    """Makes, lists, rotates, revokes and recognises API keys.

    Args:
        database: where they are kept.
        auth: the peppers, the cache's bounds, how many keys a user may have.
        limits: for keys without limits of their own.
        people: the same, for what people do with their own keys.

    Raises:
        InputError: there is no pepper: an unpeppered hash would be worth stealing.
    """

    def __init__(
        self,
        database: Database,
        auth: AuthSettings,
        limits: LimitSettings,
        *,
        people: Database | None = None,
    ) -> None:
        peppers = [pepper.get_secret_value() for pepper in (auth.key_pepper, *auth.old_key_peppers)]
        if not all(peppers):
            raise InputError("TUMA_AUTH__KEY_PEPPER is not set: give it a long random value and keep it")
        self._peppers = [pepper.encode() for pepper in peppers]
        self.pepper = name_pepper(self._peppers[0])
        self._database = database
        self._people = people or database
        self._auth = auth
        self._limits = limits
        self.callers: CallerCache[bytes] = CallerCache(
            ttl_s=auth.cache_ttl_s, entries_max=auth.cache_entries, wait_s=auth.wait_s
        )
        self._used: dict[UUID, datetime] = {}

    def _digests(self, secret: str) -> list[bytes]:
        return [digest_secret(pepper, secret) for pepper in self._peppers]

    async def create(
        self, wallet_id: UUID, rules: KeyRules | None = None, *, owner: Owner | None = None
    ) -> NewKey:
        """Make a key that pays from ``wallet_id``, and its caps with it.

        Args:
            wallet_id: who pays.
            rules: what bounds it.
            owner: who makes it; None for the operator, whose caps the user cannot lift.

        Raises:
            NotFoundError: there is no such wallet, or it is not the owner's.
            InputError: a rule makes no sense, or there are too many keys.
        """
        rules = rules or KeyRules()
        rules.check()
        if owner is not None and owner.wallet_id not in (None, wallet_id):
            raise NotFoundError(f"there is no wallet {wallet_id}")
        secret, key_id = make_secret(), new_id()
        try:
            async with self._acting(owner) as connection:
                await connection.execute(
                    "SELECT create_key($1, $2, NULL, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)"
                    if owner is None
                    else "SELECT own_create_key($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)",
                    key_id,
                    wallet_id,
                    None if owner is None else self._auth.keys_max,
                    rules.name,
                    hint_of(secret),
                    self._digests(secret)[0],
                    self.pepper,
                    rules.expires_at,
                    None if rules.models is None else list(rules.models),
                    None if rules.networks is None else list(rules.networks),
                    not rules.bound if rules.manages is None else rules.manages,
                    rules.requests_per_min,
                    rules.tokens_per_min,
                    rules.calls_in_flight,
                    list(rules.caps.keys()),
                    list(rules.caps.values()),
                )
        except asyncpg.NoDataFoundError:
            raise NotFoundError(f"there is no wallet {wallet_id}") from None
        except asyncpg.ProgramLimitExceededError:
            raise InputError(f"there are {self._auth.keys_max} keys already: revoke one first") from None
        return NewKey(key_id, secret)

    async def revoke(self, key_id: UUID, *, owner: Owner | None = None) -> None:
        """Revoke a key, on every worker; revoking twice is fine.

        Raises:
            NotFoundError: there is no such key, or it is not the owner's.
        """
        try:
            async with self._acting(owner) as connection:
                await connection.execute(
                    "SELECT revoke_key($1, NULL, $2)" if owner is None else "SELECT own_revoke_key($1, $2)",
                    key_id,
                    None if owner is None else owner.wallet_id,
                )
        except asyncpg.NoDataFoundError:
            raise NotFoundError(f"there is no key {key_id}") from None

    async def rotate(
        self, key_id: UUID, *, owner: Owner | None = None, overlap_s: float | None = None
    ) -> NewKey:
        """Give a key another secret; all else about it stays.

        Args:
            key_id: which.
            owner: who asks; None for the operator.
            overlap_s: how long the secret before stays good; 0 ends it at once, None is the settings' figure.

        Raises:
            NotFoundError: there is no such key, or it is not the owner's.
            InputError: it was revoked or has expired, or the overlap is out of bounds.
        """
        overlap_s = self._auth.key_overlap_s if overlap_s is None else overlap_s
        if not 0 <= overlap_s <= self._auth.key_overlap_max_s:
            raise InputError(f"the overlap is from 0 to {self._auth.key_overlap_max_s:g} seconds")
        secret = make_secret()
        try:
            async with self._acting(owner) as connection:
                done = await connection.fetchval(
                    "SELECT rotate_key($1, NULL, $2, $3, $4, $5, $6)"
                    if owner is None
                    else "SELECT own_rotate_key($1, $2, $3, $4, $5, $6)",
                    key_id,
                    None if owner is None else owner.wallet_id,
                    hint_of(secret),
                    self._digests(secret)[0],
                    self.pepper,
                    timedelta(seconds=overlap_s),
                )
        except asyncpg.NoDataFoundError:
            raise NotFoundError(f"there is no key {key_id}") from None
        if not done:
            raise InputError(f"key {key_id} was revoked or has expired: make another")
        return NewKey(key_id, secret)

    async def find_keys(
        self,
        *,
        owner: Owner | None = None,
        user_id: UUID | None = None,
        wallet_id: UUID | None = None,
        key_id: UUID | None = None,
        revoked: bool = False,
        after: UUID | None = None,
        limit: int = PAGE_MAX,
    ) -> list[Key]:
        """Return keys by age, at most ``limit`` of them, after the key ``after``.

        Args:
            owner: who asks, and sees their own; None for the operator.
            user_id: whose, for the operator; None for everybody's.
            wallet_id: whose, for the operator; None for all wallets'.
            key_id: which one; None for all.
            revoked: those, too.
            after: the last key of the page before.
            limit: of a page.
        """
        async with self._acting(owner) as connection:
            rows = await connection.fetch(
                "SELECT * FROM list_keys($1, $2, $3, $4, $5, $6)"
                if owner is None
                else "SELECT * FROM own_keys($1, $3, $4, $5, $6) WHERE user_id = $2",
                key_id,
                user_id if owner is None else owner.user_id,
                wallet_id if owner is None else owner.wallet_id,
                revoked,
                after,
                min(limit, PAGE_MAX),
            )
        return [Key(**row) for row in rows]

    async def get_key(self, key_id: UUID, *, owner: Owner | None = None) -> Key:
        """Return a key, a revoked one too.

        Raises:
            NotFoundError: there is no such key, or it is not the owner's.
        """
        found = await self.find_keys(owner=owner, key_id=key_id, revoked=True, limit=1)
        if not found:
            raise NotFoundError(f"there is no key {key_id}")
        return found[0]

    @asynccontextmanager
    async def _acting(self, owner: Owner | None) -> AsyncIterator[Any]:
        """Lend a connection: for the operator, or for a person, whose own keys it reaches."""
        if owner is None:
            async with self._database.transaction() as connection:
                yield connection
        else:
            async with self._people.as_person(owner.user_id) as connection:
                yield connection

    async def authenticate(self, secret: str) -> Caller:
        """Tell who calls with this secret.

        Raises:
            InvalidKeyError: unknown, expired, revoked or malformed.
            PostgresUnavailableError: it is not cached and Postgres is away.
        """
        if not is_well_formed(secret):
            raise InvalidKeyError("The API key is not valid.")
        digests = self._digests(secret)
        caller = await self.callers.find(digests[0], lambda: self._find(digests))
        if caller is None:
            raise InvalidKeyError("The API key is not valid.")
        assert caller.key_id is not None
        self._used[caller.key_id] = datetime.now(UTC)
        return caller

    async def _find(self, digests: list[bytes]) -> FoundCaller | None:
        asked_s = time.monotonic()
        async with self._database.connection() as connection:
            row = await connection.fetchrow("SELECT * FROM find_key($1)", digests)
            if row is None or not any(hmac.compare_digest(row["digest"], digest) for digest in digests):
                return None
            if row["current"] and row["digest"] != digests[0]:
                await connection.execute(
                    "SELECT rehash_key($1, $2, $3, $4)", row["id"], row["digest"], digests[0], self.pepper
                )
        return self._found(row, asked_s)

    def _found(self, row: Any, asked_s: float) -> FoundCaller:
        caller = Caller(
            user_id=row["user_id"],
            wallet_id=row["wallet_id"],
            key_id=row["id"],
            currency=row["currency"],
            limits=Limits(
                row["requests_per_min"] or self._limits.requests_per_min,
                row["tokens_per_min"] or self._limits.tokens_per_min,
                row["calls_in_flight"] or 0,
            ),
            user_limits=limits_of_user(row, self._limits),
            models=None if row["models"] is None else tuple(row["models"]),
            networks=None if row["networks"] is None else tuple(row["networks"]),
            manages=row["manages"],
            good_until_s=math.inf if row["valid_s"] is None else asked_s + row["valid_s"],
        )
        return FoundCaller(caller, row["valid_s"])

    async def run_refresh(self) -> None:
        """Ask about the keys in use twice as often as they must be, in one statement for all, until cancelled."""
        while True:
            await asyncio.sleep(self._auth.cache_ttl_s / 2)
            with suppress(PostgresUnavailableError):  # calls look up their keys themselves, and say so
                await self.callers.refresh(self._find_many)

    async def _find_many(self, digests: Sequence[bytes]) -> dict[bytes, FoundCaller]:
        """Find keys by their digests under the newest pepper; those that were kept under an older one are not found."""
        asked_s = time.monotonic()
        async with self._database.connection() as connection:
            rows = await connection.fetch("SELECT * FROM find_key($1)", list(digests))
        return {row["digest"]: self._found(row, asked_s) for row in rows}

    async def forget(self, key_id: str) -> None:
        """Drop a key from the cache, or all with ``*``."""
        self.callers.drop(None if key_id == "*" else lambda caller: str(caller.key_id) == key_id)

    async def run_notes(self) -> None:
        """Write down now and then when keys were used, until cancelled."""
        while True:
            await asyncio.sleep(_NOTE_PERIOD_S)
            await self.note_used()

    async def note_used(self) -> None:
        """Write down when keys were last used; what cannot be written is let go, as it is for the eye only."""
        used, self._used = self._used, {}
        if not used:
            return
        try:
            async with self._database.connection() as connection:
                await connection.execute(
                    "SELECT note_keys_used($1, $2)", list(used.keys()), list(used.values())
                )
        except (PostgresUnavailableError, asyncpg.PostgresError) as error:
            _log.info("keys.not_noted", keys=len(used), error=type(error).__name__)
