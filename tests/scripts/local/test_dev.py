"""``./scripts/dev`` as somebody types it, and its simulated payment providers when they are started again."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from billing.books.opening_balance import record_openings
from config.settings import Settings
from scripts.local.walk import WalkError, walk
from scripts.office import Office
from scripts.sim.payments.currencies import PROVIDERS
from scripts.sim.payments.server import SimulatedPayments
from scripts.sim.payments.settings import settings_of
from tests.support.books import check_books
from tests.support.paths import ROOT
from tests.support.payers import make_payer, sync_models
from tests.support.running import run_proxy


def start_dev(settings: Settings, data: Path, *options: str, **more: str) -> subprocess.Popen[str]:
    """Start it on this test's own servers."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("TUMA_")},
        "TUMA_POSTGRES__DSN": settings.postgres.dsn.get_secret_value(),
        "TUMA_REDIS__URL": settings.redis.url.get_secret_value(),
        "TUMA_PORT": "0",
        "TUMA_LOG__LEVEL": "error",
        **more,
    }
    command = [sys.executable, "-m", "scripts.local.server", "--json", "--data", str(data), *options]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end_dev(process: subprocess.Popen[str]) -> str:
    """Wait for its end; return what it said beside its answer."""
    try:
        return process.communicate(timeout=120)[1]
    finally:
        process.kill()
        process.wait()


def run_dev(settings: Settings, data: Path, way: str) -> dict[str, Any]:
    process = start_dev(settings, data, way)
    out, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    found: dict[str, Any] = json.loads(out)
    assert found["ok"] is True
    return found


async def test_the_walk_twice_and_the_check_beside_a_demo(settings: Settings, tmp_path: Path) -> None:
    demo = start_dev(settings, tmp_path)
    try:
        assert demo.stdout is not None
        details = json.loads(await asyncio.to_thread(demo.stdout.readline))
        assert details.keys() >= {
            "base_url",
            "api_key",
            "wallet_id",
            "postgres_dsn",
            "redis_url",
            "upstream_url",
            "admin_token",
            "payments_url",
        }
        for _ in range(2):
            check_walk(await asyncio.to_thread(run_dev, settings, tmp_path, "--walk"))
        checked = await asyncio.to_thread(run_dev, settings, tmp_path, "--check")
        assert checked["balance_before"] == "250000"  # what the walks did is in wallets of their own
    finally:
        demo.terminate()
        await asyncio.to_thread(end_dev, demo)
    assert demo.returncode == 0


def check_walk(done: dict[str, Any]) -> None:
    assert done["providers"] == list(PROVIDERS)
    names = " | ".join(step["step"] for step in done["steps"])
    for part in (
        *(f"top-up by {provider}" for provider in PROVIDERS),
        "a paid call",
        "refund of 1000 from",
        "refund of 1000 by the operator",
        "wallet frozen",
        "403 wallet_frozen",
        "dispute won",
        "dispute lost",
        "the providers' own books say the same",
    ):
        assert part in names
    proved = [step["books"] for step in done["steps"] if "books" in step]
    assert proved == ["ok"] * (len(done["steps"]) - 1)


async def test_beside_a_real_payment_provider_nothing_is_simulated(
    settings: Settings, tmp_path: Path
) -> None:
    key = {"TUMA_PAYSTACK__SECRET_KEY": "sk_test_of_ones_own"}
    process = start_dev(settings, tmp_path, "--walk", **key)
    said = await asyncio.to_thread(end_dev, process)
    assert process.returncode == 1
    assert "payments: paystack, for real" in said
    assert "a real one is set up" in said
    assert not (tmp_path / "payments-books.jsonl").exists()


async def test_the_walk_ends_at_the_first_step_after_which_the_books_do_not_hold(
    settings: Settings, office: Office
) -> None:
    await sync_models(office)
    await record_openings(office.database, office.upstream)
    payer = await make_payer(office, currency="NGN")
    async with office.database.transaction() as connection:
        await connection.execute(
            "UPDATE wallets SET posted_nano = posted_nano + 1 WHERE id = $1", payer.wallet_id
        )
    lines: list[str] = []
    async with SimulatedPayments() as psp:
        changed = Settings.model_validate({**settings.model_dump(), **settings_of(psp.origin, psp.secrets)})
        async with run_proxy(changed) as proxy:
            psp.webhooks.to = proxy.base_url
            details = {"base_url": f"{proxy.base_url}/v1", "payments_url": psp.origin}
            with pytest.raises(WalkError, match=r"top-up by stripe.*the books do not hold: I2 "):
                await walk(details, changed, lines.append)
    assert lines == []


async def test_a_webhook_that_a_restart_dropped_costs_nothing(
    settings: Settings, office: Office, tmp_path: Path
) -> None:
    await sync_models(office)
    await record_openings(office.database, office.upstream)
    payer = await make_payer(office, amount="0", currency="NGN")
    bearer = {"Authorization": f"Bearer {payer.secret}"}
    books = tmp_path / "books.jsonl"
    async with aiohttp.ClientSession(headers=bearer) as client:

        async def ask(method: str, path: str, **more: Any) -> Any:
            async with client.request(method, f"{proxy.base_url}/v1/wallet{path}", **more) as answer:
                return await answer.json()

        async with SimulatedPayments(books_path=books) as psp:
            sections = settings_of(psp.origin, psp.secrets)
            changed = Settings.model_validate(
                {**settings.model_dump(), **sections, "payments": {"look_s": 0.2, "timeout_s": 2}}
            )
            async with run_proxy(changed) as proxy:
                made = [
                    await ask("POST", "/topups", json={"provider": provider, "amount": "5000"})
                    for provider in PROVIDERS
                ]
                for topup in made:
                    async with client.post(topup["url"], data={"do": "pay"}) as page:
                        assert page.status == 200
                assert (await ask("GET", ""))["posted"] == "0"
        # They had not been told where Tuma is.
        assert {event.state for event in psp.webhooks.events.values()} == {"held"}

        port = int(psp.origin.rpartition(":")[2])
        async with SimulatedPayments(port=port, books_path=books) as psp, run_proxy(changed) as proxy:
            assert not psp.webhooks.events
            async with asyncio.timeout(60):
                while (await ask("GET", ""))["posted"] != str(5000 * len(PROVIDERS)):
                    async with office.database.transaction() as connection:
                        await connection.execute(
                            "UPDATE payment_intents SET poll_at = now() WHERE state = 'pending'"
                        )
                    await asyncio.sleep(0.05)
            assert psp.books.paid_total("paystack", "NGN") == 500_000
    await check_books(office)
