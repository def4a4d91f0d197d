"""How the metered endpoints differ: one ``Dialect`` each, so that there is one way of a call.

Source: https://platform.openai.com/docs/api-reference.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from billing.quote import Output
from proxy.errors import BadRequestError
from proxy.meter import StreamMeter

CHOICES_MAX = 128  # OpenAI's own bound on n
TOKENS_MAX = 10_000_000
_FALLBACKS_MAX = 16
Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Dialect:
    """What one endpoint's protocol has of its own.

    Args:
        path: where the provider serves it, below its base URL.
        check: raises ``BadRequestError`` where a member that money depends on is wrong.
        output: how much output a checked body asks for.
        meter: meters its streams.
        shows_usage: a client is told usage in a stream though it did not ask.
        tells_cost: an answer comes back with its settled cost in it.
    """

    path: str
    check: Callable[[Fields], None]
    output: Callable[[Fields], Output]
    meter: type[StreamMeter]
    shows_usage: bool = False
    tells_cost: bool = False


def _check_chat(fields: Mapping[str, Any]) -> None:
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequestError("'model' must be the name of a model.", param="model")
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
        raise BadRequestError("'messages' must be a non-empty array of objects.", param="messages")
    for name in ("max_tokens", "max_completion_tokens"):
        _check_count(fields, name, TOKENS_MAX)
    for name in ("n", "best_of"):
        _check_count(fields, name, CHOICES_MAX)
    if not isinstance(fields.get("stream"), bool | None):
        raise BadRequestError("'stream' must be true or false.", param="stream")
    options = fields.get("stream_options")
    if not isinstance(options, dict | None) or (
        options and not isinstance(options.get("include_usage"), bool | None)
    ):
        raise BadRequestError(
            "'stream_options' must be an object, its 'include_usage' true or false.", param="stream_options"
        )
    fallbacks = fields.get("models")
    if fallbacks is not None and (
        not isinstance(fallbacks, list)
        or len(fallbacks) > _FALLBACKS_MAX
        or not all(isinstance(name, str) for name in fallbacks)
    ):
        raise BadRequestError(f"'models' must be an array of at most {_FALLBACKS_MAX} names.", param="models")


def _check_count(fields: Mapping[str, Any], name: str, most: int) -> None:
    value = fields.get(name)
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise BadRequestError(f"{name!r} must be a whole number from 1 to {most}.", param=name)


def _chat_output(fields: Fields) -> Output:
    return Output(fields.get("max_completion_tokens") or fields.get("max_tokens"), _choices(fields))


def _choices(fields: Fields) -> int:
    return max(fields.get("n") or 1, fields.get("best_of") or 1)


CHAT = Dialect("/chat/completions", _check_chat, _chat_output, StreamMeter)
CHAT_WITH_COST = replace(CHAT, shows_usage=True, tells_cost=True)
