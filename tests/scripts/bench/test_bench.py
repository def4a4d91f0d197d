"""``tuma bench`` as somebody types it, with few calls: the figures are there, the books match, nothing is left running."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import psutil
import pytest

from billing.calls.ledger import Ledger
from billing.ids import new_id
from scripts.bench.books import BenchError, Standing, compare, prove
from scripts.bench.processes.load import Load
from scripts.bench.processes.upstream import plain_answer, stream_pieces
from scripts.bench.scenarios import SCENARIOS
from scripts.bench.stand import Side
from scripts.office import Office
from scripts.programs.embedded import find_free_port
from tests.support.feeds import opening, pay
from tests.support.paths import ROOT
from tests.support.payers import make_payer


def start_bench(folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "scripts.cli", "bench", "--quick", "--share", "0.03", *options]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder), "TUMA_PORT": "none"},  # what is set is for others' servers
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def a_gateway(upstream_port: int) -> Iterator[str]:
    """Somebody's gateway in front of the bench's provider: for once, the floor."""
    command = [sys.executable, "-m", "scripts.bench.processes.floor", "--api-key", "sk-peer"]
    command += ["--base-url", f"http://127.0.0.1:{upstream_port}/api/v1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait(30)


async def test_the_smallest_run(folder: Path) -> None:
    """What always runs of the bench: it starts what it measures, compares, and proves the books."""
    process = start_bench(folder, "--rounds", "1", "--json", "--only", "paced-8")
    out, said = await asyncio.to_thread(process.communicate, timeout=150)
    assert process.returncode == 0, out + said
    found = json.loads(out)
    (scenario,) = found["scenarios"]
    assert scenario["name"] == "paced-8"
    for side in ("floor", "tuma"):
        for figure in ("cpu_ms", "calls_per_s", "latency_p50_ms", "first_byte_p50_ms"):
            assert scenario["sides"][side][figure]["median"] > 0, (side, figure)
    assert scenario["ratios"]["tuma by floor"]["cpu_ms"]["median"] > 0
    assert found["books"]["calls"] == scenario["calls"] + max(scenario["calls"] // 4, 1)
    assert set(found["books"]["proved"]) >= {f"I{number}" for number in range(1, 9)}


@pytest.mark.long
async def test_a_small_run(folder: Path, tmp_path: Path) -> None:
    only = [
        word for name in ("plain-8", "stream-8", "paced-8", "waiting", "settle") for word in ("--only", name)
    ]
    plot = tmp_path / "plot.svg"
    port = find_free_port()
    with a_gateway(port) as url:
        options = ("--upstream-port", str(port), "--peer", f"other={url},sk-x", "--plot", str(plot), *only)
        process = start_bench(folder, "--rounds", "1", "--json", *options)
        out, said = await asyncio.to_thread(process.communicate, timeout=150)
    assert process.returncode == 0, out + said
    found = json.loads(out)
    scenarios = {scenario["name"]: scenario for scenario in found["scenarios"]}
    assert list(scenarios) == ["waiting", "plain-8", "stream-8", "paced-8", "settle"]
    for name in ("plain-8", "stream-8", "paced-8"):
        for side in ("floor", "tuma"):
            if side == "floor" and name != "paced-8":
                assert scenarios[name]["sides"]["floor-asyncio"]["cpu_ms"]["median"] > 0
            figures = scenarios[name]["sides"][side]
            for figure in ("cpu_ms", "calls_per_s", "latency_p50_ms", "latency_p99_ms", "first_byte_p50_ms"):
                assert figures[figure]["median"] > 0, (name, side, figure)
        assert "added_first_byte_p50_ms" in scenarios[name]["sides"]["tuma"]
        figures = scenarios[name]["sides"]["tuma"]
        for figure in ("postgres_cpu_ms", "redis_cpu_ms", "cores_busy"):
            assert figures[figure]["median"] > 0, (name, figure)
        ratios = scenarios[name]["ratios"]["tuma by floor"]
        assert ratios["cpu_ms"]["median"] > 0
        assert ("beside_cpu_ms" in ratios) is (name != "paced-8")
        other = scenarios[name]["sides"]["other"]
        assert other["calls_per_s"]["median"] > 0
        assert "cpu_ms" not in other
    assert scenarios["paced-8"]["sides"]["tuma"]["gap_p99_ms"]["median"] > 0
    assert scenarios["paced-8"]["sides"]["tuma"]["chunk_delay_p99_ms"]["median"] > 0
    for figure in ("chunk_delay_p50_ms", "added_chunk_delay_p50_ms", "cpu_ms_per_s", "kib_per_stream"):
        assert figure in scenarios["waiting"]["sides"]["tuma"], figure
    assert all(side["settlements_per_s"]["median"] > 0 for side in scenarios["settle"]["sides"].values())
    # Each round, its warming up, and the streams that waited, with theirs; of the settled batches the books are others.
    # Those of plain-8 and stream-8 are made once more, side by side with the floor.
    calls = [scenarios[name]["calls"] for name in ("plain-8", "stream-8", "paced-8")]
    beside = sum(calls[:2])
    waited = scenarios["waiting"]["calls"]
    made = sum(count + max(count // 4, 1) for count in calls) + beside + waited + min(waited, 50)
    assert found["books"]["calls"] == made
    assert set(found["books"]["proved"]) >= {f"I{number}" for number in range(1, 9)}
    assert ET.parse(plot).getroot().tag.endswith("svg")


@pytest.mark.long
async def test_a_small_run_of_what_is_large(folder: Path) -> None:
    only = [word for name in ("workers", "big", "capacity") for word in ("--only", name)]
    size = ("--wallets", "211", "--calls", "2500", "--workers", "1,2", "--rounds", "1")
    process = start_bench(folder, "--json", *size, *only)
    out, said = await asyncio.to_thread(process.communicate, timeout=200)
    assert process.returncode == 0, out + said
    found = json.loads(out)
    sides = {scenario["name"]: scenario["sides"] for scenario in found["scenarios"]}

    def median(name: str, side: str, figure: str) -> float:
        value: float = sides[name][side][figure]["median"]
        return value

    assert median("workers", "1 worker", "busiest_percent") == 100
    assert 50 <= median("workers", "2 workers", "busiest_percent") < 100  # both worked, and the master hardly
    for name in ("big-settle-many", "big-settle-one"):
        assert median(name, "small", "settlements_per_s") > 0
        assert median(name, "big", "settlements_per_s") > 0
    for name in ("big-plain-32", "big-stream-32"):
        assert set(sides[name]) == {"tuma", "big, 32 wallets", "big, first calls", "big, second calls"}
        # Who calls for the first time is looked up, and its mirror is filled: both of them by Postgres.
        first, few = (
            median(name, f"big, {which}", "postgres_cpu_ms") for which in ("first calls", "32 wallets")
        )
        assert first > 0
        assert few > 0
    assert median("capacity-worker", "plain", "calls_per_core_s") > 0
    assert median("capacity-redis", "2 clients", "pairs_per_s") > 0
    assert median("capacity-postgres", "4 by 20", "settle_wal_bytes") > 100
    assert [note for note in found["notes"] if "211 wallets and 2,500 calls" in note]
    assert [note for note in found["notes"] if "calls 1.00 rows" in note]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_what_is_stopped_leaves_nothing_running(folder: Path, number: signal.Signals) -> None:
    process = start_bench(folder, "--rounds", "100", "--share", "1", "--only", "plain-8")
    try:
        assert process.stderr is not None
        while not (line := await asyncio.to_thread(process.stderr.readline)).startswith("plain-8"):
            assert line, "it ended"
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 6
        process.send_signal(number)
        out, said = await asyncio.to_thread(process.communicate, timeout=90)
        assert process.returncode == 130, out + said
        assert "Traceback" not in said
    finally:
        process.kill()
    _, alive = await asyncio.to_thread(psutil.wait_procs, children, 10)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []


async def test_a_lost_nano_is_a_failed_run(office: Office) -> None:
    payer = await make_payer(office)
    ledger = Ledger(office.database, worker_id=new_id())
    await pay(ledger, payer, 1_000)
    billed: dict[str, Any] = {"calls": 1, "nanousd": 1_000}

    async def ask(_path: str, _key: str) -> dict[str, Any]:
        return billed

    async def compared(answered: int = 1) -> Standing:
        return await compare(ask, office, "a key", answered=answered, quiet_s=0)

    assert await compared() == Standing(1, 1_000)
    with pytest.raises(BenchError, match="the client had 2 answers"):
        await compared(2)
    before, since = Standing(5, 7_000), new_id()
    billed = {
        "calls": 5,
        "nanousd": 7_000,
    }  # the call above is older: what is known of those is not read again
    assert await compare(ask, office, "a key", answered=0, quiet_s=0, before=before, since=since) == Standing(
        0, 0
    )
    billed = {"calls": 6, "nanousd": 8_000}
    with pytest.raises(BenchError, match="the provider billed 1 calls"):
        await compare(ask, office, "a key", answered=0, quiet_s=0, before=before, since=since)
    for wrong in ({"nanousd": 1_001}, {"nanousd": 999}, {"calls": 2}):
        billed = {"calls": 1, "nanousd": 1_000, **wrong}
        with pytest.raises(BenchError, match="the provider billed"):
            await compared()
    billed = {"calls": 1, "nanousd": 1_000}
    await ledger.open_calls([opening(payer, 2_000)])
    with pytest.raises(BenchError, match="and 1 open"):
        await compared()
    with pytest.raises(BenchError, match=r"I8: .* was never recorded"):
        await prove(office)


@pytest.mark.parametrize(
    ("stream", "answer", "good"),
    [
        (False, plain_answer(1, "bench/fast"), True),
        (False, plain_answer(1, "bench/fast").replace(b"200 OK", b"503 No"), False),
        (False, plain_answer(1, "bench/fast").replace(b"usage", b"egasu"), False),
        (False, plain_answer(1, "bench/fast")[:-1], False),
        (True, b"".join(stream_pieces(1, "bench/fast")), True),
        (True, b"".join(stream_pieces(1, "bench/fast")[2:]), False),
        (True, b"".join(stream_pieces(1, "bench/fast")).replace(b"[DONE]", b"[GONE]"), False),
    ],
)
async def test_only_whole_answers_count(stream: bool, answer: bytes, good: bool) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" if stream else b""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(request.partition(b"Content-Length: ")[2]))
        writer.write(head + answer)
        await writer.drain()
        writer.write_eof()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1") as server:
        host, port = server.sockets[0].getsockname()
        side = Side("a server", f"http://{host}:{port}/v1", ("sk-x",))
        job = {"host": host, "port": port, "secure": False, "requests": side.requests(SCENARIOS[0])}
        more = {"stream": stream, "paced": False, "timeout_s": 30, "calls": 1, "connections": 1}
        said = await Load().calls({**job, **more})
    assert (said["calls"], said["errors"]) == ((1, 0) if good else (0, 1)), said


async def test_a_companion_makes_as_many_calls() -> None:
    """Each call that is measured has one beside it, whose errors show, too."""
    answered = {"tuma": 0, "floor": 0}
    refuse_from = 1_000

    def serve(name: str) -> Any:
        async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    request = await reader.readuntil(b"\r\n\r\n")
                    await reader.readexactly(int(request.partition(b"Content-Length: ")[2]))
                    answered[name] += 1
                    answer = plain_answer(1, "bench/fast")
                    if name == "floor" and answered[name] > refuse_from:
                        answer = answer.replace(b"200 OK", b"503 No")
                    writer.write(answer)
            writer.close()

        return work

    async with (
        await asyncio.start_server(serve("tuma"), "127.0.0.1") as tuma,
        await asyncio.start_server(serve("floor"), "127.0.0.1") as floor,
    ):
        targets = []
        for server in (tuma, floor):
            host, port = server.sockets[0].getsockname()
            targets.append(Side("a server", f"http://{host}:{port}/v1", ("sk-x",)).target(SCENARIOS[0]))
        job = {**targets[0], "stream": False, "paced": False, "timeout_s": 30, "calls": 50, "connections": 4}
        said = await Load().calls({**job, "beside": targets[1]})
        assert (said["calls"], said["errors"]) == (50, 0), said
        assert (said["beside"]["calls"], said["beside"]["errors"]) == (50, 0), said
        assert answered == {"tuma": 50, "floor": 50}
        refuse_from = 99
        said = await Load().calls({**job, "beside": targets[1]})
        assert (said["calls"], said["beside"]["calls"], said["beside"]["errors"]) == (50, 49, 1)
