"""What billing asks of a provider about its own records. Implemented by the proxy's upstream adapters."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Literal, Protocol

from billing.errors import ProviderUnavailableError
from billing.pricing.cost import Usage
from billing.provider.refusals import Standing, Subject

Source = Literal["key", "credits"]  # of this API key; of the whole account


@dataclass(frozen=True, slots=True)
class Bill:
    """The provider's own record of one answer.

    Args:
        cost_usd: what the answer cost in all.
        own_key_usd: the part of it that is billed to a key of our own at another provider, and not to our account here.
    """

    generation_id: str
    cost_usd: Decimal
    usage: Usage
    own_key_usd: Decimal = Decimal(0)


@dataclass(frozen=True, slots=True)
class Activity:
    """What the provider says it billed for one model on one UTC day."""

    day: date
    model: str
    cost_usd: Decimal


class Provider(Protocol):
    """A provider's records."""

    @property
    def keeps_bills(self) -> bool:
        """Whether this provider can be asked what one answer cost."""

    async def find_standing(self, subject: Subject) -> Standing:
        """Return how our key or our money stands by the provider's own record; ``unknown`` where it does not say.

        Raises:
            ProviderUnavailableError: it cannot be asked now.
        """

    async def find_bill(self, generation_id: str) -> Bill | None:
        """Return the provider's record; None when it does not know the id (yet).

        Raises:
            ProviderUnavailableError: it cannot be asked now.
        """

    async def find_totals_usd(self) -> Mapping[Source, Decimal | ProviderUnavailableError]:
        """Return what the provider has billed in total, by each of its own sums; empty when it has no such answer.

        A sum that cannot be asked for now stands there as the error that says why.
        """

    async def find_left_usd(self) -> Decimal | None:
        """Return how much more the provider lets us consume; None when it names no limit.

        Raises:
            ProviderUnavailableError: it cannot be asked now.
        """

    async def find_activity(self) -> list[Activity] | None:
        """Return what it billed per day and model, for days that are over; None when it has no such answer.

        Raises:
            ProviderUnavailableError: it cannot be asked now.
        """
