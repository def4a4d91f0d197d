"""What a request asks for: read and checked before anything is generated."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from scripts.sim.exact_json import dumps, to_bytes
from scripts.sim.models import SimModel

_CHOICES_MAX = 128
_DIMENSIONS_MAX = 4096
_BYTES_PER_TOKEN = 4
_TOKENS_PER_MESSAGE = 3
_TOKENS_PER_MEDIA_PART = 85


class RefusedError(Exception):
    """A request that gets an error in OpenRouter's shape. Source: https://openrouter.ai/docs/api-reference/errors."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True, slots=True)
class Ask:
    """A request as asked.

    Args:
        choices: how many answers are sent.
        generated: how many are generated, and billed.
        bound: of tokens per choice.
        last_text: the user's last message, or the prompt.
        inputs: how many prompts or inputs there are; answers are shared out evenly.
        encoding: of embeddings, ``float`` or ``base64``.
        dimensions: of embeddings.
        prefixes: per input what comes before each of its answers, and is not billed.
        said: the members that the answer repeats.
    """

    model: SimModel
    stream: bool
    choices: int
    bound: int | None
    logprobs: bool
    user: str | None
    prompt_tokens: int
    last_text: str
    behaviour: Mapping[str, Any]
    generated: int = 1
    inputs: int = 1
    encoding: str = "float"
    dimensions: int = 8
    prefixes: tuple[str, ...] = ("",)
    said: Mapping[str, Any] = field(default_factory=dict)


def read_ask(body: object, models: Mapping[str, SimModel]) -> Ask:
    """Read a chat completion; fields that it does not know are let be.

    Raises:
        RefusedError: 400, what is wrong with it.
    """
    fields, model = _read_model(body, models)
    texts, prompt_tokens = _read_messages(fields.get("messages"))
    bounds = [_read_count(fields, name) for name in ("max_completion_tokens", "max_tokens")]
    choices = _read_count(fields, "n", most=_CHOICES_MAX) or 1
    return _make_ask(
        fields,
        model,
        choices=choices,
        bound=min((bound for bound in bounds if bound is not None), default=None),
        prompt_tokens=prompt_tokens,
        last_text=texts.get("user", ""),
        logprobs=bool(_read(fields, "logprobs", bool)),
    )


def read_completion(body: object, models: Mapping[str, SimModel]) -> Ask:
    """Read a completion of the legacy kind.

    Raises:
        RefusedError: 400, what is wrong with it.
    """
    fields, model = _read_model(body, models)
    prompts = _read_inputs(fields.get("prompt"), "prompt")
    choices = _read_count(fields, "n", most=_CHOICES_MAX) or 1
    best_of = _read_count(fields, "best_of", most=_CHOICES_MAX) or choices
    if best_of < choices or (best_of > choices and fields.get("stream")):
        raise RefusedError(400, "best_of: expected at least n, and no stream")
    suffix = _read(fields, "suffix", str) or ""
    ask = _make_ask(
        fields,
        model,
        choices=choices * len(prompts),
        bound=_read_count(fields, "max_tokens", least=0),
        prompt_tokens=sum(tokens for _, tokens in prompts) + _tokens_of(suffix),
        last_text=prompts[-1][0],
    )
    echo = _read(fields, "echo", bool)
    return replace(
        ask,
        generated=best_of * len(prompts),
        inputs=len(prompts),
        prefixes=tuple(text if echo else "" for text, _ in prompts),
    )


def read_embedding(body: object, models: Mapping[str, SimModel]) -> Ask:
    """Read a request for embeddings; nothing is generated.

    Raises:
        RefusedError: 400, what is wrong with it.
    """
    fields, model = _read_model(body, models)
    inputs = _read_inputs(fields.get("input"), "input")
    encoding = fields.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise RefusedError(400, "encoding_format: expected float or base64")
    ask = _make_ask(
        {**fields, "stream": None},
        model,
        choices=0,
        bound=0,
        prompt_tokens=sum(tokens for _, tokens in inputs),
        last_text=inputs[-1][0],
    )
    dimensions = _read_count(fields, "dimensions", most=_DIMENSIONS_MAX) or ask.dimensions
    return replace(ask, generated=0, inputs=len(inputs), encoding=encoding, dimensions=dimensions)


def read_response(body: object, models: Mapping[str, SimModel]) -> Ask:
    """Read a request of the Responses API, without state as OpenRouter has it.

    Raises:
        RefusedError: 400, what is wrong with it.
    """
    fields, model = _read_model(body, models)
    if fields.get("background") or fields.get("previous_response_id"):
        raise RefusedError(400, "nothing is stored here")
    given = fields.get("input")
    texts, tokens = (
        ({"user": given}, _tokens_of(given) + _TOKENS_PER_MESSAGE)
        if isinstance(given, str)
        else _read_messages([_as_message(item) for item in given])
        if isinstance(given, list)
        else _refuse("input: expected a string or an array")
    )
    ask = _make_ask(
        fields,
        model,
        choices=1,
        bound=_read_count(fields, "max_output_tokens"),
        prompt_tokens=tokens + _tokens_of(_read(fields, "instructions", str) or ""),
        last_text=texts.get("user", ""),
    )
    names = ("instructions", "max_output_tokens", "tools", "tool_choice", "temperature", "store", "metadata")
    return replace(ask, said={name: fields.get(name) for name in names})


def _as_message(item: object) -> object:
    """Return an item as a message; calls of functions and their outputs count by their JSON."""
    if not isinstance(item, dict) or "role" in item:
        return item
    return {"role": "tool", "content": dumps(item)}


def _refuse(message: str) -> NoReturn:
    raise RefusedError(400, message)


def _read_inputs(given: object, name: str) -> list[tuple[str, int]]:
    """Return each text with its tokens; of an input that is token ids the text is not known."""
    if isinstance(given, str):
        return [(given, _tokens_of(given))]
    if not isinstance(given, list) or not given:
        raise RefusedError(400, f"{name}: expected a string or an array")
    if all(isinstance(item, int) for item in given):
        return [("", len(given))]
    found = []
    for item in given:
        if isinstance(item, str):
            found.append((item, _tokens_of(item)))
        elif isinstance(item, list) and item and all(isinstance(token, int) for token in item):
            found.append(("", len(item)))
        else:
            raise RefusedError(400, f"{name}: expected strings or arrays of token ids")
    return found


def _tokens_of(text: str) -> int:
    return -(-len(to_bytes(text)) // _BYTES_PER_TOKEN)


def _read_model(body: object, models: Mapping[str, SimModel]) -> tuple[dict[str, Any], SimModel]:
    if not isinstance(body, dict):
        raise RefusedError(400, "the body must be a JSON object")
    model_id = body.get("model")
    model = models.get(model_id) if isinstance(model_id, str) else None
    if model is None:
        raise RefusedError(400, f"{model_id} is not a valid model ID")
    return body, model


def _make_ask(
    body: Mapping[str, Any],
    model: SimModel,
    *,
    choices: int,
    bound: int | None,
    prompt_tokens: int,
    last_text: str,
    logprobs: bool = False,
) -> Ask:
    """Read what every kind of request has."""
    user = body.get("user")
    behaviour = body.get("sim")
    if behaviour is not None and not isinstance(behaviour, dict):
        raise RefusedError(400, "sim: expected an object")
    return Ask(
        model=model,
        stream=bool(_read(body, "stream", bool)),
        choices=choices,
        generated=choices,
        bound=bound,
        logprobs=logprobs,
        user=user if isinstance(user, str) else None,
        prompt_tokens=prompt_tokens,
        last_text=last_text,
        behaviour=behaviour or {},
    )


def _read(body: Mapping[str, Any], name: str, kind: type) -> Any:
    value = body.get(name)
    if value is not None and not isinstance(value, kind):
        raise RefusedError(400, f"{name}: expected {kind.__name__}")
    return value


def _read_count(body: Mapping[str, Any], name: str, *, least: int = 1, most: int | None = None) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < least
        or (most is not None and value > most)
    ):
        raise RefusedError(
            400, f"{name}: expected an integer of at least {least}" + (f", at most {most}" if most else "")
        )
    return value


def _read_messages(messages: object) -> tuple[dict[str, str], int]:
    """Return the last text per role and the prompt's tokens.

    The rule is this provider's own: a token per four bytes of UTF-8, three per message, 85 per image or other media part.
    """
    if not isinstance(messages, list) or not messages:
        raise RefusedError(400, "messages: expected a non-empty array")
    texts: dict[str, str] = {}
    size_bytes = media_parts = 0
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RefusedError(400, f"messages.{index}: expected an object with a role")
        text, media = _read_content(message.get("content"), index)
        size_bytes += len(to_bytes(text))
        media_parts += media
        texts[message["role"]] = text
    tokens = -(-size_bytes // _BYTES_PER_TOKEN) + _TOKENS_PER_MESSAGE * len(messages)
    return texts, tokens + _TOKENS_PER_MEDIA_PART * media_parts


def _read_content(content: object, index: int) -> tuple[str, int]:
    if content is None or isinstance(content, str):
        return content or "", 0
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise RefusedError(400, f"messages.{index}.content: expected a string or an array of parts")
    texts = [part["text"] for part in content if isinstance(part.get("text"), str)]
    return "".join(texts), len(content) - len(texts)
