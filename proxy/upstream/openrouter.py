"""OpenRouter: reports the cost of each answer, and keeps a record of it (https://openrouter.ai/docs/api-reference)."""

import contextlib
from collections.abc import Mapping
from datetime import date
from decimal import Decimal
from typing import Any, ClassVar, Literal

from billing.errors import ProviderUnavailableError
from billing.pricing.cost import Usage
from billing.provider.records import Activity, Bill, Source
from billing.provider.refusals import Standing, Subject
from proxy.protocol.ask import Ask
from proxy.upstream.adapter import Upstream

# /credits and /activity are for management keys: https://openrouter.ai/docs/api-reference/credits/get-credits
_NOT_OURS_TO_KNOW = (401, 403)


class OpenRouterUpstream(Upstream):
    """OpenRouter. Closing the connection cancels most of its providers' billing; ``/generation`` knows what was billed."""

    keeps_bills: ClassVar[bool] = True
    bills_by_price_book: ClassVar[bool] = False  # it routes to providers at prices of their own
    client_gone_default: ClassVar[Literal["abort", "drain"]] = "abort"

    def request_changes(self, ask: Ask) -> Mapping[str, str]:
        """Ask for usage with cost; newer versions always send it and ignore this."""
        if not ask.dialect.usage_by_option:
            return {}
        return {**super().request_changes(ask), "usage": '{"include":true}'}

    async def list_models(self) -> list[Mapping[str, Any]]:
        """Return its models, and those for embeddings, which it lists apart.

        Raises:
            ProviderUnavailableError: it cannot be asked now.
        """
        models = await super().list_models()
        with contextlib.suppress(ProviderUnavailableError):  # not every server of its kind has such a list
            models = models + await self._list_models("/embeddings/models")
        return models

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

    async def find_totals_usd(self) -> Mapping[Source, Decimal | ProviderUnavailableError]:
        """Return what this key used, and what the whole account did where we may know that; in USD, or why not now."""
        totals: dict[Source, Decimal | ProviderUnavailableError] = {}
        try:
            totals["key"] = _amount(await self._key(), "usage", path="/key")
        except ProviderUnavailableError as error:
            totals["key"] = error
        try:
            account = await self._credits()
            if account is not None:
                totals["credits"] = _amount(account, "total_usage", path="/credits")
        except ProviderUnavailableError as error:
            totals["credits"] = error
        return totals

    async def find_left_usd(self) -> Decimal | None:
        """Return the less of what this key's limit and the account's credits leave, in USD; None if neither is known.

        Raises:
            ProviderUnavailableError: it cannot be asked now.
        """
        left = _left_of_key(await self._key())
        account = await self._credits()
        if account is not None:
            left.append(_left_of_account(account))
        return min(left, default=None)

    async def find_standing(self, subject: Subject) -> Standing:
        """Return how our key (``/key``) or our money (its limit and ``/credits``) stands.

        A positive balance may still refuse one request that is too large for it, or too many at once:
        https://openrouter.ai/docs/api_reference/limits. Credits that our key may not know are unknown.

        Raises:
            ProviderUnavailableError: it cannot be asked now.
        """
        status, answer = await self.get_record("/key")
        if status in _NOT_OURS_TO_KNOW:
            return "refused"
        left = _left_of_key(_data_of(status, answer, path="/key"))
        if subject == "key":
            return "served"
        if any(amount <= 0 for amount in left):
            return "refused"
        account = await self._credits()
        if account is None:
            return "unknown"
        return "refused" if _left_of_account(account) <= 0 else "served"

    async def find_activity(self) -> list[Activity] | None:
        """Return what was billed per UTC day and model, in USD; None where we may not know.

        Raises:
            ProviderUnavailableError: it cannot be asked now.
        """
        status, answer = await self.get_record("/activity", account=True)
        if status in _NOT_OURS_TO_KNOW:
            return None
        rows = answer.get("data") if isinstance(answer, Mapping) else None
        if status != 200 or not isinstance(rows, list):  # noqa: PLR2004 - HTTP
            raise ProviderUnavailableError(f"the provider's /activity answered {status}")
        sums: dict[tuple[date, str], Decimal] = {}
        for row in rows:
            try:
                place = date.fromisoformat(str(row["date"])[:10]), str(row["model"])
                sums[place] = sums.get(place, Decimal(0)) + _amount(row, "usage", path="/activity")
            except (KeyError, TypeError, ValueError) as error:
                raise ProviderUnavailableError(
                    f"the provider's /activity cannot be read: {error!r}"
                ) from None
        return [Activity(day, model, cost_usd) for (day, model), cost_usd in sorted(sums.items())]

    async def _key(self) -> Mapping[str, object]:
        status, answer = await self.get_record("/key")
        return _data_of(status, answer, path="/key")

    async def _credits(self) -> Mapping[str, object] | None:
        """Return the account's credits; None if our key is none that may know."""
        status, answer = await self.get_record("/credits", account=True)
        if status in _NOT_OURS_TO_KNOW:
            return None
        return _data_of(status, answer, path="/credits")


def _data_of(status: int, answer: object, *, path: str) -> Mapping[str, object]:
    data = answer.get("data") if isinstance(answer, Mapping) else None
    if status != 200 or not isinstance(data, Mapping):  # noqa: PLR2004 - HTTP
        raise ProviderUnavailableError(f"the provider's {path} answered {status}")
    return data


def _left_of_key(key: Mapping[str, object]) -> list[Decimal]:
    remaining = _number(key.get("limit_remaining"))  # null: this key has no limit; may be below zero
    return [] if remaining is None else [remaining]


def _left_of_account(account: Mapping[str, object]) -> Decimal:
    bought = _amount(account, "total_credits", path="/credits")
    return bought - _amount(account, "total_usage", path="/credits")


def _amount(data: Mapping[str, object], name: str, *, path: str) -> Decimal:
    amount = _decimal(data.get(name))
    if amount is None:
        raise ProviderUnavailableError(f"the provider's {path} names no {name}")
    return amount


def _decimal(value: object) -> Decimal | None:
    exact = _number(value)
    return exact if exact is not None and exact >= 0 else None


def _number(value: object) -> Decimal | None:
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        return None
    exact = Decimal(value)
    return exact if exact.is_finite() else None


def _count(data: Mapping[str, object], *names: str) -> int:
    for name in names:
        value = data.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
    return 0
