"""Simulated answers of the other kinds: completions of the legacy kind, embeddings, and the Responses API.

Source: https://platform.openai.com/docs/api-reference, and https://openrouter.ai/docs/api-reference for ``usage.cost``.
"""

import base64
import hashlib
import struct
from collections.abc import Iterator
from typing import Any, ClassVar

from scripts.sim.answers import Answer, Event, Step
from scripts.sim.exact_json import dumps, to_bytes


class CompletionAnswer(Answer):
    """A completion: text in place of messages, the same kind of object streamed and whole."""

    chunk_kind: ClassVar[str] = "text_completion"
    document_kind: ClassVar[str] = "text_completion"

    def _rest(self, index: int) -> str:
        return f'"text":{dumps(self.plan.pieces[index])},"logprobs":null,"finish_reason":null}}'

    def _last_choice(self, index: int) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": self.plan.finish_reason}

    def _whole_choice(self, index: int) -> dict[str, Any]:
        text = self._prefix(index) + "".join(self._texts())
        return {**self._last_choice(index), "text": text, "finish_reason": self.finish_reason}

    def _prefix(self, index: int) -> str:
        """Return the prompt that choice ``index`` repeats, if it was asked to."""
        return self._ask.prefixes[index * self._ask.inputs // max(self._choices, 1)]

    def content(self) -> Iterator[Step]:
        """Yield the prompts that are repeated, then the steps of the content."""
        for choice in range(self._choices):
            if text := self._prefix(choice):
                rest = f'"text":{dumps(text)},"logprobs":null,"finish_reason":null}}'
                yield Event(self._framed(f'{self._chunk_head}{{"index":{choice},{rest}{self._chunk_tail}'))
        yield from super().content()


class EmbeddingAnswer(Answer):
    """Embeddings: vectors that depend on the input alone; nothing is generated."""

    def document(self) -> bytes:
        """Return the whole."""
        data = [
            {"object": "embedding", "index": index, "embedding": self._vector(index)}
            for index in range(self._ask.inputs)
        ]
        head = {"object": "list", "data": data, **self._head("list")}
        usage = self._usage_object()
        for name in ("completion_tokens", "completion_tokens_details", "prompt_tokens_details"):
            usage.pop(name)
        return self._ended(head, usage)

    def _vector(self, index: int) -> object:
        seed = hashlib.sha256(to_bytes(f"{index}:{self._ask.last_text}")).digest()
        numbers = [seed[place % len(seed)] / 256 for place in range(self._ask.dimensions)]
        if self._ask.encoding == "float":
            return numbers
        return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()


class ResponseAnswer(Answer):
    """An answer of the Responses API: output items, and typed events of a stream."""

    document_kind: ClassVar[str] = "response"

    def content(self) -> Iterator[Step]:
        """Yield the events before the first token, then those of the content."""
        self._number = 0
        for name in ("created", "in_progress"):
            yield Event(self._event(f"response.{name}", response=self._response("in_progress", [])))
        yield from super().content()

    def _chunk(self, index: int) -> Iterator[Event]:
        thinking = index < self.plan.reasoning_pieces
        if index in (0, self.plan.reasoning_pieces):
            yield from self._opening(thinking=thinking)
        kind = "output_text"
        if thinking:
            kind = "reasoning_text"
        elif self.behaviour.tool_calls:
            kind = "function_call_arguments"
        place = self._place(thinking=thinking)
        delta = self._event(f"response.{kind}.delta", **place, delta=self.plan.pieces[index])
        yield self._billed(index, delta)

    def _opening(self, *, thinking: bool) -> Iterator[Event]:
        """Yield the events that begin an item, and its one part of text."""
        item, place = self._item("", thinking=thinking), self._place(thinking=thinking)
        yield Event(self._event("response.output_item.added", output_index=place["output_index"], item=item))
        if item["type"] == "message":
            part = {"type": "output_text", "text": "", "annotations": []}
            yield Event(self._event("response.content_part.added", **place, part=part))

    def _place(self, *, thinking: bool) -> dict[str, Any]:
        output = 0 if thinking or not self.plan.reasoning_pieces else 1
        return {"item_id": f"item_{output}", "output_index": output, "content_index": 0}

    def _item(self, text: str, *, thinking: bool) -> dict[str, Any]:
        item_id = self._place(thinking=thinking)["item_id"]
        if thinking:
            content = [{"type": "reasoning_text", "text": text}]
            return {"id": item_id, "type": "reasoning", "summary": [], "content": content}
        if self.behaviour.tool_calls:
            return {
                "id": item_id,
                "type": "function_call",
                "call_id": "call_sim_1",
                "name": "lookup",
                "arguments": text,
                "status": "completed",
            }
        part = {"type": "output_text", "text": text, "annotations": []}
        return {
            "id": item_id,
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [part] if text else [],
        }

    def _items(self) -> list[dict[str, Any]]:
        reasoning, text = self._texts()
        items = [self._item(reasoning, thinking=True)] if reasoning else []
        return [*items, self._item(text, thinking=False)] if text else items

    def tail(self) -> list[bytes]:
        """Return the events that repeat the whole, and the last one with usage; none after a cut."""
        if self.plan.ending == "cut":
            return []
        if self.plan.ending == "error":
            error = {"code": "server_error", "message": "Provider disconnected"}
            failed = {**self._response("failed", self._items()), "error": error}
            return [self._event("response.failed", response=failed)]
        events = []
        for index, item in enumerate(self._items()):
            text = item.get("arguments") or "".join(part["text"] for part in item.get("content", []))
            if item["type"] == "message":
                place = {"item_id": item["id"], "output_index": index, "content_index": 0}
                events.append(self._event("response.output_text.done", **place, text=text))
            events.append(self._event("response.output_item.done", output_index=index, item=item))
        if not self.behaviour.done:
            return events
        status = self._status
        return [
            *events,
            self._event(f"response.{status}", response=self._whole()),
            self._framed("data: [DONE]"),  # OpenRouter's; OpenAI sends none
        ]

    @property
    def _status(self) -> str:
        return "incomplete" if self.plan.finish_reason == "length" else "completed"

    def _whole(self) -> dict[str, Any]:
        response = self._response(self._status, self._items())
        if self.behaviour.usage != "missing":
            response["usage"] = self._usage_object()
        return response

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        extra = (
            {} if self.behaviour.x_sim_extra is None else {"x_sim_extra": dict(self.behaviour.x_sim_extra)}
        )
        data = dumps({"type": kind, "sequence_number": number, **fields, **extra})
        return self._framed(f"event: {kind}{self._line_end}data: {data}")

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        head = self._head(self.document_kind)
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": head.get("id"),
            "object": "response",
            "created_at": head["created"],
            "model": head["model"],
            **self._ask.said,
            "status": status,
            "error": None,
            "incomplete_details": reason,
            "output": output,
            "parallel_tool_calls": True,
            "usage": None,
        }

    def _usage_object(self) -> dict[str, Any]:
        usage = super()._usage_object()
        renamed = {
            "prompt_tokens": "input_tokens",
            "completion_tokens": "output_tokens",
            "prompt_tokens_details": "input_tokens_details",
            "completion_tokens_details": "output_tokens_details",
        }
        return {renamed.get(name, name): value for name, value in usage.items()}

    def document(self) -> bytes:
        """Return the whole; one that breaks off has failed."""
        if self.plan.ending != "error":
            return to_bytes(dumps(self._whole()))
        error = {"code": "server_error", "message": "Provider disconnected"}
        return to_bytes(dumps({**self._response("failed", self._items()), "error": error}))
