"""Exactly one ``request.completed`` for every request, with what it cost, and nothing private."""

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest
import structlog

from config.logging import change_level, configure_logging
from config.settings import LogSettings
from proxy.telemetry import request_log as completed
from scripts.office import Office
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer
from tests.support.running import Running

MODEL = "openai/gpt-4o-mini"
SECRET_TEXT = "what only the caller may know"
HELLO: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": SECRET_TEXT}]}


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What is logged, at every level; also where an earlier test let loggers be kept as they were then."""
    monkeypatch.setattr(completed, "_log", structlog.get_logger("tuma.requests"))
    heard: list[dict[str, Any]] = []

    def keep(_logger: object, method: str, event: Any) -> Any:
        heard.append({**event, "level": method})
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[keep], wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG))
    yield heard
    structlog.configure(**before)


async def ask(
    proxy: Running, method: str, path: str, payer: Payer | None = None, body: Any = None
) -> tuple[int, str]:
    headers = {} if payer is None else {"Authorization": f"Bearer {payer.secret}"}
    async with aiohttp.ClientSession() as session:
        async with session.request(method, proxy.base_url + path, json=body, headers=headers) as response:
            await response.read()
            return response.status, response.headers["x-request-id"]


def told(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"] == "request.completed"]


async def test_each_request_leaves_one_line(
    proxy: Running, office: Office, lines: list[dict[str, Any]]
) -> None:
    payer, poor = await make_payer(office), await make_payer(office, amount="0")
    chat = "/v1/chat/completions"
    sent = [
        await ask(proxy, "POST", chat, payer, HELLO),
        await ask(proxy, "POST", chat, payer, {**HELLO, "stream": True}),
        await ask(proxy, "POST", chat, payer, {**HELLO, "sim": {"fail_status": 500}}),
        await ask(proxy, "POST", chat, poor, HELLO),
        await ask(proxy, "POST", chat, None, HELLO),
        await ask(proxy, "GET", f"/v1/keys/{payer.key_id}", payer),
        await ask(proxy, "GET", f"/{payer.secret}?key={payer.secret}"),
        await ask(proxy, "PROPFIND", "/healthz"),
        await ask(proxy, "GET", "/healthz"),
    ]
    await proxy.quiet()
    # A call's line comes once it is settled, when others may have come and gone.
    order = {request_id: place for place, (_, request_id) in enumerate(sent)}
    found = sorted(told(lines), key=lambda line: order[line["request_id"]])
    assert [(line["status"], line["request_id"]) for line in found] == sent
    assert [line["route"] for line in found] == [*[chat] * 5, "/v1/keys/{key}", "none", "none", "/healthz"]
    assert [line["level"] for line in found] == [
        *("info", "info", "warning", "info", "info", "info", "info", "info", "debug")
    ]
    assert found[7]["method"] == "other"
    for line in found[:2]:
        assert line["outcome"] == "completed"
        assert (line["wallet_id"], line["key_id"]) == (str(payer.wallet_id), str(payer.key_id))
        assert line["call_id"] == line["request_id"]
        assert line["model"] == MODEL
        assert line["posted"] is True
        assert line["accuracy"] == "exact"
        assert float(line["cost_usd"]) > 0
        assert line["currency"] == "USD"
        assert line["tokens_prompt"] > 0
        assert line["bytes_out"] > 100
        assert line["client_gone"] is False
        assert {"authenticate", "read", "quote", "reserve", "upstream", "open", "settle", "release"} <= line[
            "stages_ms"
        ].keys()
        async with office.database.connection() as connection:
            row = await connection.fetchrow("SELECT * FROM calls WHERE id = $1", line["call_id"])
        assert line["charge"] == f"{row['charge_nano'] / 1e9:.9f}".rstrip("0")
    assert (found[2]["outcome"], found[2]["state"], found[2]["code"]) == (
        "upstream_error",
        "void",
        "upstream_error",
    )
    assert (found[3]["outcome"], found[3]["code"]) == ("refused", "insufficient_funds")
    assert "call_id" not in found[3]
    assert found[4]["code"] == "invalid_api_key"
    text = json.dumps(lines, default=str)
    assert SECRET_TEXT not in text
    assert payer.secret not in text
    await check_books(office)


async def test_what_a_provider_quotes_of_a_prompt_is_not_logged(
    proxy: Running, office: Office, lines: list[dict[str, Any]]
) -> None:
    payer = await make_payer(office)
    quoted = {"error": {"message": f"Invalid prompt: '{SECRET_TEXT}'", "code": 400}}
    for stream in (False, True):
        body = {**HELLO, "stream": stream, "sim": {"fail_status": 400, "fail_body": quoted}}
        assert (await ask(proxy, "POST", "/v1/chat/completions", payer, body))[0] == 400
    twice = f'{{"model": "{MODEL}", "{"k" * 10_000}": 1, "{"k" * 10_000}": 2}}'
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {payer.secret}"}) as session:
        async with session.post(f"{proxy.base_url}/v1/chat/completions", data=twice) as response:
            assert response.status == 400
    await proxy.quiet()
    errors = sorted(line["error"] for line in told(lines))
    assert errors == ["BadRequestError", *["UpstreamRefusedError"] * 2]
    text = json.dumps(lines, default=str)
    assert SECRET_TEXT not in text
    assert "k" * 1_000 not in text


async def test_what_the_provider_says_of_an_input_is_the_callers_alone(
    proxy: Running, office: Office, lines: list[dict[str, Any]]
) -> None:
    """A provider's refusal may quote what it refuses: the caller has it, the log does not."""
    payer = await make_payer(office)
    async with aiohttp.ClientSession() as session:
        async with session.post(
            f"{proxy.base_url}/v1/chat/completions",
            json={**HELLO, "sim": {"fail_status": 400}},
            headers={"Authorization": f"Bearer {payer.secret}"},
        ) as response:
            said = (await response.json())["error"]["message"]
    await proxy.quiet()
    assert said == "Simulated failure"
    (line,) = told(lines)
    assert (line["status"], line["error"]) == (400, "UpstreamRefusedError")
    assert said not in json.dumps(lines, default=str)


async def test_a_client_that_leaves_is_told_of_once(
    proxy: Running, office: Office, lines: list[dict[str, Any]]
) -> None:
    payer = await make_payer(office)
    async with aiohttp.ClientSession() as session:
        response = await session.post(
            f"{proxy.base_url}/v1/chat/completions",
            json={**HELLO, "stream": True, "sim": {"chunks": 500, "chunk_delay_ms": 20}},
            headers={"Authorization": f"Bearer {payer.secret}"},
        )
        await response.content.readany()
        response.close()
    async with asyncio.timeout(20):
        while not told(lines):
            await asyncio.sleep(0.05)
    await proxy.quiet()
    (line,) = told(lines)
    assert line["outcome"] == "client_gone"
    assert line["client_gone"] is True
    assert line["posted"] is True
    assert float(line["cost_usd"]) > 0


def test_the_level_changes_for_loggers_that_were_used_before(capsys: pytest.CaptureFixture[str]) -> None:
    before = structlog.get_config()
    try:
        configure_logging(LogSettings(level="warning"))
        log = structlog.get_logger("a test")
        log.info("first")
        log.warning("second")
        assert change_level("debug") == "warning"
        log.debug("third")
        assert change_level("error") == "debug"
        log.warning("fourth")
        log.error("fifth")
    finally:
        structlog.configure(**before)
    shown = [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["second", "third", "fifth"]


def test_lines_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    before = structlog.get_config()
    try:
        configure_logging(LogSettings(format="console"))
        structlog.get_logger("a test").info(
            "request.completed", status=200, key_id=None, stages_ms={"reserve": 0.51, "upstream": 800.0}
        )
    finally:
        structlog.configure(**before)
    line = capsys.readouterr().err
    assert "request.completed" in line
    assert "status=200" in line
    assert "reserve 0.51 upstream 800" in line
    assert "key_id" not in line
    assert "pid" not in line


def test_a_line_that_the_fast_writer_cannot_write_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    before = structlog.get_config()
    try:
        configure_logging(LogSettings())
        structlog.get_logger("a test").info("odd", number=2**80, half="\ud800", thing=ValueError("no"))
    finally:
        structlog.configure(**before)
    line = json.loads(capsys.readouterr().err)
    assert (line["number"], line["half"], line["thing"]) == (2**80, "\ud800", "ValueError('no')")
