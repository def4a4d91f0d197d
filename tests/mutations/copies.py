"""Copies of the checkout in which guards are broken, and tests run."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.mutations.mutation import Mutation, Verdict
from tests.support.paths import ROOT

_SKIPPED = (
    ".git",
    ".venv",
    ".tuma",
    "__pycache__",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
    "build",
    "*.egg-info",
)
_TIMEOUT_S = 300
_TESTS_FAILED = 1  # pytest's exit code; 2 to 5 say that it could not run them
_PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")


def copy_checkout(target: Path) -> Path:
    """Copy what tests need of the checkout; return where it lies."""
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*_SKIPPED))
    return target


def run_tests(copy: Path, targets: Iterable[str], jobs: int) -> int:
    """Run whole test files in a copy, with pytest's own words; return its exit code."""
    parallel = ("--numprocesses", str(jobs), "--dist", "loadfile")
    files = sorted({target.partition("::")[0] for target in targets})
    # Tests of one node alone are run with all of their file here: what they need is the same.
    return subprocess.run([*_PYTEST, *parallel, *files], cwd=copy, check=False).returncode


def try_mutation(mutation: Mutation, copy: Path) -> Verdict:
    """Break a guard in a copy, run its tests, mend it again.

    Raises:
        ValueError: the guard's text is not where it was: the mutation must follow the code.
    """
    path = copy / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.name}: {mutation.file} has the guard {text.count(mutation.old)} times")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        return judge(_exit_code([*_PYTEST, "-x", "--timeout=60", *mutation.tests.split()], copy))
    finally:
        path.write_text(text, encoding="utf-8")


def judge(exit_code: int | None) -> Verdict:
    """Say what pytest's exit code says of a mutation; None where the tests hung, which is noticed, too.

    A file that cannot be imported, or a test that is not there, is no proof: not every failure is a caught mutation.
    """
    if exit_code is None or exit_code == _TESTS_FAILED:
        return Verdict.CAUGHT
    return Verdict.SURVIVED if exit_code == 0 else Verdict.UNCLEAR


def _exit_code(command: list[str], copy: Path) -> int | None:
    # A session of its own: tests that hang leave servers behind, which end with it.
    process = subprocess.Popen(
        command, cwd=copy, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        return process.wait(_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
