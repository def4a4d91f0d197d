"""What is served: one table, of which the routes and the document at ``/openapi.json`` are made."""

from typing import Any

from billing.reports.statement import KINDS
from billing.reports.usage import GROUPS
from proxy.account.alerts import get_wallet_alerts, put_wallet_alerts
from proxy.account.auto_topup import delete_payment_method, get_auto_topup, put_auto_topup
from proxy.account.calls import get_own_call, list_calls
from proxy.account.caps import get_caps, put_caps
from proxy.account.events import open_socket, stream_events
from proxy.account.forms import (
    AutoTopupForm,
    CapsForm,
    KeyForm,
    RotateForm,
    TopupForm,
    WalletAction,
    WalletAlertsForm,
)
from proxy.account.keys import create_key, delete_key, get_key, list_keys, rotate_key
from proxy.account.topups import create_topup, get_topup
from proxy.account.transactions import get_statement, list_transactions
from proxy.account.usage import get_usage
from proxy.account.wallet import get_wallet
from proxy.account.wallet_management import manage_wallet
from proxy.call.chat import chat_completions, chat_with_cost, completions, embeddings, responses
from proxy.call.estimate import estimate
from proxy.call.models import get_model, list_models
from proxy.openapi.document import show_document
from proxy.openapi.endpoint import Endpoint
from proxy.public.health import healthz, readyz
from proxy.public.metrics_page import show_metrics
from proxy.public.webhooks import receive_webhook

_FLAG: dict[str, Any] = {"type": "boolean"}
_ID: dict[str, Any] = {"type": "string", "format": "uuid"}
_PAGE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("limit", {"type": "integer", "minimum": 1, "maximum": 100, "default": 100}),
    ("after", _ID),
    ("revoked", _FLAG),
)

_TRANSACTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("limit", {"type": "integer", "minimum": 1, "maximum": 100, "default": 100}),
    ("after", _ID),
    ("kind", {"type": "string", "description": f"Several by commas: {', '.join(KINDS)}."}),
    ("since", {"type": "string", "format": "date-time"}),
    ("until", {"type": "string", "format": "date-time"}),
    ("format", {"type": "string", "enum": ["json", "csv"]}),
)

_BOUND: dict[str, Any] = {
    "type": "string",
    "description": "A day, as 2026-11-01, or a moment on a quarter of an hour.",
    "examples": ["2026-11-01", "2026-11-01T12:15:00Z"],
}
_USAGE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("since", _BOUND),
    ("until", _BOUND),
    ("group_by", {"type": "string", "description": f"Several by commas: {', '.join(GROUPS)}."}),
    ("format", {"type": "string", "enum": ["json", "csv"]}),
)
_CALLS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("limit", {"type": "integer", "minimum": 1, "maximum": 100, "default": 100}),
    ("after", _ID),
    ("model", {"type": "string"}),
    ("key", _ID),
    ("since", {"type": "string", "format": "date-time"}),
    ("until", {"type": "string", "format": "date-time"}),
)
_FEED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("last_event_id", {"type": "string", "description": "As `Last-Event-ID`, for who cannot set headers."}),
)

ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/chat/completions",
        chat_completions,
        "calls",
        body="ChatRequest",
        also=("text/event-stream",),
        errors=(415, 502, 504),
    ),
    Endpoint(
        "POST",
        "/v1/completions",
        completions,
        "calls",
        body="CompletionRequest",
        also=("text/event-stream",),
        errors=(415, 502, 504),
    ),
    Endpoint(
        "POST",
        "/v1/embeddings",
        embeddings,
        "calls",
        body="EmbeddingRequest",
        errors=(415, 502, 504),
    ),
    Endpoint(
        "POST",
        "/v1/responses",
        responses,
        "calls",
        body="ResponseRequest",
        also=("text/event-stream",),
        errors=(415, 502, 504),
    ),
    Endpoint(
        "POST",
        "/api/chat",
        chat_with_cost,
        "calls",
        body="ChatRequest",
        also=("text/event-stream",),
        errors=(415, 502, 504),
    ),
    Endpoint("POST", "/v1/estimate", estimate, "calls", body="ChatRequest", errors=(415,)),
    Endpoint("GET", "/v1/models", list_models, "calls"),
    Endpoint("GET", "/v1/models/{model:.+}", get_model, "calls"),
    Endpoint("GET", "/v1/calls", list_calls, "wallet", query=_CALLS),
    Endpoint("GET", "/v1/calls/{call}", get_own_call, "wallet"),
    Endpoint("GET", "/v1/wallet", get_wallet, "wallet"),
    Endpoint("GET", "/v1/wallet/alerts", get_wallet_alerts, "wallet"),
    Endpoint(
        "PUT",
        "/v1/wallet/alerts",
        put_wallet_alerts,
        "wallet",
        form=WalletAlertsForm,
        errors=(415,),
    ),
    Endpoint("GET", "/v1/wallet/caps", get_caps, "wallet"),
    Endpoint("PUT", "/v1/wallet/caps", put_caps, "wallet", form=CapsForm, errors=(415,)),
    Endpoint(
        "GET",
        "/v1/wallet/transactions",
        list_transactions,
        "wallet",
        query=_TRANSACTIONS,
        also=("text/csv",),
    ),
    Endpoint(
        "GET",
        "/v1/wallet/statements/{month}",
        get_statement,
        "wallet",
        query=(("format", {"type": "string", "enum": ["html", "csv"]}),),
        also=("text/html", "text/csv"),
        late=True,
    ),
    Endpoint("GET", "/v1/usage", get_usage, "wallet", query=_USAGE, also=("text/csv",), late=True),
    Endpoint("GET", "/v1/wallet/events", stream_events, "wallet", query=_FEED, streams=True),
    Endpoint("GET", "/v1/wallet/ws", open_socket, "wallet", status=101, query=_FEED, streams=True),
    Endpoint(
        "POST",
        "/v1/wallet/topups",
        create_topup,
        "wallet",
        status=201,
        form=TopupForm,
        errors=(415,),
    ),
    Endpoint("GET", "/v1/wallet/topups/{topup}", get_topup, "wallet"),
    Endpoint("GET", "/v1/wallet/auto-topup", get_auto_topup, "wallet"),
    Endpoint(
        "PUT",
        "/v1/wallet/auto-topup",
        put_auto_topup,
        "wallet",
        form=AutoTopupForm,
        errors=(415,),
    ),
    Endpoint("DELETE", "/v1/wallet/payment-method", delete_payment_method, "wallet"),
    Endpoint(
        "POST",
        "/api/wallet-management",
        manage_wallet,
        "wallet",
        form=WalletAction,
        also_status=201,
        errors=(415,),
    ),
    Endpoint(
        "POST",
        "/webhooks/{provider}",
        receive_webhook,
        "house",
        body="Object",
        secured=False,
        errors=(401, 404, 408, 413, 415, 503),
    ),
    Endpoint("GET", "/v1/keys", list_keys, "keys", query=_PAGE),
    Endpoint("POST", "/v1/keys", create_key, "keys", status=201, form=KeyForm, errors=(415,)),
    Endpoint("DELETE", "/v1/keys", delete_key, "keys", query=(("id", _ID),), required=("id",)),
    Endpoint("GET", "/v1/keys/{key}", get_key, "keys"),
    Endpoint("DELETE", "/v1/keys/{key}", delete_key, "keys"),
    Endpoint("POST", "/v1/keys/{key}/rotate", rotate_key, "keys", form=RotateForm, errors=(415,)),
    Endpoint("GET", "/healthz", healthz, "house", secured=False),
    Endpoint("GET", "/readyz", readyz, "house", secured=False, bad_status=503),
    Endpoint(
        "GET",
        "/metrics",
        show_metrics,
        "house",
        secured=False,
        also=("text/plain",),
        errors=(401, 403, 429, 503),
    ),
    Endpoint("GET", "/openapi.json", show_document, "house", secured=False),
)
