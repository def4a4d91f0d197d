"""Where an answer tells its usage, and what is known of it when it does so more than once. Pure.

At the top is OpenAI's place. Groq's streams have it in ``x_groq`` (https://console.groq.com/docs/api-reference), Moonshot's in the
last chunk of each choice (https://platform.moonshot.ai/docs/api/chat). Some servers tell the sum so far in every chunk (vLLM's
``continuous_usage_stats``), some tell zeros in a chunk after the one with figures: a figure stays until a larger one comes, and
nothing is added up over time.
"""

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

_MEMBERS_MAX = 128  # that are kept, whatever a server makes up
_CHOICES_MAX = 128
_DEPTH_MAX = 4
_OF_A_CHOICE = frozenset(("completion_tokens", "output_tokens"))


class UsageFound:
    """The usage that an answer told so far."""

    def __init__(self) -> None:
        self._top: Mapping[str, Any] | None = None
        self._of_choices: dict[int, Mapping[str, Any]] = {}

    @property
    def said(self) -> Mapping[str, Any] | None:
        """All that is known, as one ``usage`` object; None if nothing was told."""
        if self._top is not None or not self._of_choices:
            return self._top
        return _joined(list(self._of_choices.values()))

    def note(self, fields: Mapping[str, Any]) -> bool:
        """Look at an answer, or at one event of it; return whether it told something."""
        told = False
        for usage in _of_answer(fields):
            self._top = usage if self._top is None else _larger(self._top, usage)
            told = True
        for index, usage in _of_choices(fields):
            known = self._of_choices.get(index)
            if known is not None:
                self._of_choices[index] = _larger(known, usage)
            elif len(self._of_choices) < _CHOICES_MAX:
                self._of_choices[index] = usage
            told = True
        return told


def find_usage(fields: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the usage that a whole answer tells."""
    found = UsageFound()
    found.note(fields)
    return found.said


def _of_answer(fields: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    groq = fields.get("x_groq")
    for holder in (fields, groq):
        usage = holder.get("usage") if isinstance(holder, dict) else None
        if isinstance(usage, dict):
            yield usage


def _of_choices(fields: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    choices = fields.get("choices")
    for position, choice in enumerate(choices if isinstance(choices, list) else ()):
        usage = choice.get("usage") if isinstance(choice, dict) else None
        if isinstance(usage, dict):
            index = choice.get("index")
            yield index if isinstance(index, int) else position, usage


def _joined(usages: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Join those of several choices: they share the prompt, and each has a completion of its own.

    The total stays that of one choice, so that the figures do not add up and count as an estimate.
    """
    joined = dict(usages[0])
    for usage in usages[1:]:
        summed = {
            name: joined[name] + usage[name]
            for name in _OF_A_CHOICE & joined.keys() & usage.keys()
            if _is_number(joined[name]) and _is_number(usage[name])
        }
        joined = {**_larger(joined, usage), **summed}
    return joined


def _larger(known: Mapping[str, Any], news: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """Return what is told now, with the larger of two figures where both have one."""
    merged = dict(known)
    for name, value in news.items():
        before = merged.get(name)
        if isinstance(before, dict) and isinstance(value, dict) and depth < _DEPTH_MAX:
            merged[name] = _larger(before, value, depth + 1)
        elif before is None:
            if name in merged or len(merged) < _MEMBERS_MAX:
                merged[name] = value
        elif _is_number(before) and _is_number(value):
            merged[name] = max(before, value)
        elif value is not None and not _is_number(before) and not isinstance(before, dict):
            merged[name] = value
    return merged


def _is_number(value: Any) -> bool:
    return isinstance(value, int | Decimal) and not isinstance(value, bool) and value == value  # noqa: PLR0124 - NaN
