"""Processes of our own that say in one line when they are ready: started, waited for, ended."""

import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from scripts.programs.embedded import EmbeddedError
from scripts.programs.processes import end_with_parent

_ROOT = str(Path(__file__).resolve().parents[2])


def spawn(
    command: Sequence[str],
    env: Mapping[str, str],
    *,
    stdin: int | None = None,
    stderr: IO[bytes] | None = None,
) -> subprocess.Popen[str]:
    """Start a process in a session of its own, that ends with us; what it prints is for ``first_line``."""
    return subprocess.Popen(
        command,
        env={**env, "PYTHONUNBUFFERED": "1"},
        cwd=_ROOT,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
        preexec_fn=end_with_parent(signal.SIGTERM),  # noqa: PLW1509 - two system calls, no lock taken
    )


def first_line(process: subprocess.Popen[str], what: str) -> str:
    """Return the line that a child prints when it is ready.

    Raises:
        EmbeddedError: it ended before.
    """
    out: IO[str] | None = process.stdout
    assert out is not None
    line = out.readline().strip()
    if not line:
        process.wait()
        raise EmbeddedError(f"{what} did not start (exit {process.returncode}); see the lines above")
    return line


def end(process: subprocess.Popen[str], *, timeout_s: float) -> None:
    """Ask a process to stop, wait, and kill it if it does not."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
