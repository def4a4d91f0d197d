"""What is counted as a process's CPU time: its own, its children's, and that of those who have died; nobody else's."""

import os
import subprocess
import sys
import time

from scripts.bench.gauges import Clocks, cpu_s, cpu_s_by_process

_BURN = """
import os, sys, time

def burn(seconds):
    began = time.process_time()
    while time.process_time() - began < seconds:
        pass

if dead := float(sys.argv[1]):
    if not (child := os.fork()):
        burn(dead)
        os._exit(0)
    os.waitpid(child, 0)
if not os.fork():
    burn(float(sys.argv[2]))
    print("ready", flush=True)
    time.sleep(600)
time.sleep(600)
"""


def start(dead_s: float, living_s: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _BURN, str(dead_s), str(living_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_workers_count_and_so_do_the_dead() -> None:
    process = start(0.3, 0.2)
    try:
        assert 0.48 < cpu_s(process.pid) < 1.5
        living = cpu_s_by_process(process.pid)
        assert len(living) == 2
        assert max(living.values()) >= 0.2
        assert living[process.pid] < 0.2  # it only waits
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def test_nobody_else_counts() -> None:
    process = start(0, 0.01)
    try:
        clocks = Clocks({"theirs": process.pid, "ours": os.getpid()})
        began = time.process_time()
        while time.process_time() - began < 0.2:
            pass
        spent = clocks.ms()
        assert spent["ours"] >= 200
        assert spent["theirs"] < 50
        assert clocks.seconds() >= 0.2
        assert clocks.others_percent(0.0) > clocks.others_percent(200.0) >= 0
    finally:
        os.killpg(process.pid, 9)
        process.wait()
