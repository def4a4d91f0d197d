"""What ``tuma doctor`` says of the settings alone."""

from typing import Any

import pytest

from config.settings import load_settings
from scripts.doctor import _look_at_settings


@pytest.mark.parametrize(
    ("dsn", "redis", "upstream", "warned"),
    [
        ("postgresql://u:p@127.0.0.1/x", "redis://:p@localhost", "http://[::1]:1/v1", 0),
        ("postgresql:///x?host=/run/postgresql", "rediss://:p@r.example", "https://p.example/v1", 0),
        ("postgresql://u:p@db.example/x?sslmode=verify-full", "rediss://r.example", "https://p.example", 0),
        ("postgresql://u:p@db.example/x", "redis://:p@r.example", "http://p.example/v1", 3),
        ("postgresql://u:p@db.example/x?sslmode=require", "redis://:p@10.0.0.1", "http://10.0.0.2/v1", 3),
        ("postgresql://u:p@[x/x", "redis://[", "", 0),
        ("", "", "", 0),
    ],
)
def test_what_is_not_encrypted(dsn: str, redis: str, upstream: str, warned: int) -> None:
    settings = load_settings(
        postgres={"dsn": dsn},
        redis={"url": redis},
        upstream={"base_url": upstream} if upstream else {},
    )
    details = [item["detail"] for item in _look_at_settings(settings)]
    assert sum("not encrypted" in detail for detail in details) == warned
    assert not any(":p@" in detail for detail in details)


@pytest.mark.parametrize(
    ("section", "ok", "part"),
    [
        ({}, True, "not set up"),
        ({"stripe": {"secret_key": "sk_live_canary", "webhook_secret": "whsec_canary"}}, True, "live keys"),
        ({"stripe": {"secret_key": "rk_test_canary", "webhook_secret": "whsec_canary"}}, True, "TEST keys"),
        ({"stripe": {"secret_key": "sk_live_canary"}}, False, "TUMA_STRIPE__WEBHOOK_SECRET is not set"),
        ({"stripe": {"webhook_secret": "whsec_canary"}}, False, "TUMA_STRIPE__SECRET_KEY is not set"),
        ({"stripe": {"secret_key": "pk_live_canary", "webhook_secret": "x"}}, False, "a public key"),
        ({"paystack": {"secret_key": "sk_test_canary"}}, True, "TEST keys"),
        (
            {"paystack": {"secret_key": "sk_live_canary", "base_url": "http://psp.example"}},
            True,
            "not encrypted",
        ),
        ({"flutterwave": {"secret_key": "FLWSECK-canary"}}, False, "every webhook is refused"),
        (
            {"flutterwave": {"secret_key": "FLWSECK_TEST-canary", "webhook_secret": "canary"}},
            True,
            "TEST keys",
        ),
    ],
)
def test_what_it_says_of_payments(section: dict[str, Any], ok: bool, part: str) -> None:
    name = f"payments by {next(iter(section), 'stripe')}"
    found = {item["name"]: item for item in _look_at_settings(load_settings(**section))}
    assert found[name]["ok"] is ok
    assert part in found[name]["detail"]
    assert "canary" not in str(found)
