"""What Tuma answers, as JSON Schema, for the document at ``/openapi.json``."""

from typing import Any

Schema = dict[str, Any]
EXAMPLE_MODEL = "openai/gpt-4o-mini"

_AMOUNT: Schema = {
    "type": "string",
    "pattern": r"^-?[0-9]+(\.[0-9]{1,9})?$",
    "description": "Major units, exact.",
}
_MAYBE_AMOUNT: Schema = {**_AMOUNT, "type": ["string", "null"]}
_PRICE: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?$", "description": "USD, exact."}
_MOMENT: Schema = {"type": ["string", "null"], "format": "date-time"}
_ID: Schema = {"type": "string", "format": "uuid"}
_COUNT: Schema = {"type": ["integer", "null"]}
_TEXT: Schema = {"type": "string"}
_CHOICES: Schema = {"type": ["integer", "null"], "minimum": 1, "maximum": 128}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _inputs(*kinds: Schema) -> Schema:
    tokens = {"type": "array", "minItems": 1, "items": {"type": "integer"}}
    several = {"type": "array", "minItems": 1, "maxItems": 2048, "items": {"anyOf": [*kinds, tokens]}}
    return {"anyOf": [_TEXT, tokens, several]}


def _spread(figure: Schema) -> Schema:
    return _object(least=figure, expected=figure, most=figure)


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
_SUMS: dict[str, Schema] = {
    "currency": _TEXT,
    **{
        name: {"type": "integer", "minimum": 0}
        for name in (
            *("calls", "calls_exact", "calls_estimated", "calls_void", "tokens_prompt", "tokens_completion"),
            *("tokens_cached", "tokens_cache_written", "tokens_reasoning"),
        )
    },
    "cost_usd": _AMOUNT,
    "charge": _AMOUNT,
    "markup": {**_AMOUNT, "description": "The part of the charge that is the exchange rate's markup."},
    **{
        f"{what}_{name}": {**_COUNT, "description": said}
        for what in ("first_byte", "duration")
        for name, said in (
            ("average_ms", "Over the calls of which it is known."),
            ("p50_below_ms", "Half of the calls took less; of 100, 200, 400, … 102400."),
            ("p95_below_ms", "Of 20 calls, 19 took less; of 100, 200, 400, … 102400."),
        )
    },
}
_CALL = _object(
    object={"const": "call"},
    id={**_ID, "description": "The `x-request-id` of its answer."},
    state={"enum": ["open", "settled", "void", "review"]},
    outcome={"type": ["string", "null"]},
    model=_TEXT,
    stream={"type": "boolean"},
    wallet_id=_ID,
    key_id={"type": ["string", "null"]},
    generation_id={"type": ["string", "null"], "description": "The provider's id of the answer."},
    currency=_TEXT,
    cost_usd=_MAYBE_AMOUNT,
    charge=_MAYBE_AMOUNT,
    accuracy={"enum": ["exact", "estimated", None]},
    source={"enum": ["provider_cost", "price_book", "counted", "noted", None]},
    tokens_prompt=_COUNT,
    tokens_completion=_COUNT,
    tokens_cached=_COUNT,
    tokens_reasoning=_COUNT,
    hold=_AMOUNT,
    fx_rate={**_PRICE, "type": ["string", "null"], "description": "Units of the currency for one USD."},
    fx_markup_bps=_COUNT,
    **{
        f"price_{name}_usd": {**_PRICE, "type": ["string", "null"], "description": "USD, for one."}
        for name in (
            *("prompt", "completion", "cached_read", "cached_write", "reasoning", "image", "audio"),
            "request",
        )
    },
    priced_at=_MOMENT,
    opened_at=_MOMENT,
    ended_at=_MOMENT,
    first_byte_ms=_COUNT,
    duration_ms=_COUNT,
)
_EXPLANATION: Schema = {
    "type": "array",
    "items": _TEXT,
    "description": "How the charge came about, a line each, in exact figures.",
}
_CHANGES: Schema = {
    "type": "array",
    "items": _object(
        kind={"enum": ["correction", "refund"]}, amount=_AMOUNT, description=_TEXT, created_at=_MOMENT
    ),
    "description": "What was posted after the settlement; what the wallet got is positive.",
}
SHAPES: dict[str, Schema] = {
    "Call": _CALL,
    "Calls": _list_of(
        "Call",
        has_more={"type": "boolean"},
        first_id={"type": ["string", "null"]},
        last_id={"type": ["string", "null"]},
    ),
    "ExplainedCall": {
        **_CALL,
        "properties": {**_CALL["properties"], "explanation": _EXPLANATION, "changes": _CHANGES},
        "required": [*_CALL["required"], "explanation", "changes"],
    },
    "WalletAlerts": _object(
        object={"const": "wallet.alerts"}, wallet_id=_ID, currency=_TEXT, low=_MAYBE_AMOUNT
    ),
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
    "Usage": _object(
        object={"const": "usage"},
        period={
            "type": ["string", "null"],
            "description": "A day, the first of a week or month, or an hour.",
        },
        model={"type": ["string", "null"]},
        key_id={"type": ["string", "null"], "description": "None of calls without a key."},
        key_name={"type": ["string", "null"]},
        **_SUMS,
    ),
    "UsageList": _list_of(
        "Usage",
        wallet_id=_ID,
        since=_MOMENT,
        until=_MOMENT,
        timezone=_TEXT,
        group_by={"type": "array", "items": _TEXT},
        totals=_object(**_SUMS),
    ),
    "WalletEvent": {
        **_object(
            object={"const": "wallet.event"},
            type={
                "enum": [
                    *("balance", "reset", "hold", "settlement", "topup", "grant", "refund", "correction"),
                    *("reversal", "dispute", "cap", "low", "auto_topup", "wallet", "end"),
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
            "low": {"type": "object"},
            "auto_topup": {"type": "object"},
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
    "AutoTopup": _object(
        object={"const": "auto_topup"},
        wallet_id=_ID,
        currency=_TEXT,
        enabled={"type": "boolean"},
        threshold={**_AMOUNT, "type": ["string", "null"]},
        amount={**_AMOUNT, "type": ["string", "null"]},
        pause_s={"type": ["integer", "null"]},
        provider={"type": ["string", "null"]},
        method={"type": ["string", "null"], "description": "What is charged, in words."},
        failures=_COUNT,
        note=_TEXT,
        last_at=_MOMENT,
        last_topup_id={"type": ["string", "null"]},
    ),
    "WalletAnswer": {
        "anyOf": [_ref("Wallet"), _ref("Topup"), _ref("Caps"), _ref("Transactions")],
        "description": "By the action: a top-up's own answer has the status 201.",
    },
    "Estimate": _object(
        object={"const": "estimate"},
        model=_TEXT,
        tokens_prompt=_spread({"type": "integer"}),
        tokens_completion=_spread({"type": "integer"}),
        cost_usd=_spread(_AMOUNT),
        charge=_spread(_AMOUNT),
        hold=_AMOUNT,
        hold_usd=_AMOUNT,
        currency=_TEXT,
        fx_rate=_PRICE,
        markup_bps={"type": "integer"},
        admitted={"type": "boolean"},
        refusal={
            **_object(
                status={"type": "integer"},
                retry_after_ms=_COUNT,
                message=_TEXT,
                type=_TEXT,
                param={"type": ["string", "null"]},
                code={"type": ["string", "null"]},
            ),
            "type": ["object", "null"],
            "description": "What the call would be refused with just now.",
        },
    ),
    "Health": _object(status=_TEXT),
    "Readiness": _object(status=_TEXT, checks={"type": "object", "additionalProperties": _TEXT}),
    "Cost": {
        **_object(
            call_id=_ID,
            state={"enum": ["settled", "void", "review", "pending"]},
            accuracy={"enum": ["exact", "estimated", None]},
            cost_usd={**_AMOUNT, "type": ["string", "null"]},
            charge={**_AMOUNT, "type": ["string", "null"]},
            currency=_TEXT,
            fx_rate=_PRICE,
            markup_bps={"type": "integer"},
            balance={**_AMOUNT, "type": ["string", "null"]},
            tokens_prompt=_COUNT,
            tokens_completion=_COUNT,
        ),
        "description": "What a call cost; null is what is not known yet, while its settlement is `pending`.",
    },
    "ChatCompletionWithCost": {
        **_object(tuma=_ref("Cost")),
        "description": "OpenAI's, with what it cost; in a stream the last chunk, which has no choices.",
    },
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
    "Completion": {"type": "object", "description": "OpenAI's, with `usage.cost` in USD."},
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
    "Embeddings": {"type": "object", "description": "OpenAI's, with `usage.cost` in USD."},
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
    "Response": {"type": "object", "description": "OpenAI's, with `usage.cost` in USD."},
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
