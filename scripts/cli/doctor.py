"""``tuma doctor``: what is missing or wrong, in words, and how to mend it. Never prints a secret."""

import asyncio
import ipaddress
from collections.abc import Awaitable
from typing import Any, get_args
from urllib.parse import parse_qsl, urlsplit

import click

from billing.errors import TumaError
from billing.fx.book import FxBook
from billing.payments.units import PaymentProvider
from billing.postgres.database import Database
from billing.postgres.migrate import MigrationError, check_current
from billing.postgres.pooler import require_sessions
from billing.postgres.replica import POSITION
from billing.postgres.roles import LOGINS
from config.secrets import require_long_secrets
from config.settings import Settings, SettingsError, load_settings
from proxy.outbound.fx_sources import make_sources
from scripts.command import run_command
from scripts.office import Office, open_office
from scripts.programs.files import FILES_MIN, bound_connections, find_file_limit

_PEPPER_MIN = 16
_TOKEN_MIN = 16
_REDIS_MIN = (6, 2)
_POSTGRES_MIN = 150_000
_ENCRYPTED = frozenset(("rediss", "rediss+cluster", "https"))
_PUBLISHABLE_KEYS = ("pk_", "FLWPUBK")
_TEST_KEYS = ("sk_test_", "rk_test_", "FLWSECK_TEST")
_CLUSTER = "SELECT system_identifier FROM pg_control_system()"
_CHECKED = frozenset(("verify-ca", "verify-full"))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.pass_context
def doctor(context: click.Context, *, as_json: bool) -> None:
    """Say in words what is missing or wrong in the settings, and how to mend it."""
    run_command(examine, as_json=as_json or bool(context.find_root().obj))


async def examine() -> dict[str, Any]:
    """Look at the settings and at every server that they name.

    Returns:
        ``ok`` and a list of findings: ``name, ok, detail``, the detail naming the remedy where one is needed.
    """
    settings = load_settings()
    findings = _look_at_settings(settings)
    if settings.postgres.dsn.get_secret_value():
        async with open_office(settings) as office:
            postgres = await _finding("postgres", _ask_postgres(office))
            findings.append(postgres)
            if settings.redis.url.get_secret_value():
                findings.append(await _finding("redis", _ask_redis(office)))
            findings.append(await _finding("upstream", _ask_upstream(office)))
            if settings.fx.url:
                findings.append(await _finding("TUMA_FX__URL", _ask_fx(settings)))
            if postgres["ok"]:
                findings.append(await _finding("roles", _ask_roles(settings)))
                findings.append(await _finding("sessions", _ask_sessions(office)))
                if settings.postgres.replica_dsn.get_secret_value():
                    findings.append(await _finding("replica", _ask_replica(office)))
                findings += await _look_at_data(office)
    return {"ok": all(item["ok"] for item in findings), "findings": findings}


def _look_at_settings(settings: Settings) -> list[dict[str, Any]]:
    pepper = settings.auth.key_pepper.get_secret_value()
    key = settings.upstream.api_key.get_secret_value()
    token = settings.admin.token.get_secret_value()
    return [
        _item(
            "TUMA_POSTGRES__DSN",
            bool(settings.postgres.dsn.get_secret_value()),
            "set"
            + _in_the_open(settings.postgres.dsn.get_secret_value(), "?sslmode=verify-full&sslrootcert=FILE"),
            "is not set: postgresql://user:password@host:5432/tuma (or use ./scripts/dev)",
        ),
        _item(
            "TUMA_REDIS__URL",
            bool(settings.redis.url.get_secret_value()),
            "set" + _in_the_open(settings.redis.url.get_secret_value(), "rediss:// and TUMA_REDIS__CA_FILE"),
            "is not set: redis://:password@host:6379/0, or redis+cluster://:password@host:6379,host:6379",
        ),
        _item(
            "TUMA_AUTH__KEY_PEPPER",
            len(pepper) >= _PEPPER_MIN,
            "set",
            f"is missing or shorter than {_PEPPER_MIN} characters: give it a long random value and keep it;"
            " changing it makes every key invalid",
        ),
        _item(
            "TUMA_ADMIN__TOKEN",
            len(token) == 0 or len(token) >= _TOKEN_MIN,
            "set" if token else "is not set: there is no operator's API under /admin",
            f"is shorter than {_TOKEN_MIN} characters, and opens everything: give it a long random value",
        ),
        _item(
            "signing in",
            True,
            _who_signs_in(settings),
            "",
        ),
        _item(
            "TUMA_ALERTS__URL",
            True,
            "set: `tuma alerts test` shows whether messages arrive"
            if settings.alerts.url.get_secret_value()
            else "is not set: nobody is told of alerts; they are in `tuma alerts list` and in the log",
            "",
        ),
        _item("TUMA_UPSTREAM__API_KEY", bool(key), "set", "is not set: the provider's key"),
        _item(
            "TUMA_UPSTREAM__BASE_URL",
            True,
            f"{settings.upstream.kind} at {settings.upstream.base_url}"
            + _in_the_open(settings.upstream.base_url, "https://"),
            "",
        ),
        _look_at_secrets(settings),
        _look_at_files(settings, find_file_limit()),
        *(_look_at_payments(settings, provider) for provider in get_args(PaymentProvider)),
    ]


def _look_at_secrets(settings: Settings) -> dict[str, Any]:
    try:
        require_long_secrets(settings)
    except SettingsError as error:
        return _item("secrets", False, "", f"{error}: `tuma serve` does not start")
    return _item("secrets", True, "none of ours is short enough to be guessed", "")


def _look_at_files(settings: Settings, files: int) -> dict[str, Any]:
    """Say whether a worker may open as many files as its connections are."""
    bounded = bound_connections(settings, files).limits.connections
    good = f"{files}: enough for {settings.limits.connections} connections per worker"
    if bounded < settings.limits.connections:
        good = (
            f"{files}: a worker takes {bounded} connections at most, not TUMA_LIMITS__CONNECTIONS={settings.limits.connections};"
            " raise the hard limit (LimitNOFILE= of systemd, --ulimit nofile= of Docker, `ulimit -Hn`)"
        )
    return _item("open files", files >= FILES_MIN, good, f"{good}; this is too few to serve with")


def _look_at_payments(settings: Settings, provider: PaymentProvider) -> dict[str, Any]:
    """Say whether a payment provider is set up, in whole and for real money."""
    stripe, paystack, flutterwave = settings.stripe, settings.paystack, settings.flutterwave
    # Paystack signs webhooks with the key itself.
    secret, signing, base_url = {
        "stripe": (stripe.secret_key, stripe.webhook_secret, stripe.base_url),
        "paystack": (paystack.secret_key, paystack.secret_key, paystack.base_url),
        "flutterwave": (flutterwave.secret_key, flutterwave.webhook_secret, flutterwave.base_url),
    }[provider]
    prefix, key, signs = f"TUMA_{provider.upper()}__", secret.get_secret_value(), signing.get_secret_value()
    wrong = ""
    if signs and not key:
        wrong = f"{prefix}SECRET_KEY is not set, though {prefix}WEBHOOK_SECRET is: no top-up can be made"
    elif key.startswith(_PUBLISHABLE_KEYS):
        wrong = f"{prefix}SECRET_KEY is a public key: take the secret one"
    elif key and not signs:
        wrong = (
            f"{prefix}WEBHOOK_SECRET is not set: every webhook is refused, and a payment is found only when its turn to be"
            " asked about comes"
        )
    if not key:
        good = f"not set up: {prefix}SECRET_KEY is not set"
    else:
        mode = "TEST keys: no real money" if key.startswith(_TEST_KEYS) else "live keys"
        good = f"set up at {base_url}, {mode}" + _in_the_open(base_url, "https://")
    return _item(f"payments by {provider}", not wrong, good, wrong)


def _who_signs_in(settings: Settings) -> str:
    auth = settings.auth
    ways = [
        name
        for name, value in (
            ("HS256 by TUMA_AUTH__JWT_SECRET", auth.jwt_secret.get_secret_value()),
            (f"the keys at {auth.jwks_url}", auth.jwks_url),
        )
        if value
    ]
    if not ways:
        return "with keys only: neither TUMA_AUTH__JWT_SECRET nor TUMA_AUTH__JWKS_URL is set"
    missing = [
        f"TUMA_AUTH__{name}"
        for name, value in (("ISSUER", auth.issuer), ("AUDIENCE", auth.audience))
        if not value
    ]
    return f"with keys, and tokens by {' and '.join(ways)}" + (
        f"; {' and '.join(missing)} not set: tokens that the same issuer made for others are accepted, too"
        if missing
        else ""
    )


def _in_the_open(url: str, remedy: str) -> str:
    """Return a warning, if a URL leads over a network without an encryption that is checked; nothing of its secrets."""
    try:
        parts = urlsplit(url)
        hosts = [urlsplit(f"//{host}").hostname for host in parts.netloc.rpartition("@")[2].split(",")]
    except ValueError:
        return ""  # whoever connects says what is wrong with it
    encrypted = parts.scheme in _ENCRYPTED or dict(parse_qsl(parts.query)).get("sslmode") in _CHECKED
    if encrypted or all(_is_here(host) for host in hosts):
        return ""
    return f", but not encrypted with a certificate that is checked, and not on this machine: use {remedy}"


def _is_here(host: str | None) -> bool:
    if host is None or host == "localhost":
        return True  # no host: a socket of this machine
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _item(name: str, ok: bool, good: str, bad: str) -> dict[str, Any]:  # noqa: FBT001 - private, and read as a sentence
    return {"name": name, "ok": ok, "detail": good if ok else bad}


async def _finding(name: str, question: Awaitable[tuple[bool, str]]) -> dict[str, Any]:
    try:
        async with asyncio.timeout(15):
            ok, detail = await question
    except TumaError as error:
        return {"name": name, "ok": False, "detail": str(error)}
    except TimeoutError:
        return {"name": name, "ok": False, "detail": "does not answer"}
    return {"name": name, "ok": ok, "detail": detail}


async def _ask_postgres(office: Office) -> tuple[bool, str]:
    async with office.database.connection() as connection:
        number = int(await connection.fetchval("SHOW server_version_num"))
        text = await connection.fetchval("SHOW server_version")
        durable = await connection.fetchval("SHOW synchronous_commit")
        if number < _POSTGRES_MIN:
            return False, f"version {text} is older than 15"
        try:
            found = await check_current(connection)
        except MigrationError as error:
            return False, str(error)
    if durable == "off":
        return False, "synchronous_commit is off: a crash of the server would lose settlements; turn it on"
    return True, f"version {text}, schema {found}"


async def _ask_roles(settings: Settings) -> tuple[bool, str]:
    """Log in as each role of `tuma serve`."""
    if not settings.postgres.roles:
        return True, "TUMA_POSTGRES__ROLES is off: everything is done as the DSN's user"
    for role in LOGINS:
        database = Database(settings.postgres, name="tuma doctor", role=role, connections_max=1)
        try:
            async with database.connection() as connection:
                mighty = await connection.fetchval(
                    "SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = session_user"
                )
        finally:
            await database.close()
        if mighty:
            return False, f"the {role} logs in as a superuser: give it a role of its own"
    return True, f"{len(LOGINS)} roles log in, none of them a superuser"


async def _ask_sessions(office: Office) -> tuple[bool, str]:
    """Say whether notices arrive and locks last, and whether waiting for a lock is bounded behind a pooler."""
    found = await require_sessions(office.database, wait_s=office.settings.postgres.connect_timeout_s)
    database = Database(office.settings.postgres, name="tuma doctor", role="settler", connections_max=1)
    try:
        async with database.connection() as connection:
            bound = await connection.fetchval("SHOW lock_timeout")
    finally:
        await database.close()
    if bound == "0":
        return False, (
            "through the pooler nothing bounds how long the settler waits for a lock: run `tuma migrate`, then RECONNECT in the"
            " pooler; a role of your own needs ALTER ROLE … SET lock_timeout = '5s'"
        )
    return True, found


async def _ask_replica(office: Office) -> tuple[bool, str]:
    """Say whether the replica is one of our primary, and how far behind."""
    settings = office.settings.postgres
    replica = Database(settings, name="tuma doctor", connections_max=1, replica=True)
    try:
        async with office.database.connection() as connection:
            ours = await connection.fetchval(_CLUSTER)
        async with replica.connection() as connection:
            theirs = await connection.fetchval(_CLUSTER)
            position = await connection.fetchrow(POSITION)
    finally:
        await replica.close()
    if ours != theirs:
        return False, "TUMA_POSTGRES__REPLICA_DSN leads to a replica of another server"
    if not position["follows"]:
        return False, "TUMA_POSTGRES__REPLICA_DSN leads to a primary: sums are read from TUMA_POSTGRES__DSN"
    behind_s = position["behind_s"]
    if behind_s is None:
        return True, "follows; it has seen no commit yet"
    late = behind_s > settings.replica_lag_s
    return True, f"its latest commit is {behind_s:.0f} s old" + (
        f", more than TUMA_POSTGRES__REPLICA_LAG_S ({settings.replica_lag_s:.0f}): it is not asked"
        if late
        else ""
    )


async def _ask_redis(office: Office) -> tuple[bool, str]:
    survey = await office.pipe.survey()
    faults = list(survey.faults)
    if survey.away:
        faults.append(f"{', '.join(survey.away)} {'does' if len(survey.away) == 1 else 'do'} not answer")
    versions = sorted({server.version for server in survey.servers}, key=_version)
    faults += [
        f"version {version} is older than 6.2" for version in versions if _version(version) < _REDIS_MIN
    ]
    if any(server.policy != "noeviction" for server in survey.servers):
        faults.append("maxmemory-policy may evict holds: set it to noeviction")
    if not all(server.lineage for server in survey.servers):
        faults.append(
            "INFO replication tells no master_replid: a replica that is promoted could not be told from its primary"
        )
    seen = f"version {', '.join(versions)}" + (f", {survey.shape}" if survey.shape else "")
    return not faults, f"{'; '.join(faults)} ({seen})" if faults else seen


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


async def _ask_upstream(office: Office) -> tuple[bool, str]:
    models = await office.upstream.list_models()
    return True, f"lists {len(models)} models"


async def _ask_fx(settings: Settings) -> tuple[bool, str]:
    """Ask every source of exchange rates, and keep nothing of it."""
    said = []
    for source in make_sources(settings.fx):
        found = await source.fetch()
        said.append(f"{source.name} names {len(found.rates)} rates")
    return True, ", ".join(said)


async def _look_at_data(office: Office) -> list[dict[str, Any]]:
    async with office.database.connection() as connection:
        prices = await connection.fetchval("SELECT count(*) FROM model_prices WHERE valid_to IS NULL")
        keys = await connection.fetchval("SELECT count(*) FROM api_keys WHERE revoked_at IS NULL")
        used = await connection.fetch("SELECT DISTINCT currency FROM wallets")
    rates = {row["currency"]: row for row in await FxBook(office.database, office.settings.fx).describe()}
    missing = sorted({row["currency"] for row in used} - rates.keys())
    stale = sorted(row["currency"] for row in used if rates.get(row["currency"], {}).get("stale"))
    waiting = sorted(currency for currency, row in rates.items() if row["waiting"] is not None)
    return [
        _item(
            "prices",
            prices > 0,
            f"{prices} models have a price",
            "no model has a price: run `tuma models sync`",
        ),
        _item("keys", keys > 0, f"{keys} keys", "there is no API key: `tuma keys create --wallet WALLET`"),
        _item(
            "exchange rates",
            not (missing or stale or waiting),
            "every wallet's currency has one"
            + ("" if office.settings.fx.url else "; set by hand: TUMA_FX__URL is not set"),
            "; ".join(
                text
                for names, text in (
                    (missing, f"none for {', '.join(missing)}: `tuma fx set USD CODE RATE`"),
                    (stale, f"too old for {', '.join(stale)}: `tuma fx sync`"),
                    (
                        waiting,
                        f"{', '.join(waiting)} waits for your word: `tuma fx show`, `tuma fx accept CODE`",
                    ),
                )
                if names
            ),
        ),
    ]
