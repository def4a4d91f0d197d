"""What is counted agrees with the books, is added up over workers, and is shown to whom it may be."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from billing.meters import OTHER, Meters, Reading, merge
from billing.monitoring.gauges import Observer
from billing.postgres.database import Database
from config.settings import Settings
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.shared_counters import SharedCounters, WorkerSlot
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.faults.test_kill import environment
from tests.support.books import check_books
from tests.support.paths import ROOT
from tests.support.payers import make_payer, set_rate, sync_models
from tests.support.running import Running, run_proxy
from tests.support.settings import make_settings
from tests.support.tcp_proxy import TcpProxy

MODEL = "openai/gpt-4o-mini"
HELLO: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read_page(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    """Return the sum of a metric's series that have these labels."""
    return sum(
        number
        for (found, has), number in samples.items()
        if found == name and labels.items() <= dict(has).items()
    )


async def scrape(url: str, **headers: str) -> Samples:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{url}/metrics", headers=headers) as response:
            assert response.status == 200, await response.text()
            assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            return read_page(await response.text())


async def post(url: str, secret: str, body: Any) -> int:
    async with aiohttp.ClientSession() as session:
        async with session.post(
            f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {secret}"}
        ) as response:
            await response.read()
            return response.status


async def test_the_numbers_are_those_of_the_books(proxy: Running, office: Office) -> None:
    await set_rate(office, "KES", "129.5", 250)
    async with asyncio.timeout(10):
        while "KES" not in proxy.services.fx.quotes:
            await asyncio.sleep(0.02)
    dollars, shillings = await make_payer(office), await make_payer(office, currency="KES", amount="5000")
    for payer in (dollars, shillings):
        for body in (HELLO, {**HELLO, "stream": True}):
            assert await post(proxy.base_url, payer.secret, body) == 200
    assert await post(proxy.base_url, dollars.secret, {**HELLO, "sim": {"fail_status": 500}}) == 502
    assert await post(proxy.base_url, dollars.secret, {**HELLO, "model": "nobody/none"}) == 404
    assert await post(proxy.base_url, "sk-tuma-nobody", HELLO) == 401
    await proxy.quiet()
    await proxy.services.operator.reconciler.run()
    samples = await scrape(proxy.base_url)
    assert value(samples, "tuma_calls_total", outcome="completed", model=MODEL) == 4
    assert value(samples, "tuma_calls_total", outcome="upstream_error") == 1
    assert value(samples, "tuma_calls_total") == 5
    assert value(samples, "tuma_requests_total", route="/v1/chat/completions", status="200") == 4
    assert value(samples, "tuma_refusals_total", code="model_not_found") == 1
    assert value(samples, "tuma_refusals_total", code="invalid_api_key") == 1
    async with office.database.connection() as connection:
        rows = await connection.fetch(
            "SELECT currency, sum(charge_nano) AS charge, sum(cost_nanousd) AS cost FROM calls GROUP BY 1"
        )
        tokens = await connection.fetchval("SELECT sum(prompt_tokens) FROM usage")
    for row in rows:
        shown = value(samples, "tuma_charged_total", currency=row["currency"])
        assert shown == pytest.approx(int(row["charge"]) / 1e9, rel=1e-12)
        assert shown > 0
    assert value(samples, "tuma_cost_usd_total") == pytest.approx(int(sum(row["cost"] for row in rows)) / 1e9)
    assert value(samples, "tuma_tokens_total", kind="prompt") == tokens
    assert value(samples, "tuma_stage_seconds_count", stage="reserve") == 5
    assert value(samples, "tuma_stage_seconds_count", stage="settle") == 5
    assert value(samples, "tuma_settle_lag_seconds_count") >= 4
    assert value(samples, "tuma_first_byte_seconds_count", stream="yes") == 2
    assert value(samples, "tuma_batch_rows_sum", batch="settle") >= 4
    assert value(samples, "tuma_mirror_rebuilds_total") >= 2
    assert value(samples, "tuma_postgres_up") == 1
    assert value(samples, "tuma_holds_open") == value(samples, "tuma_calls_in_flight") == 0
    assert value(samples, "tuma_fx_good_for_seconds", currency="KES") == 0  # set by hand: good for ever
    assert value(samples, "tuma_pool_wait_seconds_count", role="proxy") > 0
    assert value(samples, "tuma_redis_pipeline_commands_sum") > 0
    assert value(samples, "tuma_workers") == 1
    assert samples["tuma_drift_usd", frozenset()] == 0
    assert 0 <= samples["tuma_reconciled_age_seconds", frozenset()] < 300
    assert samples["tuma_provider_paused", frozenset()] == 0
    # Whose money it is cannot be told from any label.
    page = json.dumps([[name, sorted(labels)] for name, labels in samples])
    for payer in (dollars, shillings):
        for private in (payer.user_id, payer.wallet_id, payer.key_id, payer.secret):
            assert str(private) not in page
    await check_books(office)


def test_what_never_happened_shows_as_zero() -> None:
    """A counter without labels that first shows with its first event never rose, for Prometheus: `increase` would not tell of it."""
    counters = Meters().take().counters
    assert counters["tuma_house_loss_usd"] == [[[], 0]]


async def test_what_is_held_shows_and_so_does_that_postgres_is_away(
    settings: Settings, office: Office, sim: SimulatedProvider
) -> None:
    await sync_models(office)
    payer = await make_payer(office)
    dsn = settings.postgres.dsn.get_secret_value()
    async with TcpProxy(dsn) as postgres:
        watched = make_settings(
            postgres_dsn=postgres.through(dsn),
            redis_url=settings.redis.url.get_secret_value(),
            upstream_url=sim.base_url,
            metrics={"cache_s": 0.01},
        )
        async with run_proxy(watched) as proxy, aiohttp.ClientSession() as session:
            response = await session.post(
                f"{proxy.base_url}/v1/chat/completions",
                json={**HELLO, "stream": True, "sim": {"stall_after": 2, "stall_s": 100}},
                headers={"Authorization": f"Bearer {payer.secret}"},
            )
            await response.content.readany()
            samples = await scrape(proxy.base_url)
            assert value(samples, "tuma_holds_open", state="open") == 1
            assert value(samples, "tuma_calls_in_flight") == 1
            assert value(samples, "tuma_held", currency="USD") > 0
            postgres.shut()
            await asyncio.sleep(0.05)
            samples = await scrape(proxy.base_url)
            assert samples["tuma_postgres_up", frozenset()] == 0
            assert value(samples, "tuma_calls_in_flight") == 1  # what workers know is there all the same
            assert not [name for name, _ in samples if name == "tuma_held"]
            postgres.open()
            response.close()
            await proxy.quiet()
            async with asyncio.timeout(30):
                while value(samples, "tuma_postgres_up") != 1:
                    await asyncio.sleep(0.05)
                    samples = await scrape(proxy.base_url)
            assert value(samples, "tuma_holds_open") == 0
    await check_books(office)


async def test_who_may_scrape(settings: Settings, office: Office) -> None:
    async def ask(url: str, **headers: str) -> int:
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{url}/metrics", headers=headers) as response:
                return response.status

    base: dict[str, Any] = {
        "postgres_dsn": settings.postgres.dsn.get_secret_value(),
        "redis_url": settings.redis.url.get_secret_value(),
    }
    async with run_proxy(make_settings(**base)) as proxy:
        assert await ask(proxy.base_url) == 200
        # Behind a proxy that nobody said is trusted, everybody seems to be this machine.
        assert await ask(proxy.base_url, **{"X-Forwarded-For": "203.0.113.7"}) == 403
        assert await ask(proxy.base_url, Forwarded="for=203.0.113.7") == 403
        assert await ask(proxy.base_url, **{"X-Real-IP": "203.0.113.7"}) == 403
        assert await ask(proxy.base_url, Via="1.1 front") == 403
    async with run_proxy(make_settings(**base, metrics={"networks": "10.0.0.0/8"})) as proxy:
        assert await ask(proxy.base_url) == 403
    async with run_proxy(make_settings(**base, auth={"trusted_proxies": "127.0.0.0/8"})) as proxy:
        assert await ask(proxy.base_url, **{"X-Forwarded-For": "203.0.113.7"}) == 403
        assert await ask(proxy.base_url, **{"X-Forwarded-For": "127.0.0.1"}) == 200
        assert (
            await ask(proxy.base_url, Via="1.1 front") == 403
        )  # it is trusted, and does not say for whom it speaks
        assert await ask(proxy.base_url) == 200
    async with run_proxy(make_settings(**base, metrics={"token": "scrape me"})) as proxy:
        assert await ask(proxy.base_url) == 401
        assert await ask(proxy.base_url, Authorization="Bearer scrape you") == 401
        assert await ask(proxy.base_url, Authorization="Bearer scrape me") == 200


def test_models_beyond_the_bound_share_a_label() -> None:
    meters = Meters(models_max=2)
    assert [meters.model(name) for name in ("a", "b", "c", "a", "d")] == ["a", "b", OTHER, "a", OTHER]


def test_a_replacement_goes_on_counting_and_a_torn_write_is_not_read() -> None:
    shared = SharedCounters(2)
    first, other = Meters(), Meters()
    slot, beside = WorkerSlot(shared, 0), WorkerSlot(shared, 1)
    first.calls.add(3, "completed", "a")
    first.settle_lag.observe(0.02)
    first.gauge(first.metrics[0], lambda: [((), 7)])
    other.calls.add(2, "completed", "a")
    assert slot.publish(first.take())
    assert beside.publish(other.take())
    assert shared.taken == 2
    shared.leave(0)  # kill -9
    (left,) = beside.others()
    assert left.gauges == {}  # what it had open ended with it
    second = Meters()
    second.carry(slot.before())
    second.calls.add(1, "completed", "a")
    slot.publish(second.take())
    total = merge([*beside.others(), other.take()])
    assert total.counters["tuma_calls"] == [[["completed", "a"], 6]]
    assert shared.restarts == 1
    # The half that is written next is not the one that is read: a worker killed while it writes spoils nothing.
    memory, at = shared._memory, shared._at(0)
    from proxy.telemetry.shared_counters import _HALF_BYTES, _SLOT

    turn = _SLOT.unpack_from(memory, at)[1]
    half = at + _SLOT.size + (turn + 1) % 2 * _HALF_BYTES
    memory[half : half + 64] = b"\xff" * 64
    assert shared.read(0).counters["tuma_calls"] == [[["completed", "a"], 4]]
    half = at + _SLOT.size + turn % 2 * _HALF_BYTES
    memory[half + 20 : half + 30] = b"\xff" * 10
    assert shared.read(0) == Reading()


async def test_what_is_shown_outlives_who_showed_it() -> None:
    settings = make_settings(
        postgres_dsn="postgresql://nobody@127.0.0.1:1/none", redis_url="redis://127.0.0.1:1"
    )
    shared = SharedCounters(2)
    shown = Metrics(
        Meters(),
        Observer(Database(settings.postgres), settings.metrics, settings.fx),
        settings.metrics,
        WorkerSlot(shared, 0),
    )
    shown.meters.calls.add(3, "completed", "a")
    assert value(read_page((await shown.render()).decode()), "tuma_calls_total") == 3
    shared.leave(0)  # kill -9, before it published at its pace
    beside = Metrics(
        Meters(),
        Observer(Database(settings.postgres), settings.metrics, settings.fx),
        settings.metrics,
        WorkerSlot(shared, 1),
    )
    page = read_page((await beside.render()).decode())
    assert value(page, "tuma_calls_total") == 3
    assert value(page, "tuma_worker_restarts_total") == 1
    assert value(page, "tuma_workers") == 1


@asynccontextmanager
async def serving(settings: Settings, log: Path, **more: str) -> AsyncIterator[str]:
    env = environment(settings, workers=3, more={"TUMA_METRICS__PUBLISH_S": "0.2", **more})
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "scripts.cli", "serve"],
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
    try:
        assert process.stdout is not None
        line = await asyncio.to_thread(process.stdout.readline)
        assert line.startswith("tuma: accepting calls on"), line
        yield line.split()[-1]
    finally:
        process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(process.wait, 60)


def lines_of(log: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == event]


async def wait_for_calls(url: str, count: int, *, workers: int = 3) -> None:
    """Wait until scrapes show so many calls, whichever worker is hit; they never go back."""
    seen, same = 0.0, 0
    async with asyncio.timeout(60):
        while same < 8:
            samples = await scrape(url)
            calls = value(samples, "tuma_calls_total")
            assert calls >= seen
            seen = calls
            same = same + 1 if calls == count and value(samples, "tuma_workers") == workers else 0
            await asyncio.sleep(0.05)


async def pids_of(office: Office) -> set[int]:
    async with office.database.connection() as connection:
        rows = await connection.fetch(
            "SELECT pid FROM workers WHERE stopped_at IS NULL AND lease_until > now() ORDER BY pid"
        )
    return {row["pid"] for row in rows}


async def test_three_workers_show_one_sum_through_a_kill_and_change_their_level_together(
    settings: Settings, office: Office, tmp_path: Path
) -> None:
    await sync_models(office)
    payer = await make_payer(office)
    log = tmp_path / "log"
    token = "an operator's token"
    async with serving(settings, log, TUMA_ADMIN__TOKEN=token) as url:
        for _ in range(12):  # a connection each: on whichever worker takes it
            assert await post(url, payer.secret, HELLO) == 200
        await wait_for_calls(url, 12)
        assert lines_of(log, "request.completed") == []  # the level is error
        async with aiohttp.ClientSession() as session:
            async with session.put(
                f"{url}/admin/log-level",
                json={"level": "debug"},
                headers={"Authorization": f"Bearer {token}"},
            ) as response:
                assert response.status == 200
        before = await pids_of(office)
        async with asyncio.timeout(60):
            while {line["pid"] for line in lines_of(log, "log.level_changed")} != before:
                await asyncio.sleep(0.1)
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        async with asyncio.timeout(60):
            while value(await scrape(url), "tuma_worker_restarts_total") != 1:
                await asyncio.sleep(0.1)
        await wait_for_calls(url, 12)
        for _ in range(6):
            assert await post(url, payer.secret, HELLO) == 200
        await wait_for_calls(url, 18)
        async with asyncio.timeout(60):  # the replacement, too, logs what is below its own setting
            while True:
                await scrape(url)
                heard = {
                    line["pid"] for line in lines_of(log, "request.completed") if line["level"] == "debug"
                }
                if heard - before:
                    break
        told = [
            line for line in lines_of(log, "request.completed") if line["route"] == "/v1/chat/completions"
        ]
        assert len(told) == 6
        # By the command, too, on all of them.
        command = [sys.executable, "-m", "scripts.cli", "log-level", "error"]
        env = environment(settings)
        assert (
            await asyncio.to_thread(subprocess.run, command, env=env, cwd=ROOT, check=False)
        ).returncode == 0
        after = await pids_of(office)
        async with asyncio.timeout(60):
            while True:
                lines = lines_of(log, "log.level_changed")
                if {line["pid"] for line in lines if line["after"] == "error"} >= after:
                    break
                await asyncio.sleep(0.1)
