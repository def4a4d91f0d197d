"""What a request asks for: read and checked before anything is generated."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scripts.sim.exact import to_bytes
from scripts.sim.models import SimModel

_CHOICES_MAX = 128
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
    """A chat completion as asked. ``bound`` is of tokens per choice."""

    model: SimModel
    stream: bool
    choices: int
    bound: int | None
    logprobs: bool
    user: str | None
    prompt_tokens: int
    last_text: str
    behaviour: Mapping[str, Any]


def read_ask(body: object, models: Mapping[str, SimModel]) -> Ask:
    """Read a request; fields that it does not know are let be.

    Raises:
        RefusedError: 400, what is wrong with it.
    """
    if not isinstance(body, dict):
        raise RefusedError(400, "the body must be a JSON object")
    model_id = body.get("model")
    model = models.get(model_id) if isinstance(model_id, str) else None
    if model is None:
        raise RefusedError(400, f"{model_id} is not a valid model ID")
    texts, prompt_tokens = _read_messages(body.get("messages"))
    stream = _read(body, "stream", bool)
    user = body.get("user")
    bounds = [_read_count(body, name) for name in ("max_completion_tokens", "max_tokens")]
    behaviour = body.get("sim")
    if behaviour is not None and not isinstance(behaviour, dict):
        raise RefusedError(400, "sim: expected an object")
    return Ask(
        model=model,
        stream=bool(stream),
        choices=_read_count(body, "n", most=_CHOICES_MAX) or 1,
        bound=min((bound for bound in bounds if bound is not None), default=None),
        logprobs=bool(_read(body, "logprobs", bool)),
        user=user if isinstance(user, str) else None,
        prompt_tokens=prompt_tokens,
        last_text=texts.get("user", ""),
        behaviour=behaviour or {},
    )


def _read(body: Mapping[str, Any], name: str, kind: type) -> Any:
    value = body.get(name)
    if value is not None and not isinstance(value, kind):
        raise RefusedError(400, f"{name}: expected {kind.__name__}")
    return value


def _read_count(body: Mapping[str, Any], name: str, *, most: int | None = None) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < 1
        or (most is not None and value > most)
    ):
        raise RefusedError(
            400, f"{name}: expected an integer of at least 1" + (f", at most {most}" if most else "")
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
