"""``/admin``: the operator's services. Every change is audited as the admin's, with the request's id."""

from proxy.account.events import stream_wallet_events
from proxy.account.forms import CapsForm, KeyForm, RotateForm
from proxy.openapi.endpoint import Endpoint
from proxy.operator.calls import get_call, refund_call, settle_call
from proxy.operator.caps import (
    get_key_caps,
    get_user_caps,
    get_wallet_caps,
    put_key_caps,
    put_user_caps,
    put_wallet_caps,
)
from proxy.operator.forms import (
    CreditForm,
    DecideForm,
    LogLevelForm,
    OverdraftForm,
    ReasonForm,
    RefundForm,
    UserChangeForm,
    UserForm,
    WalletForm,
)
from proxy.operator.keys import create_key, delete_key, list_keys, rotate_key
from proxy.operator.monitoring import list_alerts, list_audit, put_log_level, verify_audit
from proxy.operator.payments import ADMIN_PAYMENTS
from proxy.operator.people import change_user, create_user, get_user, list_users
from proxy.operator.reconciliation import get_quota, list_reconciliations, reconcile
from proxy.operator.requests import endpoint, query
from proxy.operator.wallets import (
    change_wallet,
    create_wallet,
    credit_wallet,
    freeze_wallet,
    get_wallet,
    list_wallets,
    unfreeze_wallet,
)

# Users


# Wallets


# Caps: ceilings, which no user can lift


# Keys


# Calls and the house's books


ADMIN = (
    endpoint("GET", "/admin/users", list_users, query=query("email", "limit", "after")),
    endpoint("POST", "/admin/users", create_user, form=UserForm, status=201),
    endpoint("GET", "/admin/users/{user}", get_user),
    endpoint("PATCH", "/admin/users/{user}", change_user, form=UserChangeForm),
    endpoint("GET", "/admin/users/{user}/caps", get_user_caps),
    endpoint("PUT", "/admin/users/{user}/caps", put_user_caps, form=CapsForm),
    endpoint("GET", "/admin/wallets", list_wallets, query=query("user", "limit", "after")),
    endpoint("POST", "/admin/wallets", create_wallet, form=WalletForm, status=201),
    endpoint("GET", "/admin/wallets/{wallet}", get_wallet),
    endpoint("PATCH", "/admin/wallets/{wallet}", change_wallet, form=OverdraftForm),
    endpoint("POST", "/admin/wallets/{wallet}/freeze", freeze_wallet, form=ReasonForm),
    endpoint("POST", "/admin/wallets/{wallet}/unfreeze", unfreeze_wallet, form=ReasonForm),
    endpoint("POST", "/admin/wallets/{wallet}/credits", credit_wallet, form=CreditForm, status=201),
    Endpoint(
        "GET",
        "/admin/wallets/{wallet}/events",
        stream_wallet_events,
        "operator",
        query=query("last_event_id"),
        streams=True,
        operator=True,
    ),
    endpoint("GET", "/admin/wallets/{wallet}/caps", get_wallet_caps),
    endpoint("PUT", "/admin/wallets/{wallet}/caps", put_wallet_caps, form=CapsForm),
    endpoint("GET", "/admin/keys", list_keys, query=query("wallet", "user", "revoked", "limit", "after")),
    endpoint("POST", "/admin/keys", create_key, form=KeyForm, status=201),
    endpoint("POST", "/admin/keys/{key}/rotate", rotate_key, form=RotateForm),
    endpoint("DELETE", "/admin/keys/{key}", delete_key),
    endpoint("GET", "/admin/keys/{key}/caps", get_key_caps),
    endpoint("PUT", "/admin/keys/{key}/caps", put_key_caps, form=CapsForm),
    endpoint("GET", "/admin/calls/{call}", get_call),
    endpoint("POST", "/admin/calls/{call}/refund", refund_call, form=RefundForm),
    endpoint("POST", "/admin/calls/{call}/settle", settle_call, form=DecideForm),
    endpoint("GET", "/admin/quota", get_quota),
    endpoint("GET", "/admin/reconciliation", list_reconciliations),
    endpoint("POST", "/admin/reconciliation", reconcile),
    endpoint("GET", "/admin/alerts", list_alerts),
    endpoint("GET", "/admin/audit", list_audit, query=query("wallet", "user", "actor", "since", "limit")),
    endpoint("GET", "/admin/audit/verify", verify_audit, query=query("expect")),
    endpoint("PUT", "/admin/log-level", put_log_level, form=LogLevelForm),
    *ADMIN_PAYMENTS,
)
