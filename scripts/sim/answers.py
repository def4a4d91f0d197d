"""The bytes and the pauses of a simulated answer, in OpenRouter's shapes. Pure: nothing here waits or sends.

Source: https://openrouter.ai/docs/api-reference/streaming and https://openrouter.ai/docs/api-reference/errors.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from scripts.sim.behaviour import Behaviour
from scripts.sim.books import Generation
from scripts.sim.exact_json import dumps, to_bytes, usd
from scripts.sim.models import SimModel
from scripts.sim.requests import Ask

_WORDS = (
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
)
_WORD = re.compile(r"\s*\S+|\s+")
_DISCONNECTED = {"code": 502, "message": "Provider disconnected"}


class Event(NamedTuple):
    """Bytes to send; the tokens count as billed once they are sent."""

    data: bytes
    tokens: int = 0
    reasoning_tokens: int = 0


class Pause(NamedTuple):
    """Time to let pass; ``stall`` means silence on the wire, before which everything is sent."""

    seconds: float
    stall: bool = False


Step = Event | Pause
Ending = Literal["whole", "error", "cut"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is generated: per choice ``tokens`` in ``pieces``, of which ``kept`` are generated before the answer breaks off."""

    pieces: tuple[str, ...]
    reasoning_pieces: int
    tokens: int
    kept: int
    ending: Ending
    finish_reason: str

    def tokens_of(self, index: int, behaviour: Behaviour) -> int:
        """Return the tokens of piece ``index``; the last one may be cut short by the bound."""
        return min(behaviour.tokens_per_chunk, self.tokens - index * behaviour.tokens_per_chunk)


def plan_answer(ask: Ask, behaviour: Behaviour) -> Plan:
    """Choose the words, cut them at the request's bound, and find where the behaviour breaks the answer off."""
    told = ask.last_text if behaviour.echo and behaviour.text is None else behaviour.text
    content = [_word(index) for index in range(behaviour.chunks)] if told is None else _WORD.findall(told)
    if behaviour.tool_calls:
        content = _as_arguments(content)
    thoughts = [_word(index) for index in range(behaviour.reasoning_chunks)]
    wanted = (len(thoughts) + len(content)) * behaviour.tokens_per_chunk
    tokens = wanted if ask.bound is None else min(wanted, ask.bound)
    pieces = (*thoughts, *content)[: -(-tokens // behaviour.tokens_per_chunk)]
    kept, ending = _find_ending(behaviour, len(pieces))
    finish_reason = "tool_calls" if behaviour.tool_calls else "stop"
    return Plan(
        pieces=pieces,
        reasoning_pieces=min(len(thoughts), len(pieces)),
        tokens=tokens,
        kept=kept,
        ending=ending,
        finish_reason="length" if tokens < wanted else finish_reason,
    )


def _find_ending(behaviour: Behaviour, pieces: int) -> tuple[int, Ending]:
    """Return how many pieces are generated and how the answer ends then; what comes first wins."""
    error_after, cut_after = behaviour.error_after, behaviour.cut_after
    if cut_after is not None and (error_after is None or cut_after <= error_after):
        return min(cut_after, pieces), "cut"
    if error_after is not None:
        return min(error_after, pieces), "error"
    return pieces, "whole"


def _word(index: int) -> str:
    word = _WORDS[index % len(_WORDS)]
    return f" {word}" if index else word


def _as_arguments(words: list[str]) -> list[str]:
    """Return pieces that together are a JSON object, so that a client can parse the arguments of a whole call."""
    pieces = [json.dumps(word, ensure_ascii=False)[1:-1] for word in words] or [""]
    pieces[0] = '{"text":"' + pieces[0]
    pieces[-1] += '"}'
    return pieces


class Answer:
    """One chat completion: the steps of its content, then its tail; or the whole as one document.

    Args:
        generation: the entry in the books, for its id and its prompt.
        model: whose prices apply.
        ask: what was asked.
        behaviour: how to behave.
    """

    chunk_kind: ClassVar[str] = "chat.completion.chunk"
    document_kind: ClassVar[str] = "chat.completion"

    def __init__(self, generation: Generation, model: SimModel, ask: Ask, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.plan = plan_answer(ask, behaviour)
        self._ask = ask
        self._generation = generation
        self._model = model
        self._choices = ask.choices
        self._logprobs = ask.logprobs or behaviour.logprobs
        self._line_end = "\r\n" if behaviour.crlf else "\n"
        head = dumps(self._head(self.chunk_kind))
        extra = "" if behaviour.x_sim_extra is None else f',"x_sim_extra":{dumps(behaviour.x_sim_extra)}'
        null = ',"usage":null' if behaviour.usage == "every_chunk_null" else ""
        self._chunk_head = f'data: {head[:-1]},"choices":['
        self._chunk_tail = f"]{extra}{null}}}"
        self._usage_tail = f"]{extra},"

    @property
    def tokens(self) -> int:
        """The completion tokens of all choices that are generated, as far as the answer gets."""
        full = self.plan.kept * self.behaviour.tokens_per_chunk
        return min(full, self.plan.tokens) * self._ask.generated

    @property
    def reasoning_tokens(self) -> int:
        """The part of ``tokens`` that is reasoning."""
        full = min(self.plan.kept, self.plan.reasoning_pieces) * self.behaviour.tokens_per_chunk
        return min(full, self.plan.tokens) * self._ask.generated

    @property
    def finish_reason(self) -> str:
        """As the books note it when the answer got as far as it should."""
        return self.plan.finish_reason if self.plan.ending == "whole" else "error"

    @property
    def duration_s(self) -> float:
        """How long the generation takes. A stall is the wire's, not the generator's, and does not count."""
        pauses = max(self.plan.kept - 1, 0)
        return (float(self.behaviour.first_delay_ms) + pauses * float(self.behaviour.chunk_delay_ms)) / 1000

    def cost_nanousd(self, tokens: int) -> int:
        """Return what the generation costs with so many completion tokens."""
        return self._model.cost_nanousd(
            prompt_tokens=self._generation.prompt_tokens,
            cached_tokens=self._generation.cached_tokens,
            completion_tokens=tokens,
        )

    def content(self) -> Iterator[Step]:
        """Yield events and pauses up to the end of the content, or to where the answer breaks off."""
        behaviour = self.behaviour
        if behaviour.comments:
            yield self._comment()
        if behaviour.first_delay_ms:
            yield Pause(float(behaviour.first_delay_ms) / 1000)
        delay = Pause(float(behaviour.chunk_delay_ms) / 1000)
        for index in range(self.plan.kept):
            if index and behaviour.comments and index % behaviour.comments == 0:
                yield self._comment()
            if index == behaviour.stall_after:
                yield Pause(float(behaviour.stall_s), stall=True)
            elif index and delay.seconds:
                yield delay
            yield from self._chunk(index)
        if behaviour.stall_after == self.plan.kept:
            yield Pause(float(behaviour.stall_s), stall=True)

    def _comment(self) -> Event:
        return Event(self._framed(": OPENROUTER PROCESSING"))

    def _framed(self, text: str) -> bytes:
        return to_bytes(f"{text}{self._line_end}{self._line_end}")

    def _chunk(self, index: int) -> Iterator[Event]:
        rest = self._rest(index)
        for choice in range(self._choices):
            text = f'{self._chunk_head}{{"index":{choice},{rest}{self._chunk_tail}'
            yield self._billed(index, self._framed(text))

    def _billed(self, index: int, data: bytes) -> Event:
        tokens = self.plan.tokens_of(index, self.behaviour)
        return Event(data, tokens, tokens if index < self.plan.reasoning_pieces else 0)

    def _rest(self, index: int) -> str:
        """Return what a choice of piece ``index`` says after its own index."""
        delta = dumps(self._delta(index))
        logprobs = dumps(self._logprobs_of(self.plan.pieces[index])) if self._logprobs else "null"
        return f'"delta":{delta},"finish_reason":null,"native_finish_reason":null,"logprobs":{logprobs}}}'

    def _delta(self, index: int) -> dict[str, Any]:
        text = self.plan.pieces[index]
        if index < self.plan.reasoning_pieces:
            return {"role": "assistant", "content": "", "reasoning": text}
        if not self.behaviour.tool_calls:
            return {"role": "assistant", "content": text}
        call: dict[str, Any] = {"index": 0, "function": {"arguments": text}}
        if index == self.plan.reasoning_pieces:
            call = {"index": 0, **_tool_call(text)}
        return {"role": "assistant", "content": None, "tool_calls": [call]}

    def _logprobs_of(self, text: str) -> dict[str, Any]:
        token = {"token": text, "logprob": -0.25, "bytes": list(to_bytes(text)), "top_logprobs": []}
        return {"content": [token], "refusal": None}

    def tail(self) -> list[bytes]:
        """Return the events after the content: finish, usage and ``[DONE]``, or the error; none after a cut."""
        if self.plan.ending == "cut":
            return []
        if self.plan.ending == "error":
            return [self._error_event()]
        events = [self._finish_event(choice) for choice in range(self._choices)]
        if self.behaviour.usage in ("after_finish", "every_chunk_null", "zeros"):
            events.append(self._framed(f"{self._chunk_head}{self._usage_tail}{self._usage()}}}"))
        if self.behaviour.done:
            events.append(self._framed("data: [DONE]"))
        return events

    def _finish_event(self, index: int) -> bytes:
        choice = dumps(self._last_choice(index))
        beside = self.behaviour.usage == "beside_choices" and index == self._choices - 1
        tail = f"{self._usage_tail}{self._usage()}}}" if beside else self._chunk_tail
        return self._framed(f"{self._chunk_head}{choice}{tail}")

    def _last_choice(self, index: int) -> dict[str, Any]:
        reason = self.plan.finish_reason
        return {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "finish_reason": reason,
            "native_finish_reason": reason,
            "logprobs": None,
        }

    def _error_event(self) -> bytes:
        choice = {**self._last_choice(0), "finish_reason": "error"}
        head = self._head(self.chunk_kind)
        return self._framed(f"data: {dumps({**head, 'error': _DISCONNECTED, 'choices': [choice]})}")

    def _usage(self) -> str:
        return f'"usage":{dumps(self._usage_object())}'

    def _usage_object(self) -> dict[str, Any]:
        zeros = self.behaviour.usage == "zeros"  # as some servers send where they did not count
        prompt_tokens = 0 if zeros else self._generation.prompt_tokens
        tokens = 0 if zeros else self.tokens
        usage: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": prompt_tokens + tokens,
            "prompt_tokens_details": {"cached_tokens": self._generation.cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens, "image_tokens": 0},
        }
        if not self.behaviour.omit_cost:
            usage |= {
                "cost": usd(self.cost_nanousd(self.tokens)),
                "is_byok": False,
                "cost_details": {"upstream_inference_cost": None},
            }
        return usage

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            **({} if self.behaviour.anonymous else {"id": self._generation.id}),
            "provider": "Sim",
            "model": self._model.id,
            "object": kind,
            "created": int(self._generation.started_s),
        }

    def document(self) -> bytes:
        """Return the answer to a request that is not streamed; one that breaks off carries the error in its body."""
        body = {
            **self._head(self.document_kind),
            "choices": [self._whole_choice(index) for index in range(self._choices)],
            "system_fingerprint": None,  # OpenRouter's OpenAPI, ChatResult: always there, and may be null
        }
        return self._ended(body, self._usage_object())

    def _ended(self, body: dict[str, Any], usage: dict[str, Any]) -> bytes:
        """Return a document with what comes last: an unknown member, and the error or the usage."""
        if self.behaviour.x_sim_extra is not None:
            body["x_sim_extra"] = self.behaviour.x_sim_extra
        if self.plan.ending == "error":
            body["error"] = _DISCONNECTED
        elif self.behaviour.usage != "missing":
            body["usage"] = usage
        return to_bytes(dumps(body))

    def _texts(self) -> tuple[str, str]:
        """Return the reasoning and the content, as far as they get."""
        pieces, cut = self.plan.pieces[: self.plan.kept], self.plan.reasoning_pieces
        return "".join(pieces[:cut]), "".join(pieces[cut:])

    def _whole_choice(self, index: int) -> dict[str, Any]:
        reasoning, text = self._texts()
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None, "reasoning": None}
        if reasoning:
            message["reasoning"] = reasoning
        if self.behaviour.tool_calls:
            message |= {"content": None, "tool_calls": [{"index": 0, **_tool_call(text)}]}
        return {
            "index": index,
            "message": message,
            "finish_reason": self.finish_reason,
            "native_finish_reason": self.finish_reason,
            "logprobs": self._logprobs_of(text) if self._logprobs else None,
        }


def _tool_call(arguments: str) -> dict[str, Any]:
    return {"id": "call_sim_1", "type": "function", "function": {"name": "lookup", "arguments": arguments}}
