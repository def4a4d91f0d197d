"""A plain answer made of a stream, for a provider that streams though it was asked not to. Pure.

The deltas of a choice are put together as clients of OpenAI's protocol do (https://platform.openai.com/docs/api-reference/chat-streaming):
texts follow each other, items of lists that have an ``index`` are one item each, and what names something stands once.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from proxy.protocol.json_document import read_document
from proxy.protocol.sse import BOM, EventSplitter, event_data
from proxy.protocol.usage_found import UsageFound

_FIELDS = (b"data:", b"event:", b"id:", b"retry:", b":")
_NAMES = frozenset(("id", "type", "role", "index", "format", "object"))  # are told again, not continued
_WHOLE = {"chat.completion.chunk": "chat.completion"}
_LAST_TYPES = frozenset(("response.completed", "response.incomplete", "response.failed"))
_ITEMS_MAX = 100_000
_DEPTH_MAX = 8


def is_stream(beginning: bytes) -> bool:
    """Tell by its first bytes whether a body is one of server-sent events, whatever its media type says."""
    return beginning.removeprefix(BOM).lstrip().startswith(_FIELDS)


def plain_from_stream(body: bytes) -> bytes | None:
    """Return the plain answer that a whole stream amounts to; None if it says nothing.

    Args:
        body: events of chat completions, of completions, or of the Responses API, where the last event holds the whole.
    """
    whole: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    usage = UsageFound()
    for fields in _events(body):
        response = fields.get("response")
        if fields.get("type") in _LAST_TYPES and isinstance(response, dict):
            return _json(response)
        usage.note(fields)
        for name, value in fields.items():
            if name == "choices":
                _add_choices(choices, value)
            elif value is not None or name not in whole:
                whole[name] = value
    if not whole and not choices:
        return None
    if usage.said is not None:
        whole["usage"] = usage.said
    if choices:
        whole["object"] = _WHOLE.get(str(whole.get("object")), whole.get("object"))
        whole["choices"] = [_finished(choices[index]) for index in sorted(choices)]
    return _json(whole)


def _events(body: bytes) -> Iterator[Mapping[str, Any]]:
    splitter = EventSplitter(len(body))
    for event in (*splitter.feed(body), splitter.flush()):
        found = read_document(event_data(event) or b"")
        if found is not None:
            yield found.fields


def _add_choices(choices: dict[int, dict[str, Any]], news: Any) -> None:
    for position, choice in enumerate(news if isinstance(news, list) else ()):
        if isinstance(choice, dict):
            index = choice.get("index")
            index = index if isinstance(index, int) else position
            _add(choices.setdefault(index, {}), {**choice, "index": index})


def _finished(choice: dict[str, Any]) -> dict[str, Any]:
    """Return a choice as a plain answer has it: what its deltas said is its message."""
    if "delta" in choice:
        delta = choice.pop("delta")
        message = {"role": "assistant", "content": None, **(delta if isinstance(delta, dict) else {})}
        for call in message.get("tool_calls") or ():
            if isinstance(call, dict):
                call.pop("index", None)
        choice["message"] = message
    choice.setdefault("finish_reason", None)
    return choice


def _add(known: dict[str, Any], news: Mapping[str, Any], depth: int = 0) -> None:
    for name, value in news.items():
        before = known.get(name)
        if value is None:
            known.setdefault(name, None)
        elif isinstance(before, dict) and isinstance(value, dict) and depth < _DEPTH_MAX:
            _add(before, value, depth + 1)
        elif isinstance(before, list) and isinstance(value, list):
            _add_items(before, value, depth)
        elif isinstance(before, str) and isinstance(value, str) and _goes_on(name, depth):
            known[name] = before + value
        elif isinstance(value, list):
            known[name] = []
            _add_items(known[name], value, depth)
        elif isinstance(value, dict):
            known[name] = {}
            _add(known[name], value, depth + 1)
        else:
            known[name] = value


def _goes_on(name: str, depth: int) -> bool:
    """Tell whether a text is continued by the next; of a choice itself only a completion's is."""
    return name == "text" if depth == 0 else name not in _NAMES


def _add_items(known: list[Any], news: list[Any], depth: int) -> None:
    for item in news:
        index = item.get("index") if isinstance(item, dict) else None
        same = next((one for one in known if isinstance(one, dict) and one.get("index") == index), None)
        if index is not None and same is not None and depth < _DEPTH_MAX:
            _add(same, item, depth + 1)
        elif len(known) < _ITEMS_MAX:
            known.append(item)


def _json(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":"), default=float).encode()
