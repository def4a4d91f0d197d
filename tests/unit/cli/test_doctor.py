"""What ``tuma doctor`` says of the settings alone."""

from typing import Any

import pytest

from billing.redis.survey import Server, Survey
from config.settings import load_settings
from scripts.cli.doctor import _ask_redis, _look_at_settings


@pytest.mark.parametrize(
    ("dsn", "redis", "upstream", "warned"),
    [
        ("postgresql://u:p@127.0.0.1/x", "redis://:p@localhost", "http://[::1]:1/v1", 0),
        ("postgresql:///x?host=/run/postgresql", "rediss://:p@r.example", "https://p.example/v1", 0),
        ("postgresql://u:p@db.example/x?sslmode=verify-full", "rediss://r.example", "https://p.example", 0),
        ("postgresql://u:p@db.example/x", "redis://:p@r.example", "http://p.example/v1", 3),
        ("postgresql://u:p@db.example/x?sslmode=require", "redis://:p@10.0.0.1", "http://10.0.0.2/v1", 3),
        ("postgresql://u:p@[x/x", "redis://[", "", 0),
        ("", "redis+cluster://:p@127.0.0.1:1,[::1]:2", "", 0),
        ("", "redis+cluster://:p@127.0.0.1:1,10.0.0.1:2", "", 1),
        ("", "rediss+cluster://:p@r.example,s.example", "", 0),
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


@pytest.mark.parametrize(("url", "said"), [("", "is not set"), ("https://hooks.example/token", "set")])
def test_whether_anybody_is_told_of_alerts(url: str, said: str) -> None:
    settings = load_settings(alerts={"url": url, "secret": "a secret that signs"})
    (found,) = (item for item in _look_at_settings(settings) if item["name"] == "TUMA_ALERTS__URL")
    assert found["detail"].startswith(said)
    assert "token" not in found["detail"]


_GOOD = Server("7.0.15", "noeviction", lineage=True)
_SHAPE = "a cluster of 3 primaries, 2 of them with a replica"


@pytest.mark.parametrize(
    ("survey", "ok", "said"),
    [
        (Survey((_GOOD,)), True, "version 7.0.15"),
        (Survey((_GOOD, _GOOD), shape=_SHAPE), True, f"version 7.0.15, {_SHAPE}"),
        (
            Survey((_GOOD,), away=("h:1",), shape=_SHAPE),
            False,
            f"h:1 does not answer (version 7.0.15, {_SHAPE})",
        ),
        (Survey((_GOOD,), away=("h:1", "i:2")), False, "h:1, i:2 do not answer (version 7.0.15)"),
        (Survey((_GOOD,), faults=("5 slots have no node",)), False, "5 slots have no node (version 7.0.15)"),
        (
            Survey((_GOOD, Server("6.0.9", "noeviction", lineage=True))),
            False,
            "version 6.0.9 is older than 6.2 (version 6.0.9, 7.0.15)",
        ),
        (Survey((_GOOD, Server("7.0.15", "allkeys-lru", lineage=True))), False, "set it to noeviction"),
        (Survey((_GOOD, Server("7.0.15", "noeviction", lineage=False))), False, "tells no master_replid"),
    ],
)
async def test_what_it_says_of_redis(survey: Survey, ok: bool, said: str) -> None:
    class Link:
        async def survey(self) -> Survey:
            return survey

    class Stand:
        pipe = Link()

    found, detail = await _ask_redis(Stand())  # type: ignore[arg-type]
    assert found is ok
    assert said in detail
