"""The bytes of the simulated answers, in OpenRouter's shapes."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from scripts.sim.behaviour import Behaviour
from scripts.sim.books import Generation, SimModel, usd

_WORDS = [
    "the",
    "a",
    "of",
    "to",
    "and",
    "in",
    "is",
    "it",
    "you",
    "that",
    "he",
    "was",
    "for",
    "on",
    "are",
    "with",
    "as",
    "his",
    "they",
    "be",
    "at",
    "one",
    "have",
    "this",
    "from",
]
_COST = "@cost@"
_ERROR = {"code": 502, "message": "Provider disconnected"}


def word(index: int) -> str:
    """Return the content of chunk ``index``: one short English word with its space."""
    return " " + _WORDS[index % len(_WORDS)]


def dump(value: Mapping[str, Any], cost_nanousd: int | None = None) -> str:
    """Write JSON; a cost goes in as an exact number, never through a float."""
    text = json.dumps(value, separators=(",", ":"))
    return text if cost_nanousd is None else text.replace(f'"{_COST}"', usd(cost_nanousd))


def usage_of(generation: Generation, behaviour: Behaviour) -> dict[str, Any]:
    """Return the usage object; its cost is filled in by ``dump``."""
    usage: dict[str, Any] = {
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": generation.completion_tokens,
        "total_tokens": generation.prompt_tokens + generation.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": generation.reasoning_tokens},
    }
    if not behaviour.omit_cost:
        usage["cost"] = _COST
    return usage


class AnswerScript:
    """Makes the events of one answer.

    Args:
        generation: the entry in the books.
        model: whose prices apply.
        behaviour: how to behave.
        words: content per chunk.
        choices: ``n``.
        finish_reason: of every choice.
    """

    def __init__(
        self,
        generation: Generation,
        model: SimModel,
        behaviour: Behaviour,
        *,
        words: list[str],
        choices: int,
        finish_reason: str,
    ) -> None:
        self.generation = generation
        self.model = model
        self.behaviour = behaviour
        self.words = words
        self.choices = choices
        self.finish_reason = "tool_calls" if behaviour.tool_calls else finish_reason

    def cost(self) -> int:
        """Return what the answer costs so far, in nano-USD."""
        entry = self.generation
        return self.model.cost_nanousd(
            prompt=entry.prompt_tokens, cached=entry.cached_tokens, completion=entry.completion_tokens
        )

    def event(self, fields: Mapping[str, Any]) -> bytes:
        """Frame one chunk."""
        head: dict[str, Any] = {
            "id": self.generation.id,
            "provider": "Sim",
            "model": self.model.id,
            "object": "chat.completion.chunk",
            "created": int(self.generation.started_s),
        }
        if self.behaviour.extra:
            head["x_sim_extra"] = {"note": 'holds "usage" and [DONE] in a string', "number": 1.50}
        return self.frame(f"data: {dump({**head, **fields}, self.cost())}")

    def frame(self, text: str) -> bytes:
        """End an event with a blank line."""
        end = "\r\n" if self.behaviour.crlf else "\n"
        return f"{text}{end}{end}".encode()

    def chunk(self, index: int) -> Iterator[bytes]:
        """Yield the events of chunk ``index``, one per choice."""
        for choice in range(self.choices):
            delta = self._delta(index)
            fields: dict[str, Any] = {"choices": [self._choice(choice, delta, None)]}
            if self.behaviour.usage == "every_chunk_null":
                fields["usage"] = None
            yield self.event(fields)

    def _delta(self, index: int) -> dict[str, Any]:
        text = self.words[index]
        role: dict[str, Any] = {"role": "assistant"} if index == 0 else {}
        if index < self.behaviour.reasoning_chunks:
            return {**role, "content": "", "reasoning": text}
        if self.behaviour.tool_calls:
            call: dict[str, Any] = {"index": 0, "function": {"arguments": text}}
            if index == self.behaviour.reasoning_chunks:
                call = {
                    "index": 0,
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "lookup", "arguments": text},
                }
            return {**role, "content": None, "tool_calls": [call]}
        return {**role, "content": text}

    def _choice(self, index: int, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        logprobs = {"content": [{"token": "x", "logprob": -0.10, "bytes": None, "top_logprobs": []}]}
        return {
            "index": index,
            "delta": delta,
            "finish_reason": finish_reason,
            "native_finish_reason": finish_reason,
            "logprobs": logprobs if self.behaviour.logprobs and finish_reason is None else None,
        }

    def ending(self) -> Iterator[bytes]:
        """Yield the finish events, the usage and the end."""
        for choice in range(self.choices):
            fields: dict[str, Any] = {"choices": [self._choice(choice, {"content": ""}, self.finish_reason)]}
            if self.behaviour.usage == "beside_choices" and choice == self.choices - 1:
                fields["usage"] = usage_of(self.generation, self.behaviour)
            elif self.behaviour.usage == "every_chunk_null":
                fields["usage"] = None
            yield self.event(fields)
        if self.behaviour.usage in ("after_finish", "every_chunk_null"):
            yield self.event({"choices": [], "usage": usage_of(self.generation, self.behaviour)})
        if self.behaviour.done:
            yield self.frame("data: [DONE]")

    def error(self) -> bytes:
        """Return the error event of a provider that broke off."""
        choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "error"}
        return self.event({"error": _ERROR, "choices": [choice]})

    def plain(self) -> bytes:
        """Return the whole answer as one JSON document."""
        text = "".join(self.words)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self.behaviour.reasoning_chunks:
            cut = self.behaviour.reasoning_chunks
            message = {
                "role": "assistant",
                "content": "".join(self.words[cut:]),
                "reasoning": "".join(self.words[:cut]),
            }
        if self.behaviour.tool_calls:
            call = {"id": "call_1", "type": "function", "function": {"name": "lookup", "arguments": text}}
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
        choices = [
            {"index": index, "message": message, "finish_reason": self.finish_reason, "logprobs": None}
            for index in range(self.choices)
        ]
        body: dict[str, Any] = {
            "id": self.generation.id,
            "provider": "Sim",
            "model": self.model.id,
            "object": "chat.completion",
            "created": int(self.generation.started_s),
            "choices": choices,
        }
        if self.behaviour.extra:
            body["x_sim_extra"] = {"number": 1.50}
        if self.behaviour.usage != "missing":
            body["usage"] = usage_of(self.generation, self.behaviour)
        return dump(body, self.cost()).encode()
