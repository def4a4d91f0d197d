"""All guards, room by room: each file of the folders here, and each beside this one that has ``MUTATIONS``, adds its own."""

import importlib
import subprocess
from pathlib import Path

from tests.mutations.mutation import Mutation
from tests.support.paths import ROOT

_HERE = Path(__file__).parent
_NO_ROOMS = {"__init__", "__main__", "catalogue", "copies", "mutation"}


def _read() -> dict[Mutation, str]:
    found: dict[Mutation, str] = {}
    for path in sorted(_HERE.rglob("*.py")):
        if path.parent == _HERE and path.stem in _NO_ROOMS:
            continue
        module = ".".join(("tests.mutations", *path.relative_to(_HERE).with_suffix("").parts))
        found.update(dict.fromkeys(importlib.import_module(module).MUTATIONS, str(path.relative_to(ROOT))))
    return found


_ROOMS = _read()
MUTATIONS = tuple(_ROOMS)


def choose_changed(files: set[str]) -> list[Mutation]:
    """Return the mutations that files have to do with: the guard's, its tests', or the one that lists it."""
    return [
        item
        for item, listed_in in _ROOMS.items()
        if files & {item.file, listed_in, *(target.partition("::")[0] for target in item.tests.split())}
    ]


def changed_since(commit: str) -> list[Mutation]:
    """Return the mutations of the files that differ from a commit, files that git does not know yet among them."""
    files: set[str] = set()
    for command in (
        ["diff", "--name-only", commit, "--"],
        ["ls-files", "--others", "--exclude-standard"],
    ):
        done = subprocess.run(
            ["git", *command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        files.update(done.stdout.splitlines())
    return choose_changed(files)
