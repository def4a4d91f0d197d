"""What Tuma answers, as JSON Schema, for the document at ``/openapi.json``."""

from typing import Any

Schema = dict[str, Any]
EXAMPLE_MODEL = "openai/gpt-4o-mini"

_AMOUNT: Schema = {
    "type": "string",
    "pattern": r"^-?[0-9]+(\.[0-9]{1,9})?$",
    "description": "Major units, exact.",
}
_PRICE: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?$", "description": "USD, exact."}
_MOMENT: Schema = {"type": ["string", "null"], "format": "date-time"}
_ID: Schema = {"type": "string", "format": "uuid"}
_COUNT: Schema = {"type": ["integer", "null"]}
_TEXT: Schema = {"type": "string"}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _caps() -> Schema:
    return {
        "type": "object",
        "description": "By period: call, day, week, month, total.",
        "propertyNames": {"enum": ["call", "day", "week", "month", "total"]},
        "additionalProperties": _ref("Cap"),
    }


def _list_of(name: str, **more: Schema) -> Schema:
    return _object(object={"const": "list"}, data={"type": "array", "items": _ref(name)}, **more)


_KEY = _object(
    object={"const": "api_key"},
    id=_ID,
    wallet_id=_ID,
    currency=_TEXT,
    name=_TEXT,
    hint=_TEXT,
    status={"enum": ["active", "expired", "revoked"]},
    created_at=_MOMENT,
    rotated_at=_MOMENT,
    previous_secret_until=_MOMENT,
    expires_at=_MOMENT,
    revoked_at=_MOMENT,
    last_used_at=_MOMENT,
    models={"type": ["array", "null"], "items": _TEXT},
    networks={"type": ["array", "null"], "items": _TEXT},
    manages={"type": "boolean"},
    requests_per_min=_COUNT,
    tokens_per_min=_COUNT,
    calls_in_flight=_COUNT,
    caps=_caps(),
)
SHAPES: dict[str, Schema] = {
    "Error": _object(
        error=_object(
            message=_TEXT,
            type=_TEXT,
            param={"type": ["string", "null"]},
            code={"type": ["string", "null"]},
        )
    ),
    "Wallet": _object(
        object={"const": "wallet"},
        id=_ID,
        currency=_TEXT,
        posted=_AMOUNT,
        held=_AMOUNT,
        available=_AMOUNT,
        overdraft=_AMOUNT,
        status={"enum": ["active", "frozen"]},
    ),
    "Cap": _object(
        limit=_AMOUNT,
        currency=_TEXT,
        spent=_AMOUNT,
        held=_AMOUNT,
        left=_AMOUNT,
        limit_by_user={**_AMOUNT, "type": ["string", "null"]},
        limit_by_operator={**_AMOUNT, "type": ["string", "null"]},
        starts_at=_MOMENT,
        ends_at=_MOMENT,
    ),
    "Caps": {
        **_object(
            object={"const": "wallet.caps"}, wallet_id=_ID, currency=_TEXT, caps=_caps(), user_caps=_caps()
        ),
        "description": "`key_caps` as well, for who came with a key.",
    },
    "Key": _KEY,
    "NewKey": {
        **_KEY,
        "properties": {**_KEY["properties"], "secret": {"type": "string", "pattern": "^sk-tuma-"}},
        "required": [*_KEY["required"], "secret"],
    },
    "Keys": _list_of(
        "Key",
        has_more={"type": "boolean"},
        first_id={"type": ["string", "null"]},
        last_id={"type": ["string", "null"]},
    ),
    "DeletedKey": _object(
        id=_ID, object={"const": "api_key"}, deleted={"const": True}, status={"const": "revoked"}
    ),
    "Model": _object(
        id=_TEXT,
        object={"const": "model"},
        created={"type": "integer"},
        owned_by=_TEXT,
        name=_TEXT,
        context_length=_COUNT,
        max_completion_tokens=_COUNT,
        pricing={"type": "object", "additionalProperties": _PRICE, "description": "USD, per token."},
        pricing_per_million=_object(prompt=_PRICE, completion=_PRICE),
    ),
    "Models": _list_of("Model"),
    "Transaction": _object(
        object={"const": "transaction"},
        id=_ID,
        kind={"enum": ["settlement", "grant", "topup", "refund", "correction", "reversal", "dispute"]},
        amount=_AMOUNT,
        currency=_TEXT,
        balance=_AMOUNT,
        call_id={"type": ["string", "null"]},
        model={"type": ["string", "null"]},
        cost_usd={**_AMOUNT, "type": ["string", "null"]},
        tokens_prompt=_COUNT,
        tokens_completion=_COUNT,
        description=_TEXT,
        created_at=_MOMENT,
    ),
    "Transactions": _list_of(
        "Transaction",
        has_more={"type": "boolean"},
        first_id={"type": ["string", "null"]},
        last_id={"type": ["string", "null"]},
    ),
    "WalletEvent": {
        **_object(
            object={"const": "wallet.event"},
            type={
                "enum": [
                    *("balance", "reset", "hold", "settlement", "topup", "grant", "refund", "correction"),
                    *("reversal", "dispute", "cap", "wallet", "end"),
                ]
            },
        ),
        "description": (
            "`balance` comes first, `reset` where events are missing, `end` last, with a `reason` and nothing else; each of"
            " the others is something that was committed, with the balance after it."
        ),
        "properties": {
            "object": {"const": "wallet.event"},
            "type": _TEXT,
            "id": {**_TEXT, "description": "For `Last-Event-ID`."},
            "wallet_id": _ID,
            "currency": _TEXT,
            "posted": _AMOUNT,
            "held": _AMOUNT,
            "available": _AMOUNT,
            "overdraft": _AMOUNT,
            "status": {"enum": ["active", "frozen"]},
            "posted_change": _AMOUNT,
            "held_change": _AMOUNT,
            "created_at": _MOMENT,
            "call_id": _ID,
            "model": _TEXT,
            "state": {"enum": ["settled", "void"]},
            "outcome": _TEXT,
            "accuracy": {"enum": ["exact", "estimated"]},
            "cost_usd": _AMOUNT,
            "charge": _AMOUNT,
            "transaction_id": _ID,
            "description": _TEXT,
            "cap": {"type": "object"},
            "reason": _TEXT,
        },
    },
    "Topup": _object(
        object={"const": "topup"},
        id=_ID,
        wallet_id=_ID,
        provider={"enum": ["stripe", "paystack", "flutterwave"]},
        amount=_AMOUNT,
        currency=_TEXT,
        state={"enum": ["creating", "pending", "failed", "expired", "paid", "review"]},
        url={"type": ["string", "null"], "description": "Where it is paid."},
        reference=_TEXT,
        note=_TEXT,
        created_at=_MOMENT,
        expires_at=_MOMENT,
        ended_at=_MOMENT,
    ),
    "Health": _object(status=_TEXT),
    "Readiness": _object(status=_TEXT, checks={"type": "object", "additionalProperties": _TEXT}),
    "ChatCompletion": {"type": "object", "description": "OpenAI's, with `usage.cost` in USD."},
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
    "Object": {"type": "object"},
}
