"""Ask whether a pinned package has a known vulnerability: ``python -m scripts.vulnerabilities``, a step of CI.

pip-audit answers "no known vulnerabilities" also where the package index publishes no advisories and knows nothing of any
package. So its report is read: what was not looked up is said, and never taken for good.
"""

import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_ACCEPTED = ROOT / ".ci" / "advisories-accepted"
_PIP_AUDIT = "pip-audit==2.10.1"
_TIMEOUT_S = 300


class NotAuditedError(Exception):
    """The question could not be asked; the message says why."""


def read_accepted(text: str) -> dict[str, str]:
    """Read the list of advisories that do not concern us: an id and the reason on each line."""
    accepted = {}
    for line in text.splitlines():
        advisory, _, reason = line.partition("#")[0].strip().partition(" ")
        if advisory and not reason.strip():
            raise ValueError(f"{advisory} is accepted without a reason")
        if advisory:
            accepted[advisory] = reason.strip()
    return accepted


def judge(report: Mapping[str, Any], accepted: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return what is vulnerable, and what was not looked up, a line each.

    Args:
        report: pip-audit's, as JSON.
        accepted: reason by id of advisory; an alias counts.
    """
    found, unknown = [], []
    for package in report["dependencies"]:
        name = f"{package['name']} {package.get('version', '')}".strip()
        if "skip_reason" in package:
            unknown.append(f"{name}: {package['skip_reason']}")
        for advisory in package.get("vulns", ()):
            if accepted.keys().isdisjoint({advisory["id"], *advisory.get("aliases", ())}):
                fixed = ", ".join(advisory.get("fix_versions", ())) or "no version yet"
                found.append(f"{name}: {advisory['id']}, fixed in {fixed}")
    return found, unknown


def run_pip_audit() -> Mapping[str, Any]:
    """Run pip-audit over ``constraints.txt``, from an environment of its own.

    Raises:
        NotAuditedError: it cannot be had, or its service does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="tuma-audit-") as folder:
        venv.create(folder, with_pip=True)
        programs = Path(folder) / "bin"
        _run([str(programs / "pip"), "install", "--quiet", _PIP_AUDIT], "it cannot be installed")
        out = _run(
            [
                *(str(programs / "pip-audit"), "--requirement", str(ROOT / "constraints.txt"), "--no-deps"),
                *("--disable-pip", "--progress-spinner", "off", "--format", "json"),
            ],
            "the service of advisories does not answer",
        )
    try:
        report: Mapping[str, Any] = json.loads(out)
    except ValueError:
        raise NotAuditedError("the service of advisories does not answer") from None
    return report


def _run(command: list[str], trouble: str) -> str:
    """Run; pip-audit's status 1 is an answer, too."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise NotAuditedError(f"{trouble} within {_TIMEOUT_S} s") from None
    if done.returncode and not done.stdout.strip():
        last = done.stderr.strip().rpartition("\n")[2]
        raise NotAuditedError(f"{trouble}: {last[:200]}")
    return done.stdout


def main() -> None:
    """Print the verdict; exit 1 if something vulnerable is pinned."""
    try:
        report = run_pip_audit()
    except NotAuditedError as error:
        print(f"not audited: {error}")
        return
    accepted = read_accepted(_ACCEPTED.read_text(encoding="utf-8"))
    found, unknown = judge(report, accepted)
    asked = len(report["dependencies"])
    if unknown:
        print(f"not audited: {len(unknown)} of {asked} packages, such as {unknown[0]}")
    print(f"audited: {asked - len(unknown)} of {asked} packages, {len(found)} vulnerable")
    for line in found:
        print(f"  {line}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
