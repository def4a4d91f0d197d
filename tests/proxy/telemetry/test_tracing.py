"""Traces go where OpenTelemetry's variables say, and nothing of them is there where they say nothing."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from config.settings import Settings
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.support.paths import ROOT
from tests.support.payers import make_payer, sync_models
from tests.support.running import Running, run_proxy
from tests.support.settings import make_settings

MODEL = "openai/gpt-4o-mini"
SECRET_TEXT = "what only the caller may know"
HELLO: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": SECRET_TEXT}]}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@asynccontextmanager
async def collector() -> AsyncIterator[tuple[str, list[bytes]]]:
    """An OTLP receiver; what it is sent."""
    heard: list[bytes] = []

    async def take(request: web.Request) -> web.Response:
        heard.append(await request.read())
        return web.Response(body=b"", content_type="application/x-protobuf")

    app = web.Application(client_max_size=64 * 1024 * 1024)
    app.router.add_post("/v1/traces", take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}", heard
    await runner.cleanup()


async def call(proxy: Running, secret: str, body: Any, **headers: str) -> int:
    async with aiohttp.ClientSession() as session:
        async with session.post(
            f"{proxy.base_url}/v1/chat/completions",
            json=body,
            headers={"Authorization": f"Bearer {secret}", **headers},
        ) as response:
            await response.read()
            return response.status


async def test_a_span_for_each_stage_and_the_context_goes_on(
    settings: Settings, office: Office, sim: SimulatedProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    await sync_models(office)
    payer = await make_payer(office)
    async with collector() as (url, heard):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "tuma of the tests")
        traced = make_settings(
            postgres_dsn=settings.postgres.dsn.get_secret_value(),
            redis_url=settings.redis.url.get_secret_value(),
            upstream_url=sim.base_url,
        )
        async with run_proxy(traced) as proxy:
            for body in (HELLO, {**HELLO, "stream": True}):
                assert await call(proxy, payer.secret, body, traceparent=f"00-{TRACE}-{PARENT}-01") == 200
            assert await call(proxy, payer.secret, HELLO, traceparent=f"00-{TRACE}-{PARENT}-00") == 200
            assert await call(proxy, "sk-tuma-nobody", HELLO) == 401
            await proxy.quiet()
        # What is left is sent at the end.
        assert heard
    messages = [ExportTraceServiceRequest.FromString(data) for data in heard]
    resources = [resource for message in messages for resource in message.resource_spans]
    names = {
        attribute.value.string_value
        for resource in resources
        for attribute in resource.resource.attributes
        if attribute.key == "service.name"
    }
    assert names == {"tuma of the tests"}
    spans = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    roots = [span for span in spans if span.name == "POST /v1/chat/completions"]
    followed = [span for span in roots if span.trace_id.hex() == TRACE]
    assert len(followed) == 2  # the third was not to be sampled, as its client said
    assert {span.parent_span_id.hex() for span in followed} == {PARENT}
    assert len(roots) == 3
    for root in followed:
        below = [span for span in spans if span.parent_span_id == root.span_id]
        assert {"authenticate", "read", "quote", "reserve", "upstream", "open", "settle", "release"} <= {
            span.name for span in below
        }
        assert sum(span.name == "upstream" for span in below) == 1
        for span in below:
            assert root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
            assert span.end_time_unix_nano <= root.end_time_unix_nano
        facts = {attribute.key: attribute.value for attribute in root.attributes}
        assert facts["tuma.outcome"].string_value == "completed"
        assert facts["tuma.model"].string_value == MODEL
    sent = [
        request.headers["traceparent"] for request in sim.requests if request.path.endswith("completions")
    ]
    upstream = {f"00-{TRACE}-{span.span_id.hex()}-01" for span in spans if span.name == "upstream"}
    assert set(sent[:2]) == upstream
    assert sent[2].startswith(f"00-{TRACE}-")
    assert sent[2].endswith("-00")
    for data in heard:
        assert SECRET_TEXT.encode() not in data
        assert payer.secret.encode() not in data
        assert b"sk-sim" not in data


async def test_without_the_variables_nothing_is_followed(
    proxy: Running, office: Office, sim: SimulatedProvider
) -> None:
    payer = await make_payer(office)
    assert proxy.services.tracing is None
    assert (
        await call(proxy, payer.secret, HELLO, traceparent=f"00-{TRACE}-{PARENT}-01", tracestate="a=b") == 200
    )
    (request,) = [request for request in sim.requests if request.path.endswith("completions")]
    assert not {"traceparent", "tracestate"} & request.headers.keys()
    # The Redis client imports OpenTelemetry's API by itself, where they are installed.
    ours = "('opentelemetry.sdk.trace', 'opentelemetry.exporter', 'opentelemetry.trace.propagation.tracecontext')"
    code = f"import sys, scripts.cli; print([name for name in sys.modules if name.startswith({ours})])"
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318", "TUMA_TRACING": "false"}, False),
    ],
)
def test_who_asks_for_traces(
    variables: dict[str, str], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert make_settings(postgres_dsn="", redis_url="").tracing is wanted
