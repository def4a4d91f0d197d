"""How the simulated provider behaves: told per request, per model, or for the whole server."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self, cast, get_args

UsagePlace = Literal["after_finish", "beside_choices", "missing", "every_chunk_null", "zeros"]

_COUNT_MAX = 1_000_000
_TIME_MAX = 86_400_000
_FAIL_STATUS_LEAST, _FAIL_STATUS_MOST = 400, 599


class BehaviourError(ValueError):
    """An unknown field, or a value that the field cannot have."""


def _checked(default: Any, check: Callable[[Any], bool]) -> Any:
    return field(default=default, metadata={"check": check})


def _is_whole(value: object, least: int, most: int = _COUNT_MAX) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_usage_place(value: object) -> bool:
    return isinstance(value, str) and value in get_args(UsagePlace)


def _count(default: int, *, least: int = 0) -> int:
    return cast("int", _checked(default, lambda value: _is_whole(value, least)))


def _maybe(*, least: int = 0, most: int = _COUNT_MAX) -> int | None:
    return cast("int | None", _checked(None, lambda value: value is None or _is_whole(value, least, most)))


def _time(default: float) -> float:
    def check(value: object) -> bool:
        # A Decimal comes from a request's JSON, whose numbers are read exactly.
        good = not isinstance(value, bool | str | bytes) and hasattr(value, "__float__")
        return good and 0 <= float(cast("float", value)) <= _TIME_MAX

    return cast("float", _checked(default, check))


def _flag(*, default: bool = False) -> bool:
    return cast("bool", _checked(default, lambda value: isinstance(value, bool)))


@dataclass(frozen=True, slots=True)
class Behaviour:
    """One answer's script.

    A chunk is one word, for each of the ``n`` choices. ``…_after`` counts chunks, reasoning among them; ``None`` means never.

    Raises:
        BehaviourError: a value that a field cannot have.
    """

    chunks: int = _count(20)
    tokens_per_chunk: int = _count(1, least=1)
    # Explicit content, one chunk per word, in place of ``chunks``.
    text: str | None = _checked(None, lambda value: value is None or isinstance(value, str))
    # The user's last message as the content.
    echo: bool = _flag()
    # Chunks of reasoning before those of content.
    reasoning_chunks: int = _count(0)
    # The content as the arguments of a tool call.
    tool_calls: bool = _flag()
    cached_tokens: int = _count(0)
    # As if the request had asked for them.
    logprobs: bool = _flag()
    # An unknown field in every chunk and answer.
    x_sim_extra: Mapping[str, Any] | None = _checked(
        None, lambda value: value is None or isinstance(value, Mapping)
    )

    first_delay_ms: float = _time(0)
    chunk_delay_ms: float = _time(0)
    # Silence on the wire for ``stall_s``; then the answer goes on.
    stall_after: int | None = _maybe()
    stall_s: float = _time(3600)

    events_per_write: int = _count(1, least=1)
    # Each write in pieces of so many bytes.
    split_bytes: int | None = _maybe(least=1)
    crlf: bool = _flag()
    # A comment at the start and after every so many chunks; 0 means none.
    comments: int = _count(0)
    usage: UsagePlace = field(default="after_finish", metadata={"check": _is_usage_place})
    omit_cost: bool = _flag()
    # False leaves out ``[DONE]``.
    done: bool = _flag(default=True)

    # Refused before anything is generated; the body is JSON's value, or a text sent as it is.
    fail_status: int | None = _maybe(least=_FAIL_STATUS_LEAST, most=_FAIL_STATUS_MOST)
    fail_body: Any = field(default=None, metadata={"check": lambda _: True})
    fail_headers: Mapping[str, str] | None = _checked(None, lambda value: value is None or _is_headers(value))
    # 200, and then nothing but an error with this code, ``null`` or HTML.
    error_before_first: bool = _flag()
    error_code: int = cast(
        "int", _checked(502, lambda value: _is_whole(value, _FAIL_STATUS_LEAST, _FAIL_STATUS_MOST))
    )
    null_body: bool = _flag()
    html_body: bool = _flag()
    # An error event, or the connection's end, after so many chunks.
    error_after: int | None = _maybe()
    cut_after: int | None = _maybe()

    # Whether closing the connection ends the generation, and the billing with it.
    cancellable: bool = _flag(default=True)
    generation_id_header: bool = _flag()
    # The answer names no id of its own, as OpenAI's embeddings do not.
    anonymous: bool = _flag()
    # How long after its end ``/generation`` still denies a generation, or whether it always does.
    generation_delay_s: float = _time(0)
    generation_missing: bool = _flag()

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not item.metadata["check"](value):
                raise BehaviourError(f"behaviour {item.name!r} cannot be {value!r}")

    def told(self, changes: object) -> Self:
        """Return this behaviour with some fields changed.

        Raises:
            BehaviourError: not a mapping, an unknown field, or a value that the field cannot have.
        """
        if not isinstance(changes, Mapping):
            raise BehaviourError("a behaviour is an object")
        if not changes:
            return self
        known = {item.name for item in fields(self)}
        if unknown := sorted(str(name) for name in changes if name not in known):
            raise BehaviourError(f"unknown behaviour {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return replace(self, **changes)

    @property
    def fails_early(self) -> bool:
        """Whether nothing is generated, and so nothing billed."""
        return bool(self.fail_status or self.null_body or self.html_body or self.error_before_first)


def _is_headers(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(text, str) for pair in value.items() for text in pair
    )
