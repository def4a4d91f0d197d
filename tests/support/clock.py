"""A shifted clock: of the tests and of the servers that they start, by libfaketime.

Each process adds the same offset to the machine's clock, so that time goes on and all agree. What counts seconds (the
monotonic clock) is left alone: event loops and their timeouts run as ever. But Postgres' own timeouts (of locks, of
statements) do not fire, since a signal's handler sees the machine's time while libfaketime waits for it: a test of those
is no test of calendars.
"""

import os
import select
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import SupportsIndex

from billing.postgres.database import Database

# Where Debian's package `libfaketime` puts it.
_LIBRARIES = ("/usr/lib/*/faketime/libfaketimeMT.so.1", "/usr/lib/faketime/libfaketimeMT.so.1")
_VARIABLES = ("LD_PRELOAD", "FAKETIME", "FAKETIME_DONT_FAKE_MONOTONIC", "NO_FAKE_STAT", "TZ")


def find_library() -> Path | None:
    """Return libfaketime, if it is installed."""
    found = [path for pattern in _LIBRARIES for path in sorted(Path("/").glob(pattern[1:]))]
    return found[0] if found else None


def shift(library: Path, to: datetime, zone: str) -> dict[str, str]:
    """Return the variables of a process whose clock shows a moment now, and whose local time is that of a zone."""
    offset_s = round((to - datetime.now(UTC)).total_seconds())
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME": f"{offset_s:+d}",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",  # a file's age is nobody's calendar, and Python compares it with its compiled modules
        "TZ": zone,
    }


def variables_of_clock() -> Mapping[str, str]:
    """Return what servers need to see our clock; nothing if it is the machine's."""
    return {name: os.environ[name] for name in _VARIABLES if name in os.environ} if is_shifted() else {}


def is_shifted() -> bool:
    """Tell whether this process has another clock than the machine."""
    return "FAKETIME" in os.environ


def mend_sleep() -> None:
    """Let ``time.sleep`` sleep under libfaketime, which (0.9.10) takes an absolute monotonic time for a shifted one."""
    if is_shifted():

        def sleep(seconds: float | SupportsIndex, /) -> None:
            select.select([], [], [], float(seconds))

        time.sleep = sleep


async def drop_partitions(database: Database) -> int:
    """Leave no partition of this month or a later one, as if none had been made for months; return how many went."""
    async with database.connection() as connection:
        names = await connection.fetch(
            "SELECT c.relname AS name FROM pg_class c WHERE c.relispartition AND c.relkind = 'r'"
            " AND right(c.relname, 7) >= to_char(now() AT TIME ZONE 'UTC', 'YYYY_MM') AND c.relname ~ '_[0-9]{4}_[0-9]{2}$'"
        )
        for row in names:
            await connection.execute(f'DROP TABLE "{row["name"]}"')
    return len(names)
