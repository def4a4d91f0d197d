"""``python -m tests.calendar``: the tests that are marked ``calendar``, once more at each moment on which calendars trip.

What else is given goes on to pytest, in place of the files that have such tests. ``--moment NAME`` (again for more) chooses moments,
``--quick`` the four of them that are of all kinds; ``--required`` fails where there is no libfaketime.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tests.support.clock import find_library, shift

_ROOT = Path(__file__).resolve().parents[1]
_TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class Moment:
    """When the tests begin, and on which zone's clock their process runs."""

    name: str
    at: datetime
    zone: str
    options: tuple[str, ...] = ()
    quick: bool = False


def _utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=UTC)  # type: ignore[misc,arg-type]


# Zones of the process differ from UTC on purpose: half an hour before midnight UTC it is the next month on one clock.
# Clocks in Berlin change at night, in Cairo at midnight: there a day begins at 01:00, and 23:30 comes twice.
MOMENTS = (
    Moment("last hour of a month", _utc(2027, 4, 30, 23, 25), "Pacific/Kiritimati"),
    Moment("last hour of a year", _utc(2027, 12, 31, 23, 25), "America/New_York", quick=True),
    Moment("29 February", _utc(2028, 2, 29, 12, 0), "UTC", quick=True),
    Moment("summer time begins in Berlin", _utc(2027, 3, 28, 1, 10), "Europe/Berlin"),
    Moment("summer time ends in Berlin", _utc(2027, 10, 31, 1, 10), "Europe/Berlin", quick=True),
    Moment("summer time begins in Cairo", _utc(2027, 4, 29, 22, 10), "Africa/Cairo"),
    Moment("summer time ends in Cairo", _utc(2027, 10, 28, 21, 10), "Africa/Cairo"),
    Moment(
        "a month after the last partition",
        _utc(2027, 6, 15, 12, 0),
        "Africa/Lagos",
        ("--past-partitions",),
        quick=True,
    ),
)


def _find_files() -> list[str]:
    """Return the test files that have such tests: the others need not be imported ten times."""
    mark = "pytest.mark.calendar"
    return sorted(
        str(path) for path in (_ROOT / "tests").rglob("test_*.py") if mark in path.read_text(encoding="utf-8")
    )


def _run(moment: Moment, library: Path, options: list[str]) -> tuple[Moment, int, str, float]:
    command = [sys.executable, "-m", "pytest", "-m", "calendar", "-q", "-p", "no:cacheprovider"]
    began = time.monotonic()
    done = subprocess.run(
        [*command, *moment.options, *(options or _find_files())],
        check=False,
        cwd=_ROOT,
        env={**os.environ, **shift(library, moment.at, moment.zone)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_TIMEOUT_S,
    )
    return moment, done.returncode, done.stdout, time.monotonic() - began


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m tests.calendar", description=__doc__)
    parser.add_argument("--moment", action="append", choices=[moment.name for moment in MOMENTS])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--required", action="store_true")
    return parser.parse_known_args(arguments)


def main(arguments: list[str]) -> int:
    """Run the moments side by side; return 1 if a test failed at one of them."""
    asked, options = _parse(arguments)
    library = find_library()
    if library is None:
        left_out = "; ".join(moment.name for moment in MOMENTS)
        print(f"LEFT OUT, for want of libfaketime (Debian's package libfaketime): {left_out}")
        return int(asked.required)
    failed = []
    with ThreadPoolExecutor((os.cpu_count() or 1) + 1) as pool:
        chosen = [
            moment
            for moment in MOMENTS
            if (moment.quick or not asked.quick) and (asked.moment is None or moment.name in asked.moment)
        ]
        for moment, code, said, took_s in pool.map(lambda moment: _run(moment, library, options), chosen):
            if code:
                failed.append(moment.name)
                print(said)
            last = said.strip().rpartition("\n")[2].strip("= ")
            print(
                f"{moment.name} ({moment.at:%Y-%m-%d %H:%M} UTC, TZ={moment.zone}): {last} [{took_s:.0f} s]"
            )
            sys.stdout.flush()
    if failed:
        print(f"FAILED at: {'; '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
