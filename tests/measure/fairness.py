"""How long one caller's request holds the event loop, and what it makes another wait: ``python -m tests.measure.fairness``.

A worker with real servers, a caller with money who sends 16 MiB of one shape several times at once, and beside it a heartbeat on
the loop and another user's small calls, one after the other. The provider is a process, and what is sent comes from threads.
"""

import asyncio
import contextlib
import http.client
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import structlog

from billing.postgres.database import Database
from billing.postgres.migrate import migrate
from scripts.office import open_office
from scripts.programs.embedded import EmbeddedPostgres, EmbeddedRedis
from tests.support.payers import Payer, make_payer, sync_models
from tests.support.running import Running, run_proxy
from tests.support.settings import make_settings

LARGE = 16 * 1024 * 1024
MODEL = "openai/gpt-4o-mini"
GOOD = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
HEAD = b'{"model":"%b","messages":[{"role":"user","content":' % MODEL.encode()
BEAT_S = 0.002


def bodies() -> Iterator[tuple[str, bytes]]:
    for piece in (b"[],", b"{},", b'{"type":"x"},', b'"",', b"1,"):
        yield piece.decode() * 2 + "…", HEAD + b"[" + piece * ((LARGE - 500) // len(piece)) + b"0]}]}"
    words = b"wallet money [time] {people} way\\n" * (LARGE // 35)
    yield "one text", HEAD + b'"' + words + b'"}]}'
    texts = b",".join([b'{"type":"text","text":"%b"}' % words[:400_000]] * 38)
    yield "many texts", HEAD + b"[" + texts + b"]}]}"


async def post(proxy: Running, payer: Payer, body: bytes) -> tuple[int, float]:
    return await asyncio.to_thread(_post, int(proxy.base_url.rpartition(":")[2]), payer.secret, body)


def _post(port: int, secret: str, body: bytes) -> tuple[int, float]:
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {secret}"})
        return connection.getresponse().status, time.perf_counter() - began
    finally:
        connection.close()


async def measure(
    proxy: Running, attacker: Payer, other: Payer, name: str, body: bytes, *, times: int
) -> None:
    held, spent, waited = [0.0], [0.0], [0.0]

    async def beat() -> None:
        last, last_cpu = time.perf_counter(), time.thread_time()
        while True:
            await asyncio.sleep(BEAT_S)
            now, cpu = time.perf_counter(), time.thread_time()
            held.append(now - last - BEAT_S)
            spent.append(cpu - last_cpu)
            last, last_cpu = now, cpu

    async def call() -> None:
        while True:
            waited.append((await post(proxy, other, json.dumps(GOOD).encode()))[1])

    beside = [asyncio.ensure_future(beat()), asyncio.ensure_future(call())]
    await asyncio.sleep(0.3)
    found = await asyncio.gather(*(post(proxy, attacker, body) for _ in range(times)))
    for task in beside:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    statuses = sorted({status for status, _ in found})
    print(
        f"{name:28} {statuses}  answered in {max(took for _, took in found):6.2f} s;"
        f" the loop was held for {max(held) * 1000:6.0f} ms ({max(spent) * 1000:.0f} of its own CPU), another's call took {max(waited) * 1000:6.0f} ms at most"
    )


async def main(times: int) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with (
        tempfile.TemporaryDirectory() as folder,
        EmbeddedPostgres(Path(folder) / "postgres", fast=True) as postgres,
        EmbeddedRedis(Path(folder) / "redis") as redis,
    ):
        postgres.create_database("fairness")
        command = [sys.executable, "-m", "scripts.sim.provider"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sim:
            assert sim.stdout is not None
            settings = make_settings(
                postgres_dsn=postgres.dsn("fairness"),
                redis_url=redis.url,
                upstream_url=sim.stdout.readline().split()[-1],
            )
            database = Database(settings.postgres)
            await migrate(database)
            await database.close()
            async with open_office(settings) as office:
                await sync_models(office)
                attacker, other = await make_payer(office, amount="1000"), await make_payer(office)
                async with run_proxy(settings) as proxy:
                    await post(proxy, other, json.dumps(GOOD).encode())
                    for name, body in bodies():
                        await measure(proxy, attacker, other, name, body, times=times)
            sim.terminate()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 4))
