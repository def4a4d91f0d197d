"""How the metered endpoints differ: one ``Dialect`` each, so that there is one way of a call.

Source: https://platform.openai.com/docs/api-reference.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from billing.pricing.quote import Output
from proxy.http.errors import BadRequestError
from proxy.protocol.meter import CompletionMeter, StreamMeter
from proxy.protocol.responses_meter import ResponseMeter

CHOICES_MAX = 128  # OpenAI's own bound on n
TOKENS_MAX = 10_000_000
_FALLBACKS_MAX = 16
_INPUTS_MAX = 2048  # OpenAI's own bound on the inputs of one request for embeddings
# Members of the Responses API that name something stored at the provider, in the account that all share.
_STORED = ("previous_response_id", "conversation", "prompt")
_OWN_TOOLS = ("function", "custom")  # are run by the caller
Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Dialect:
    """What one endpoint's protocol has of its own.

    Args:
        path: where the provider serves it, below its base URL.
        check: raises ``BadRequestError`` where a member that money depends on is wrong.
        output: how much output a checked body asks for.
        meter: meters its streams.
        usage_by_option: the provider tells usage in a stream only where ``stream_options`` asks for it.
        shows_usage: a client is told usage in a stream though it did not ask.
        tells_cost: an answer comes back with its settled cost in it.
    """

    path: str
    check: Callable[[Fields], None]
    output: Callable[[Fields], Output]
    meter: type[StreamMeter] = StreamMeter
    usage_by_option: bool = True
    shows_usage: bool = False
    tells_cost: bool = False


def _check_chat(fields: Fields) -> None:
    _check_common(fields)
    messages = fields.get("messages")
    if (
        not isinstance(messages, list)
        or not messages
        or [item for item in messages if not isinstance(item, dict)]
    ):
        raise BadRequestError("'messages' must be a non-empty array of objects.", param="messages")
    _check_no_files(messages, "messages")
    _check_counts(fields, ("max_tokens", "max_completion_tokens"), TOKENS_MAX)
    _check_counts(fields, ("n", "best_of"), CHOICES_MAX)


def _chat_output(fields: Fields) -> Output:
    """Of two bounds the larger one counts: servers differ in which of them they know."""
    bound = max(fields.get("max_completion_tokens") or 0, fields.get("max_tokens") or 0)
    return Output(bound or None, _choices(fields))


def _check_completion(fields: Fields) -> None:
    _check_common(fields)
    _check_inputs(fields, "prompt")
    _check_counts(fields, ("max_tokens",), TOKENS_MAX, least=0)
    _check_counts(fields, ("n", "best_of"), CHOICES_MAX)


def _completion_output(fields: Fields) -> Output:
    """Each of several prompts has its own choices."""
    return Output(fields.get("max_tokens"), _choices(fields) * _count_inputs(fields["prompt"]))


def _check_embedding(fields: Fields) -> None:
    _check_common(fields)
    _check_inputs(fields, "input")
    if fields.get("stream"):
        raise BadRequestError("Embeddings are not streamed.", param="stream")


def _check_response(fields: Fields) -> None:
    """Refuse what would cost something that nobody here could see: work in the background, and what the provider has stored."""
    _check_common(fields)
    given = fields.get("input")
    if not (isinstance(given, str) and given) and not (
        isinstance(given, list) and given and all(isinstance(item, dict) for item in given)
    ):
        raise BadRequestError("'input' must be a text, or a non-empty array of objects.", param="input")
    _check_counts(fields, ("max_output_tokens",), TOKENS_MAX)
    if fields.get("background") not in (None, False):
        raise BadRequestError(
            "'background' is not served: a call is paid while it is answered.", param="background"
        )
    for name in _STORED:
        if fields.get(name) is not None:
            raise BadRequestError(
                f"{name!r} is not served: what the provider has stored cannot be priced. Send the whole input.",
                param=name,
            )
    if isinstance(given, list) and any(_is_reference(item) for item in given):
        raise BadRequestError("An 'item_reference' is not served: send the item itself.", param="input")
    _check_no_files(given, "input")
    tools = fields.get("tools")
    if not isinstance(tools, list | None) or not all(isinstance(tool, dict) for tool in tools or ()):
        raise BadRequestError("'tools' must be an array of objects.", param="tools")
    for tool in tools or ():
        if tool.get("type") not in _OWN_TOOLS:
            raise BadRequestError(
                "Only tools of type 'function' and 'custom' are served: the provider bills its own apart from tokens.",
                param="tools",
            )


def _is_reference(item: Fields) -> bool:
    """Tell whether an item is one that the provider has stored; its type may be left out, as a message's may."""
    kind = item.get("type")
    return kind == "item_reference" or (kind is None and not {"role", "content"} <= item.keys())


def _check_no_files(items: object, name: str) -> None:
    """Refuse files that the provider has stored: they are the account's, which all share, and their size is not known here."""
    for item in items if isinstance(items, list) else ():
        for parts in (item.get("content"), item.get("output")):
            if not isinstance(parts, list):
                continue
            for part in parts:
                if isinstance(part, dict) and any(
                    isinstance(place, dict) and place.get("file_id") is not None
                    for place in (part, part.get("file"))
                ):
                    raise BadRequestError("A 'file_id' is not served: send the file itself.", param=name)


def _check_common(fields: Fields) -> None:
    model = fields.get("model")
    if not isinstance(model, str) or not model:
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
        or not all(isinstance(name, str) for name in fallbacks)
    ):
        raise BadRequestError(f"'models' must be an array of at most {_FALLBACKS_MAX} names.", param="models")


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
        value = fields.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise BadRequestError(f"{name!r} must be a whole number from {least} to {most}.", param=name)


def _choices(fields: Fields) -> int:
    return max(fields.get("n") or 1, fields.get("best_of") or 1)


CHAT = Dialect("/chat/completions", _check_chat, _chat_output)
CHAT_WITH_COST = replace(CHAT, shows_usage=True, tells_cost=True)
COMPLETIONS = Dialect("/completions", _check_completion, _completion_output, meter=CompletionMeter)
EMBEDDINGS = Dialect("/embeddings", _check_embedding, lambda _: Output(0, choices=0), usage_by_option=False)
RESPONSES = Dialect(
    "/responses",
    _check_response,
    lambda fields: Output(fields.get("max_output_tokens")),
    meter=ResponseMeter,
    usage_by_option=False,
    shows_usage=True,
)
