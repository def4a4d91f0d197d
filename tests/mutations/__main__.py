"""Break each guard on purpose, in copies, and show that the tests notice.

``python -m tests.mutations [NAME …]`` runs those whose name contains one of the words, or all. ``--changed COMMIT`` runs those of the
files that differ from a commit. Exits 1 if a mutation survives. ``--record`` keeps the count of a full run in ``last_full_run.json``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue

from tests.mutations.catalogue import MUTATIONS, changed_since
from tests.mutations.copies import copy_checkout, run_tests, try_mutation
from tests.mutations.mutation import Mutation, Verdict
from tests.support.paths import ROOT

_RECORD = Path(__file__).with_name("last_full_run.json")
_TALLY = "{caught} caught, {survived} survived, {unclear} unclear, of {all}"


def _run_all(mutations: Sequence[Mutation], folder: Path, jobs: int) -> dict[Verdict, list[str]]:
    copies: SimpleQueue[Path] = SimpleQueue()
    for number in range(jobs):
        copies.put(copy_checkout(folder / str(number)))
    found: dict[Verdict, list[str]] = {verdict: [] for verdict in Verdict}

    def run(mutation: Mutation) -> None:
        began_s = time.monotonic()
        copy = copies.get()
        try:
            verdict = try_mutation(mutation, copy)
        finally:
            copies.put(copy)
        found[verdict].append(mutation.name)
        print(f"{verdict:<9} {time.monotonic() - began_s:5.1f} s  {mutation.name}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, mutations))
    return found


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def _read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="NAME", help="only those with one of these in their name")
    parser.add_argument(
        "--changed", metavar="COMMIT", help="only those of files that differ from this commit"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="how many at a time (default: cores)"
    )
    parser.add_argument(
        "--unchecked", action="store_true", help="do not run the tests without a mutation first"
    )
    parser.add_argument("--record", action="store_true", help="keep the result of a full run")
    return parser.parse_args()


def main() -> None:
    """Run what was asked for; say what survived."""
    asked = _read_arguments()
    chosen = changed_since(asked.changed) if asked.changed else list(MUTATIONS)
    chosen = [item for item in chosen if not asked.words or any(word in item.name for word in asked.words)]
    if asked.record and len(chosen) < len(MUTATIONS):
        sys.exit("--record is for a run of all mutations")
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tuma-mutations-") as name:
        folder = Path(name)
        if chosen and not asked.unchecked:
            print(f"the tests of {len(chosen)} mutations, with none of them", flush=True)
            copy = copy_checkout(folder / "whole")
            if run_tests(copy, {target for item in chosen for target in item.tests.split()}, asked.jobs):
                sys.exit("the tests fail without any mutation: nothing would be proved")
        found = _run_all(chosen, folder, asked.jobs)
    tally = {str(verdict): len(names) for verdict, names in found.items()}
    for verdict in (Verdict.SURVIVED, Verdict.UNCLEAR):
        for survivor in found[verdict]:
            print(f"{verdict}: {survivor}")
    minutes = (time.monotonic() - began_s) / 60
    print(_TALLY.format(**tally, all=len(chosen)) + f", in {minutes:.0f} minutes")
    if asked.record:
        record = {
            "date": datetime.now(UTC).date().isoformat(),
            "commit": _commit(),
            "mutations": len(chosen),
            **tally,
            "minutes": round(minutes),
        }
        _RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.exit(tally[Verdict.CAUGHT] < len(chosen))


if __name__ == "__main__":
    main()
