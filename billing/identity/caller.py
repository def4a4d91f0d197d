"""Who calls, and the cache that remembers for less than a second what Postgres said of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any
from uuid import UUID

from billing.errors import AddressNotAllowedError, ModelNotAllowedError
from billing.holds.hold import Place, limiters_of
from billing.limits import Limits
from config.settings import LimitSettings

Address = IPv4Address | IPv6Address


Network = IPv4Network | IPv6Network


_NAME_LENGTH_MAX = 200


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and which wallet pays; what bounds them, where anything does.

    Args:
        good_until_s: when what they came with ends, by the monotonic clock.
    """

    user_id: UUID
    wallet_id: UUID
    key_id: UUID | None
    currency: str
    limits: Limits
    user_limits: Limits | None = None
    models: tuple[str, ...] | None = None
    networks: tuple[Network, ...] | None = None
    manages: bool = False
    good_until_s: float = math.inf
    place: Place = field(init=False, repr=False, compare=False)  # of its holds

    def __post_init__(self) -> None:
        limiters = limiters_of(self.user_id, self.key_id, self.limits, self.user_limits)
        place = Place(self.user_id, self.wallet_id, self.key_id, limiters)
        object.__setattr__(self, "place", place)  # it is frozen

    def allows_model(self, model: str) -> bool:
        """Tell whether this caller may call a model."""
        return self.models is None or any(
            model.startswith(rule[:-1]) if rule.endswith("*") else model == rule for rule in self.models
        )

    def require_models(self, models: Sequence[str]) -> None:
        """Refuse models that the key does not allow.

        Raises:
            ModelNotAllowedError: one of them is not among the key's.
        """
        for model in models:
            if not self.allows_model(model):
                raise ModelNotAllowedError(f"This key may not call {model[:_NAME_LENGTH_MAX]!r}.")

    def require_address(self, address: Address | None) -> None:
        """Refuse a client that calls from elsewhere than the key allows.

        Raises:
            AddressNotAllowedError: it does, or where from is unknown.
        """
        if self.networks is not None and (
            address is None or not any(address in network for network in self.networks)
        ):
            raise AddressNotAllowedError(f"This key may not be used from {address or 'an unknown address'}.")


@dataclass(frozen=True, slots=True)
class FoundCaller:
    """A caller as Postgres knows them now, and for how many seconds what they came with is good; None: no end is known."""

    caller: Caller
    valid_s: float | None = None


def limits_of_user(row: Mapping[str, Any], usual: LimitSettings) -> Limits | None:
    """Return a user's own limits, else the settings'; None when neither says anything.

    Args:
        row: with ``user_requests_per_min``, ``user_tokens_per_min`` and ``user_calls_in_flight``.
        usual: for users without limits of their own.
    """
    found = (
        row["user_requests_per_min"] or usual.user_requests_per_min,
        row["user_tokens_per_min"] or usual.user_tokens_per_min,
        row["user_calls_in_flight"] or usual.user_calls_in_flight,
    )
    if not any(found):
        return None
    return Limits(found[0] or usual.requests_per_min, found[1] or usual.tokens_per_min, found[2])
