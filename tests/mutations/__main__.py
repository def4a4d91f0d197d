"""Break each guard on purpose, in a copy, and show that the tests notice.

Run it with ``python -m tests.mutations [NAME …]`` from the checkout's environment. It exits 1 if a mutation survives.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutations.catalogue import MUTATIONS
from tests.mutations.mutation import Mutation
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
)
_TIMEOUT_S = 300


def survives(mutation: Mutation) -> bool:
    """Apply a mutation in a copy and run its tests; True if they all pass all the same.

    Raises:
        ValueError: the guard's text is not where it was: the mutation must follow the code.
    """
    with tempfile.TemporaryDirectory(prefix="tuma-mutation-") as name:
        copy = Path(name) / "tuma"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*_SKIPPED))
        path = copy / mutation.file
        text = path.read_text(encoding="utf-8")
        if text.count(mutation.old) != 1:
            raise ValueError(
                f"{mutation.name}: {mutation.file} has the guard {text.count(mutation.old)} times"
            )
        path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--timeout=60", "-p", "no:cacheprovider"]
        try:
            done = subprocess.run(
                [*command, *mutation.tests.split()],
                cwd=copy,
                capture_output=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0


def main() -> None:
    """Run the mutations named on the command line, or all."""
    wanted = sys.argv[1:]
    survivors = []
    for mutation in MUTATIONS:
        if wanted and not any(word in mutation.name for word in wanted):
            continue
        began = time.monotonic()
        alive = survives(mutation)
        print(
            f"{'SURVIVED' if alive else 'caught  '} {time.monotonic() - began:5.1f} s  {mutation.name}",
            flush=True,
        )
        if alive:
            survivors.append(mutation.name)
    print(f"{len(survivors)} survived")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
