"""The pins, and how the report on their vulnerabilities is read."""

import re
import tomllib
from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.vulnerabilities import judge, read_accepted
from tests.support.paths import ROOT

LINES = (ROOT / "constraints.txt").read_text().splitlines()
PINNED: dict[str, str] = {
    canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in LINES
}


def needed(requirements: list[str]) -> set[str]:
    """Every distribution that these requirements bring along here."""
    found: set[str] = set()
    waiting = [Requirement(line) for line in requirements]
    seen = set()
    while waiting:
        one = waiting.pop()
        if str(one) in seen:
            continue
        seen.add(str(one))
        found.add(canonicalize_name(one.name))
        for line in requires(one.name) or ():
            other = Requirement(line)
            if other.marker is None or any(
                other.marker.evaluate({"extra": extra}) for extra in {"", *one.extras}
            ):
                waiting.append(other)
    return found


def test_everything_that_is_installed_is_pinned() -> None:
    """What the checkout asks for, which an install of it may not have done yet."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    everything = needed([line for group in groups for line in group if not line.startswith("tuma[")])
    assert len(everything) > 50
    assert everything - PINNED.keys() == set()


def test_the_pins_name_versions_and_nothing_else() -> None:
    for line in LINES:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.]+", line), line
    assert len(PINNED) == len(LINES)
    for path in ("pyproject.toml", "constraints.txt", "scripts/_bootstrap", "Dockerfile"):
        text = (ROOT / path).read_text()
        assert "index-url" not in text
        assert "find-links" not in text


def test_the_report_is_read_with_care() -> None:
    report = {
        "dependencies": [
            {"name": "good", "version": "1", "vulns": []},
            {
                "name": "bad",
                "version": "2",
                "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["3"]}],
            },
            {
                "name": "known",
                "version": "3",
                "vulns": [{"id": "PYSEC-2", "aliases": ["CVE-2"], "fix_versions": []}],
            },
            {"name": "secret", "skip_reason": "not found"},
        ]
    }
    found, unknown = judge(report, read_accepted("# why\n\nCVE-2 only with a feature that is off  # 2026\n"))
    assert found == ["bad 2: PYSEC-1, fixed in 3"]
    assert unknown == ["secret: not found"]
    with pytest.raises(ValueError, match="without a reason"):
        read_accepted("CVE-1\n")
