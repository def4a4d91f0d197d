"""How the simulated provider behaves: told per request, per model, or for the whole server."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

UsagePlace = Literal["after_finish", "beside_choices", "missing", "every_chunk_null"]


class BehaviourError(ValueError):
    """An unknown field, or a value of the wrong type."""


@dataclass(frozen=True, slots=True)
class Behaviour:
    """One answer's script. Counts are of content chunks per choice; ``None`` means never."""

    chunks: int = 20
    chunk_delay_ms: float = 0
    first_delay_ms: float = 0
    tokens_per_chunk: int = 1
    text: str | None = None
    events_per_write: int = 1
    split_bytes: int | None = None
    crlf: bool = False
    comments: int | None = None  # a comment before the first token, and one every so many chunks
    usage: UsagePlace = "after_finish"
    omit_cost: bool = False
    fail_status: int | None = None
    fail_body: str | None = None
    fail_headers: Mapping[str, str] = field(default_factory=dict)
    error_before_first: bool = False
    error_after: int | None = None
    stall_after: int | None = None
    stall_s: float = 3600
    cut_after: int | None = None
    null_body: bool = False
    html_body: bool = False
    tool_calls: bool = False
    reasoning_chunks: int = 0
    cached_tokens: int = 0
    logprobs: bool = False
    extra: bool = False  # an unknown field in every chunk
    cancellable: bool = True
    generation_id_header: bool = False
    generation_delay_s: float = 0
    generation_missing: bool = False
    done: bool = True

    def told(self, changes: object) -> "Behaviour":
        """Return this behaviour with some fields changed.

        Raises:
            BehaviourError: an unknown field or a wrong type.
        """
        if not isinstance(changes, Mapping):
            raise BehaviourError("a behaviour is an object")
        known = {item.name: item for item in fields(self)}
        for name, value in changes.items():
            if name not in known:
                raise BehaviourError(f"unknown behaviour {name!r}; known: {', '.join(sorted(known))}")
            _check(name, value, getattr(_DEFAULTS, name))
        return replace(self, **changes)

    @property
    def fails_early(self) -> bool:
        """Whether nothing is generated, and so nothing billed."""
        return bool(self.fail_status or self.null_body or self.html_body or self.error_before_first)


_DEFAULTS = Behaviour()


def _check(name: str, value: Any, default: Any) -> None:
    if name == "usage":
        good = value in get_args(UsagePlace)
    elif isinstance(default, bool):
        good = isinstance(value, bool)
    elif name in ("text", "fail_body"):
        good = value is None or isinstance(value, str)
    elif name == "fail_headers":
        good = isinstance(value, Mapping)
    else:
        good = value is None or (
            isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
        )
    if not good:
        raise BehaviourError(f"behaviour {name!r} cannot be {value!r}")
