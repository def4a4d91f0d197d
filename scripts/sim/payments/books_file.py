"""A file in which the simulated payment providers' books survive a restart, as real providers' do."""

import copy
import json
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path
from typing import Any, TextIO

from scripts.sim.append_log import open_lines
from scripts.sim.exact_json import dumps
from scripts.sim.payments.books import KINDS, Books


class BooksFile:
    """Keeps books in an append-only file of JSON lines.

    A line has every entry that has changed since the line before, whole, by kind: what one request changes is kept, or a
    kill tears the line and nothing of it is; the last line about an entry is how it stands. Changes are found by
    comparing, so that no part of the books has to remember to tell of them.

    Args:
        path: made if missing.
        books: new ones.
    """

    def __init__(self, path: Path, books: Books) -> None:
        self._path = path
        self._books = books
        self._file: TextIO | None = None
        self._kept: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}

    def open(self) -> None:
        """Put what earlier runs kept into the books, and go on writing behind it.

        Raises:
            ValueError: a whole line that is none of ours.
            OSError: the file cannot be read or written.
        """
        lines, self._file = open_lines(self._path)
        for line in lines:
            self._read(line)
        self._books.count_on()
        for kind, kept in self._kept.items():
            kept.update(copy.deepcopy(self._books.entries(kind)))

    def _read(self, line: str) -> None:
        try:
            for kind, rows in json.loads(line, parse_float=Decimal).items():
                make = KINDS[kind]
                self._books.entries(kind).update({row["id"]: make(**row) for row in rows})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not of the simulated payment providers' books: {line[:80]!r}") from error

    def save(self) -> None:
        """Write what has changed, before anybody is told of it.

        Raises:
            OSError: the file cannot be written.
        """
        if self._file is None:
            return
        changed = {kind: self._changed(kind) for kind in KINDS}
        told = {kind: [asdict(entry) for entry in entries] for kind, entries in changed.items() if entries}
        if not told:
            return
        self._file.write(dumps(told) + "\n")
        self._file.flush()
        for kind, entries in changed.items():
            self._kept[kind].update({entry.id: copy.deepcopy(entry) for entry in entries})

    def _changed(self, kind: str) -> list[Any]:
        kept = self._kept[kind]
        return [entry for entry in self._books.entries(kind).values() if kept.get(entry.id) != entry]

    def close(self) -> None:
        """Keep the last changes, and close the file."""
        if self._file is not None:
            self.save()
            self._file.close()
            self._file = None
