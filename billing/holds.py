"""Holds: money set aside in Redis for calls in flight. Redis only admits; Postgres is the truth.

Keys, all of one user under one shard tag so that every script stays in one cluster slot:

* ``tuma:{sNN}:w:<wallet>``: the mirror, a hash of ``available``, ``frozen`` and one ``hold:<call>`` per live call. The
  holds lie inside the mirror, so that losing one means losing both, and no hold is ever given back to a mirror that
  did not count it.
* ``tuma:{sNN}:f:<wallet>``: the token of the worker that is filling the mirror from Postgres.
* ``tuma:{sNN}:leases``: a sorted set of ``call|wallet|user|key`` by the end of its lease, unix milliseconds.
* ``tuma:{sNN}:n:<call>``: notes of a call: the provider's generation id, progress, a settlement waiting for Postgres.
* ``tuma:{sNN}:k:<key>`` and ``tuma:{sNN}:p:<key>``: a key's rate windows and its calls in flight.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from uuid import UUID

from billing.errors import (
    BrokenInvariantError,
    InsufficientFundsError,
    RateLimitError,
    RedisUnavailableError,
    WalletFrozenError,
)
from billing.money import format_amount
from billing.redis_pipe import RedisPipe, decode_map, load_script
from config.settings import HoldSettings

SHARDS = 64
_NOTES_TTL_MS = 7 * 24 * 3600 * 1000
_FILL_TRIES = 40
_FILL_PAUSE_S = 0.025


@dataclass(frozen=True, slots=True)
class Limits:
    """A key's limits; ``calls_in_flight`` 0 means none."""

    requests_per_min: int
    tokens_per_min: int
    calls_in_flight: int = 0


@dataclass(frozen=True, slots=True)
class RateState:
    """What is left of a key's windows: counts, and milliseconds until they are full again."""

    limits: Limits
    remaining_requests: int
    reset_requests_ms: int
    remaining_tokens: int
    reset_tokens_ms: int


@dataclass(frozen=True, slots=True)
class Hold:
    """Money held for one call, in nano units of the wallet's currency; ``tokens`` were taken from the key's window."""

    call_id: UUID
    user_id: UUID
    wallet_id: UUID
    key_id: UUID
    amount_nano: int
    tokens: int
    limits: Limits

    def extended_to(self, amount_nano: int) -> "Hold":
        """Return the same hold at a larger amount."""
        return replace(self, amount_nano=amount_nano)


@dataclass(frozen=True, slots=True)
class WalletSnapshot:
    """A wallet as one Postgres snapshot shows it, with the holds of its live calls; nano units."""

    available_nano: int
    frozen: bool
    holds: Mapping[UUID, int]


@dataclass(frozen=True, slots=True)
class ExpiredLease:
    """A hold whose worker gave no sign of life in time."""

    call_id: UUID
    wallet_id: UUID
    user_id: UUID
    key_id: UUID


ReadWallet = Callable[[UUID], Awaitable[WalletSnapshot]]


def shard_of(user_id: UUID) -> int:
    """Return the shard of a user, stable for ever (the id's last bits are random)."""
    return user_id.int % SHARDS


class Holds:
    """Reserve, extend, renew and release.

    Args:
        pipe: the way to Redis.
        settings: leases and mirrors.
        read_wallet: reads the truth of one wallet, for a cold mirror.
    """

    def __init__(self, pipe: RedisPipe, settings: HoldSettings, read_wallet: ReadWallet) -> None:
        self._pipe = pipe
        self._read_wallet = read_wallet
        self._lease_ms = int(settings.lease_s * 1000)
        self._mirror_ttl_ms = int(settings.mirror_ttl_s * 1000)
        self._reserve = load_script("reserve")
        self._extend = load_script("extend")
        self._renew = load_script("renew")
        self._release = load_script("release")
        self._fill = load_script("fill")

    async def reserve(self, hold: Hold) -> RateState:
        """Set ``hold.amount_nano`` aside, or refuse. Idempotent by call id.

        Returns:
            what is left of the key's rate windows.

        Raises:
            InsufficientFundsError: available is less than the amount.
            WalletFrozenError: the wallet is frozen.
            RateLimitError: a window of the key is full.
            RedisUnavailableError: Redis is away; a hold that it made all the same expires with its lease.
            PostgresUnavailableError: the mirror is cold and Postgres is away.
        """
        prefix = _prefix(hold.user_id)
        keys = (
            *_wallet_keys(prefix, hold.wallet_id),
            f"{prefix}leases",
            f"{prefix}k:{hold.key_id}",
            f"{prefix}p:{hold.key_id}",
        )
        limits = hold.limits
        args = (
            str(hold.call_id),
            _member(hold),
            str(hold.amount_nano),
            str(-hold.amount_nano),
            self._lease_ms,
            limits.requests_per_min,
            limits.tokens_per_min,
            limits.calls_in_flight,
            hold.tokens,
        )
        for _ in range(_FILL_TRIES):
            reply = await self._pipe.call(self._reserve, keys, args)
            verdict = reply[0].decode()
            if verdict != "cold":
                return self._judge(verdict, reply, hold)
            if reply[1]:
                await self._fill_mirror(hold.user_id, hold.wallet_id, token=str(hold.call_id))
            else:
                await asyncio.sleep(_FILL_PAUSE_S)
        raise RedisUnavailableError("the wallet's mirror could not be filled")

    @staticmethod
    def _judge(verdict: str, reply: list[int], hold: Hold) -> RateState:
        match verdict:
            case "granted":
                return RateState(hold.limits, reply[2], reply[3], reply[4], reply[5])
            case "insufficient_funds":
                raise InsufficientFundsError(
                    f"The wallet does not cover this call: {format_amount(hold.amount_nano)} would have to be set aside."
                    " Top up, or ask for fewer tokens (max_tokens)."
                )
            case "wallet_frozen":
                raise WalletFrozenError("The wallet is frozen.")
            case "requests" | "tokens" | "calls_in_flight":
                what = {
                    "requests": f"{hold.limits.requests_per_min} requests per minute",
                    "tokens": f"{hold.limits.tokens_per_min} tokens per minute",
                    "calls_in_flight": f"{hold.limits.calls_in_flight} calls at a time",
                }[verdict]
                raise RateLimitError(f"This key is limited to {what}.", retry_after_ms=max(reply[1], 1))
            case _:
                raise BrokenInvariantError(f"reserve.lua answered {verdict!r}")

    async def _fill_mirror(self, user_id: UUID, wallet_id: UUID, *, token: str) -> None:
        snapshot = await self._read_wallet(wallet_id)
        args: list[str | int] = [
            token,
            str(snapshot.available_nano),
            int(snapshot.frozen),
            self._mirror_ttl_ms,
        ]
        for call_id, amount_nano in snapshot.holds.items():
            args += [str(call_id), str(amount_nano)]
        await self._pipe.call(self._fill, _wallet_keys(_prefix(user_id), wallet_id), args)

    async def extend(self, hold: Hold, amount_nano: int) -> bool:
        """Enlarge a hold to ``amount_nano``; False when the wallet cannot bear it.

        Raises:
            RedisUnavailableError: Redis is away; whether it was extended is unknown.
        """
        more = amount_nano - hold.amount_nano
        mirror, _ = _wallet_keys(_prefix(hold.user_id), hold.wallet_id)
        for _ in range(_FILL_TRIES):
            reply = await self._pipe.call(self._extend, (mirror,), (str(hold.call_id), str(more), str(-more)))
            match reply.decode():
                case "extended":
                    return True
                case "insufficient_funds" | "wallet_frozen":
                    return False
                case (
                    "missing"
                ):  # a flush, or the mirror's own end of life: rebuild it, and put this hold back
                    await self._warm(hold)
                case verdict:
                    raise BrokenInvariantError(f"extend.lua answered {verdict!r}")
        raise RedisUnavailableError("the wallet's mirror could not be filled")

    async def _warm(self, hold: Hold) -> None:
        if await self.renew(hold) != "cold":
            return
        token_key = _wallet_keys(_prefix(hold.user_id), hold.wallet_id)[1]
        if await self._pipe.run("SET", token_key, str(hold.call_id), "NX", "PX", 5000):
            await self._fill_mirror(hold.user_id, hold.wallet_id, token=str(hold.call_id))
        else:
            await asyncio.sleep(_FILL_PAUSE_S)

    async def renew(self, hold: Hold, notes: Mapping[str, str] | None = None) -> str:
        """Renew a hold's lease and note what is known of its answer; put it back if a flush took it.

        Returns:
            ``renewed``, ``restored`` or ``cold``.

        Raises:
            RedisUnavailableError: Redis is away.
        """
        prefix = _prefix(hold.user_id)
        args: list[str | int] = [
            str(hold.call_id),
            _member(hold),
            str(hold.amount_nano),
            str(-hold.amount_nano),
            self._lease_ms,
            _NOTES_TTL_MS,
            hold.limits.calls_in_flight,
        ]
        for name, value in (notes or {}).items():
            args += [name, value]
        keys = (
            *_wallet_keys(prefix, hold.wallet_id),
            f"{prefix}leases",
            f"{prefix}n:{hold.call_id}",
            f"{prefix}p:{hold.key_id}",
        )
        reply: bytes = await self._pipe.call(self._renew, keys, args)
        return reply.decode()

    async def release(self, hold: Hold, *, charge_nano: int | None, tokens_used: int = 0) -> str:
        """Drop a hold after its settlement was committed.

        Args:
            hold: as it was reserved or extended.
            charge_nano: what the settlement took; None when somebody else settled the call, or when what became of it
                is unknown: then the mirror is dropped and rebuilt from Postgres.
            tokens_used: given back to the key's window is what was reserved beyond this.

        Returns:
            ``released`` or ``cold``.

        Raises:
            RedisUnavailableError: Redis is away; the hold expires with its lease.
        """
        prefix = _prefix(hold.user_id)
        keys = (
            *_wallet_keys(prefix, hold.wallet_id),
            f"{prefix}leases",
            f"{prefix}n:{hold.call_id}",
            f"{prefix}p:{hold.key_id}",
            f"{prefix}k:{hold.key_id}",
        )
        args = (
            str(hold.call_id),
            _member(hold),
            "" if charge_nano is None else str(-charge_nano),
            hold.limits.tokens_per_min,
            hold.tokens - tokens_used if charge_nano is not None else 0,
        )
        reply: bytes = await self._pipe.call(self._release, keys, args)
        return reply.decode()

    async def forget(self, lease: ExpiredLease) -> None:
        """Drop an expired hold and its wallet's mirror; the mirror is rebuilt from Postgres when next needed."""
        hold = Hold(lease.call_id, lease.user_id, lease.wallet_id, lease.key_id, 0, 0, Limits(1, 1))
        await self.release(hold, charge_nano=None)

    async def cool(self, user_id: UUID, wallet_id: UUID) -> None:
        """Drop a wallet's mirror, because Postgres changed otherwise than through a settlement (credit, freeze, …)."""
        await self._pipe.run("DEL", *_wallet_keys(_prefix(user_id), wallet_id))

    async def find_notes(self, user_id: UUID, call_id: UUID) -> dict[str, str]:
        """Return what was noted of a call; empty when nothing was, or when Redis lost it."""
        return decode_map(await self._pipe.run("HGETALL", f"{_prefix(user_id)}n:{call_id}"))

    async def find_available(self, user_id: UUID, wallet_id: UUID) -> int | None:
        """Return the mirror's available amount in nano units, None when the mirror is cold."""
        value = await self._pipe.run("HGET", _wallet_keys(_prefix(user_id), wallet_id)[0], "available")
        return None if value is None else int(value)

    async def list_holds(self, user_id: UUID, wallet_id: UUID) -> dict[UUID, int]:
        """Return the holds that a wallet's mirror counts, in nano units."""
        fields = decode_map(await self._pipe.run("HGETALL", _wallet_keys(_prefix(user_id), wallet_id)[0]))
        return {UUID(name[5:]): int(value) for name, value in fields.items() if name.startswith("hold:")}

    async def find_leases(self, *, expired: bool, limit: int) -> list[ExpiredLease]:
        """Return holds by lease over all shards, at most ``limit`` per shard: the expired ones, or all."""
        seconds, micros = await self._pipe.run("TIME")
        now_ms = int(seconds) * 1000 + int(micros) // 1000
        top = str(now_ms) if expired else "+inf"
        replies = await asyncio.gather(
            *(
                self._pipe.run(
                    "ZRANGEBYSCORE", f"tuma:{{s{shard:02d}}}:leases", "-inf", top, "LIMIT", "0", str(limit)
                )
                for shard in range(SHARDS)
            )
        )
        found = []
        for members in replies:
            for member in members:
                call_id, wallet_id, user_id, key_id = member.decode().split("|")
                found.append(ExpiredLease(UUID(call_id), UUID(wallet_id), UUID(user_id), UUID(key_id)))
        return found

    async def has_live_lease(self, hold: ExpiredLease) -> bool:
        """Tell whether a worker has renewed this hold's lease in time."""
        score = await self._pipe.run("ZSCORE", f"{_prefix(hold.user_id)}leases", _member(hold))
        if score is None:
            return False
        seconds, micros = await self._pipe.run("TIME")
        return int(float(score)) > int(seconds) * 1000 + int(micros) // 1000


def _prefix(user_id: UUID) -> str:
    return f"tuma:{{s{shard_of(user_id):02d}}}:"


def _wallet_keys(prefix: str, wallet_id: UUID) -> tuple[str, str]:
    return f"{prefix}w:{wallet_id}", f"{prefix}f:{wallet_id}"


def _member(hold: Hold | ExpiredLease) -> str:
    return f"{hold.call_id}|{hold.wallet_id}|{hold.user_id}|{hold.key_id}"
