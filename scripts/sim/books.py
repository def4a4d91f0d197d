"""The simulated provider's own books: what it billed, per generation, in integer nano-USD."""

import asyncio
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from scripts.sim.append_log import open_lines


@dataclass(slots=True)
class Generation:
    """One answer: open while it is generated, then billed, once. Times are Unix seconds."""

    id: str
    model: str
    streamed: bool
    started_s: float
    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cost_nanousd: int = 0
    cancelled: bool = False  # the caller left before the end, whatever was billed
    finish_reason: str | None = None
    ended_s: float | None = None
    request_id: str | None = None
    user: str | None = None
    delay_s: float = 0
    missing: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return the entry as the books list it."""
        return asdict(self)


class Books:
    """Every generation, optionally kept in a file that survives a restart.

    Args:
        path: an append-only file of JSON lines, one per billed generation, flushed each. A last line that a kill has torn
            is dropped when the file is opened again. ``None`` keeps the books in memory.
        clock: Unix seconds.
    """

    def __init__(self, path: Path | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self.generations: dict[str, Generation] = {}
        self._path = path
        self._clock = clock
        self._file: TextIO | None = None
        self._total_nanousd = 0
        self._open_ids: set[str] = set()
        self._quiet = asyncio.Event()
        self._quiet.set()

    @property
    def total_nanousd(self) -> int:
        """What was billed in all, by earlier runs too; open generations are not in it."""
        return self._total_nanousd

    @property
    def open_count(self) -> int:
        """How many generations are running."""
        return len(self._open_ids)

    def load(self) -> None:
        """Read what earlier runs billed, and go on writing behind it.

        Raises:
            ValueError: a whole line that is not an entry; these are not our books.
            OSError: the file cannot be read or written.
        """
        if self._path is None:
            return
        lines, self._file = open_lines(self._path)
        for line in lines:
            self._remember(_read_entry(line))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def begin(
        self,
        model_id: str,
        *,
        streamed: bool,
        prompt_tokens: int,
        cached_tokens: int = 0,
        request_id: str | None = None,
        user: str | None = None,
        delay_s: float = 0,
        missing: bool = False,
    ) -> Generation:
        """Open a generation; it costs nothing until it is billed.

        Args:
            model_id: which model.
            streamed: whether the answer is a stream.
            prompt_tokens: of the prompt, cached ones among them.
            cached_tokens: at most as many as the prompt has.
            request_id: the caller's ``x-request-id``.
            user: the request's ``user``.
            delay_s: how long after its end ``find_record`` still denies it.
            missing: whether ``find_record`` always does.
        """
        now_s = self._clock()
        generation = Generation(
            id=f"gen-{int(now_s)}-{secrets.token_hex(10)}",
            model=model_id,
            streamed=streamed,
            started_s=now_s,
            prompt_tokens=prompt_tokens,
            cached_tokens=min(cached_tokens, prompt_tokens),
            request_id=request_id,
            user=user,
            delay_s=delay_s,
            missing=missing,
        )
        self.generations[generation.id] = generation
        self._open_ids.add(generation.id)
        self._quiet.clear()
        return generation

    def bill(
        self,
        generation: Generation,
        *,
        cost_nanousd: int,
        completion_tokens: int,
        reasoning_tokens: int,
        finish_reason: str | None,
        cancelled: bool = False,
    ) -> bool:
        """End a generation and bill it; a second time changes nothing.

        Returns:
            Whether this was the first time.
        """
        if generation.id not in self._open_ids:
            return False
        generation.completion_tokens = completion_tokens
        generation.reasoning_tokens = reasoning_tokens
        generation.cost_nanousd = cost_nanousd
        generation.finish_reason = finish_reason
        generation.cancelled = cancelled
        generation.ended_s = self._clock()
        if self._file is not None:
            self._file.write(json.dumps(generation.as_json(), separators=(",", ":")) + "\n")
            self._file.flush()
        self._remember(generation)
        self._open_ids.remove(generation.id)
        if not self._open_ids:
            self._quiet.set()
        return True

    def _remember(self, generation: Generation) -> None:
        self.generations[generation.id] = generation
        self._total_nanousd += generation.cost_nanousd

    def find_record(self, generation_id: str) -> Generation | None:
        """Return a generation as ``/generation`` knows it: ended, not hidden, and old enough."""
        found = self.generations.get(generation_id)
        if found is None or found.ended_s is None or found.missing:
            return None
        return found if self._clock() >= found.ended_s + found.delay_s else None

    async def wait_quiet(self, *, timeout_s: float = 10) -> None:
        """Wait until no generation is open.

        Raises:
            TimeoutError: one still is.
        """
        async with asyncio.timeout(timeout_s):
            await self._quiet.wait()

    def sum_activity(self) -> list[dict[str, Any]]:
        """Return requests, tokens and ``cost_nanousd`` per UTC day of the start and model, in that order."""
        sums: dict[tuple[str, str], dict[str, int]] = {}
        names = ("prompt_tokens", "completion_tokens", "reasoning_tokens", "cost_nanousd")
        for generation in self.generations.values():
            if generation.ended_s is None:
                continue
            day = datetime.fromtimestamp(generation.started_s, tz=UTC).date().isoformat()
            row = sums.setdefault((day, generation.model), dict.fromkeys(("requests", *names), 0))
            row["requests"] += 1
            for name in names:
                row[name] += getattr(generation, name)
        return [{"date": day, "model": model, **row} for (day, model), row in sorted(sums.items())]


def _read_entry(line: str) -> Generation:
    try:
        return Generation(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise ValueError(f"not an entry of the simulated provider's books: {line[:80]!r}") from error
