"""Holds: money set aside in Redis for calls in flight. Redis only admits; Postgres is the truth.

Keys, all of one user under one shard tag so that every script stays in one cluster slot:

* ``tuma:{sNN}:u:<user>``: the mirror, a hash that is filled from Postgres as one snapshot:

  - ``available:<wallet>`` and, of a frozen one, ``frozen:<wallet>``;
  - ``hold:<call>`` for each live call, and where there are caps ``usd:<call>``, the same in nano-dollars. The holds lie
    inside the mirror, so that losing one means losing both, and no hold is ever given back to a mirror that did not
    count it;
  - where there are caps ``capped``, and for each wallet, key or user that has some ``caps:<scope>``: words
    ``period:start:end:limit`` (unix milliseconds, nano units); ``left:<scope>:<period>`` is what a window has left;
  - ``lineage``: of the server that it was filled on (lua/lineage.lua). On another one it is cold.

* ``tuma:{sNN}:f:<user>``: the token of the worker that is filling the mirror from Postgres.
* ``tuma:{sNN}:leases``: a sorted set of ``call|wallet|user|key`` by the end of its lease, unix milliseconds.
* ``tuma:{sNN}:n:<call>``: notes of a call: the provider's generation id, progress, a settlement waiting for Postgres.
* ``tuma:{sNN}:k:<id>`` and ``tuma:{sNN}:p:<id>``: the rate windows and the calls in flight of a key or a user.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from billing.errors import (
    BrokenInvariantError,
    CapExceededError,
    InsufficientFundsError,
    RateLimitError,
    RedisUnavailableError,
    WalletFrozenError,
)
from billing.holds.admission import Room, is_warm, judge, room_of, window_of
from billing.holds.hold import SHARDS, ExpiredLease, Hold, _member, _mirror_keys, _prefix
from billing.ids import minted_at
from billing.limits import Limits, RateState
from billing.meters import Meters
from billing.money import format_amount
from billing.redis.client import RedisWay
from billing.redis.pipeline import decode_map, load_script
from config.settings import HoldSettings

_NOTES_TTL_MS = 7 * 24 * 3600 * 1000
_AMOUNT_MAX = 2**62  # nano units; no wallet has as much, and Redis and Postgres count in 64 bits
_FILL_TRIES = 40
_PER = {"day": "per day", "week": "per week", "month": "per month", "total": "in total"}
_FILL_PAUSE_S = 0.025


# The fields of a user's mirror as one snapshot of Postgres shows them, with the cap windows of a moment.
ReadMirror = Callable[[UUID, datetime], Awaitable[Mapping[str, str]]]


class Holds:
    """Reserve, extend, renew and release.

    Args:
        pipe: the way to Redis.
        settings: leases and mirrors.
        read_mirror: reads the truth of one user, for a cold mirror.
        meters: where rebuilt mirrors are counted.
    """

    def __init__(
        self,
        pipe: RedisWay,
        settings: HoldSettings,
        read_mirror: ReadMirror,
        meters: Meters | None = None,
    ) -> None:
        self._meters = meters or Meters()
        self._pipe = pipe
        self._read_mirror = read_mirror
        self._lease_ms = int(settings.lease_s * 1000)
        self._mirror_ttl_ms = int(settings.mirror_ttl_s * 1000)
        self._reserve = load_script("billing.holds", "reserve", "lineage", "caps")
        self._extend = load_script("billing.holds", "extend", "lineage", "caps")
        self._renew = load_script("billing.holds", "renew", "caps")
        self._release = load_script("billing.holds", "release", "caps")
        self._fill = load_script("billing.holds", "fill", "lineage")
        self._look = load_script("billing.holds", "look", "lineage")
        self._claim = load_script("billing.holds", "claim", "lineage")
        self._claim_cold = load_script("billing.holds", "claim_cold", "lineage", "caps")
        self._leases = load_script("billing.holds", "leases")
        self._alive = load_script("billing.holds", "alive")

    async def reserve(self, hold: Hold) -> RateState:
        """Set ``hold.amount_nano`` aside, or refuse. Idempotent by call id.

        Returns:
            what is left of the caller's rate windows.

        Raises:
            InsufficientFundsError: available is less than the amount.
            CapExceededError: a cap of the wallet, the key or the user has less left than the amount.
            WalletFrozenError: the wallet is frozen.
            RateLimitError: a window of the key or the user is full.
            RedisUnavailableError: Redis is away; a hold that it made all the same expires with its lease.
            PostgresUnavailableError: the mirror is cold and Postgres is away.
        """
        if max(hold.amount_nano, hold.amount_nanousd) > _AMOUNT_MAX:
            raise _not_covered(hold)
        place, call = hold.find_place(), str(hold.call_id)
        keys = (place.mirror, place.fill, place.leases, *place.windows)
        args: tuple[str | int, ...] = (
            call,
            call + place.tail,
            hold.amount_nano,
            -hold.amount_nano,
            self._lease_ms,
            place.wallet,
            hold.amount_nanousd,
            -hold.amount_nanousd,
            place.key,
            place.user,
            hold.arrived_ms,
            hold.tokens,
            *place.reserve_limits,
        )
        for _ in range(_FILL_TRIES):
            reply = await self._pipe.call(self._reserve, keys, args)
            verdict = reply[0].decode()
            if verdict != "cold":
                return self._judge(verdict, reply, hold)
            if reply[1]:
                await self._fill_mirror(hold)
            else:
                await asyncio.sleep(_FILL_PAUSE_S)
        raise RedisUnavailableError("the wallet's mirror could not be filled")

    async def look(self, hold: Hold) -> RateState:
        """Return or raise what ``reserve`` would just now, but hold, write and count nothing.

        Where the mirror is cold, what Postgres would fill it with decides.

        Raises:
            InsufficientFundsError, CapExceededError, WalletFrozenError, RateLimitError: as ``reserve``.
            RedisUnavailableError, PostgresUnavailableError: nobody can tell.
        """
        now_us, mirror, windows = await self._read(hold)
        if not is_warm(mirror, hold):
            mirror = await self._read_mirror(hold.user_id, minted_at(hold.call_id))
        return self._judge_by(mirror, windows, hold, now_us=now_us)

    async def check(self, hold: Hold) -> Room:
        """Raise what ``reserve`` would just now, as surely as it: a cold mirror is filled first, and nothing is held.

        Returns:
            what there would have been room for.

        ``look`` judges by what Postgres said a moment ago; money that came, or a call that ended, meanwhile is not in that.

        Raises:
            InsufficientFundsError, CapExceededError, WalletFrozenError, RateLimitError: as ``reserve``.
            RedisUnavailableError, PostgresUnavailableError: nobody can tell.
        """
        keys, place = _mirror_keys(hold.user_id), hold.find_place()
        args = (str(hold.call_id), place.wallet, place.key, place.user, hold.arrived_ms)
        for _ in range(_FILL_TRIES):
            now_us, mirror, windows = await self._read(hold)
            if is_warm(mirror, hold):
                self._judge_by(mirror, windows, hold, now_us=now_us)
                return room_of(mirror, [window_of(window) for window in windows], hold, now_us=now_us)
            if await self._pipe.call(self._claim_cold, keys, args):
                await self._fill_mirror(hold)
            else:
                await asyncio.sleep(_FILL_PAUSE_S)
        raise RedisUnavailableError("the wallet's mirror could not be filled")

    async def left(self, hold: Hold) -> Room:
        """Return what there is room for just now; a cold mirror is read from Postgres. The hold's amounts do not count.

        Raises:
            RedisUnavailableError, PostgresUnavailableError: nobody can tell.
        """
        now_us, mirror, windows = await self._read(hold)
        if not is_warm(mirror, hold):
            mirror = await self._read_mirror(hold.user_id, minted_at(hold.call_id))
        return room_of(mirror, [window_of(window) for window in windows], hold, now_us=now_us)

    async def _read(self, hold: Hold) -> tuple[int, Mapping[str, str], list[Any]]:
        """Return Redis's time in microseconds, the mirror as it is, and the windows of the limiters."""
        place = hold.find_place()
        now_us, fields, *windows = await self._pipe.call(self._look, (place.mirror, *place.windows), ())
        return now_us, decode_map(fields), windows

    def _judge_by(
        self, mirror: Mapping[str, str], windows: list[Any], hold: Hold, *, now_us: int
    ) -> RateState:
        reply = judge(mirror, [window_of(window) for window in windows], hold, now_us=now_us)
        return self._judge(reply[0], reply, hold)

    @staticmethod
    def _judge(verdict: str, reply: list[Any], hold: Hold) -> RateState:
        match verdict:
            case "granted":
                return _rate_state(reply, hold)
            case "insufficient_funds":
                raise _not_covered(hold)
            case "cap_exceeded":
                scope, period, ends, limit, left = (part.decode() for part in reply[8:13])
                raise CapExceededError(
                    _describe_cap(hold, scope, period, ends_ms=int(ends), limit=int(limit), left=int(left))
                )
            case "wallet_frozen":
                raise WalletFrozenError("The wallet is frozen.")
            case "requests" | "tokens" | "calls_in_flight":
                owner, limits = hold.limiters[reply[8] - 1]
                who = "key" if owner == hold.key_id else "user"
                what = {
                    "requests": f"{limits.requests_per_min} requests per minute",
                    "tokens": f"{limits.tokens_per_min} tokens per minute",
                    "calls_in_flight": f"{limits.calls_in_flight} calls at a time",
                }[verdict]
                too_large = verdict == "tokens" and hold.tokens > limits.tokens_per_min
                raise RateLimitError(
                    f"This {who} is limited to {what}"
                    + (f"; this call alone may take {hold.tokens}." if too_large else "."),
                    retry_after_ms=max(reply[1], 1),
                    state=_rate_state(reply, hold),
                    hopeless=too_large,
                )
            case _:
                raise BrokenInvariantError(f"reserve.lua answered {verdict!r}")

    async def _fill_mirror(self, hold: Hold) -> None:
        fields = await self._read_mirror(hold.user_id, minted_at(hold.call_id))
        args: list[str | int] = [str(hold.call_id), self._mirror_ttl_ms]
        for name, value in fields.items():
            args += [name, value]
        await self._pipe.call(self._fill, _mirror_keys(hold.user_id), args)
        self._meters.rebuilds.add(1)

    async def extend(self, hold: Hold, amount_nano: int, amount_nanousd: int = 0) -> bool:
        """Enlarge a hold to these amounts; False when the wallet or a cap cannot bear it.

        Raises:
            RedisUnavailableError: Redis is away; whether it was extended is unknown.
        """
        more = amount_nano - hold.amount_nano
        more_usd = max(amount_nanousd - hold.amount_nanousd, 0)
        place = hold.find_place()
        args = (
            str(hold.call_id),
            more,
            -more,
            place.wallet,
            more_usd,
            -more_usd,
            place.key,
            place.user,
            hold.arrived_ms,
        )
        for _ in range(_FILL_TRIES):
            reply = await self._pipe.call(self._extend, (place.mirror,), args)
            match reply.decode():
                case "extended":
                    return True
                case "insufficient_funds" | "cap_exceeded" | "wallet_frozen":
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
        token_key = _mirror_keys(hold.user_id)[1]
        if await self._pipe.call(self._claim, (token_key,), (str(hold.call_id),)):
            await self._fill_mirror(hold)
        else:
            await asyncio.sleep(_FILL_PAUSE_S)

    async def renew(self, hold: Hold, notes: Mapping[str, str] | None = None) -> str:
        """Renew a hold's lease and note what is known of its answer; put it back if a flush took it.

        Returns:
            ``renewed``, ``restored`` or ``cold``.

        Raises:
            RedisUnavailableError: Redis is away.
        """
        reply: bytes = await self.begin_renew(hold, notes)
        return reply.decode()

    def begin_renew(self, hold: Hold, notes: Mapping[str, str] | None = None) -> Awaitable[bytes]:
        """Send what ``renew`` sends; who awaits the result has what it raises, and its reply."""
        place, call = hold.find_place(), str(hold.call_id)
        keys = (place.mirror, place.fill, place.leases, place.notes + call, *place.flights)
        args: list[str | int] = [
            call,
            call + place.tail,
            hold.amount_nano,
            -hold.amount_nano,
            self._lease_ms,
            _NOTES_TTL_MS,
            place.wallet,
            hold.amount_nanousd,
            -hold.amount_nanousd,
            place.key,
            place.user,
            hold.arrived_ms,
            *place.renew_limits,
        ]
        for name, value in (notes or {}).items():
            args += (name, value)
        return self._pipe.call(self._renew, keys, args)

    async def release(
        self, hold: Hold, *, charge_nano: int | None, charge_nanousd: int = 0, tokens_used: int = 0
    ) -> str:
        """Drop a hold after its settlement was committed.

        Args:
            hold: as it was reserved or extended.
            charge_nano: what the settlement took; None when somebody else settled the call, or when what became of it
                is unknown: then the mirror is dropped and rebuilt from Postgres.
            charge_nanousd: what the wallet paid of the cost, in nano-dollars.
            tokens_used: given back to the windows is what was reserved beyond this.

        Returns:
            ``released`` or ``cold``.

        Raises:
            RedisUnavailableError: Redis is away; the hold expires with its lease.
        """
        place, call = hold.find_place(), str(hold.call_id)
        keys = (place.mirror, place.fill, place.leases, place.notes + call, *place.windows)
        args = (
            call,
            call + place.tail,
            "" if charge_nano is None else -charge_nano,
            place.wallet,
            -charge_nanousd,
            place.key,
            place.user,
            hold.arrived_ms,
            hold.tokens - tokens_used if charge_nano is not None else 0,
            *place.token_limits,
        )
        reply: bytes = await self._pipe.call(self._release, keys, args)
        return reply.decode()

    async def forget(self, lease: ExpiredLease) -> None:
        """Drop an expired hold and its user's mirror; the mirror is rebuilt from Postgres when next needed."""
        none = Limits(1, 1)
        hold = Hold(lease.call_id, lease.user_id, lease.wallet_id, lease.key_id, 0, 0, none, user_limits=none)
        await self.release(hold, charge_nano=None)

    async def cool(self, user_id: UUID) -> None:
        """Drop a user's mirror, because Postgres changed otherwise than through a settlement (credit, freeze, cap, …)."""
        await self._pipe.run("DEL", *_mirror_keys(user_id))

    async def find_notes(self, user_id: UUID, call_id: UUID) -> dict[str, str]:
        """Return what was noted of a call; empty when nothing was, or when Redis lost it."""
        return decode_map(await self._pipe.run("HGETALL", f"{_prefix(user_id)}n:{call_id}"))

    async def find_available(self, user_id: UUID, wallet_id: UUID) -> int | None:
        """Return the mirror's available amount in nano units, None when the mirror is cold."""
        value = (await self.read_mirror(user_id)).get(f"available:{wallet_id}")
        return None if value is None else int(value)

    async def list_holds(self, user_id: UUID) -> dict[UUID, int]:
        """Return the holds that a user's mirror counts, in nano units of their wallets."""
        fields = await self.read_mirror(user_id)
        return {UUID(name[5:]): int(value) for name, value in fields.items() if name.startswith("hold:")}

    async def read_mirror(self, user_id: UUID) -> dict[str, str]:
        """Return the fields of a user's mirror; empty when it is cold."""
        _, fields = await self._pipe.call(self._look, _mirror_keys(user_id)[:1], ())
        mirror = decode_map(fields)
        mirror.pop("lineage", None)
        return mirror

    async def find_leases(self, *, expired: bool, limit: int) -> list[ExpiredLease]:
        """Return holds by lease over all shards, at most ``limit`` per shard: the expired ones, or all.

        Raises:
            RedisUnavailableError: a shard is away.
        """
        found = await asyncio.gather(
            *(self.find_leases_of(shard, expired=expired, limit=limit) for shard in range(SHARDS))
        )
        return [lease for leases in found for lease in leases]

    async def find_leases_of(self, shard: int, *, expired: bool, limit: int) -> list[ExpiredLease]:
        """Return holds of one shard by lease, as ``find_leases``.

        Raises:
            RedisUnavailableError: the shard is away.
        """
        key = f"tuma:{{s{shard:02d}}}:leases"
        found = []
        for member in await self._pipe.call(self._leases, (key,), (limit, int(expired))):
            call_id, wallet_id, user_id, key_id = member.decode().split("|")
            found.append(
                ExpiredLease(UUID(call_id), UUID(wallet_id), UUID(user_id), UUID(key_id) if key_id else None)
            )
        return found

    async def has_live_lease(self, hold: ExpiredLease) -> bool:
        """Tell whether a worker has renewed this hold's lease in time."""
        return bool(await self._pipe.call(self._alive, (f"{_prefix(hold.user_id)}leases",), (_member(hold),)))


def _rate_state(reply: list[Any], hold: Hold) -> RateState:
    limiters = hold.limiters
    by_requests, by_tokens = limiters[reply[2] - 1][1], limiters[reply[5] - 1][1]
    limits = Limits(by_requests.requests_per_min, by_tokens.tokens_per_min, by_requests.calls_in_flight)
    return RateState(limits, reply[3], reply[4], reply[6], reply[7])


def _describe_cap(hold: Hold, scope: str, period: str, *, ends_ms: int, limit: int, left: int) -> str:
    owner = {str(hold.wallet_id): "wallet", str(hold.user_id): "user"}.get(scope, "key")
    usd = owner == "user"
    amount = hold.amount_nanousd if usd else hold.amount_nano
    unit = "USD" if usd else hold.currency
    text = f"This call would have to set {format_amount(amount)} {unit} aside; the {owner}'s cap is {format_amount(limit)} {unit}"
    if period == "call":
        return f"{text} per call. Ask for fewer tokens (max_tokens)."
    text += f" {_PER[period]}, and {format_amount(left)} of it is left"
    if period == "total":
        return f"{text}."
    return f"{text} until {datetime.fromtimestamp(ends_ms / 1000, UTC):%Y-%m-%dT%H:%M:%SZ}."


def _not_covered(hold: Hold) -> InsufficientFundsError:
    return InsufficientFundsError(
        f"The wallet does not cover this call: {format_amount(hold.amount_nano)} {hold.currency} would have to be set"
        " aside. Top up, or ask for fewer tokens (max_tokens)."
    )
