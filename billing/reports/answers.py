"""The shapes of what the reports of calls and of usage return."""

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from billing.calls.outcome import Accuracy, Source
from billing.reports.explain import ChangeKind
from billing.shapes import Amount, Count, Id, Moment, PriceOfOne, Rate

_AverageMs = Annotated[int | None, Field(description="Over the calls of which it is known.")]
_HalfBelowMs = Annotated[
    int | None, Field(description="Half of the calls took less; of 100, 200, 400, … 102400.")
]
_MostBelowMs = Annotated[
    int | None, Field(description="Of 20 calls, 19 took less; of 100, 200, 400, … 102400.")
]
_Explanation = Annotated[
    list[str], Field(description="How the charge came about, a line each, in exact figures.")
]


class CallJson(TypedDict):
    """A call as its owner sees it; USD, major units of the wallet's currency, milliseconds; null is what is not known."""

    object: Literal["call"]
    id: Annotated[Id, Field(description="The `x-request-id` of its answer.")]
    state: Literal["open", "settled", "void", "review"]
    outcome: str | None
    model: str
    stream: bool
    wallet_id: Id
    key_id: Id | None
    generation_id: Annotated[str | None, Field(description="The provider's id of the answer.")]
    currency: str
    cost_usd: Amount | None
    charge: Amount | None
    accuracy: Accuracy | None
    source: Source | None
    tokens_prompt: int | None
    tokens_completion: int | None
    tokens_cached: int | None
    tokens_reasoning: int | None
    hold: Amount
    fx_rate: Rate | None
    fx_markup_bps: int | None
    price_prompt_usd: PriceOfOne | None
    price_completion_usd: PriceOfOne | None
    price_cached_read_usd: PriceOfOne | None
    price_cached_write_usd: PriceOfOne | None
    price_reasoning_usd: PriceOfOne | None
    price_image_usd: PriceOfOne | None
    price_audio_usd: PriceOfOne | None
    price_request_usd: PriceOfOne | None
    priced_at: Moment | None
    opened_at: Moment
    ended_at: Moment | None
    first_byte_ms: int | None
    duration_ms: int | None


class ChangeJson(TypedDict):
    """What was posted after a call's settlement; major units of the wallet's currency."""

    kind: ChangeKind
    amount: Amount
    description: str
    created_at: Moment


class ExplainedCallJson(CallJson):
    """A call as its owner sees it, with how its charge came about; units as in `Call`."""

    explanation: _Explanation
    changes: Annotated[
        list[ChangeJson],
        Field(description="What was posted after the settlement; what the wallet got is positive."),
    ]


class CallPostingJson(TypedDict):
    """An entry of the journal; major units of ``currency``, with the journal's sign."""

    kind: str
    account: str
    currency: str
    amount: Amount
    memo: str
    at: Moment


class WholeCallJson(CallJson):
    """A call as the operator sees it: with the house's part of it, in USD; `spread` in the wallet's currency."""

    user_id: Id
    provider_cost_usd: Amount | None
    house_usd: Amount
    spread: Amount | None
    hold_usd: Amount
    explanation: _Explanation
    postings: list[CallPostingJson]


class SumsFields(TypedDict):
    """What calls sum to; amounts in major units of the currency or in USD, latencies in milliseconds."""

    calls: Count
    calls_exact: Count
    calls_estimated: Count
    calls_void: Count
    tokens_prompt: Count
    tokens_completion: Count
    tokens_cached: Count
    tokens_cache_written: Count
    tokens_reasoning: Count
    cost_usd: Amount
    charge: Amount
    markup: Annotated[Amount, Field(description="The part of the charge that is the exchange rate's markup.")]
    first_byte_average_ms: _AverageMs
    first_byte_p50_below_ms: _HalfBelowMs
    first_byte_p95_below_ms: _MostBelowMs
    duration_average_ms: _AverageMs
    duration_p50_below_ms: _HalfBelowMs
    duration_p95_below_ms: _MostBelowMs


class HouseSumsFields(SumsFields):
    """The same, for operators: ``house_usd`` is what the house paid of it, in USD."""

    house_usd: NotRequired[Amount]


class UsageJson(SumsFields):
    """The sums of one group; what it is not grouped by is null. Major units, milliseconds."""

    object: Literal["usage"]
    period: Annotated[str | None, Field(description="A day, the first of a week or month, or an hour.")]
    model: str | None
    key_id: Annotated[Id | None, Field(description="None of calls without a key.")]
    key_name: str | None
    currency: str
