"""Settings for a test: short leases, short waits, loopback."""

from typing import Any

from config.settings import Settings, load_settings

PEPPER = "a pepper for the tests, long enough"


def make_settings(
    *, postgres_dsn: str, redis_url: str, upstream_url: str = "http://127.0.0.1:1/v1", **more: Any
) -> Settings:
    base: dict[str, Any] = {
        "postgres": {"dsn": postgres_dsn},
        "redis": {"url": redis_url},
        "upstream": {
            "base_url": upstream_url,
            "api_key": "sk-sim",
            "generation_wait_s": 5,
            "extra_members": ("sim", "x_own"),
        },
        "auth": {"key_pepper": PEPPER},
        "holds": {"lease_s": 2, "renew_s": 0.5},
        "sweep": {"period_s": 0.3, "worker_lease_s": 2},
        "batch": {"open_wait_s": 2},
        "limits": {"user_calls_in_flight": 0},  # many a test makes hundreds of calls at once as one user
        "port": 0,
        "shutdown_s": 10,
    }
    for name, value in more.items():
        base[name] = {**base.get(name, {}), **value} if isinstance(value, dict) else value
    return load_settings(**base)
