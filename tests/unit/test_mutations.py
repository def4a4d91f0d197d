"""Each guard that ``tests/mutations/`` breaks stands where it says, once; the breaking itself takes too long for every run."""

from pathlib import Path

import pytest

from tests.mutations.catalogue import MUTATIONS, choose_changed
from tests.mutations.copies import judge, try_mutation
from tests.mutations.mutation import Mutation, Verdict
from tests.support.paths import ROOT


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[item.name for item in MUTATIONS])
def test_the_guard_is_where_it_was(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1
    assert mutation.old != mutation.new
    for target in mutation.tests.split():
        path, _, test = target.partition("::")
        assert (ROOT / path).exists()
        assert f"def {test.partition('[')[0]}" in (ROOT / path).read_text() if test else True


def test_names_are_told_apart() -> None:
    names = [item.name for item in MUTATIONS]
    assert len(names) == len(set(names))


def test_only_tests_that_fail_prove_something() -> None:
    """Tests that could not be run at all (a broken import, a test that is not there) must not pass for a guard that was noticed."""
    assert judge(1) is Verdict.CAUGHT
    assert judge(None) is Verdict.CAUGHT  # they hung
    assert judge(0) is Verdict.SURVIVED
    assert [judge(code) for code in (2, 3, 4, 5)] == [Verdict.UNCLEAR] * 4


def test_a_change_chooses_its_mutations() -> None:
    one = next(item for item in MUTATIONS if item.file == "billing/redis/cluster.py")
    assert one in choose_changed({"billing/redis/cluster.py"})
    assert {item.file for item in choose_changed({"billing/redis/cluster.py"})} == {
        "billing/redis/cluster.py"
    }
    assert one in choose_changed({one.tests.partition("::")[0]})
    assert one in choose_changed({"tests/mutations/billing/redis.py"})
    assert choose_changed({"README.md"}) == []


@pytest.mark.parametrize(
    ("guard", "verdict"),
    [("return 0", Verdict.CAUGHT), ("return  1", Verdict.SURVIVED), ("return (", Verdict.UNCLEAR)],
)
def test_a_guard_is_broken_tried_and_mended(tmp_path: Path, guard: str, verdict: Verdict) -> None:
    (tmp_path / "guarded.py").write_text("def one():\n    return 1\n")
    (tmp_path / "test_it.py").write_text("import guarded\n\ndef test_it():\n    assert guarded.one() == 1\n")
    mutation = Mutation("one is one", "guarded.py", "return 1", guard, "test_it.py")
    assert try_mutation(mutation, tmp_path) is verdict
    assert (tmp_path / "guarded.py").read_text() == "def one():\n    return 1\n"


def test_a_guard_that_has_moved_is_said(tmp_path: Path) -> None:
    (tmp_path / "guarded.py").write_text("")
    with pytest.raises(ValueError, match="0 times"):
        try_mutation(Mutation("gone", "guarded.py", "return 1", "return 0", "test_it.py"), tmp_path)
