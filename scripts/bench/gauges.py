"""What processes have used: CPU time and memory, of a process with all that it started."""

import sys
import time
from collections.abc import Mapping
from contextlib import suppress


class Clocks:
    """The CPU clocks of several processes, from now on.

    Args:
        pids: of each, by a name.
    """

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = dict(pids)
        self._began_s = time.perf_counter()
        self._began_machine_s = _machine_s()
        self._began = {name: cpu_s(pid) for name, pid in self._pids.items()}

    def ms(self) -> dict[str, float]:
        """Return the milliseconds that each has used since."""
        return {name: (cpu_s(pid) - self._began[name]) * 1000 for name, pid in self._pids.items()}

    def others_percent(self, ours_ms: float) -> float:
        """Return what others have used since of all cores together, where ``ours_ms`` is not theirs; the kernel's share is."""
        import psutil  # noqa: PLC0415 - as below

        theirs_s = max(_machine_s() - self._began_machine_s - ours_ms / 1000, 0.0)
        return 100 * theirs_s / self.seconds() / (psutil.cpu_count() or 1)

    def seconds(self) -> float:
        """Return how long that is by the wall clock."""
        return time.perf_counter() - self._began_s


def _machine_s() -> float:
    """Return for how long the cores were busy since the machine was started, all together."""
    import psutil  # noqa: PLC0415 - as below

    times = psutil.cpu_times()
    return float(
        sum(times[:8]) - times.idle - getattr(times, "iowait", 0.0)
    )  # guests' time is in the users' already


def cpu_s(pid: int) -> float:
    """Return the CPU time, user and system, of a process and all that it started, in seconds.

    Those are the living ones, and the dead whom their parents have waited for: what a worker had used before it died
    stays counted.
    """
    import psutil  # noqa: PLC0415 - comes with the embedded wheels, which an installation without them lacks

    total = 0.0
    process = psutil.Process(pid)
    for each in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            user_s, system_s, *dead_s = each.cpu_times()[:4]
            total += (_exact_cpu_s(each.pid) or user_s + system_s) + sum(dead_s)
    return total


def cpu_s_by_process(pid: int) -> dict[int, float]:
    """Return the CPU time of a process and of each of its living children, in seconds, by pid."""
    import psutil  # noqa: PLC0415 - as above

    process = psutil.Process(pid)
    found = {}
    for each in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            found[each.pid] = _exact_cpu_s(each.pid) or sum(each.cpu_times()[:2])
    return found


def _exact_cpu_s(pid: int) -> float | None:
    """Read a process's CPU clock, which ``/proc`` rounds to 10 ms; see clock_getcpuclockid(3). None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    with suppress(OSError):
        return time.clock_gettime((~pid << 3) | 2)
    return None


def memory_bytes(pid: int) -> int:
    """Return the resident memory of a process and its children."""
    import psutil  # noqa: PLC0415 - as above

    process = psutil.Process(pid)
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))
