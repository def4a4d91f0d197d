"""What may be asked for: the table of members is whole, and what it does not have is refused."""

import contextlib
import typing
from typing import Any

import pytest
from openai.types import completion_create_params as completions
from openai.types import embedding_create_params as embeddings
from openai.types.chat import completion_create_params as chat
from openai.types.responses import response_create_params as responses

from proxy.http.errors import BadRequestError
from proxy.protocol.content import find_extras
from proxy.protocol.dialects import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, Dialect, count_of
from proxy.protocol.members import DIALECTS, Policy

STRICT, LOOSE = Policy(), Policy(unknown="pass")
HELLO: dict[str, Any] = {"model": "openai/gpt-4o", "messages": [{"role": "user", "content": "hi"}]}
SAID: dict[str, Any] = {"model": "openai/gpt-4o", "input": "hi"}
PDF = {"type": "file", "file": {"filename": "a.pdf", "file_data": "https://example.com/a.pdf"}}
SEARCH = {"type": "web_search"}
# The caller runs it, whatever its arguments are called.
READS_A_FILE = {
    "type": "function",
    "name": "f",
    "parameters": {"properties": {"file_id": {"type": "string"}}},
}


def members_of(shape: Any) -> set[str]:
    """Return the members of a request of the ``openai`` package: a union of typed dictionaries."""
    return {
        name for part in typing.get_args(shape) or (shape,) for name in getattr(part, "__annotations__", {})
    } | {name for part in typing.get_args(shape) or (shape,) for name in typing.get_type_hints(part)}


@pytest.mark.parametrize(
    ("dialect", "shape"),
    [
        ("chat", chat.CompletionCreateParams),
        ("completions", completions.CompletionCreateParams),
        ("embeddings", embeddings.EmbeddingCreateParams),
        ("responses", responses.ResponseCreateParams),
    ],
)
def test_every_member_of_openais_package_is_in_the_table(dialect: str, shape: Any) -> None:
    members = members_of(shape)
    assert len(members) > 4
    assert members - DIALECTS[dialect].names == set()


def part(**fields: Any) -> dict[str, Any]:
    return {**HELLO, "messages": [{"role": "user", "content": [fields]}]}


def item(**fields: Any) -> dict[str, Any]:
    return {**SAID, "input": [{"role": "user", "content": "hi"}, fields]}


REFUSED: list[tuple[Dialect, dict[str, Any]]] = [
    (CHAT, {**HELLO, "never_heard_of": 1}),
    (CHAT, {**HELLO, "preset": "cheap"}),
    (CHAT, {**HELLO, "chat_template": "{{ 1 }}"}),
    (CHAT, {**HELLO, "n_predict": 5}),
    (CHAT, {**HELLO, "api_base": "https://example.com"}),
    (CHAT, {**HELLO, "prompt_cache_options": {"ttl": "30m"}}),
    (CHAT, {**HELLO, "stream_options": {"no_such": True}}),
    (CHAT, {**HELLO, "provider": {"no_such": 1}}),
    (CHAT, {**HELLO, "reasoning": {"mode": "pro"}}),
    (CHAT, {**HELLO, "tools": [SEARCH]}),
    (CHAT, {**HELLO, "tools": [{"type": "openrouter:web_search"}]}),
    (CHAT, {**HELLO, "tools": [{"type": "web_search_preview"}]}),
    (CHAT, {**HELLO, "plugins": [{"id": "fusion"}]}),
    (CHAT, {**HELLO, "plugins": [{"id": "auto-router"}]}),
    (CHAT, {**HELLO, "plugins": [{"id": "no-such"}]}),
    (CHAT, {**HELLO, "plugins": [{"id": "file-parser"}]}),
    (CHAT, {**HELLO, "plugins": [{"id": "file-parser", "pdf": {"engine": "mistral-ocr"}}]}),
    (CHAT, {**HELLO, "plugins": [{"id": "web", "max_results": 10**9}]}),
    (CHAT, {**HELLO, "modalities": ["smell"]}),
    (CHAT, {**HELLO, "prediction": "x"}),
    (CHAT, part(type="no_such_kind", url="https://example.com")),
    (CHAT, part(type="file", file={"file_id": "file-1"})),
    (CHAT, {**HELLO, "messages": [{"role": "assistant", "audio": {"id": "audio_1"}}]}),
    (COMPLETIONS, {"model": "m", "prompt": "hi", "max_completion_tokens": 5}),
    (COMPLETIONS, {"model": "m", "prompt": "hi", "prompt_embeds": "AAAA"}),
    (EMBEDDINGS, {"model": "m", "input": "hi", "stream": True}),
    (RESPONSES, {**SAID, "previous_response_id": "resp_1"}),
    (RESPONSES, {**SAID, "conversation": "conv_1"}),
    (RESPONSES, {**SAID, "prompt": {"id": "pmpt_1"}}),
    (RESPONSES, {**SAID, "background": True}),
    (RESPONSES, {**SAID, "context_management": [{"type": "compaction"}]}),
    (RESPONSES, {**SAID, "tools": [SEARCH]}),
    (RESPONSES, {**SAID, "tools": [{"type": "file_search", "vector_store_ids": ["vs_1"]}]}),
    (RESPONSES, {**SAID, "tools": [{"type": "code_interpreter", "container": {"type": "auto"}}]}),
    (RESPONSES, {**SAID, "tools": [{"type": "shell", "environment": {"type": "container_auto"}}]}),
    (RESPONSES, {**SAID, "tools": [{"type": "namespace", "tools": [SEARCH]}]}),
    (RESPONSES, {**SAID, "tools": [{"type": "mcp", "server_url": "https://example.com"}]}),
    (RESPONSES, item(type="item_reference", id="msg_1")),
    (RESPONSES, item(id="msg_1")),
    (RESPONSES, item(type="reasoning", id="rs_1", summary=[])),
    (RESPONSES, item(type="image_generation_call", id="ig_1")),
    (RESPONSES, item(type="mcp_approval_response", approval_request_id="x", approve=True)),
    (RESPONSES, item(type="computer_call_output", call_id="c", output={"type": "x", "file_id": "file-1"})),
    (RESPONSES, item(type="tool_search_output", tools=[SEARCH])),
    (RESPONSES, item(type="additional_tools", role="developer", tools=[SEARCH])),
    (RESPONSES, item(type="message", role="user", content="hi", tools=[{"file_id": "file-1"}])),
    (CHAT, {**HELLO, "enabledSearch": True}),
]


@pytest.mark.parametrize(("dialect", "fields"), REFUSED, ids=lambda value: str(value)[:70])
def test_what_cannot_be_bounded_is_refused_by_name(dialect: Dialect, fields: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError) as refused:
        dialect.check(fields, STRICT)
    assert refused.value.param
    assert len(str(refused.value)) > 20


ODD: list[Any] = [
    None,
    True,
    0,
    1.5,
    float("inf"),
    "",
    "x",
    [],
    [[]],
    [{}],
    {},
    {"type": []},
    {"type": {}},
    {"id": []},
]


@pytest.mark.parametrize("dialect", [CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES], ids=lambda item: item.name)
def test_nothing_odd_is_more_than_refused(dialect: Dialect) -> None:
    """Each member of the table, as anything that JSON may be, alone and in an array."""
    good = {
        "chat": HELLO,
        "responses": SAID,
        "completions": {"model": "m", "prompt": "hi"},
        "embeddings": SAID,
    }
    for name in sorted(DIALECTS[dialect.name].names):
        for value in (*ODD, *([item] for item in ODD)):
            with contextlib.suppress(BadRequestError):
                dialect.check({**good[dialect.name], name: value}, STRICT)


CASES: list[tuple[Dialect, dict[str, Any]]] = [
    (CHAT, {**HELLO, "Model": "o1-pro"}),
    (CHAT, {**HELLO, "MODEL": "o1-pro"}),
    (CHAT, {**HELLO, "N": 50}),
    (CHAT, {**HELLO, "Stream_Options": {"include_usage": False}}),
    (CHAT, {**HELLO, "max_token\u017f": 5_000}),  # a long s
    (CHAT, {**HELLO, "max_to\u212aens": 5_000}),  # the sign of kelvin
    (CHAT, {**HELLO, "stream_options": {"Include_usage": False}}),
    (CHAT, {**HELLO, "provider": {"Max_price": {"prompt": 9}}}),
    (CHAT, {**HELLO, "messages": [{"role": "user", "content": "hi", "Content": [PDF]}]}),
    (CHAT, part(type="text", text="hi", Type="file")),
    (CHAT, part(type="image_url", image_url={"url": "https://x/y.png", "detail": "low", "Detail": "high"})),
    (CHAT, {**HELLO, "tools": [{"type": "function", "Type": "web_search", "function": {"name": "f"}}]}),
    (RESPONSES, {**SAID, "Max_output_tokens": 5}),
    (RESPONSES, item(role="user", content="hi", Type="item_reference")),
]


@pytest.mark.parametrize("policy", [STRICT, LOOSE], ids=["refuse", "pass"])
@pytest.mark.parametrize(("dialect", "fields"), CASES, ids=lambda value: str(value)[-60:])
def test_a_name_in_other_letters_is_refused_at_every_level(
    dialect: Dialect, fields: dict[str, Any], policy: Policy
) -> None:
    with pytest.raises(BadRequestError, match="write '"):
        dialect.check(fields, policy)


SERVED: list[tuple[Dialect, dict[str, Any]]] = [
    (CHAT, {**HELLO, "store": False, "preset": None, "parallel_tool_calls": True}),
    (
        CHAT,
        {
            **HELLO,
            "temperature": 0.2,
            "top_k": 5,
            "min_p": 0.1,
            "seed": 1,
            "user": "u",
            "metadata": {"a": "b"},
        },
    ),
    (CHAT, {**HELLO, "max_tokens": 100.0, "n": 1e0}),
    (CHAT, {**HELLO, "model": None, "models": ["a/b", "c/d"]}),
    (CHAT, {**HELLO, "reasoning": {"effort": "high", "exclude": True}, "verbosity": "low"}),
    (CHAT, {**HELLO, "provider": {"sort": "price", "zdr": True, "max_price": {"prompt": 1}}}),
    (CHAT, {**HELLO, "plugins": [{"id": "web", "enabled": False}, {"id": "response-healing"}]}),
    (CHAT, {**HELLO, "usage": {"include": True}, "transforms": ["middle-out"]}),
    (CHAT, {**HELLO, "tools": [{"type": "function", "function": {"name": "f", "parameters": {"Type": {}}}}]}),
    (
        CHAT,
        {
            **HELLO,
            "messages": [{"role": "assistant", "content": None, "reasoning_details": [], "tool_calls": []}],
        },
    ),
    (CHAT, part(type="text", text="hi", cache_control={"type": "ephemeral"})),
    (CHAT, part(**PDF)),
    (RESPONSES, {**SAID, "background": False, "store": False, "include": ["reasoning.encrypted_content"]}),
    (
        RESPONSES,
        {**SAID, "tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f"}]}]},
    ),
    (RESPONSES, {**SAID, "tools": [{"type": "local_shell"}, {"type": "custom", "name": "apply_patch"}]}),
    (RESPONSES, item(type="reasoning", summary=[], encrypted_content="gAAA")),
    (RESPONSES, item(type="function_call_output", call_id="c", output="42")),
    (RESPONSES, item(type="additional_tools", role="developer", tools=[READS_A_FILE])),
    (RESPONSES, item(type="tool_search_output", tools=[READS_A_FILE])),
]


@pytest.mark.parametrize(("dialect", "fields"), SERVED, ids=lambda value: str(value)[:70])
def test_what_honest_clients_send_is_served(dialect: Dialect, fields: dict[str, Any]) -> None:
    dialect.check(fields, STRICT)


def test_an_operator_may_let_members_pass() -> None:
    asked = {**HELLO, "x_own": 1}
    with pytest.raises(BadRequestError):
        CHAT.check(asked, STRICT)
    CHAT.check(asked, LOOSE)
    CHAT.check(asked, Policy(extra=frozenset({"x_own"})))
    with pytest.raises(BadRequestError):
        CHAT.check({**asked, "preset": "cheap"}, LOOSE)


@pytest.mark.parametrize(
    ("fields", "units"),
    [
        ({}, {}),
        ({"service_tier": "auto"}, {}),
        ({"service_tier": "priority"}, {"tier_priority": 1}),
        ({"web_search_options": {}}, {"web_search": 1}),
        ({"plugins": [{"id": "web", "max_results": 7}]}, {"web_search": 1, "web_search_result": 7}),
        ({"model": "openai/gpt-4o:online"}, {"web_search": 1, "web_search_result": 5}),
        ({"modalities": ["text", "audio"], "audio": {"voice": "alloy"}}, {"audio_output": 1}),
        ({"modalities": ["image", "text"]}, {"image_output": 1}),
        ({"provider": {"order": ["pricey"]}}, {"routing": 1}),
    ],
    ids=str,
)
def test_what_is_billed_apart(fields: dict[str, Any], units: dict[str, int]) -> None:
    assert find_extras({**HELLO, **fields}) == units


@pytest.mark.parametrize(
    ("value", "count"),
    [(5, 5), (100.0, 100), (1e2, 100), (1.5, None), (True, None), ("5", None), (float("inf"), None)],
)
def test_a_whole_number_is_whole_however_it_is_written(value: Any, count: int | None) -> None:
    assert count_of({"n": value}, "n") == count
