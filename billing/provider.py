"""What billing asks of a provider about its own records. Implemented by the proxy's upstream adapters."""

from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol

from billing.pricing import Usage


@dataclass(frozen=True, slots=True)
class Bill:
    """The provider's own record of one answer; ``cost_usd`` is what it billed."""

    generation_id: str
    cost_usd: Decimal
    usage: Usage


class Provider(Protocol):
    """A provider's records."""

    @property
    def keeps_bills(self) -> bool:
        """Whether this provider can be asked what one answer cost."""

    async def find_bill(self, generation_id: str) -> Bill | None:
        """Return the provider's record; None when it does not know the id (yet).

        Raises:
            ProviderUnavailableError: it cannot be asked now.
        """

    async def find_total_usd(self) -> Decimal | None:
        """Return what the provider has billed this account in total; None when it has no such answer.

        Raises:
            ProviderUnavailableError: it cannot be asked now.
        """
