"""What is served: one table, of which the routes and the document at ``/openapi.json`` are made."""

from typing import Any

from billing.statement import KINDS
from proxy.caps import get_caps, put_caps
from proxy.chat import chat_completions
from proxy.feed import open_socket, stream_events
from proxy.forms import CapsForm, KeyForm, RotateForm, TopupForm
from proxy.health import healthz, readyz
from proxy.keys import create_key, delete_key, get_key, list_keys, rotate_key
from proxy.models import get_model, list_models
from proxy.openapi import Endpoint, show_document
from proxy.topups import create_topup, get_topup
from proxy.transactions import get_statement, list_transactions
from proxy.wallet import get_wallet
from proxy.webhooks import receive_webhook

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

_FEED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("last_event_id", {"type": "string", "description": "As `Last-Event-ID`, for who cannot set headers."}),
)

ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/chat/completions",
        chat_completions,
        "ChatCompletion",
        "calls",
        body="ChatRequest",
        also=("text/event-stream",),
        errors=(415, 502, 504),
    ),
    Endpoint("GET", "/v1/models", list_models, "Models", "calls"),
    Endpoint("GET", "/v1/models/{model:.+}", get_model, "Model", "calls"),
    Endpoint("GET", "/v1/wallet", get_wallet, "Wallet", "wallet"),
    Endpoint("GET", "/v1/wallet/caps", get_caps, "Caps", "wallet"),
    Endpoint("PUT", "/v1/wallet/caps", put_caps, "Caps", "wallet", form=CapsForm, errors=(415,)),
    Endpoint(
        "GET",
        "/v1/wallet/transactions",
        list_transactions,
        "Transactions",
        "wallet",
        query=_TRANSACTIONS,
        also=("text/csv",),
    ),
    Endpoint(
        "GET",
        "/v1/wallet/statements/{month}",
        get_statement,
        "Object",
        "wallet",
        query=(("format", {"type": "string", "enum": ["html", "csv"]}),),
        also=("text/html", "text/csv"),
    ),
    Endpoint("GET", "/v1/wallet/events", stream_events, "WalletEvent", "wallet", query=_FEED, streams=True),
    Endpoint(
        "GET", "/v1/wallet/ws", open_socket, "WalletEvent", "wallet", status=101, query=_FEED, streams=True
    ),
    Endpoint(
        "POST",
        "/v1/wallet/topups",
        create_topup,
        "Topup",
        "wallet",
        status=201,
        form=TopupForm,
        errors=(415,),
    ),
    Endpoint("GET", "/v1/wallet/topups/{topup}", get_topup, "Topup", "wallet"),
    Endpoint(
        "POST",
        "/webhooks/{provider}",
        receive_webhook,
        "Object",
        "house",
        body="Object",
        secured=False,
        errors=(401, 404, 408, 413, 415, 503),
    ),
    Endpoint("GET", "/v1/keys", list_keys, "Keys", "keys", query=_PAGE),
    Endpoint("POST", "/v1/keys", create_key, "NewKey", "keys", status=201, form=KeyForm, errors=(415,)),
    Endpoint("DELETE", "/v1/keys", delete_key, "DeletedKey", "keys", query=(("id", _ID),), required=("id",)),
    Endpoint("GET", "/v1/keys/{key}", get_key, "Key", "keys"),
    Endpoint("DELETE", "/v1/keys/{key}", delete_key, "DeletedKey", "keys"),
    Endpoint("POST", "/v1/keys/{key}/rotate", rotate_key, "NewKey", "keys", form=RotateForm, errors=(415,)),
    Endpoint("GET", "/healthz", healthz, "Health", "house", secured=False),
    Endpoint("GET", "/readyz", readyz, "Readiness", "house", secured=False, errors=(503,)),
    Endpoint("GET", "/openapi.json", show_document, "Object", "house", secured=False),
)
