"""Holds: money set aside in Redis for calls in flight. Redis only admits; Postgres is the truth."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from uuid import UUID

from billing.limits import Limits

SHARDS = 64


class Place:
    """Where the holds of one caller lie, in the words of the scripts; made once per caller, as every call needs them all.

    Args:
        user_id, wallet_id, key_id: whose.
        limiters: whose windows the calls count in, and their limits.
    """

    __slots__ = (
        "fill",
        "flights",
        "key",
        "leases",
        "mirror",
        "notes",
        "renew_limits",
        "reserve_limits",
        "tail",
        "token_limits",
        "user",
        "wallet",
        "windows",
    )

    def __init__(
        self, user_id: UUID, wallet_id: UUID, key_id: UUID | None, limiters: Sequence[tuple[UUID, Limits]]
    ) -> None:
        prefix = _prefix(user_id)
        self.mirror, self.fill = _mirror_keys(user_id)
        self.leases = f"{prefix}leases"
        self.notes = f"{prefix}n:"
        self.user, self.wallet = str(user_id), str(wallet_id)
        self.key = "" if key_id is None else str(key_id)
        self.tail = f"|{self.wallet}|{self.user}|{self.key}"
        self.windows: list[str] = []
        self.flights: list[str] = []
        self.reserve_limits: list[int] = []
        self.renew_limits = [len(limiters)]
        self.token_limits: list[int] = []
        for owner, limits in limiters:
            flight = f"{prefix}p:{owner}"
            self.windows += (f"{prefix}k:{owner}", flight)
            self.flights.append(flight)
            self.reserve_limits += (limits.requests_per_min, limits.tokens_per_min, limits.calls_in_flight)
            self.renew_limits.append(limits.calls_in_flight)
            self.token_limits.append(limits.tokens_per_min)


def limiters_of(
    user_id: UUID, key_id: UUID | None, limits: Limits, user_limits: Limits | None
) -> list[tuple[UUID, Limits]]:
    """Return whose windows a call counts in, the key's first.

    Args:
        user_id: who calls.
        key_id: with which key, if any.
        limits: the key's; the user's, for a caller without a key.
        user_limits: of the user, beside those of the key; None for none.
    """
    if key_id is None:
        return [(user_id, user_limits or limits)]
    if user_limits is None:
        return [(key_id, limits)]
    return [(key_id, limits), (user_id, user_limits)]


@dataclass(frozen=True, slots=True)
class Hold:
    """Money held for one call; ``tokens`` were taken from the windows of its key and its user.

    Args:
        key_id: None for a caller who came without a key.
        amount_nano: in nano units of the wallet's currency.
        limits: the key's; the user's, for a caller without a key.
        amount_nanousd: the same amount in nano-dollars, for caps on the user.
        user_limits: of the user, beside those of the key; None for none.
        currency: the wallet's, for what is said of a refusal.
        place: the caller's, if it is at hand.
    """

    call_id: UUID
    user_id: UUID
    wallet_id: UUID
    key_id: UUID | None
    amount_nano: int
    tokens: int
    limits: Limits
    amount_nanousd: int = 0
    user_limits: Limits | None = None
    currency: str = ""
    place: Place | None = field(default=None, compare=False, repr=False)

    def extended_to(self, amount_nano: int, amount_nanousd: int = 0) -> "Hold":
        """Return the same hold at larger amounts."""
        return replace(self, amount_nano=amount_nano, amount_nanousd=max(amount_nanousd, self.amount_nanousd))

    @property
    def limiters(self) -> list[tuple[UUID, Limits]]:
        """Whose windows the call counts in, the key's first."""
        return limiters_of(self.user_id, self.key_id, self.limits, self.user_limits)

    def find_place(self) -> Place:
        """Return where it lies."""
        return self.place or Place(self.user_id, self.wallet_id, self.key_id, self.limiters)

    @property
    def arrived_ms(self) -> int:
        """When the call arrived, by its id; unix milliseconds."""
        return self.call_id.int >> 80


@dataclass(frozen=True, slots=True)
class ExpiredLease:
    """A hold whose worker gave no sign of life in time."""

    call_id: UUID
    wallet_id: UUID
    user_id: UUID
    key_id: UUID | None


def shard_of(user_id: UUID) -> int:
    """Return the shard of a user, stable for ever (the id's last bits are random)."""
    return user_id.int % SHARDS


def _prefix(user_id: UUID) -> str:
    return f"tuma:{{s{shard_of(user_id):02d}}}:"


def _mirror_keys(user_id: UUID) -> tuple[str, str]:
    prefix = _prefix(user_id)
    return f"{prefix}u:{user_id}", f"{prefix}f:{user_id}"


def _member(hold: Hold | ExpiredLease) -> str:
    return f"{hold.call_id}|{hold.wallet_id}|{hold.user_id}|{hold.key_id or ''}"
