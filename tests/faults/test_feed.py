"""The live feed over real worker processes: an event comes on whichever one the client hangs, through their death."""

import asyncio
import json
import os
import random
import signal
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import psutil
import pytest

from billing.calls.ledger import Ledger
from billing.ids import new_id
from billing.money import NANO
from config.settings import Settings
from scripts.office import Office
from tests.faults.test_kill import environment, serving
from tests.support.feeds import committed, pay, watching
from tests.support.paths import ROOT
from tests.support.payers import Payer, make_payer


def holders(master: int, port: int) -> dict[int, int]:
    """How many connections each worker process has."""
    return {
        worker.pid: sum(
            link.status == psutil.CONN_ESTABLISHED and link.laddr.port == port
            for link in worker.net_connections("tcp4")
        )
        for worker in psutil.Process(master).children()
        if worker.status() != psutil.STATUS_ZOMBIE
    }


async def test_through_the_death_of_workers(settings: Settings, office: Office) -> None:
    """Watchers on both workers see the same; whoever's worker is killed goes on elsewhere, without gap or repeat."""
    ledger = Ledger(office.database, worker_id=new_id())
    payer = await make_payer(office, amount="1000")
    async with serving(settings, workers=2) as (master, url):
        port = int(url.rpartition(":")[2])
        done = asyncio.Event()
        seen: list[list[dict[str, Any]]] = []
        async with AsyncExitStack() as stack:
            async with asyncio.timeout(30):
                while sum(count > 0 for count in holders(master.pid, port).values()) < 2:
                    stream = await stack.enter_async_context(watching(url, payer.secret))
                    assert (await stream.take(1))[0]["type"] == "balance"
                    seen.append([])

        async def follow(events: list[dict[str, Any]]) -> None:
            while not (done.is_set() and events and events[-1]["id"] == goal):
                try:
                    last = events[-1]["id"] if events else None
                    async with watching(url, payer.secret, after=last) as stream:
                        while not (done.is_set() and events and events[-1]["id"] == goal):
                            event = await stream.next(timeout_s=0.5)
                            if event is None:
                                break
                            if event["type"] != "end":
                                events.append(event)
                except (aiohttp.ClientError, OSError, TimeoutError):
                    await asyncio.sleep(0.05)

        goal = ""
        seen = [[] for _ in range(6)]
        async with asyncio.TaskGroup() as tasks:
            following = [tasks.create_task(follow(events)) for events in seen]
            async with asyncio.timeout(30):
                while not all(seen):
                    await asyncio.sleep(0.05)
            for _ in range(3):
                for _ in range(10):
                    await pay(ledger, payer, 1000)
                victim = random.choice(list(holders(master.pid, port)))
                os.kill(victim, signal.SIGKILL)
                for _ in range(10):
                    await pay(ledger, payer, 1000)
                    await asyncio.sleep(0.05)
            goal = (await committed(office, payer))[-1]
            done.set()
            async with asyncio.timeout(60):
                await asyncio.gather(*following)
        rows = await committed(office, payer)
        assert len(rows) == 120
        for events in seen:
            assert events[0]["type"] == "balance"
            assert [event["id"] for event in events[1:]] == rows


async def start_watch(settings: Settings, payer: Payer, port: int, *options: str) -> Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "scripts.cli",
        "watch",
        str(payer.wallet_id),
        *options,
        env={**environment(settings, port=port), "TUMA_KEY": payer.secret},
        cwd=ROOT,
        stdout=PIPE,
        stderr=PIPE,
    )


async def test_tuma_watch_through_a_restart(settings: Settings, office: Office) -> None:
    ledger = Ledger(office.database, worker_id=new_id())
    payer = await make_payer(office)
    async with serving(settings) as (first, url):
        port = int(url.rpartition(":")[2])
        process = await start_watch(settings, payer, port, "--json", "--events", "6")
        assert process.stdout is not None
        try:
            async with asyncio.timeout(60):
                balance = json.loads(await process.stdout.readline())
                assert (balance["type"], balance["available"]) == ("balance", "10")
                await pay(ledger, payer, NANO)
                told = [json.loads(await process.stdout.readline()) for _ in range(2)]
                first.kill()
                first.wait()
                await pay(ledger, payer, NANO)  # while the proxy is away
                async with serving(settings, port=port) as (second, _):
                    told += [json.loads(await process.stdout.readline()) for _ in range(2)]
                    second.send_signal(signal.SIGTERM)
                    await asyncio.to_thread(second.wait, 30)
                async with serving(settings, port=port):
                    await office.wallets.credit(payer.wallet_id, 5 * NANO, reason="a gift")
                    told.append(json.loads(await process.stdout.readline()))
                    assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert [event["id"] for event in told] == await committed(office, payer)
    assert [event["type"] for event in told] == ["hold", "settlement"] * 2 + ["grant"]


@pytest.mark.parametrize("wrong", ["key", "wallet"])
async def test_tuma_watch_says_why_it_is_refused(settings: Settings, office: Office, wrong: str) -> None:
    payer, other = await make_payer(office), await make_payer(office)
    asked = (
        Payer(payer.user_id, payer.wallet_id, payer.key_id, "sk-tuma-wrong")
        if wrong == "key"
        else Payer(other.user_id, other.wallet_id, other.key_id, payer.secret)
    )
    async with serving(settings) as (_, url):
        process = await start_watch(settings, asked, int(url.rpartition(":")[2]))
        async with asyncio.timeout(60):
            _, errors = await process.communicate()
    assert process.returncode == 1
    assert ("not valid" if wrong == "key" else "another wallet") in errors.decode()


async def test_tuma_watch_draws(settings: Settings, office: Office) -> None:
    ledger = Ledger(office.database, worker_id=new_id())
    payer = await make_payer(office)
    async with serving(settings) as (_, url), watching(url, payer.secret) as stream:
        await stream.take(1)
        process = await start_watch(settings, payer, int(url.rpartition(":")[2]), "--events", "3")
        async with asyncio.timeout(60):
            while holders_of_wallet(url) < 2:
                await asyncio.sleep(0.1)
            await pay(ledger, payer, NANO)
            out, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    text = out.decode()
    assert "9 USD available" in text
    assert "settlement" in text
    assert "a/model" in text


def holders_of_wallet(url: str) -> int:
    """How many clients of a proxy there are on this machine."""
    port = int(url.rpartition(":")[2])
    return sum(
        link.status == psutil.CONN_ESTABLISHED and link.laddr and link.laddr.port == port
        for link in psutil.net_connections("tcp4")
    )
