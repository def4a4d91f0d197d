"""Canaries in the place of every secret: none appears in a log, an answer, a traceback, ``doctor`` or upstream."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp
import pytest
from pydantic import BaseModel, SecretStr

from billing.errors import InputError, TumaError
from billing.postgres.database import Database
from billing.redis.pipeline import RedisPipe
from config.secrets import HIDDEN, Redactor, find_secrets
from config.settings import PostgresSettings, RedisSettings, Settings, SettingsError, load_settings
from proxy.http.errors import upstream_error
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.support.books import check_books
from tests.support.paths import ROOT
from tests.support.payers import Payer, make_payer, sync_models
from tests.support.running import run_proxy
from tests.support.settings import make_settings
from tests.support.tcp_proxy import TcpProxy

UPSTREAM_KEY = 'sk-or-canary/upstream+"key"=='
MANAGEMENT_KEY = "sk-or-canary-management"
ADMIN_TOKEN = "canary-admin-token"
PEPPER = "canary-pepper-long-enough"
CANARY = "canary"
HELLO = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def sim() -> AsyncIterator[SimulatedProvider]:
    async with SimulatedProvider(api_key=UPSTREAM_KEY) as provider:
        yield provider


@pytest.fixture
def settings(dsn: str, redis_url: str, sim: SimulatedProvider) -> Settings:
    return make_settings(
        postgres_dsn=dsn,
        redis_url=redis_url,
        upstream_url=sim.base_url,
        upstream={"api_key": UPSTREAM_KEY, "management_key": MANAGEMENT_KEY, "generation_wait_s": 1},
        auth={"key_pepper": PEPPER},
        admin={"token": ADMIN_TOKEN},
    )


def environment(settings: Settings, **more: str) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("TUMA_")},
        "TUMA_PORT": "0",
        "TUMA_POSTGRES__DSN": settings.postgres.dsn.get_secret_value(),
        "TUMA_REDIS__URL": settings.redis.url.get_secret_value(),
        "TUMA_UPSTREAM__BASE_URL": settings.upstream.base_url,
        "TUMA_UPSTREAM__API_KEY": UPSTREAM_KEY,
        "TUMA_UPSTREAM__EXTRA_MEMBERS": '["sim"]',
        "TUMA_UPSTREAM__MANAGEMENT_KEY": MANAGEMENT_KEY,
        "TUMA_UPSTREAM__GENERATION_WAIT_S": "0.2",
        "TUMA_AUTH__KEY_PEPPER": PEPPER,
        "TUMA_ADMIN__TOKEN": ADMIN_TOKEN,
        "TUMA_STRIPE__SECRET_KEY": "sk_live_canary_stripe",
        "TUMA_STRIPE__WEBHOOK_SECRET": "whsec_canary_long",
        "TUMA_STRIPE__BASE_URL": "http://127.0.0.1:1",
        "TUMA_PAYSTACK__SECRET_KEY": "sk_live_canary_paystack",
        "TUMA_PAYSTACK__BASE_URL": "http://127.0.0.1:1",
        "TUMA_FLUTTERWAVE__SECRET_KEY": "FLWSECK-canary",
        "TUMA_FLUTTERWAVE__WEBHOOK_SECRET": "canary-of-a-hash",
        "TUMA_FLUTTERWAVE__BASE_URL": "http://127.0.0.1:1",
        "TUMA_LOG__LEVEL": "debug",
        "TUMA_BATCH__OPEN_WAIT_S": "0.5",
        **more,
    }


@dataclass
class Heard:
    """All that came out."""

    answers: list[str] = field(default_factory=list)
    log: str = ""

    def show(self, payer: Payer, settings: Settings) -> list[str]:
        """Return which secrets are in it."""
        everything = "\n".join([*self.answers, self.log])
        passwords = [
            urlsplit(url.get_secret_value()).password or "-none-"
            for url in (settings.postgres.dsn, settings.redis.url)
        ]
        return [secret for secret in (CANARY, payer.secret, *passwords) if secret in everything]


@asynccontextmanager
async def serving(heard: Heard, **env: str) -> AsyncIterator[str]:
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "scripts.cli", "serve"],
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            assert process.stdout is not None
            yield (await asyncio.to_thread(process.stdout.readline)).split()[-1]
        finally:
            process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(process.wait, 30)
            log.seek(0)
            heard.log += log.read()


async def call(
    heard: Heard, url: str, path: str = "/v1/chat/completions", *, key: str, body: object = HELLO, **more: Any
) -> int:
    method = "GET" if body is None else "POST"
    async with aiohttp.ClientSession() as session:
        async with session.request(
            method,
            url + path,
            json=body,
            headers={"Authorization": f"Bearer {key}"},
            **more,
        ) as response:
            heard.answers.append(str(response.headers) + (await response.read()).decode(errors="replace"))
            return response.status


ECHOES: list[dict[str, Any]] = [
    {"fail_status": status, "fail_body": body, "fail_headers": {"Retry-After": f"Bearer {UPSTREAM_KEY}"}}
    for status in (400, 401, 402, 403, 404, 413, 422, 429, 500, 502, 503)
    for body in (
        {
            "error": {
                "message": f"Bearer {UPSTREAM_KEY} is wrong",
                "code": UPSTREAM_KEY,
                UPSTREAM_KEY: [UPSTREAM_KEY],
            }
        },
        f"not JSON: {UPSTREAM_KEY}",
        '{"error": "' + UPSTREAM_KEY.replace('"', '\\"').replace("/", "\\/").replace("c", "\\u0063") + '"}',
    )
]


async def ask_for_trouble(heard: Heard, url: str, secret: str) -> None:
    """Calls that are paid, refused, answered with the provider's echo of its key, cut, and no HTTP at all."""
    stream = {**HELLO, "stream": True}
    assert await call(heard, url, key=secret) == 200
    assert await call(heard, url, key=secret, body=stream) == 200
    assert await call(heard, url, key=secret + "x") == 401
    assert await call(heard, url, "/v1/wallet", key=secret, body=None) == 200
    assert await call(heard, url, "/nowhere", key=secret, body=None) == 404
    assert await call(heard, url, f"/{secret}?key={secret}", key="-", body=None) == 404
    for told in (
        *ECHOES,
        {"cut_after": 2},
        {"error_after": 2},
        {"null_body": True},
        {"html_body": True},
    ):
        for body in (HELLO, stream):
            await call(heard, url, key=secret, body={**body, "sim": told})
            await call(heard, url, "/readyz", key="-", body=None)
    for provider in ("paystack", "flutterwave"):
        topup = {"provider": provider, "amount": "5"}
        assert await call(heard, url, "/v1/wallet/topups", key=secret, body=topup) == 503
        assert await call(heard, url, f"/webhooks/{provider}", key="-", body=topup) == 401
    # What is no HTTP, with the key in it.
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    writer.write(f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {secret}\x01\r\n\r\n".encode())
    heard.answers.append((await reader.read()).decode())
    writer.close()


@pytest.mark.parametrize("log_format", ["json", "console"])
async def test_the_served_proxy_shows_no_secret(
    settings: Settings, office: Office, sim: SimulatedProvider, log_format: str
) -> None:
    await sync_models(office)
    payer = await make_payer(office)
    heard = Heard()
    dsn, redis_url = settings.postgres.dsn.get_secret_value(), settings.redis.url.get_secret_value()
    async with TcpProxy(dsn) as postgres, TcpProxy(redis_url) as redis:
        env = environment(
            settings,
            TUMA_POSTGRES__DSN=postgres.through(dsn),
            TUMA_REDIS__URL=redis.through(redis_url),
            TUMA_LOG__FORMAT=log_format,
            TUMA_QUOTA__PAUSE_S="0.01",
            TUMA_QUOTA__PAUSE_MAX_S="0.01",
        )
        async with serving(heard, **env) as url:
            await ask_for_trouble(heard, url, payer.secret)
            redis.shut()
            assert await call(heard, url, key=payer.secret) == 503
            assert await call(heard, url, "/readyz", key="-", body=None) == 503
            redis.open()
            postgres.shut()
            assert await call(heard, url, key="sk-tuma-unknown") == 503
            assert await call(heard, url, "/readyz", key="-", body=None) == 503
            postgres.open()
    assert heard.log.count("request.completed") > 20
    assert "UpstreamError" in heard.log  # what was refused, and why
    assert HIDDEN in heard.log  # the provider's words, without the key that it showed in them
    heard.log += json.dumps([request.headers for request in sim.requests]).replace(
        json.dumps(f"Bearer {UPSTREAM_KEY}"), ""
    )
    assert heard.show(payer, settings) == []
    async with asyncio.timeout(20):
        while await find_open(office):
            await asyncio.sleep(0.1)


# What nobody foresaw: an exception of a library that repeats the DSN, and values at any depth.
UNFORESEEN = """
import logging, sys
import structlog
from config.logging import configure_logging
from config.settings import LogSettings

log_format, secret, key = sys.argv[1:]
configure_logging(LogSettings(format=log_format), hide=[secret])
try:
    raise RuntimeError(f"cannot connect to {secret}")
except RuntimeError:
    structlog.get_logger().exception("it.broke", told=secret, deep={"headers": [("Authorization", f"Bearer {key}")]})
logging.getLogger("a.library").error("cannot connect to %s with %s", secret, key)
"""


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_what_nobody_foresaw_is_logged_without_secrets(log_format: str) -> None:
    """Whoever writes a line: it is redacted as a whole, last of all."""
    secret, key = "postgresql://tuma:canary@db/tuma", "sk-tuma-canary_0123456789"
    done = subprocess.run(
        [sys.executable, "-c", UNFORESEEN, log_format, secret, key],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.count("it.broke") == 1
    assert done.stderr.count(HIDDEN) == 5, (
        "in the exception, the value, the header, and twice in the library's"
    )
    assert CANARY not in done.stderr + done.stdout


async def find_open(office: Office) -> int:
    async with office.database.connection() as connection:
        return int(await connection.fetchval("SELECT count(*) FROM calls WHERE state = 'open'"))


async def run_doctor(env: Mapping[str, str]) -> str:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "scripts.cli", "doctor"),
        env=dict(env),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    return out.decode()


async def test_doctor_shows_no_secret(settings: Settings, office: Office) -> None:
    payer = await make_payer(office)
    dsn, redis_url = settings.postgres.dsn.get_secret_value(), settings.redis.url.get_secret_value()
    password = urlsplit(dsn).password or ""
    odd = "canary/p@ss#w?rd:1%"
    wrongs: list[dict[str, str]] = [
        {},
        {
            "TUMA_POSTGRES__DSN": dsn.replace(password, "canary-wrong"),
            "TUMA_REDIS__URL": redis_url.replace(urlsplit(redis_url).password or "", "canary-wrong"),
        },
        {
            "TUMA_POSTGRES__DSN": dsn.replace(password, odd),
            "TUMA_REDIS__URL": f"redis://:{odd}@127.0.0.1:1/0",
        },
        {"TUMA_POSTGRES__DSN": "canary://x:canary@y/z", "TUMA_REDIS__URL": "canary:secret"},
        {"TUMA_POSTGRES__DSN": dsn + "?sslmode=canary", "TUMA_UPSTREAM__API_KEY": "sk-canary-wrong"},
        {"TUMA_UPSTREAM__BASE_URL": "https://user:canary@x/v1"},
        {"TUMA_UPSTREAM__API_KEY": "canary\nX: y"},
        {"TUMA_POSTGRES": '{"dsn": "canary'},
    ]
    outs = await asyncio.gather(*(run_doctor(environment(settings, **wrong)) for wrong in wrongs))
    for wrong, out in zip(wrongs, outs, strict=True):
        assert "Traceback" not in out, (wrong, out)
        assert "TUMA_" in out, (wrong, out)
        assert Heard([out]).show(payer, settings) == [], (wrong, out)


def _secrets(section: BaseModel, path: str = "") -> Iterator[str]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _secrets(value, f"{path}{name}.")
        elif isinstance(value, SecretStr):
            yield f"{path}{name}"


def test_no_setting_is_shown() -> None:
    names = list(_secrets(load_settings()))
    assert len(names) >= 6
    values: dict[str, dict[str, str]] = {}
    for name in names:
        place, _, member = name.partition(".")
        values.setdefault(place, {})[member] = f"canary-of-{member}"
    full = load_settings(**values)
    assert find_secrets(full) == {f"canary-of-{name.partition('.')[2]}" for name in names}
    for text in (repr(full), str(full), repr(full.model_dump()), full.model_dump_json()):
        assert CANARY not in text
    # What has a secret's name is a SecretStr.
    sections = [section for _, section in full if isinstance(section, BaseModel)]
    for section in sections:
        for member, value in section:
            if member.endswith(("key", "secret", "password", "pepper", "token", "dsn")):
                assert isinstance(value, SecretStr), member
    with pytest.raises(SettingsError) as refused:
        load_settings(upstream={"api_key": "canary\r\nX: y"})
    assert CANARY not in str(refused.value)


async def test_no_room_shows_a_secret(settings: Settings, office: Office) -> None:
    await sync_models(office)
    async with run_proxy(settings) as proxy:
        services = proxy.services
        for room in (
            services,
            services.upstream,
            services.keys,
            *services.runtime.pools.values(),
            services.runtime.pipe,
            proxy.app,
        ):
            text = repr(room)
            assert CANARY not in text
            assert (urlsplit(settings.redis.url.get_secret_value()).password or "-") not in text
    await check_books(office)


async def test_odd_passwords_are_not_shown_in_errors() -> None:
    for password in ("can/ary", "can#ary", "can?ary", "can@ary", "can:ary@x", "[can", "can%zz"):
        for url in (f"postgresql://u:{password}@127.0.0.1:1/x", f"postgresql://{password}", password):
            database = Database(PostgresSettings(dsn=SecretStr(url)))
            with pytest.raises(TumaError) as refused:
                async with database.connection():
                    pass
            assert "can" not in str(refused.value).replace("cannot", "").replace("scan", ""), refused.value
            with pytest.raises(TumaError):
                await database.connect_alone()
        pipe = RedisPipe(RedisSettings(url=SecretStr(f"redis://:{password}@127.0.0.1:1/0")))
        with pytest.raises(TumaError) as refused:
            await pipe.run("PING")
        assert "can" not in str(refused.value)
        await pipe.close()
    for good in ("can%2Fary", "can%40ary"):
        database = Database(PostgresSettings(dsn=SecretStr(f"postgresql://u:{good}@127.0.0.1:1/x")))
        with pytest.raises(TumaError) as refused:
            async with database.connection():
                pass
        assert not isinstance(refused.value, InputError)


def test_the_redactor_knows_a_secret_in_every_dress() -> None:
    redact = Redactor([UPSTREAM_KEY, "short", "päper-canary"])
    for text in (
        UPSTREAM_KEY,
        json.dumps({"a": UPSTREAM_KEY}),
        json.dumps(json.dumps(UPSTREAM_KEY))[1:-1],
        repr(UPSTREAM_KEY),
        repr({"Authorization": f"Bearer {UPSTREAM_KEY}"}),
        "päper-canary",
        json.dumps("päper-canary"),
        "key sk-tuma-abcdefghijklmnop_q-r",
    ):
        assert "canary" not in redact(text), text
        assert "sk-tuma-a" not in redact(text)
        assert HIDDEN in redact(text)
    assert redact("a short text of sk-tuma-… keys") == "a short text of sk-tuma-… keys"
    assert quote(UPSTREAM_KEY)  # an encoded one is another text: no URL of ours has a secret


def test_an_error_that_shows_our_key() -> None:
    redact = Redactor([UPSTREAM_KEY])
    for body in (json.dumps({"error": {"message": UPSTREAM_KEY}}), json.dumps({"error": UPSTREAM_KEY})):
        for status in (400, 401, 403, 422):
            error = upstream_error(status, body.encode(), {"retry-after": UPSTREAM_KEY}, redact=redact)
            assert CANARY not in repr(error)
            assert CANARY not in repr(vars(error))
    assert "'a\\u0000b'" not in repr(upstream_error(400, b"\xff", {}, redact=redact))
