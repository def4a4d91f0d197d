"""What real clients send: shapes as they arrived, or as the client's source makes them; the words are ours. See docs/clients.md."""

import json
from pathlib import Path
from typing import Any

import pytest

from proxy.http.errors import BadRequestError, NotStoredError, error_object
from proxy.protocol.content import find_extras
from proxy.protocol.dialects import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES
from proxy.protocol.members import Policy

_FOLDER = Path(__file__).parents[2] / "transcripts" / "clients"
_STRICT = Policy()
_DIALECTS = {f"/v1{dialect.path}": dialect for dialect in (CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES)}
_SEEN = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(_FOLDER.glob("*.json"))}
_REFUSED = {name: seen for name, seen in _SEEN.items() if "refused" in seen}


@pytest.mark.parametrize("name", sorted(_SEEN.keys() - _REFUSED.keys()))
def test_an_honest_client_is_not_refused(name: str) -> None:
    """By neither kind of provider: nothing that it sends is billed apart, which kind ``openai`` serves none of."""
    seen = _SEEN[name]
    _DIALECTS[seen["path"]].check(seen["request"], _STRICT)
    assert find_extras(seen["request"]) == {}


@pytest.mark.parametrize("name", sorted(_REFUSED))
def test_what_a_client_must_switch_off_is_said(name: str) -> None:
    seen = _REFUSED[name]
    with pytest.raises(BadRequestError) as refused:
        _DIALECTS[seen["path"]].check(seen["request"], _STRICT)
    assert refused.value.param == seen["refused"]
    assert any(hint in str(refused.value) for hint in ("Switch", "switch", "'store': false", "whole input"))


def test_a_client_that_continues_by_id_learns_that_nothing_is_kept() -> None:
    """OpenAI's code for an id that it does not know: clients that can send the whole input then do."""
    for name in ("openai-python-3.57.0-responses-stored", "vscode-chat-092f70e-responses-stored"):
        with pytest.raises(NotStoredError) as refused:
            RESPONSES.check(_SEEN[name]["request"], _STRICT)
        assert error_object(refused.value)["code"] == "previous_response_not_found"


def test_every_kind_of_tool_loop_is_among_them() -> None:
    """Each turn sends what came before: a loop that is refused in its second step is worth nothing."""
    steps: dict[str, set[str]] = {}
    for seen in _SEEN.values():
        request: dict[str, Any] = seen["request"]
        items = request.get("messages") or request.get("input")
        kinds = {
            str(item.get("type") if "input" in request else item.get("role"))
            for item in (items if isinstance(items, list) else ())
            if isinstance(item, dict)
        }
        steps.setdefault(seen["path"], set()).update(kinds)
    assert steps["/v1/chat/completions"] >= {"assistant", "tool", "function"}
    assert steps["/v1/responses"] >= {
        "function_call",
        "function_call_output",
        "custom_tool_call",
        "custom_tool_call_output",
        "reasoning",
        "additional_tools",
    }
