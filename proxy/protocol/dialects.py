"""How the metered endpoints differ: one ``Dialect`` each, so that there is one way of a call.

Source: https://platform.openai.com/docs/api-reference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from billing.pricing.quote import Output
from proxy.http.errors import BadRequestError, NotStoredError
from proxy.protocol.content import (
    check_inside,
    check_items,
    check_messages,
    check_no_files,
    check_tools,
    find_extras,
)
from proxy.protocol.members import DIALECTS, Fields, Policy
from proxy.protocol.meter import CompletionMeter, StreamMeter
from proxy.protocol.responses_meter import ResponseMeter

CHOICES_MAX = 128  # OpenAI's own bound on n
TOKENS_MAX = 10_000_000
_FALLBACKS_MAX = 16
_INPUTS_MAX = 2048  # OpenAI's own bound on the inputs of one request for embeddings
COMPLETION_TOKENS = 16  # OpenAI's own default of max_tokens, for legacy completions


@dataclass(frozen=True, slots=True)
class Dialect:
    """What one endpoint's protocol has of its own.

    Args:
        name: of its table of members.
        path: where the provider serves it, below its base URL.
        check: raises ``BadRequestError`` where a member that money depends on is wrong, or is not served.
        output: how much output a checked body asks for.
        bounds: the members that bound the output, per choice; the first one is the newest.
        meter: meters its streams.
        usage_by_option: the provider tells usage in a stream only where ``stream_options`` asks for it.
        shows_usage: a client is told usage in a stream though it did not ask.
        tells_cost: an answer comes back with its settled cost in it.
    """

    name: str
    path: str
    check: Callable[[Fields, Policy], None]
    output: Callable[[Fields], Output]
    bounds: tuple[str, ...] = ()
    meter: type[StreamMeter] = StreamMeter
    usage_by_option: bool = True
    shows_usage: bool = False
    tells_cost: bool = False


def _check_chat(fields: Fields, policy: Policy) -> None:
    _check_common(fields, "chat", policy)
    messages = fields.get("messages")
    if (
        not isinstance(messages, list)
        or not messages
        or [item for item in messages if not isinstance(item, dict)]
    ):
        raise BadRequestError("'messages' must be a non-empty array of objects.", param="messages")
    check_no_files(messages, "messages")
    check_messages(messages, policy)
    check_tools(fields.get("tools"), "chat.tools")
    _check_prediction(fields)
    _check_counts(fields, ("max_tokens", "max_completion_tokens"), TOKENS_MAX)
    _check_counts(fields, ("n", "best_of"), CHOICES_MAX)


def _chat_output(fields: Fields) -> Output:
    """Of two bounds the larger one counts: servers differ in which of them they know."""
    bound = max(count_of(fields, "max_completion_tokens") or 0, count_of(fields, "max_tokens") or 0)
    return Output(bound or None, _choices(fields))


def _check_completion(fields: Fields, policy: Policy) -> None:
    _check_common(fields, "completions", policy)
    _check_inputs(fields, "prompt")
    _check_counts(fields, ("max_tokens",), TOKENS_MAX, least=0)
    _check_counts(fields, ("n", "best_of"), CHOICES_MAX)


def _completion_output(fields: Fields) -> Output:
    """Each of several prompts has its own choices."""
    return Output(count_of(fields, "max_tokens"), _choices(fields) * _count_inputs(fields["prompt"]))


def _check_embedding(fields: Fields, policy: Policy) -> None:
    _check_common(fields, "embeddings", policy)
    _check_inputs(fields, "input")
    if fields.get("stream"):
        raise BadRequestError("Embeddings are not streamed.", param="stream")


def _check_response(fields: Fields, policy: Policy) -> None:
    """Refuse what would cost something that nobody here could see: work in the background, and what the provider has stored."""
    if fields.get("previous_response_id"):
        raise NotStoredError(
            "'previous_response_id' is not served: what the provider has stored cannot be priced: send the whole input.",
            param="previous_response_id",
        )
    _check_common(fields, "responses", policy)
    given = fields.get("input")
    if not (isinstance(given, str) and given) and not (
        isinstance(given, list) and given and all(isinstance(item, dict) for item in given)
    ):
        raise BadRequestError("'input' must be a text, or a non-empty array of objects.", param="input")
    _check_counts(fields, ("max_output_tokens",), TOKENS_MAX)
    if isinstance(given, list):
        check_no_files(given, "input")
        check_items(given, policy)
    check_tools(fields.get("tools"), "responses.tools")


def _check_prediction(fields: Fields) -> None:
    prediction = fields.get("prediction")
    if prediction is not None and not (
        isinstance(prediction, dict) and isinstance(prediction.get("content"), str | list)
    ):
        raise BadRequestError("'prediction' must be an object with its 'content'.", param="prediction")


def _check_common(fields: Fields, dialect: str, policy: Policy) -> None:
    DIALECTS[dialect].check(fields, policy)
    check_inside(fields, policy)
    model = fields.get("model")
    if not (isinstance(model, str) and model) and not (model is None and fields.get("models")):
        raise BadRequestError("'model' must be the name of a model.", param="model")
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
        or not all(isinstance(name, str) and name for name in fallbacks)
    ):
        raise BadRequestError(f"'models' must be an array of at most {_FALLBACKS_MAX} names.", param="models")
    find_extras(fields)  # refuses what has no bound


def _check_inputs(fields: Fields, name: str) -> None:
    """Refuse what is neither a text nor token ids, nor an array of such; embeddings may be of objects, too."""
    given = fields.get(name)
    if isinstance(given, str):
        return
    kinds: tuple[type, ...] = (str, list, dict) if name == "input" else (str, list)
    if (
        not isinstance(given, list)
        or not given
        or _count_inputs(given) > _INPUTS_MAX
        or not (_are_tokens(given) or all(isinstance(item, kinds) for item in given))
        or not all(_are_tokens(item) for item in given if isinstance(item, list))
    ):
        raise BadRequestError(
            f"{name!r} must be a text, an array of token ids, or an array of at most {_INPUTS_MAX} of these.",
            param=name,
        )


def _count_inputs(given: Any) -> int:
    return 1 if isinstance(given, str) or _are_tokens(given) else len(given)


def _are_tokens(given: list[Any]) -> bool:
    return bool(given) and all(isinstance(item, int) and not isinstance(item, bool) for item in given)


def _check_counts(fields: Fields, names: Sequence[str], most: int, *, least: int = 1) -> None:
    for name in names:
        if fields.get(name) is None:
            continue
        value = count_of(fields, name)
        if value is None or not least <= value <= most:
            raise BadRequestError(f"{name!r} must be a whole number from {least} to {most}.", param=name)


def count_of(fields: Fields, name: str) -> int | None:
    """Return a member that is a whole number, however it is written (``100``, ``100.0``, ``1e2``); None if it is none."""
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if value == value // 1 else None


def _choices(fields: Fields) -> int:
    return max(count_of(fields, "n") or 1, count_of(fields, "best_of") or 1)


CHAT = Dialect(
    "chat",
    "/chat/completions",
    _check_chat,
    _chat_output,
    bounds=("max_completion_tokens", "max_tokens"),
)
CHAT_WITH_COST = replace(CHAT, shows_usage=True, tells_cost=True)
COMPLETIONS = Dialect(
    "completions",
    "/completions",
    _check_completion,
    _completion_output,
    bounds=("max_tokens",),
    meter=CompletionMeter,
)
EMBEDDINGS = Dialect(
    "embeddings", "/embeddings", _check_embedding, lambda _: Output(0, choices=0), usage_by_option=False
)
RESPONSES = Dialect(
    "responses",
    "/responses",
    _check_response,
    lambda fields: Output(count_of(fields, "max_output_tokens")),
    bounds=("max_output_tokens",),
    meter=ResponseMeter,
    usage_by_option=False,
    shows_usage=True,
)
