"""The shapes of what is answered about models and calls. What the provider answers is passed on, and may have more members."""

from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import TypedDict

from billing.calls.outcome import Accuracy
from billing.shapes import Amount, Id, Price
from proxy.http.errors import ErrorObjectJson


class ChatCompletionJson(TypedDict):
    """OpenAI's, with `usage.cost` in USD."""


class CompletionJson(TypedDict):
    """OpenAI's, with `usage.cost` in USD."""


class EmbeddingsJson(TypedDict):
    """OpenAI's, with `usage.cost` in USD."""


class ResponseJson(TypedDict):
    """OpenAI's, with `usage.cost` in USD."""


class FxFields(TypedDict):
    """Units of the wallet's currency for one USD, and the markup on it in hundredths of a percent."""

    fx_rate: Price
    markup_bps: int


class CostJson(FxFields):
    """What a call cost; null is what is not known yet, while its settlement is `pending`. USD, major units of the currency."""

    call_id: Id
    state: Literal["settled", "void", "review", "pending"]
    accuracy: Accuracy | None
    cost_usd: Amount | None
    charge: Amount | None
    currency: str
    balance: Amount | None
    tokens_prompt: int | None
    tokens_completion: int | None


class ChatCompletionWithCostJson(TypedDict):
    """OpenAI's, with what it cost; in a stream the last chunk, which has no choices."""

    tuma: CostJson


class PricePerMillionJson(TypedDict):
    """USD, for a million tokens."""

    prompt: Price
    completion: Price


class ModelJson(TypedDict):
    """A model in OpenAI's shape, with its prices in USD; lengths in tokens, ``created`` in seconds since 1970."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    name: str
    context_length: int | None
    max_completion_tokens: int | None
    pricing: Annotated[dict[str, Price], Field(description="USD, per token.")]
    pricing_per_million: PricePerMillionJson


class ModelsJson(TypedDict):
    """All models that the caller can call."""

    object: Literal["list"]
    data: list[ModelJson]


class TokenSpreadJson(TypedDict):
    """A number of tokens, as it may come out."""

    least: int
    expected: int
    most: int


class AmountSpreadJson(TypedDict):
    """An amount, as it may come out."""

    least: Amount
    expected: Amount
    most: Amount


class RefusalJson(ErrorObjectJson):
    """An error that would be answered, with its status, and after how many milliseconds to try again."""

    status: int
    retry_after_ms: int | None


class QuotedFields(FxFields):
    """What a call would cost and hold; USD, and major units of the wallet's currency."""

    object: Literal["estimate"]
    model: str
    tokens_prompt: TokenSpreadJson
    tokens_completion: TokenSpreadJson
    cost_usd: AmountSpreadJson
    charge: AmountSpreadJson
    hold: Amount
    hold_usd: Amount
    currency: str


class EstimateJson(QuotedFields):
    """What a call would cost and hold, and whether it would be admitted; USD, and major units of the wallet's currency."""

    admitted: bool
    refusal: Annotated[RefusalJson | None, Field(description="What the call would be refused with just now.")]
