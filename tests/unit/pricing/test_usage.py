"""Reading ``usage``: each sample has the members that its provider publishes (see ``billing/pricing/usage.py``), with made-up figures."""

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.pricing.cost import TOKENS_MAX, Usage
from billing.pricing.usage import ReportedCost, UsageReading, read_cost, read_usage, with_prompt

EXACT: dict[str, tuple[dict[str, Any], Usage]] = {
    "openai": (
        {
            "prompt_tokens": 1100,
            "completion_tokens": 90,
            "total_tokens": 1190,
            "prompt_tokens_details": {"cached_tokens": 1024, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 64,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        },
        Usage(1100, 90, cached_read_tokens=1024, reasoning_tokens=64),
    ),
    "openai, audio in": (
        {
            "prompt_tokens": 300,
            "completion_tokens": 20,
            "total_tokens": 320,
            "prompt_tokens_details": {"audio_tokens": 200, "text_tokens": 100},
        },
        Usage(300, 20, audio_tokens=200),
    ),
    "openai, predictions": (
        {
            "prompt_tokens": 50,
            "completion_tokens": 80,
            "total_tokens": 130,
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "accepted_prediction_tokens": 40,
                "rejected_prediction_tokens": 25,
            },
        },
        Usage(50, 80),
    ),
    "openai, responses": (
        {
            "input_tokens": 75,
            "input_tokens_details": {"cached_tokens": 30},
            "output_tokens": 1186,
            "output_tokens_details": {"reasoning_tokens": 1024},
            "total_tokens": 1261,
        },
        Usage(75, 1186, cached_read_tokens=30, reasoning_tokens=1024),
    ),
    "openai, embeddings": ({"prompt_tokens": 8, "total_tokens": 8}, Usage(8)),
    "xai": (
        {
            "prompt_tokens": 32,
            "completion_tokens": 9,
            "total_tokens": 135,
            "prompt_tokens_details": {
                "text_tokens": 32,
                "audio_tokens": 0,
                "image_tokens": 0,
                "cached_tokens": 6,
            },
            "completion_tokens_details": {"reasoning_tokens": 94, "audio_tokens": 0},
            "num_sources_used": 0,
        },
        Usage(32, 103, cached_read_tokens=6, reasoning_tokens=94),
    ),
    "deepseek": (
        {
            "prompt_tokens": 1000,
            "completion_tokens": 40,
            "total_tokens": 1040,
            "prompt_cache_hit_tokens": 800,
            "prompt_cache_miss_tokens": 200,
            "prompt_tokens_details": {"cached_tokens": 800},
            "completion_tokens_details": {"reasoning_tokens": 30},
        },
        Usage(1000, 40, cached_read_tokens=800, reasoning_tokens=30),
    ),
    "deepseek, without a sum": (
        {"prompt_cache_hit_tokens": 10, "prompt_cache_miss_tokens": 5, "completion_tokens": 20},
        Usage(15, 20, cached_read_tokens=10),
    ),
    "moonshot": (
        {"prompt_tokens": 1000, "completion_tokens": 7, "total_tokens": 1007, "cached_tokens": 800},
        Usage(1000, 7, cached_read_tokens=800),
    ),
    "litellm": (
        {
            "prompt_tokens": 1000,
            "completion_tokens": 7,
            "total_tokens": 1007,
            "cache_creation_input_tokens": 600,
            "cache_read_input_tokens": 300,
            "prompt_tokens_details": {
                "cached_tokens": 300,
                "cache_creation_tokens": 600,
                "audio_tokens": None,
            },
        },
        Usage(1000, 7, cached_read_tokens=300, cached_write_tokens=600),
    ),
    "openrouter": (
        {
            "prompt_tokens": 1000,
            "completion_tokens": 7,
            "total_tokens": 1007,
            "prompt_tokens_details": {"cached_tokens": 300, "cache_write_tokens": 600, "video_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 3, "image_tokens": 0},
            "server_tool_use": {"web_search_requests": 0},
        },
        Usage(1000, 7, 300, 600, 3),
    ),
    "anthropic": (
        {
            "input_tokens": 200,
            "cache_creation_input_tokens": 500,
            "cache_read_input_tokens": 800,
            "output_tokens": 9,
            "cache_creation": {"ephemeral_5m_input_tokens": 500, "ephemeral_1h_input_tokens": 0},
            "service_tier": "standard",
        },
        Usage(1500, 9, cached_read_tokens=800, cached_write_tokens=500),
    ),
    "openai's names, anthropic's counts, and a total that proves it": (
        {
            "prompt_tokens": 200,
            "completion_tokens": 9,
            "total_tokens": 1009,
            "cache_read_input_tokens": 800,
            "prompt_tokens_details": {"cached_tokens": 800},
        },
        Usage(1000, 9, cached_read_tokens=800),
    ),
    "both protocols' names": (
        {
            "prompt_tokens": 10,
            "completion_tokens": 2,
            "total_tokens": 12,
            "input_tokens": 0,
            "output_tokens": 2,
        },
        Usage(10, 2),
    ),
    "numbers with a point": ({"prompt_tokens": Decimal("10.0"), "completion_tokens": 2.0}, Usage(10, 2)),
}

ESTIMATED: dict[str, tuple[dict[str, Any], Usage]] = {
    "gemini: thoughts in the total alone": (
        {"prompt_tokens": 30, "completion_tokens": 7, "total_tokens": 1037},
        Usage(30, 1007, reasoning_tokens=1000),
    ),
    "reasoning beside, in a total that a gateway made anew": (
        {
            "prompt_tokens": 30,
            "completion_tokens": 7,
            "total_tokens": 37,
            "completion_tokens_details": {"reasoning_tokens": 100},
        },
        Usage(30, 107, reasoning_tokens=100),
    ),
    "reasoning beside, without a total": (
        {"prompt_tokens": 30, "completion_tokens": 7, "completion_tokens_details": {"reasoning_tokens": 100}},
        Usage(30, 107, reasoning_tokens=100),
    ),
    "reasoning inside or beside: no total says": (
        {"prompt_tokens": 30, "completion_tokens": 7, "completion_tokens_details": {"reasoning_tokens": 5}},
        Usage(30, 7, reasoning_tokens=5),
    ),
    "perplexity": (
        {
            "prompt_tokens": 9,
            "completion_tokens": 400,
            "total_tokens": 409,
            "reasoning_tokens": 9000,
            "num_search_queries": 12,
            "citation_tokens": 5000,
        },
        Usage(9, 9400, reasoning_tokens=9000),
    ),
    "a total below its parts": (
        {"prompt_tokens": 30, "completion_tokens": 7, "total_tokens": 9},
        Usage(30, 7),
    ),
    "cached, spelled twice and otherwise": (
        {
            "prompt_tokens": 1000,
            "completion_tokens": 1,
            "cached_tokens": 800,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
        Usage(1000, 1),
    ),
    "more in the cache than in the prompt": (
        {"prompt_tokens": 200, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 800}},
        Usage(1000, 1, cached_read_tokens=800),
    ),
    "hit and miss beyond the prompt": (
        {"prompt_tokens": 100, "prompt_cache_hit_tokens": 80, "prompt_cache_miss_tokens": 50},
        Usage(130, 0, cached_read_tokens=80),
    ),
    "audio of the prompt that is cached": (
        {"prompt_tokens": 100, "prompt_tokens_details": {"cached_tokens": 80, "audio_tokens": 50}},
        Usage(100, 0, cached_read_tokens=50, audio_tokens=50),
    ),
    "the completion alone": ({"prompt_tokens": 0, "completion_tokens": 5}, Usage(0, 5)),
    "audio out, which no price is for": (
        {
            "prompt_tokens": 10,
            "completion_tokens": 50,
            "total_tokens": 60,
            "completion_tokens_details": {"audio_tokens": 40, "text_tokens": 10},
        },
        Usage(10, 50),
    ),
    "pictures out": (
        {
            "prompt_tokens": 10,
            "completion_tokens": 1300,
            "total_tokens": 1310,
            "completion_tokens_details": {"image_tokens": 1290},
        },
        Usage(10, 1300),
    ),
    "searched": (
        {"input_tokens": 10, "output_tokens": 5, "server_tool_use": {"web_search_requests": 1}},
        Usage(10, 5),
    ),
    "kept for an hour": (
        {
            "input_tokens": 10,
            "output_tokens": 5,
            "cache_creation_input_tokens": 100,
            "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 100},
        },
        Usage(110, 5, cached_write_tokens=100),
    ),
    "predictions beside": (
        {
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "total_tokens": 15,
            "completion_tokens_details": {"rejected_prediction_tokens": 20},
        },
        Usage(10, 20),
    ),
    "a word for a number": ({"prompt_tokens": "many", "completion_tokens": 5}, Usage(0, 5)),
}


@pytest.mark.parametrize("name", sorted(EXACT))
def test_what_adds_up(name: str) -> None:
    said, usage = EXACT[name]
    assert read_usage(said) == UsageReading(usage, adds_up=True)


@pytest.mark.parametrize("name", sorted(ESTIMATED))
def test_what_does_not_add_up_is_the_larger_figure(name: str) -> None:
    said, usage = ESTIMATED[name]
    assert read_usage(said) == UsageReading(usage, adds_up=False)


def test_a_total_alone_is_the_prompt_where_there_is_no_output() -> None:
    assert read_usage({"total_tokens": 8}, has_output=False) == UsageReading(Usage(8), adds_up=True)
    assert read_usage({"prompt_tokens": 8, "total_tokens": 8}, has_output=False).adds_up
    odd = read_usage({"prompt_tokens": 8, "total_tokens": 9}, has_output=False)
    assert odd == UsageReading(Usage(9), adds_up=False)


def test_a_prompt_that_is_not_told_is_counted() -> None:
    told = UsageReading(Usage(0, 5), adds_up=False)
    assert with_prompt(told, 30) == UsageReading(Usage(30, 5), adds_up=False)
    for other in (UsageReading(Usage(), adds_up=True), UsageReading(Usage(7, 5), adds_up=True)):
        assert with_prompt(other, 30) is other


def test_a_count_beyond_all_sense_is_none() -> None:
    for huge in (Decimal("1E+99999999"), Decimal("-1E+99999999"), Decimal("NaN"), float("inf"), 1e300, True):
        reading = read_usage({"prompt_tokens": huge, "completion_tokens": Decimal("12.0")})
        assert reading == UsageReading(Usage(0, 12), adds_up=False)
    assert read_usage({"prompt_tokens": 10**30}).usage == Usage(TOKENS_MAX)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.decimals(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
_NAMES = sorted(
    {name for said, _ in (*EXACT.values(), *ESTIMATED.values()) for name in said}
    | {"cost", "cost_details", "is_byok", "x"}
)
_PARTS = sorted(
    {
        name
        for said, _ in (*EXACT.values(), *ESTIMATED.values())
        for inner in said.values()
        if isinstance(inner, dict)
        for name in inner
    }
    | {"upstream_inference_cost"}
)
values = json_values | st.dictionaries(st.sampled_from(_PARTS), json_values)


@given(st.dictionaries(st.sampled_from(_NAMES), values), st.booleans())
def test_no_usage_object_breaks_the_meter(said: dict[str, Any], has_output: bool) -> None:
    usage = read_usage(said, has_output=has_output).usage
    assert all(getattr(usage, name) >= 0 for name in Usage.__slots__)
    assert usage.cached_read_tokens + usage.cached_write_tokens + usage.audio_tokens <= usage.prompt_tokens
    assert usage.reasoning_tokens <= usage.completion_tokens
    cost = read_cost(said)
    assert cost is None or cost.total_usd >= cost.own_key_usd >= 0


counts = st.integers(0, 3000)


@given(
    prompt=counts,
    completion=counts,
    reasoning=st.none() | counts,
    total=st.none() | counts,
    read=st.none() | counts,
    write=st.none() | counts,
    audio=st.none() | counts,
    rejected=st.none() | counts,
)
def test_never_below_what_any_reading_of_the_parts_gives(
    prompt: int,
    completion: int,
    reasoning: int | None,
    total: int | None,
    read: int | None,
    write: int | None,
    audio: int | None,
    rejected: int | None,
) -> None:
    said = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": total,
        "prompt_tokens_details": {"cached_tokens": read, "cache_write_tokens": write, "audio_tokens": audio},
        "completion_tokens_details": {"reasoning_tokens": reasoning, "rejected_prediction_tokens": rejected},
    }
    reading = read_usage(said)
    usage = reading.usage
    assert usage.prompt_tokens >= max(prompt, write or 0, audio or 0)
    assert usage.completion_tokens >= max(completion, reasoning or 0, rejected or 0)
    assert usage.cached_write_tokens >= min(write or 0, usage.prompt_tokens - usage.audio_tokens)
    assert usage.cached_read_tokens <= (read or 0)
    assert usage.audio_tokens == (audio or 0)
    if total:
        assert usage.prompt_tokens + usage.completion_tokens >= total
        if reasoning and total != prompt + completion:
            assert usage.completion_tokens >= completion + reasoning
    if reading.adds_up:
        assert usage.prompt_tokens == prompt
        assert usage.completion_tokens in (completion, completion + (reasoning or 0))
        assert not total or total == usage.prompt_tokens + usage.completion_tokens


@pytest.mark.parametrize(
    ("said", "cost"),
    [
        ({"cost": Decimal("0.000012")}, ReportedCost(Decimal("0.000012"))),
        ({"cost": 0.1}, ReportedCost(Decimal("0.1"))),
        ({"cost": 0}, ReportedCost(Decimal(0))),
        # OpenRouter repeats the cost there, unless a key of ours was used.
        (
            {
                "cost": Decimal("0.2"),
                "is_byok": False,
                "cost_details": {"upstream_inference_cost": Decimal("0.2")},
            },
            ReportedCost(Decimal("0.2")),
        ),
        (
            {
                "cost": Decimal("0.01"),
                "is_byok": True,
                "cost_details": {"upstream_inference_cost": Decimal("0.2")},
            },
            ReportedCost(Decimal("0.21"), Decimal("0.2")),
        ),
        ({"cost": Decimal("0.01"), "is_byok": True, "cost_details": {"upstream_inference_cost": None}}, None),
        ({"cost": Decimal("0.01"), "is_byok": True}, None),
        *(
            ({"cost": bad}, None)
            for bad in (True, None, "0.1", -1, float("nan"), Decimal("Infinity"), {"total_cost": 1})
        ),
    ],
)
def test_the_providers_own_figure(said: dict[str, Any], cost: ReportedCost | None) -> None:
    assert read_cost(said) == cost
