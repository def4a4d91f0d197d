"""Child processes that end with us, and those that an earlier run left behind."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.01


def end_with_parent(number: signal.Signals) -> Callable[[], None] | None:
    """Return a ``preexec_fn`` that has the child receive ``number`` when its parent dies; None where that is unknown.

    Linux's PR_SET_PDEATHSIG, prctl(2). The kernel takes the *thread* that started the child for its parent.
    """
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def in_child() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return in_child


def kill_tree(process: subprocess.Popen[bytes], *, timeout_s: float) -> None:
    """Kill a child and its own children, whatever sessions they made for themselves, and wait until all are dead."""
    import psutil  # noqa: PLC0415 - comes with the embedded wheels, which an installation without them lacks

    children = []
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()
    deadline = time.monotonic() + timeout_s
    for child in children:
        # Dead ones may stay as zombies for a while: it is for init to collect them.
        with contextlib.suppress(psutil.NoSuchProcess):
            while (
                child.status() != psutil.STATUS_ZOMBIE and child.is_running() and time.monotonic() < deadline
            ):
                time.sleep(_POLL_S)


def stop_if_ours(pid: int, mark: str, number: signal.Signals, *, timeout_s: float) -> bool:
    """Stop a process of an earlier run if ``mark`` is one of the arguments on its command line; touch nothing else.

    Args:
        pid: as a pid file names it; by now it may be nobody's, or another program's.
        mark: what only ours has on its command line, such as its folder of data.
        number: asks it to stop; SIGKILL follows.
        timeout_s: to wait for it, in seconds, before and after SIGKILL.

    Returns:
        Whether it was ours, and is gone.
    """
    import psutil  # noqa: PLC0415 - comes with the embedded wheels, which an installation without them lacks

    try:
        process = psutil.Process(pid)
        if mark not in process.cmdline():
            return False
        process.send_signal(number)
        deadline = time.monotonic() + timeout_s
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                process.kill()
                process.wait(timeout_s)
            time.sleep(_POLL_S)
    except psutil.NoSuchProcess:
        return True
    except (psutil.AccessDenied, psutil.TimeoutExpired):
        return False
    return True
