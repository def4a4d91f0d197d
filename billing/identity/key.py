"""API keys: made once, shown once, kept as HMAC-SHA256 under a pepper, recognised by it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Literal
from uuid import UUID

from typing_extensions import TypedDict

from billing.errors import InputError
from billing.identity.caller import Network
from billing.shapes import Id, Moment
from billing.wallets.caps import check_caps

_NAME_LENGTH_MAX = 200


_RULES_MAX = 100


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose keys somebody may manage: a user's, or those of one of their wallets."""

    user_id: UUID
    wallet_id: UUID | None = None


@dataclass(frozen=True, slots=True)
class KeyRules:
    """What a key is made with. A key that is bound by anything never manages keys.

    Args:
        expires_at: with a time zone; None for never.
        models: ids, or beginnings of ids that end with ``*``; None for all.
        networks: where it may be used from; None for anywhere.
        manages: whether it may manage keys and caps; None for yes, unless it is bound.
        caps: by period, in nano units of the wallet's currency.
    """

    name: str = ""
    expires_at: datetime | None = None
    models: Sequence[str] | None = None
    networks: Sequence[Network] | None = None
    manages: bool | None = None
    requests_per_min: int | None = None
    tokens_per_min: int | None = None
    calls_in_flight: int | None = None
    caps: Mapping[str, int | None] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def bound(self) -> bool:
        """Whether the key can do less than its wallet."""
        bounds = (
            self.expires_at,
            self.models,
            self.networks,
            self.requests_per_min,
            self.tokens_per_min,
            self.calls_in_flight,
        )
        return any(bound is not None for bound in bounds) or any(
            cap is not None for cap in self.caps.values()
        )

    def check(self) -> None:
        """Refuse what no key can be made with.

        Raises:
            InputError: says which rule, and why.
        """
        if len(self.name) > _NAME_LENGTH_MAX or not self.name.isprintable():
            raise InputError(f"a key's name is at most {_NAME_LENGTH_MAX} printable characters")
        if self.expires_at is not None:
            if self.expires_at.tzinfo is None:
                raise InputError("expires_at needs a time zone, as 2027-01-31T00:00:00Z")
            if self.expires_at <= datetime.now(UTC):
                raise InputError("expires_at is in the past")
        self._check_lists()
        for label, value in (
            ("requests_per_min (rpm)", self.requests_per_min),
            ("tokens_per_min (tpm)", self.tokens_per_min),
            ("calls_in_flight (max-parallel)", self.calls_in_flight),
        ):
            if value is not None and not 0 < value < 2**40:
                raise InputError(f"{label} must be a positive number")
        check_caps(self.caps)
        if self.manages and self.bound:
            raise InputError("a key that is bound by anything cannot manage keys")

    def _check_lists(self) -> None:
        for rules, what in ((self.models, "models"), (self.networks, "networks")):
            if rules is not None and not 1 <= len(rules) <= _RULES_MAX:
                raise InputError(f"{what}: name 1 to {_RULES_MAX}, or leave it out to allow all")
        for model in self.models or ():
            if not 1 <= len(model) <= _NAME_LENGTH_MAX or not model.isprintable() or "*" in model[:-1]:
                raise InputError(
                    f"models: {model[:_NAME_LENGTH_MAX]!r} is no model's id; a * may only end it"
                )


@dataclass(frozen=True, slots=True)
class NewKey:
    """A secret just made, which exists nowhere else."""

    id: UUID
    secret: str


KeyStatus = Literal["active", "expired", "revoked"]


class KeyFields(TypedDict):
    """A key as it is shown; moments in ISO 8601, limits per minute."""

    id: Id
    wallet_id: Id
    name: str
    hint: str
    status: KeyStatus
    created_at: Moment
    rotated_at: Moment | None
    previous_secret_until: Moment | None
    expires_at: Moment | None
    revoked_at: Moment | None
    last_used_at: Moment | None
    models: list[str] | None
    networks: list[str] | None
    manages: bool
    requests_per_min: int | None
    tokens_per_min: int | None
    calls_in_flight: int | None


@dataclass(frozen=True, slots=True)
class Key:
    """A key as its owner sees it. ``hint`` are its secret's first characters; ``pepper`` names the one it is kept under."""

    id: UUID
    wallet_id: UUID
    user_id: UUID
    currency: str
    name: str
    hint: str
    pepper: str | None
    status: KeyStatus
    created_at: datetime
    rotated_at: datetime | None
    previous_until: datetime | None
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    models: list[str] | None
    networks: list[Network] | None
    manages: bool
    requests_per_min: int | None
    tokens_per_min: int | None
    calls_in_flight: int | None

    def as_json(self) -> KeyFields:
        """Return what may be shown; moments in ISO 8601."""
        return {
            "id": str(self.id),
            "wallet_id": str(self.wallet_id),
            "name": self.name,
            "hint": f"{self.hint}…",
            "status": self.status,
            "created_at": self.created_at.astimezone(UTC).isoformat(),
            "rotated_at": _iso(self.rotated_at),
            "previous_secret_until": _iso(self.previous_until),
            "expires_at": _iso(self.expires_at),
            "revoked_at": _iso(self.revoked_at),
            "last_used_at": _iso(self.last_used_at),
            "models": self.models,
            "networks": None if self.networks is None else [str(network) for network in self.networks],
            "manages": self.manages,
            "requests_per_min": self.requests_per_min,
            "tokens_per_min": self.tokens_per_min,
            "calls_in_flight": self.calls_in_flight,
        }


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.astimezone(UTC).isoformat()
