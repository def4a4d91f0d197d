"""OpenRouter: reports the cost of each answer, and keeps a record of it (https://openrouter.ai/docs/api-reference)."""

from collections.abc import Mapping
from decimal import Decimal
from typing import ClassVar, Literal

from billing.errors import ProviderUnavailableError
from billing.pricing import Usage
from billing.provider import Bill
from proxy.ask import Ask
from proxy.upstream.adapter import Upstream


class OpenRouterUpstream(Upstream):
    """OpenRouter. Closing the connection cancels most of its providers' billing; ``/generation`` knows what was billed."""

    keeps_bills: ClassVar[bool] = True
    bills_by_price_book: ClassVar[bool] = False  # it routes to providers at prices of their own
    client_gone_default: ClassVar[Literal["abort", "drain"]] = "abort"

    def request_changes(self, ask: Ask) -> Mapping[str, str]:
        """Ask for usage with cost; newer versions always send it and ignore this."""
        return {**super().request_changes(ask), "usage": '{"include":true}'}

    async def find_bill(self, generation_id: str) -> Bill | None:
        """Return OpenRouter's record of an answer; None while it does not know the id.

        Raises:
            ProviderUnavailableError: it cannot be asked now.
        """
        status, answer = await self.get_record("/generation", id=generation_id)
        if status == 404:  # noqa: PLR2004 - HTTP
            return None
        data = answer.get("data") if isinstance(answer, Mapping) else None
        cost_usd = _decimal(data.get("total_cost")) if isinstance(data, Mapping) else None
        if status != 200 or cost_usd is None or not isinstance(data, Mapping):  # noqa: PLR2004 - HTTP
            raise ProviderUnavailableError(f"the provider's /generation answered {status}")
        usage = Usage(
            prompt_tokens=_count(data, "native_tokens_prompt", "tokens_prompt"),
            completion_tokens=_count(data, "native_tokens_completion", "tokens_completion"),
            cached_read_tokens=_count(data, "native_tokens_cached"),
            reasoning_tokens=_count(data, "native_tokens_reasoning"),
        )
        return Bill(generation_id, cost_usd, usage)

    async def find_total_usd(self) -> Decimal | None:
        """Return the account's total usage in USD.

        Raises:
            ProviderUnavailableError: it cannot be asked now.
        """
        status, answer = await self.get_record("/credits")
        data = answer.get("data") if isinstance(answer, Mapping) else None
        total = _decimal(data.get("total_usage")) if isinstance(data, Mapping) else None
        if status != 200 or total is None:  # noqa: PLR2004 - HTTP
            raise ProviderUnavailableError(f"the provider's /credits answered {status}")
        return total


def _decimal(value: object) -> Decimal | None:
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        return None
    exact = Decimal(value)
    return exact if exact.is_finite() and exact >= 0 else None


def _count(data: Mapping[str, object], *names: str) -> int:
    for name in names:
        value = data.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
    return 0
