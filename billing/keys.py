"""API keys: made once, shown once, stored as HMAC-SHA256 under a pepper, looked up by it."""

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from uuid import UUID

from billing.db import Database
from billing.errors import InputError, InvalidKeyError, NotFoundError
from billing.holds import Limits
from billing.ids import new_id
from config.settings import AuthSettings, LimitSettings

PREFIX = "sk-tuma-"
_SECRET_BYTES = 32
_SECRET_LENGTH_MAX = 200
_UNKNOWN_TTL_S = 1.0


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and which wallet pays."""

    user_id: UUID
    wallet_id: UUID
    key_id: UUID | None
    currency: str
    limits: Limits
    user_limits: Limits | None = None


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key just made; ``secret`` exists nowhere else."""

    id: UUID
    secret: str


class Keys:
    """Makes, revokes and recognises API keys.

    Args:
        database: where they are kept.
        auth: the pepper and the cache's bounds.
        limits: for keys without limits of their own.

    Raises:
        InputError: there is no pepper: an unpeppered hash would be worth stealing.
    """

    def __init__(self, database: Database, auth: AuthSettings, limits: LimitSettings) -> None:
        pepper = auth.key_pepper.get_secret_value()
        if not pepper:
            raise InputError("TUMA_AUTH__KEY_PEPPER is not set: give it a long random value and keep it")
        self._pepper = pepper.encode()
        self._database = database
        self._ttl_s = auth.cache_ttl_s
        self._entries_max = auth.cache_entries
        self._limits = limits
        self._cache: OrderedDict[bytes, tuple[float, Caller | None]] = OrderedDict()

    def _digest(self, secret: str) -> bytes:
        return hmac.digest(self._pepper, secret.encode("utf-8", "surrogatepass"), hashlib.sha256)

    async def create(
        self,
        wallet_id: UUID,
        *,
        name: str = "",
        requests_per_min: int | None = None,
        tokens_per_min: int | None = None,
        calls_in_flight: int | None = None,
    ) -> NewKey:
        """Make a key that pays from ``wallet_id``.

        Raises:
            NotFoundError: there is no such wallet.
            InputError: a limit is not positive.
        """
        for label, value in (
            ("rpm", requests_per_min),
            ("tpm", tokens_per_min),
            ("max-parallel", calls_in_flight),
        ):
            if value is not None and not 0 < value < 2**40:
                raise InputError(f"{label} must be a positive number")
        secret = PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
        key_id = new_id()
        async with self._database.transaction() as connection:
            if await connection.fetchval("SELECT 1 FROM wallets WHERE id = $1", wallet_id) is None:
                raise NotFoundError(f"there is no wallet {wallet_id}")
            await connection.execute(
                "INSERT INTO api_keys (id, wallet_id, name, hint, secret_hmac, requests_per_min, tokens_per_min, calls_in_flight)"
                " VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
                key_id,
                wallet_id,
                name,
                secret[: len(PREFIX) + 4],
                self._digest(secret),
                requests_per_min,
                tokens_per_min,
                calls_in_flight,
            )
        return NewKey(key_id, secret)

    async def revoke(self, key_id: UUID) -> None:
        """Revoke a key, on every worker; revoking twice is fine.

        Raises:
            NotFoundError: there is no such key.
        """
        async with self._database.transaction() as connection:
            found = await connection.fetchval(
                "UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE id = $1 RETURNING id",
                key_id,
            )
        if found is None:
            raise NotFoundError(f"there is no key {key_id}")

    async def authenticate(self, secret: str) -> Caller:
        """Tell who calls with this secret.

        Raises:
            InvalidKeyError: unknown, revoked or malformed.
            PostgresUnavailableError: it is not cached and Postgres is away.
        """
        if not secret.startswith(PREFIX) or len(secret) > _SECRET_LENGTH_MAX:
            raise InvalidKeyError("The API key is not valid.")
        digest = self._digest(secret)
        cached = self._cache.get(digest)
        now = time.monotonic()
        if cached is not None and cached[0] > now:
            caller = cached[1]
        else:
            caller = await self._find(digest)
            self._cache[digest] = (
                now + (self._ttl_s if caller else min(_UNKNOWN_TTL_S, self._ttl_s)),
                caller,
            )
            self._cache.move_to_end(digest)
            if len(self._cache) > self._entries_max:
                self._cache.popitem(last=False)
        if caller is None:
            raise InvalidKeyError("The API key is not valid.")
        return caller

    async def _find(self, digest: bytes) -> Caller | None:
        async with self._database.connection() as connection:
            row = await connection.fetchrow(
                "SELECT k.id, k.wallet_id, w.user_id, w.currency, k.requests_per_min, k.tokens_per_min, k.calls_in_flight,"
                " u.requests_per_min AS user_rpm, u.tokens_per_min AS user_tpm, u.calls_in_flight AS user_flight"
                " FROM api_keys k JOIN wallets w ON w.id = k.wallet_id JOIN users u ON u.id = w.user_id"
                " WHERE k.secret_hmac = $1 AND k.revoked_at IS NULL AND u.status = 'active'",
                digest,
            )
        if row is None:
            return None
        limits = Limits(
            row["requests_per_min"] or self._limits.requests_per_min,
            row["tokens_per_min"] or self._limits.tokens_per_min,
            row["calls_in_flight"] or 0,
        )
        user_limits = self._limits_of_user(row["user_rpm"], row["user_tpm"], row["user_flight"])
        return Caller(row["user_id"], row["wallet_id"], row["id"], row["currency"], limits, user_limits)

    def _limits_of_user(self, rpm: int | None, tpm: int | None, flight: int | None) -> Limits | None:
        """A user's own limits, else the settings'; None when neither says anything."""
        usual = self._limits
        found = (
            rpm or usual.user_requests_per_min,
            tpm or usual.user_tokens_per_min,
            flight or usual.user_calls_in_flight,
        )
        if not any(found):
            return None
        return Limits(found[0] or usual.requests_per_min, found[1] or usual.tokens_per_min, found[2])

    async def forget(self, key_id: str) -> None:
        """Drop a key from the cache, or all with ``*``."""
        if key_id == "*":
            self._cache.clear()
            return
        for digest, (_, caller) in list(self._cache.items()):
            if caller is not None and str(caller.key_id) == key_id:
                del self._cache[digest]
