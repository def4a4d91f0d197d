"""What the provider tells about its models, its books and the caller's account, in OpenRouter's shapes.

Source: https://openrouter.ai/docs/api-reference, the pages of each path.
"""

from collections.abc import Iterable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from scripts.sim.books import Books, Generation
from scripts.sim.exact_json import usd, usd_of_femto
from scripts.sim.models import SimModel

_MODELS_CREATED_S = 1_700_000_000


def show_models(models: Iterable[SimModel]) -> dict[str, Any]:
    """Return ``GET /models``; prices are strings in USD per token, and a model without cache discount lists none."""
    return {"data": [_show_model(model) for model in models]}


def _show_model(model: SimModel) -> dict[str, Any]:
    pricing = {
        "prompt": f"{usd_of_femto(model.prompt_femtousd):f}",
        "completion": f"{usd_of_femto(model.completion_femtousd):f}",
        "request": f"{usd(model.request_nanousd):f}",
        "image": "0",
        "web_search": "0",
        "internal_reasoning": "0",
        "input_cache_write": "0",
    }
    if model.cached_femtousd is not None:
        pricing["input_cache_read"] = f"{usd_of_femto(model.cached_femtousd):f}"
    return {
        "id": model.id,
        "canonical_slug": model.id,
        "name": model.name,
        "created": _MODELS_CREATED_S,
        "context_length": model.context_tokens,
        "architecture": {
            "modality": "text+image->text",
            "input_modalities": ["text", "image"],
            "output_modalities": ["text"],
            "tokenizer": "Other",
        },
        "pricing": pricing,
        "top_provider": {
            "context_length": model.context_tokens,
            "max_completion_tokens": model.completion_tokens_max,
            "is_moderated": False,
        },
        "supported_parameters": ["max_tokens", "temperature", "tools", "logprobs", "response_format"],
    }


def show_key(books: Books, credits_usd: Decimal) -> dict[str, Any]:
    """Return ``GET /key``: what was used, and what is left of the credits, never below zero. Amounts in USD."""
    used = usd(books.total_nanousd)
    return {
        "data": {
            "label": "sk-sim",
            "usage": used,
            "limit": credits_usd,
            "limit_remaining": max(credits_usd - used, Decimal(0)),
            "limit_reset": None,
            "is_free_tier": False,
            "is_provisioning_key": False,
        }
    }


def show_credits(books: Books, credits_usd: Decimal) -> dict[str, Any]:
    """Return ``GET /credits``: bought and used, in USD."""
    return {"data": {"total_credits": credits_usd, "total_usage": usd(books.total_nanousd)}}


def show_generation(generation: Generation) -> dict[str, Any]:
    """Return ``GET /generation`` of an ended one; costs in USD, times in milliseconds."""
    cost = usd(generation.cost_nanousd)
    started_s = generation.started_s
    elapsed_ms = round(((generation.ended_s or started_s) - started_s) * 1000)
    return {
        "data": {
            "id": generation.id,
            "upstream_id": generation.id.replace("gen-", "chatcmpl-"),
            "total_cost": cost,
            "usage": cost,
            "cache_discount": None,
            "upstream_inference_cost": 0,
            "is_byok": False,
            "created_at": datetime.fromtimestamp(started_s, tz=UTC).isoformat(),
            "model": generation.model,
            "streamed": generation.streamed,
            "cancelled": generation.cancelled,
            "provider_name": "Sim",
            "external_user": generation.user,
            "api_type": "completions",
            "latency": elapsed_ms,
            "generation_time": elapsed_ms,
            "finish_reason": generation.finish_reason,
            "native_finish_reason": generation.finish_reason,
            "tokens_prompt": generation.prompt_tokens,
            "tokens_completion": generation.completion_tokens,
            "native_tokens_prompt": generation.prompt_tokens,
            "native_tokens_completion": generation.completion_tokens,
            "native_tokens_reasoning": generation.reasoning_tokens,
            "native_tokens_cached": generation.cached_tokens,
            "num_media_prompt": None,
            "num_media_completion": None,
        }
    }


def show_activity(books: Books, date: str | None) -> dict[str, Any]:
    """Return ``GET /activity``, of one day if a date is given; unlike OpenRouter's, today is in it. ``usage`` in USD."""
    rows = [row for row in books.sum_activity() if date is None or row["date"] == date]
    return {
        "data": [
            {
                "date": row["date"],
                "model": row["model"],
                "model_permaslug": row["model"],
                "endpoint_id": f"sim:{row['model']}",
                "provider_name": "Sim",
                "usage": usd(row["cost_nanousd"]),
                "byok_usage_inference": 0,
                "requests": row["requests"],
                "prompt_tokens": row["prompt_tokens"],
                "completion_tokens": row["completion_tokens"],
                "reasoning_tokens": row["reasoning_tokens"],
            }
            for row in rows
        ]
    }


def show_books(books: Books) -> dict[str, Any]:
    """Return the books as they are; ``total_nanousd`` is of the billed ones."""
    entries = [generation.as_json() for generation in books.generations.values()]
    return {"total_nanousd": books.total_nanousd, "open": books.open_count, "generations": entries}
