"""Each guard that ``tests/mutations/`` breaks stands where it says, once; the breaking itself takes too long for every run."""

from pathlib import Path

import pytest

from tests.mutations.catalogue import MUTATIONS
from tests.mutations.mutation import Mutation
from tests.support.paths import ROOT


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[item.name for item in MUTATIONS])
def test_the_guard_is_where_it_was(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1
    assert mutation.old != mutation.new
    assert Path(ROOT / mutation.tests.partition("::")[0].split()[0]).exists()


def test_names_are_told_apart() -> None:
    names = [item.name for item in MUTATIONS]
    assert len(names) == len(set(names))
