"""OpenRouter: reports the cost of each answer, and keeps a record of it (https://openrouter.ai/docs/api-reference)."""

import contextlib
import json
from collections.abc import Mapping
from datetime import date
from decimal import Decimal
from typing import Any, ClassVar, Literal

from billing.errors import ProviderUnavailableError
from billing.pricing.cost import Usage
from billing.pricing.quote import Quote
from billing.provider.records import Activity, Bill, Source
from billing.provider.refusals import Standing, Subject
from proxy.protocol.ask import Ask
from proxy.upstream.adapter import Upstream

# /credits and /activity are for management keys: https://openrouter.ai/docs/api-reference/credits/get-credits
_MILLION = 1_000_000
_NOT_OURS_TO_KNOW = (401, 403)


class OpenRouterUpstream(Upstream):
    """OpenRouter. Closing the connection cancels most of its providers' billing; ``/generation`` knows what was billed."""

    keeps_bills: ClassVar[bool] = True
    bills_by_price_book: ClassVar[bool] = False  # it routes to providers at prices of their own
    client_gone_default: ClassVar[Literal["abort", "drain"]] = "abort"
    completion_tokens_default: ClassVar[int] = 0

    def request_changes(self, ask: Ask, quote: Quote) -> Mapping[str, str | None]:
        """Tell the prices that are held for, and ask for usage with cost (newer versions always send it and ignore this)."""
        changes = {
            **super().request_changes(ask, quote),
            "provider": json.dumps(_bounded_provider(ask.fields.get("provider"), quote)),
        }
        if quote.prompt.open_ended:
            changes["plugins"] = json.dumps(_with_file_parser(ask.fields.get("plugins")))
        if ask.dialect.usage_by_option:
            changes["usage"] = '{"include":true}'
        return changes

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

        Where a key of ours at the provider behind it was used (``is_byok``), OpenRouter charges its fee alone (``usage``), and the
        provider bills ``upstream_inference_cost`` to that key. https://openrouter.ai/docs/api-reference/get-a-generation

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
        own_key_usd = _own_key_usd(data, cost_usd)
        return Bill(generation_id, _fee_usd(data, cost_usd) + own_key_usd, usage, own_key_usd)

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


def _bounded_provider(asked: object, quote: Quote) -> dict[str, Any]:
    """Return the preferences of routing with the prices that are held for; the caller's own bounds, where they are lower.

    ``max_price`` is in USD per million tokens, or per image or request; an endpoint that is dearer is left out (OpenRouter's
    OpenAPI, ``ProviderPreferences``).
    """
    preferences = dict(asked) if isinstance(asked, Mapping) else {}
    prices = (quote.price, *quote.others)
    told = {
        "prompt": max(price.prompt_usd for price in prices) * _MILLION,
        "completion": max(price.completion_usd for price in prices) * _MILLION,
        "request": max(price.request_usd for price in prices),
        "image": max(price.image_usd for price in prices),
    }
    own = preferences.get("max_price")
    bounds: dict[str, Any] = dict(own) if isinstance(own, Mapping) else {}
    for name, most in told.items():
        if name in ("request", "image") and not most:
            continue  # not every endpoint says that these are free
        asked_most = _decimal_of(bounds.get(name))
        bounds[name] = float(most if asked_most is None else min(asked_most, most))
    return {**preferences, "max_price": bounds}


def _with_file_parser(asked: object) -> list[Any]:
    """Return the plugins with a parser of files that bills nothing beside tokens, where none is asked for.

    Without one a model that reads no files has them read at a price per page (https://openrouter.ai/docs/guides/overview/multimodal/pdfs).
    """
    plugins = list(asked) if isinstance(asked, list) else []
    if any(isinstance(plugin, Mapping) and plugin.get("id") == "file-parser" for plugin in plugins):
        return plugins
    return [*plugins, {"id": "file-parser", "pdf": {"engine": "cloudflare-ai"}}]


def _decimal_of(value: object) -> Decimal | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        return None
    try:
        exact = Decimal(str(value))
    except ArithmeticError:
        return None
    return exact if exact.is_finite() and exact >= 0 else None


def _fee_usd(data: Mapping[str, object], cost_usd: Decimal) -> Decimal:
    """Return what OpenRouter charged itself."""
    fee_usd = _decimal(data.get("usage")) if data.get("is_byok") is True else None
    return cost_usd if fee_usd is None else min(fee_usd, cost_usd)


def _own_key_usd(data: Mapping[str, object], cost_usd: Decimal) -> Decimal:
    """Return what was billed to a key of ours; the documents leave open whether ``total_cost`` has it in it."""
    if data.get("is_byok") is not True:
        return Decimal(0)
    billed_usd = _decimal(data.get("upstream_inference_cost")) or Decimal(0)
    return max(billed_usd, cost_usd - _fee_usd(data, cost_usd))


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
