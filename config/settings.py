"""Every setting of Tuma, read once from the environment.

Names carry the prefix ``TUMA_`` and nest with ``__``: ``TUMA_POSTGRES__DSN`` is ``settings.postgres.dsn``.
Units are in the names (``_s`` seconds, ``_ms`` milliseconds, ``_bytes``, ``_bps`` hundredths of a percent);
secrets are ``SecretStr`` and never printed. This module alone reads the environment.
"""

import json
import os
import re
from collections.abc import Collection
from decimal import Decimal
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError as UnreadableError

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Bound = Annotated[int, Field(ge=0)]  # 0: none
MarkupBps = Annotated[int, Field(ge=0, le=100_000)]
Usd = Annotated[Decimal, Field(ge=0, lt=10**9)]
SECRET_MIN = 16  # characters of a secret that signs
LogLevel = Literal["debug", "info", "warning", "error"]
_ORIGIN = re.compile(r"https?://(?:[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")


def wants_traces() -> bool:
    """Return whether OpenTelemetry's standard variables name somewhere to send traces to."""
    read = os.environ.get
    off = read("OTEL_SDK_DISABLED", "").lower() == "true" or read("OTEL_TRACES_EXPORTER", "otlp") != "otlp"
    return not off and bool(read("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or read("OTEL_EXPORTER_OTLP_ENDPOINT"))


class SettingsError(ValueError):
    """The environment does not make a usable configuration; the message says which setting and how to mend it."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def read_networks(text: str) -> tuple[IPv4Network | IPv6Network, ...]:
    """Parse networks or single addresses, comma separated.

    Raises:
        ValueError: one of them is none.
    """
    return tuple(ip_network(part.strip()) for part in text.split(",") if part.strip())


def _split_list(value: object) -> object:
    """Split a comma separated text, or read it as a JSON array."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return json.loads(value)
    return tuple(part.strip() for part in value.split(",") if part.strip())


class PostgresSettings(_Section):
    """Where the truth is."""

    dsn: SecretStr = SecretStr("")  # of the user who owns the schema, or may act as its owner
    # How the roles of `tuma serve` log in (billing/postgres/roles.py); empty: with the DSN above, and passwords derived from it.
    proxy_dsn: SecretStr = SecretStr("")
    settler_dsn: SecretStr = SecretStr("")
    keeper_dsn: SecretStr = SecretStr("")
    api_dsn: SecretStr = SecretStr("")
    webhook_dsn: SecretStr = SecretStr("")
    operator_dsn: SecretStr = SecretStr("")
    roles: bool = True  # false: no roles are made, and everything is done as the DSN's user
    role_prefix: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,30}$")] = "tuma"
    pool_max: Count = 8
    connect_timeout_s: Positive = 5.0
    command_timeout_s: Positive = 15.0
    # "transaction": the DSNs above lead to a pooler that lends a server's connection for one transaction, as PgBouncer does.
    pooler: Literal["none", "transaction"] = "none"
    # Of the two below the place counts: who logs in there, and by which password, is said by the DSNs above.
    direct_dsn: SecretStr = SecretStr(
        ""
    )  # past the pooler, for what needs a session: LISTEN, locks, migrations
    replica_dsn: SecretStr = SecretStr(
        ""
    )  # a server that follows the primary, for sums that may be of before
    replica_lag_s: Positive = 30.0  # a replica that is further behind is not asked
    replica_pause_s: Positive = 5.0  # how long one that is away, or too far behind, is not asked again

    @model_validator(mode="after")
    def _leads_past_the_pooler(self) -> "PostgresSettings":
        if self.pooler != "none" and not self.direct_dsn.get_secret_value():
            raise ValueError(
                "POOLER is set, so DIRECT_DSN must be, too: it leads to the server itself, past the pooler, which keeps no session"
                " (LISTEN, locks, migrations)"
            )
        return self


class RedisSettings(_Section):
    """Where calls are admitted."""

    url: SecretStr = SecretStr("")
    ca_file: str = ""  # who signs the certificate of a rediss:// server; empty: whom the system trusts
    timeout_s: Positive = 1.0  # a Redis that answers slower than this fails closed
    pipeline_max: Count = 256  # commands in one pipeline
    # Of a cluster (redis+cluster://, rediss+cluster://), whose nodes each have timeout and connections as above.
    redirects_max: Count = 5  # times that a command which did not run is sent to where it belongs
    redirect_pause_s: Positive = 0.1  # before it is sent again while its keys are being moved
    map_pause_s: Positive = 0.2  # between two looks at who has which slot, while that changes


class UpstreamSettings(_Section):
    """The provider that answers the calls."""

    kind: Literal["openrouter", "openai"] = "openrouter"
    base_url: str = "https://openrouter.ai/api/v1"
    api_key: SecretStr = SecretStr("")
    management_key: SecretStr = SecretStr(
        ""
    )  # OpenRouter's, for /credits and /activity; else the api_key is tried
    trust_cost: bool = False  # kind openai: take a gateway's own `usage.cost` before the price book
    on_client_gone: Literal["abort", "drain"] | None = None  # None: abort for openrouter, drain for openai
    connect_timeout_s: Positive = 10.0
    first_byte_timeout_s: Positive = 300.0
    idle_timeout_s: Positive = 120.0  # between two reads of a stream, after its first byte
    end_wait_s: Positive = (
        2.0  # how long an answer that said all, or sent [DONE] without usage, may stay open
    )
    drain_timeout_s: Positive = 600.0  # how long an answer is read on for a client that left
    generation_wait_s: Positive = 15.0  # how long /generation is asked for an exact figure before estimating
    answer_bytes: Count = 64 * 1024 * 1024  # a plain answer larger than this is refused
    event_bytes: Count = 32 * 1024 * 1024  # one event of a stream; a picture is one
    connections_max: Count = 20_000  # at once; further calls wait for one, as long as for a first byte
    # Members of a request that no table here has; `pass` is for servers that bill nothing but tokens.
    unknown_members: Literal["refuse", "pass"] = "refuse"
    extra_members: tuple[str, ...] = ()  # a JSON array: members that this provider has, and bills nothing for

    @field_validator("base_url")
    @classmethod
    def _no_trailing_slash(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        if any(sign in value for sign in "@?# \\"):
            raise ValueError("must have no user, query or fragment: the key is TUMA_UPSTREAM__API_KEY")
        return value.rstrip("/")

    @field_validator("api_key", "management_key")
    @classmethod
    def _fits_a_header(cls, value: SecretStr) -> SecretStr:
        text = value.get_secret_value()
        if not text.isascii() or (text and not text.isprintable()):
            raise ValueError("has characters that no header can carry; is there a line's end in it?")
        return value


class AuthSettings(_Section):
    """How callers prove who they are."""

    key_pepper: SecretStr = SecretStr("")
    old_key_peppers: tuple[SecretStr, ...] = ()  # a JSON array: keys made under them go on working
    cache_ttl_s: Annotated[float, Field(gt=0, le=1)] = 0.8  # a revoked key stops by then, though nobody tell
    cache_entries: Count = 100_000  # of keys, of people, and of tokens that were verified
    wait_s: Positive = 5.0  # how long it waits for a Postgres that is away, before 503
    keys_max: Count = 100  # that a user makes for themselves
    key_overlap_s: Annotated[float, Field(ge=0)] = (
        24 * 3600.0
    )  # how long a rotated key's secret before is good
    key_overlap_max_s: Annotated[float, Field(ge=0)] = 30 * 24 * 3600.0
    default_currency: str = ""  # of the wallet that somebody who signs in first is given; empty: none
    jwt_secret: SecretStr = SecretStr("")  # for HS256, shared with the issuer; empty: such tokens are refused
    jwt_bytes: Count = 8 * 1024  # a token larger than this is refused
    jwks_url: str = ""  # the issuer's keys for RS256 and ES256; empty: such tokens are refused
    jwks_bytes: Count = 128 * 1024  # an answer larger than this is refused
    jwks_timeout_s: Positive = 5.0
    jwks_ttl_s: Positive = 600.0  # keys older than this are fetched anew, behind the calls
    jwks_retry_s: Positive = 10.0  # between two fetches at least, whatever the tokens name
    jwks_stale_s: Positive = 86_400.0  # keys that cannot be fetched anew stay good for so long
    issuer: str = ""  # what `iss` must be; empty: anything
    audience: str = ""  # what `aud` must contain; empty: anything
    leeway_s: Annotated[float, Field(ge=0, le=600)] = 30.0  # between the issuer's clock and ours
    trusted_proxies: str = ""  # networks whose X-Forwarded-For is believed, comma separated

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, value: str) -> str:
        read_networks(value)
        return value

    @property
    def trusted_networks(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """Where proxies that are believed stand."""
        return read_networks(self.trusted_proxies)


class AdminSettings(_Section):
    """The operator's token."""

    token: SecretStr = SecretStr("")


class FxSettings(_Section):
    """Exchange of the provider's dollars into the wallet's currency."""

    # The first source: https://open.er-api.com, https://openexchangerates.org with an app_id, the whole address of a document
    # of either shape, or file:///path; empty: nothing is fetched.
    url: str = ""
    app_id: SecretStr = SecretStr("")
    second_url: str = ""  # a source that must agree with the first
    second_app_id: SecretStr = SecretStr("")
    markup_bps: MarkupBps = 0  # for rates set without a markup of their own
    markup_bps_by_currency: dict[str, MarkupBps] = {}  # a JSON object: {"NGN": 250}
    currencies: Annotated[tuple[str, ...], NoDecode] = ()  # quoted beside those of wallets, comma separated
    period_s: Positive = 3600.0  # from one fetch to the next
    timeout_s: Positive = 10.0  # for a source's whole answer
    answer_bytes: Count = 256 * 1024  # a larger answer is refused
    document_age_max_s: Positive = (
        3 * 86_400.0
    )  # rates that the source itself made longer ago are not believed
    band_bps: Bound = 200  # how far two sources may be apart
    jump_bps: Bound = 1_000  # how far a rate may move from the quoted one without an operator's word
    stale_after_s: Positive = (
        86_400.0  # a fetched rate that was not confirmed for so long prices no new calls
    )

    @field_validator("url", "second_url")
    @classmethod
    def _no_query(cls, value: str) -> str:
        if value and not value.startswith(("http://", "https://", "file:///")):
            raise ValueError("must start with https://, http:// (this machine alone) or file:///")
        if any(sign in value for sign in "@?# \\"):
            raise ValueError("must have no user, query or fragment: the key is TUMA_FX__APP_ID")
        return value

    @field_validator("currencies", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return _split_list(value)

    @field_validator("markup_bps_by_currency", "currencies")
    @classmethod
    def _are_codes(cls, value: Collection[str]) -> Collection[str]:
        if not all(re.fullmatch(r"[A-Z]{3}", code) for code in value):
            raise ValueError("currencies are codes of three capital letters, as NGN")
        return value


class _PaymentProviderSettings(_Section):
    secret_key: SecretStr = SecretStr("")  # empty: this provider is not offered
    base_url: str = ""

    @field_validator("base_url")
    @classmethod
    def _no_trailing_slash(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        if any(sign in value for sign in "@?# \\"):
            raise ValueError("must have no user, query or fragment")
        return value.rstrip("/")

    @field_validator("secret_key")
    @classmethod
    def _fits_a_header(cls, value: SecretStr) -> SecretStr:
        text = value.get_secret_value()
        if not text.isascii() or (text and not text.isprintable()):
            raise ValueError("has characters that no header can carry; is there a line's end in it?")
        return value


class StripeSettings(_PaymentProviderSettings):
    """Top-ups by Stripe."""

    base_url: str = "https://api.stripe.com"
    # Where a payer goes who named no other place, as Stripe's page needs one.
    return_url: str = "https://stripe.com"
    webhook_secret: SecretStr = SecretStr("")  # empty: every webhook is refused


class PaystackSettings(_PaymentProviderSettings):
    """Top-ups by Paystack, which signs webhooks with the secret key."""

    base_url: str = "https://api.paystack.co"


class FlutterwaveSettings(_PaymentProviderSettings):
    """Top-ups by Flutterwave."""

    base_url: str = "https://api.flutterwave.com/v3"
    webhook_secret: SecretStr = SecretStr("")  # empty: every webhook is refused


class PaymentSettings(_Section):
    """How payments are waited for and looked into."""

    timeout_s: Positive = 20.0  # for an answer of a payment provider
    expires_s: Annotated[float, Field(ge=1_800, le=86_400)] = 3_600.0  # how long a page waits for its payer
    look_s: Positive = 5.0  # how often is looked for work that nobody rang for
    poll_s: Positive = 30.0  # before a provider is asked about a payment that it told nothing of; doubled
    # A payer who waits and asks how it stands lets the provider be asked at once: so often per top-up, for so long, so many at once.
    waiting_pause_s: Annotated[float, Field(ge=0.001)] = 1.0
    waiting_s: Positive = 3.0
    waiting_max: Count = 16  # per worker
    late_s: Positive = 3 * 86_400.0  # how long after its end an intent is still asked about
    sweep_s: Positive = 3_600.0  # how often everything of late is looked at
    sweep_back_s: Positive = 3 * 86_400.0
    webhook_bytes: Count = 256 * 1024  # a larger webhook is refused
    pending_max: Count = 20  # top-ups of a wallet that wait to be paid; one more is refused
    auto_look_s: Positive = 10.0  # how often is looked for wallets that top themselves up
    auto_pause_s: Annotated[float, Field(ge=60)] = (
        3_600.0  # from one such top-up of a wallet to the next, at least
    )
    minimum: dict[str, str] = {}  # a JSON object, in major units: {"NGN": "500"}
    maximum: dict[str, str] = {}


class LogSettings(_Section):
    """What is logged, to stderr."""

    level: LogLevel = "info"
    format: Literal["json", "console"] = "json"


class MetricSettings(_Section):
    """``GET /metrics``: who may read it, and what it costs."""

    token: SecretStr = SecretStr("")  # whoever sends it may scrape; empty: only the networks below
    networks: str = (
        "127.0.0.0/8,::1/128"  # who may scrape without a token, unless one is set; comma separated
    )
    cache_s: Positive = 5.0  # how long what was read from Postgres is shown
    timeout_s: Positive = 3.0  # for reading it
    publish_s: Positive = 1.0  # how often a worker shows its numbers to the others
    models_max: Count = 100  # with series of their own, per worker; the rest is "other"

    @field_validator("networks")
    @classmethod
    def _networks(cls, value: str) -> str:
        read_networks(value)
        return value


class LimitSettings(_Section):
    """Bounds on what a caller may send and how slowly."""

    line_bytes: Count = 8 * 1024  # a request's first line
    field_bytes: Count = 16 * 1024  # one header, its name included
    fields: Count = 100  # headers of one request
    head_bytes: Count = 64 * 1024  # all of them, and the first line
    head_timeout_s: Positive = 15.0  # from a request's first byte to the end of its head
    silent_timeout_s: Positive = 30.0  # a new connection that has sent nothing
    connections: Count = 20_000  # per worker; one more is closed at once
    connections_per_address: Bound = 0  # per worker and client address; 0: none, as behind a load balancer
    body_bytes: Count = 16 * 1024 * 1024
    body_timeout_s: Positive = 30.0
    form_bytes: Count = 256 * 1024  # a body that is no call: a key, a cap, a top-up
    look_bytes: Count = 16 * 1024  # before a larger body is read, the wallet is looked at
    user_bodies_bytes: Count = 64 * 1024 * 1024  # of a user, per worker, while they are being read
    bodies_bytes: Count = 512 * 1024 * 1024  # of everybody, per worker
    json_nodes: Count = (
        400_000  # numbers and texts of a body; docs/security.md says what else weighs how much
    )
    json_depth: Count = 100
    write_timeout_s: Positive = 60.0  # a client that takes no byte for so long is gone
    keepalive_timeout_s: Positive = 75.0
    lingering_s: Positive = (
        3.0  # how long a refused body is still taken in, so that its sender reads the refusal
    )
    calls_in_flight: Count = 10_000  # per worker
    requests_per_min: Count = 600_000  # a key without limits of its own
    tokens_per_min: Count = 1_000_000_000
    user_requests_per_min: Bound = (
        0  # all keys of a user together, unless the user has limits of their own; 0: none
    )
    user_tokens_per_min: Bound = 0
    user_calls_in_flight: Bound = 100
    auth_failures_per_min: Bound = 60  # with keys that are not valid, per client address; 0: no limit
    webhook_failures_per_min: Bound = 60  # webhooks that are not signed, per client address; 0: no limit
    user_writes_per_min: Bound = 120  # changes of a user's keys, caps and top-ups; 0: no limit
    usage_days: Count = 400  # that GET /v1/usage sums at once
    usage_rows: Count = 2_000  # that it answers at most, as JSON
    usage_csv_rows: Count = 50_000  # and as CSV


class HttpSettings(_Section):
    """What responses tell browsers."""

    hsts_s: Bound = 0  # Strict-Transport-Security, where TLS ends before us; 0: none


class CorsSettings(_Section):
    """Which web pages may call the API from a browser."""

    origins: Annotated[tuple[str, ...], NoDecode] = ()  # https://app.example.com, comma separated, or "*"
    max_age_s: Bound = 600  # how long a browser need not ask again

    @field_validator("origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return _split_list(value)

    @field_validator("origins")
    @classmethod
    def _exact(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and _ORIGIN.fullmatch(origin) is None:
                raise ValueError("every origin is scheme://host[:port] in lower case, without a path, or '*'")
        if "*" in value and len(value) > 1:
            raise ValueError("'*' stands alone")
        return value


class HoldSettings(_Section):
    """How much is set aside for a call, and for how long without a sign of life."""

    lease_s: Positive = 15.0
    renew_s: Positive = 4.0
    note_s: Positive = 1.0  # how often the ids of new answers are written to Postgres, beside Redis
    mirror_ttl_s: Positive = 600.0  # a wallet's mirror is rebuilt from Postgres at least so often
    # What a stream that names no bound counts in windows of tokens per minute until it has ended.
    stream_default_tokens: Count = 1_024
    plain_default_tokens: Count = (
        4_096  # the same of a plain call; of a model whose maximum nobody says, the bound
    )
    sensible_tokens: Count = (
        4_096  # where the wallet pays for less than the model's maximum, less than this waits its turn
    )
    least_tokens: Count = 64  # a wallet that pays for less output than this is refused
    turn_wait_s: Annotated[float, Field(ge=0)] = 10.0  # for other calls of the same wallet to end
    turn_waiters: Count = 64  # calls of a wallet that wait so, in a worker
    extend_at_percent: Annotated[int, Field(gt=0, le=100)] = 80
    expected_tokens: Count = 256  # a usual answer, for what an estimate expects
    counted_texts: Count = 10_000  # long texts of which the number of tokens is remembered


class BatchSettings(_Section):
    """Group commit of opened and settled calls."""

    open_rows: Count = 500
    open_delay_ms: Annotated[float, Field(ge=0)] = (
        5.0  # how long a call's row waits for others while nothing waits for it
    )
    settle_rows: Count = 500
    settle_delay_ms: Annotated[float, Field(ge=0)] = (
        2.0  # the same, of what an answer waits for; less if nobody is coming
    )
    queue_rows: Count = 100_000  # beyond this new calls are refused
    open_wait_s: Positive = 5.0  # how long a call waits for Postgres before 503
    settle_wait_s: Positive = 1.0  # how long an answer's end waits for its settlement to be posted


class SweepSettings(_Section):
    """The sweeper's pace."""

    period_s: Positive = 5.0
    worker_lease_s: Positive = 12.0
    rows: Count = 500
    ask_again_max_s: Positive = 60.0  # between two questions about an id that the provider does not know yet
    review_after_s: Positive = 120.0  # an id that the provider denies for so long goes to review


class FeedSettings(_Section):
    """The live feed of a wallet."""

    keep_s: Positive = 3_600.0  # who was away for no longer than this goes on where they were
    forget_s: Positive = 60.0  # how often older events are removed
    watchers: Count = 10_000  # per worker
    watchers_per_caller: Count = 50  # per worker and key, or user who signed in
    watchers_per_user: Count = 100  # per worker, with all their keys
    queue_events: Count = 256  # waiting for one watcher; one more, and the watcher is dropped
    page_events: Count = 200  # of one wallet, read at once
    wallets: Count = 100  # read at once
    heartbeat_s: Positive = 15.0
    write_timeout_s: Positive = 10.0  # a watcher that takes no byte for so long is dropped
    recheck_s: Positive = 300.0  # how often a watcher's key is looked at, should nobody tell of a change
    retry_s: Positive = 1.0  # how soon a watcher shall come back; spread when a worker stops


class QuotaSettings(_Section):
    """How the provider's quota is shared by the workers, and watched."""

    slab_usd: Usd = Decimal(1)  # what a worker leases at a time, if there is as much
    idle_s: Positive = 10.0  # a slab that lies idle for so long is given back
    observe_s: Positive = 30.0  # how often the provider is asked what is left
    low_usd: Usd = Decimal(5)  # less than this raises the alarm
    budget_usd: Usd | None = None  # consumed by us in all, at most; for providers that name no limit
    pause_s: Positive = (
        5.0  # no calls after the provider refused our key or account; doubled while it goes on
    )
    pause_max_s: Positive = 60.0
    refusals_s: Positive = (
        60.0  # for so long a call's refusal counts beside those of other callers and models
    )


class ReconcileSettings(_Section):
    """How our books follow the provider's."""

    period_s: Positive = 3600.0  # `tuma serve` reconciles by itself so often
    wait_s: Positive = 60.0  # for a run of another process to end
    charge_estimates_upward: bool = True  # whether a wallet pays more when an estimated charge proves too low
    sample: Annotated[int, Field(ge=0)] = 50  # exactly settled calls that a run asks about again
    rows: Count = 1_000  # calls of one run


class AlertSettings(_Section):
    """What an operator is told by webhook, and when."""

    # Where messages are posted; it may have a token in it. Empty: alerts are kept and shown, and nobody is told.
    url: SecretStr = SecretStr("")
    secret: SecretStr = SecretStr("")  # signs every message
    name: Annotated[str, Field(max_length=100)] = "tuma"  # of this installation, in every message
    period_s: Positive = 15.0  # from one look at the conditions to the next
    quiet_s: Annotated[float, Field(ge=0)] = 60.0  # a condition that was not seen for so long has ended
    remind_s: Positive = 6 * 3600.0  # how often is reminded of one that lasts
    look_s: Positive = 2.0  # how often each worker looks for messages to deliver
    timeout_s: Positive = 10.0  # for the receiver's whole answer
    answer_bytes: Count = 16 * 1024  # an answer larger than this is no acknowledgement
    pause_s: Positive = 5.0  # before a second try; doubled with each
    pause_max_s: Positive = 300.0
    drop_after_s: Positive = 3 * 86_400.0  # a message that nobody took for so long is given up
    settle_lag_s: Positive = 60.0  # calls of dead workers that are open for so long
    webhook_tries: Count = 3  # an event of a payment provider's that failed so often
    differences_s: Positive = 86_400.0  # how long what reconciliation found and did not post is told of
    cap_percent: Annotated[int, Field(ge=50, le=100)] = 80  # spent of a cap
    events_back_s: Positive = 3600.0  # users' events of longer ago are not told of
    rows: Count = 1_000  # wallets, events and messages at a time

    @model_validator(mode="after")
    def _is_signed(self) -> "AlertSettings":
        if self.url.get_secret_value() and len(self.secret.get_secret_value()) < SECRET_MIN:
            raise ValueError(
                f"URL is set, so SECRET must be, too, with at least {SECRET_MIN} characters: it signs the messages"
            )
        return self


class Settings(BaseSettings):
    """All settings; ``load_settings`` is the way to get them."""

    model_config = SettingsConfigDict(
        env_prefix="TUMA_", env_nested_delimiter="__", extra="ignore", frozen=True, hide_input_in_errors=True
    )

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8080
    workers: Count = 1
    shutdown_s: Positive = 30.0
    postgres: PostgresSettings = PostgresSettings()
    redis: RedisSettings = RedisSettings()
    upstream: UpstreamSettings = UpstreamSettings()
    auth: AuthSettings = AuthSettings()
    admin: AdminSettings = AdminSettings()
    fx: FxSettings = FxSettings()
    stripe: StripeSettings = StripeSettings()
    paystack: PaystackSettings = PaystackSettings()
    flutterwave: FlutterwaveSettings = FlutterwaveSettings()
    payments: PaymentSettings = PaymentSettings()
    log: LogSettings = LogSettings()
    metrics: MetricSettings = MetricSettings()
    # Whether traces are sent: as OpenTelemetry's own variables say, unless it is set.
    tracing: bool = Field(default_factory=wants_traces)
    limits: LimitSettings = LimitSettings()
    http: HttpSettings = HttpSettings()
    cors: CorsSettings = CorsSettings()
    holds: HoldSettings = HoldSettings()
    batch: BatchSettings = BatchSettings()
    sweep: SweepSettings = SweepSettings()
    feed: FeedSettings = FeedSettings()
    quota: QuotaSettings = QuotaSettings()
    reconcile: ReconcileSettings = ReconcileSettings()
    alerts: AlertSettings = AlertSettings()


def load_settings(**overrides: object) -> Settings:
    """Read the environment; ``overrides`` win over it (tests, `./scripts/dev`).

    Raises:
        SettingsError: a value does not parse; the message names the variable, never its value.
    """
    try:
        return Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        lines = [
            f"TUMA_{'__'.join(str(part).upper() for part in item['loc'])}: {item['msg']}"
            for item in error.errors(include_input=False, include_url=False)
        ]
        raise SettingsError("; ".join(lines)) from None
    except UnreadableError as error:
        raise SettingsError(f"TUMA_…: {error}; it is no JSON") from None
