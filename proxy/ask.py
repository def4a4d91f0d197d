"""Reading what the caller asks: a bounded body, parsed once, checked where money depends on it."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from config.settings import LimitSettings
from proxy.context import stages_of
from proxy.errors import BadRequestError, BodyTimeoutError, BodyTooLargeError
from proxy.jsonspan import DuplicateKeyError, JsonSpanError, Member, scan_object, set_members

CHOICES_MAX = 128  # OpenAI's own bound on n
TOKENS_MAX = 10_000_000
_FALLBACKS_MAX = 16


@dataclass(frozen=True, slots=True)
class Ask:
    """A chat completion as asked; members that Tuma does not know are kept byte for byte."""

    text: str
    members: list[Member]
    fields: Mapping[str, Any]
    model: str
    stream: bool
    stream_options: Mapping[str, Any] | None
    include_usage: bool
    size: int

    def body_with(self, changes: Mapping[str, str]) -> bytes:
        """Return the body with these members set to JSON text, everything else untouched."""
        text = set_members(self.text, self.members, changes) if changes else self.text
        return text.encode()

    @property
    def models(self) -> list[str]:
        """Every model that may answer: the one asked for, and OpenRouter's fallbacks."""
        return [self.model, *(name for name in self.fields.get("models") or () if name != self.model)]


async def read_ask(request: web.Request, limits: LimitSettings) -> Ask:
    """Read and check the body of a chat completion.

    Raises:
        BodyTooLargeError, BodyTimeoutError, BadRequestError: nothing was sent anywhere.
    """
    body = await read_body(request, limits)
    try:
        text = body.decode("utf-8")
        members = scan_object(text)
    except UnicodeDecodeError:
        raise BadRequestError("The body is not valid UTF-8.") from None
    except DuplicateKeyError as error:
        raise BadRequestError(f"The body names {error.key!r} twice.", param=error.key) from None
    except JsonSpanError as error:
        raise BadRequestError(f"The body is not a valid JSON object: {error}") from None
    fields = {member.key: member.value for member in members}
    _check(fields)
    options = fields.get("stream_options")
    stages_of(request).mark("read")
    return Ask(
        text=text,
        members=members,
        fields=fields,
        model=fields["model"],
        stream=bool(fields.get("stream")),
        stream_options=options,
        include_usage=bool(options and options.get("include_usage")),
        size=len(body),
    )


async def read_body(request: web.Request, limits: LimitSettings) -> bytes:
    """Read a body whole, within the settings' bounds of size and time.

    Raises:
        BodyTooLargeError, BodyTimeoutError, BadRequestError: it could not be read.
    """
    if request.content_length is not None and request.content_length > limits.body_bytes:
        raise BodyTooLargeError(f"The body is larger than {limits.body_bytes} bytes.")
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise BodyTooLargeError(f"The body is larger than {limits.body_bytes} bytes.") from None
    except TimeoutError:
        raise BodyTimeoutError(f"The body did not arrive within {limits.body_timeout_s:g} seconds.") from None
    except (web.RequestPayloadError, ConnectionResetError, ValueError) as error:
        raise BadRequestError(f"The body could not be read: {error}") from None


def _check(fields: Mapping[str, Any]) -> None:
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequestError("'model' must be the name of a model.", param="model")
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
        raise BadRequestError("'messages' must be a non-empty array of objects.", param="messages")
    for name in ("max_tokens", "max_completion_tokens"):
        _check_count(fields, name, TOKENS_MAX)
    _check_count(fields, "n", CHOICES_MAX)
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
