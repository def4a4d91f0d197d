"""Files of lines that are only ever appended to, and outlive a kill."""

from pathlib import Path
from typing import TextIO


def open_lines(path: Path) -> tuple[list[str], TextIO]:
    """Return a file's lines, and the file to write behind them; it is made if missing.

    A last line that a kill has torn is dropped.

    Raises:
        OSError: the file cannot be read or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    if path.exists():
        _drop_torn_line(path)
        # Not splitlines(): a line may hold other separators that Unicode knows.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return lines, path.open("a", encoding="utf-8")


def _drop_torn_line(path: Path) -> None:
    with path.open("r+b") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)
