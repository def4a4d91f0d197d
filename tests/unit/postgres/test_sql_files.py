"""Each function stands once, in the room that calls it: what is read, searched or broken on purpose is the text that runs."""

import re
from collections import Counter
from pathlib import Path

import pytest

from billing.postgres.functions import digest_of, load_functions
from billing.postgres.migrate import load_migrations
from tests.support.paths import ROOT

FUNCTION_FILES = sorted((ROOT / "billing").glob("*/*.sql"))
NUMBERED_FILES = sorted((ROOT / "billing/postgres/migrations").glob("*.sql"))
_FUNCTION = re.compile(r"^CREATE OR REPLACE FUNCTION (\w+)\(.*?\bAS \$\$.*?\$\$;\n", re.MULTILINE | re.DOTALL)
_REVOKE = re.compile(r"^REVOKE EXECUTE ON FUNCTION [\w, ]+ FROM PUBLIC;.*\n", re.MULTILINE)
_COMMENT = re.compile(r"^--.*\n", re.MULTILINE)
_LINES_MAX = 400


def label(path: Path) -> str:
    return str(path.relative_to(ROOT / "billing"))


def test_all_files_are_found() -> None:
    assert [item.name for item in load_functions()] == [label(path) for path in FUNCTION_FILES]
    numbers = [item.number for item in load_migrations()]
    assert numbers == list(range(18, numbers[-1] + 1))
    assert {int(path.name[:4]) for path in NUMBERED_FILES} == set(numbers)


def test_no_function_is_written_twice() -> None:
    """Else one text is superseded, and whoever changes or breaks that one changes nothing."""
    made = Counter(
        name
        for path in FUNCTION_FILES + NUMBERED_FILES
        for name in re.findall(
            r"^\s*CREATE (?:OR REPLACE )?FUNCTION ([\w.]+)", path.read_text(), re.MULTILINE
        )
    )
    assert len(made) > 100
    assert {name: count for name, count in made.items() if count > 1} == {}


@pytest.mark.parametrize("path", FUNCTION_FILES, ids=label)
def test_a_rooms_file_has_functions_and_nothing_else(path: Path) -> None:
    text = path.read_text()
    assert re.match(r"-- [A-Z].*", text), "it begins with what it is about"
    assert text.count("\n") <= _LINES_MAX
    assert _FUNCTION.findall(text)
    rest = _COMMENT.sub("", _REVOKE.sub("", _FUNCTION.sub("", text)))
    assert rest.strip() == "", "tables, data and triggers are numbered: they are made once"


@pytest.mark.parametrize("path", NUMBERED_FILES, ids=label)
def test_a_numbered_file_makes_no_function(path: Path) -> None:
    made = re.findall(r"CREATE (?:OR REPLACE )?FUNCTION ([\w.]+)", path.read_text())
    assert made == (["auth.uid"] if path.name == "0018_tables.sql" else []), "a stand-in for Supabase's alone"


def test_every_function_is_called() -> None:
    functions = {name: path for path in FUNCTION_FILES for name in _FUNCTION.findall(path.read_text())}
    text = "\n".join(
        path.read_text()
        for folder in ("billing", "proxy", "scripts")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in {".py", ".sql"} and path != ROOT / "billing/postgres/roles.py"
    )
    called = Counter(re.findall(r"\b(\w+)\s*\(", text))
    assert [name for name in functions if called[name] < 2 and name not in _RUN_BY_HAND] == []


_RUN_BY_HAND = {"rebuild_usage"}  # an operator's: the sums of usage, anew


def test_a_digest_is_of_names_and_texts() -> None:
    files = load_functions()
    assert digest_of(files) == digest_of(load_functions())
    assert digest_of(files) != digest_of(files[1:])
