"""How long a file, a folder and a function may grow; each exception stands here with its reason."""

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.support.paths import ROOT

MOST_LINES_OF_A_FILE = 500
MOST_FILES_OF_A_FOLDER = 15
MOST_LINES_OF_A_FUNCTION = 60

TREES = ("billing", "config", "proxy", "scripts", "tests")

LONG_FILES: dict[str, str] = {
    "billing/postgres/roles.py": "one subject: who may do what in Postgres, role by role",
    "config/settings.py": "one subject: each setting with its bound, in one list that an operator reads",
    "proxy/upstream/client.py": "one subject: the HTTP client that is hand-made and frozen",
}

FULL_FOLDERS: dict[str, str] = {}

LONG_FUNCTIONS: dict[str, str] = {}


def test_a_file_has_at_most_500_lines() -> None:
    lengths = {_name(file): len(file.read_text().splitlines()) for file in _files()}
    _only_the_exceptions_pass(MOST_LINES_OF_A_FILE, lengths, LONG_FILES)


def test_a_folder_has_at_most_15_files() -> None:
    """Python files, besides the ``__init__.py`` that makes a folder a package."""
    counts = Counter(_name(file.parent) for file in _files() if file.name != "__init__.py")
    _only_the_exceptions_pass(MOST_FILES_OF_A_FOLDER, counts, FULL_FOLDERS)


def test_a_function_has_at_most_60_lines() -> None:
    """From its ``def`` to its last line; of functions with one name in a file, the longest counts."""
    lengths: dict[str, int] = {}
    for file in _files():
        for function in ast.walk(ast.parse(file.read_text())):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{_name(file)}:{function.name}"
                length = (function.end_lineno or function.lineno) - function.lineno + 1
                lengths[name] = max(length, lengths.get(name, 0))
    _only_the_exceptions_pass(MOST_LINES_OF_A_FUNCTION, lengths, LONG_FUNCTIONS)


def _files() -> Iterator[Path]:
    for tree in TREES:
        yield from sorted((ROOT / tree).rglob("*.py"))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _only_the_exceptions_pass(most: int, sizes: Mapping[str, int], exceptions: Mapping[str, str]) -> None:
    """What is over the bound is named with a reason, and what is named is still over the bound."""
    over = {name: size for name, size in sizes.items() if size > most}
    assert sizes, "nothing was measured"
    assert {name: size for name, size in over.items() if name not in exceptions} == {}, f"over {most}"
    assert exceptions.keys() - over.keys() == set(), "stale exceptions"
    assert all(exceptions.values()), "an exception without its reason"
