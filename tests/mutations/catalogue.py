"""All guards, room by room: each file here that has ``MUTATIONS`` adds its own."""

import importlib
from pathlib import Path

from tests.mutations.mutation import Mutation

_HERE = Path(__file__).parent


def _read() -> tuple[Mutation, ...]:
    found: list[Mutation] = []
    for path in sorted(_HERE.rglob("*.py")):
        if path.parent == _HERE and path.stem in {"__init__", "__main__", "catalogue", "mutation"}:
            continue
        module = ".".join(("tests.mutations", *path.relative_to(_HERE).with_suffix("").parts))
        found.extend(importlib.import_module(module).MUTATIONS)
    return tuple(found)


MUTATIONS = _read()
