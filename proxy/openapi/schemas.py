"""What Tuma is sent that is no form of its own, as JSON Schema, for the document at ``/openapi.json``.

What it answers is written from the types of the answers (``proxy/openapi/answer_schemas.py``).
"""

from typing import Any

Schema = dict[str, Any]
EXAMPLE_MODEL = "openai/gpt-4o-mini"

_TEXT: Schema = {"type": "string"}
_CHOICES: Schema = {"type": ["integer", "null"], "minimum": 1, "maximum": 128}


def _inputs(*kinds: Schema) -> Schema:
    tokens = {"type": "array", "minItems": 1, "items": {"type": "integer"}}
    several = {"type": "array", "minItems": 1, "maxItems": 2048, "items": {"anyOf": [*kinds, tokens]}}
    return {"anyOf": [_TEXT, tokens, several]}


REQUESTS: dict[str, Schema] = {
    "ChatRequest": {
        "type": "object",
        "description": "OpenAI's. What Tuma does not know it passes on.",
        "properties": {
            "model": {"type": "string", "minLength": 1},
            "messages": {"type": "array", "minItems": 1, "items": {"type": "object"}},
            "stream": {"type": ["boolean", "null"]},
            "max_tokens": {"type": ["integer", "null"], "minimum": 1, "maximum": 10_000_000},
            "max_completion_tokens": {"type": ["integer", "null"], "minimum": 1, "maximum": 10_000_000},
        },
        "required": ["model", "messages"],
        "examples": [
            {"model": EXAMPLE_MODEL, "messages": [{"role": "user", "content": "hi"}]},
            {"model": EXAMPLE_MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True},
        ],
    },
    "CompletionRequest": {
        "type": "object",
        "description": "OpenAI's. What Tuma does not know it passes on.",
        "properties": {
            "model": {"type": "string", "minLength": 1},
            "prompt": _inputs(_TEXT),
            "stream": {"type": ["boolean", "null"]},
            "max_tokens": {"type": ["integer", "null"], "minimum": 0, "maximum": 10_000_000},
            "n": _CHOICES,
            "best_of": _CHOICES,
        },
        "required": ["model", "prompt"],
        "examples": [{"model": EXAMPLE_MODEL, "prompt": "Once"}],
    },
    "EmbeddingRequest": {
        "type": "object",
        "description": "OpenAI's. What Tuma does not know it passes on.",
        "properties": {
            "model": {"type": "string", "minLength": 1},
            "input": _inputs(_TEXT, {"type": "object"}),
            "stream": {"enum": [False, None]},
        },
        "required": ["model", "input"],
        "examples": [{"model": "openai/text-embedding-3-small", "input": ["one", "two"]}],
    },
    "ResponseRequest": {
        "type": "object",
        "description": "OpenAI's, without what the provider would store. What Tuma does not know it passes on.",
        "properties": {
            "model": {"type": "string", "minLength": 1},
            "input": {
                "anyOf": [
                    {"type": "string", "minLength": 1},
                    {"type": "array", "minItems": 1, "items": {"type": "object"}},
                ]
            },
            "stream": {"type": ["boolean", "null"]},
            "max_output_tokens": {"type": ["integer", "null"], "minimum": 1, "maximum": 10_000_000},
            "background": {"enum": [False, None]},
            "previous_response_id": {"type": "null"},
            "conversation": {"type": "null"},
            "prompt": {"type": "null"},
            "tools": {
                "type": ["array", "null"],
                "items": {
                    "type": "object",
                    "properties": {"type": {"enum": ["function", "custom"]}},
                    "required": ["type"],
                },
            },
        },
        "required": ["model", "input"],
        "examples": [{"model": EXAMPLE_MODEL, "input": "hi"}],
    },
    "Object": {"type": "object"},
}
