"""``GET /v1/models`` and ``/v1/models/{id}``: OpenAI's shape, with prices as extra fields."""

from decimal import Decimal

from aiohttp import web

from billing.pricing.price_book import Model
from proxy.call.answers import ModelJson, ModelsJson
from proxy.http.typed_answer import JsonAnswer, answer
from proxy.identity.authenticate import authenticate
from proxy.services.call import CALL

_PER_MILLION = 1_000_000


async def list_models(request: web.Request) -> JsonAnswer[ModelsJson]:
    """Every model that the caller can call."""
    caller = await authenticate(request)
    models = request.app[CALL].prices.models
    data = [model_json(model) for model in models.values() if caller.allows_model(model.id)]
    return answer(request, {"object": "list", "data": data})


async def get_model(request: web.Request) -> JsonAnswer[ModelJson]:
    """One model; 404 ``model_not_found`` for one that is unknown or has no price."""
    caller = await authenticate(request)
    model = request.app[CALL].prices.get_model(request.match_info["model"])
    caller.require_models([model.id])
    return answer(request, model_json(model))


def model_json(model: Model) -> ModelJson:
    """Return a model in OpenAI's shape; prices are decimal strings in USD, per token as OpenRouter names them."""
    price = model.price
    pricing = {
        "prompt": price.prompt_usd,
        "completion": price.completion_usd,
        "input_cache_read": price.cached_read_usd,
        "input_cache_write": price.cached_write_usd,
        "internal_reasoning": price.reasoning_usd,
        "image": price.image_usd,
        "audio": price.audio_usd,
        "request": price.request_usd,
    }
    return {
        "id": model.id,
        "object": "model",
        "created": int(model.created_at.timestamp()),
        "owned_by": model.id.partition("/")[0] if "/" in model.id else "provider",
        "name": model.name,
        "context_length": price.context_tokens,
        "max_completion_tokens": price.completion_tokens_max,
        "pricing": {name: _plain(value) for name, value in pricing.items() if value is not None},
        "pricing_per_million": {
            "prompt": _plain(price.prompt_usd * _PER_MILLION),
            "completion": _plain(price.completion_usd * _PER_MILLION),
        },
    }


def _plain(value: Decimal) -> str:
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
