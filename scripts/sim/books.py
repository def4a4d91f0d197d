"""The simulated provider's own books: what it billed, per generation, in integer nano-USD."""

import asyncio
import json
import os
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

NANO = 10**9


@dataclass(frozen=True, slots=True)
class SimModel:
    """A model and its prices: nano-USD per million tokens (so USD 0.15 per million is 150,000,000)."""

    id: str
    name: str
    prompt: int
    completion: int
    cached: int | None = None
    context_tokens: int = 128_000
    completion_tokens_max: int = 16_384

    def cost_nanousd(self, *, prompt: int, cached: int, completion: int) -> int:
        """Return the cost of an answer, rounded up once."""
        cached_price = self.prompt if self.cached is None else self.cached
        millionths = (prompt - cached) * self.prompt + cached * cached_price + completion * self.completion
        return -(-millionths // 1_000_000)


def usd(nanousd: int) -> str:
    """Write nano-USD as a JSON number, exactly, in plain notation."""
    whole, fraction = divmod(nanousd, NANO)
    text = f"{whole}.{fraction:09d}".rstrip("0")
    return text + "0" if text.endswith(".") else text


@dataclass(slots=True)
class Generation:
    """One answer: open while it is generated, then billed, once."""

    id: str
    model: str
    streamed: bool
    started_s: float
    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cost_nanousd: int = 0
    cancelled: bool = False
    finish_reason: str | None = None
    ended_s: float | None = None
    request_id: str | None = None
    delay_s: float = 0
    missing: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return the entry as the books list it."""
        return asdict(self)


@dataclass(slots=True)
class Books:
    """Every generation, optionally kept in a file that survives a kill.

    Args:
        path: an append-only file of JSON lines; its torn last line, if any, is ignored.
    """

    path: Path | None = None
    generations: dict[str, Generation] = field(default_factory=dict)
    total_nanousd: int = 0
    _file: TextIO | None = None

    def load(self) -> None:
        """Read what an earlier run billed, and go on writing behind it."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    generation = Generation(**json.loads(line))
                except (ValueError, TypeError):
                    continue
                self.generations[generation.id] = generation
                self.total_nanousd += generation.cost_nanousd
        self._file = self.path.open("a", encoding="utf-8")
        if self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n"):
            self._file.write("\n")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def begin(self, model: str, *, streamed: bool, prompt_tokens: int, request_id: str | None) -> Generation:
        """Open a generation."""
        now = time.time()
        generation = Generation(f"gen-{int(now)}-{os.urandom(8).hex()}", model, streamed, now, prompt_tokens)
        generation.request_id = request_id
        self.generations[generation.id] = generation
        return generation

    def bill(
        self, generation: Generation, model: SimModel, *, cancelled: bool, finish_reason: str | None
    ) -> None:
        """End a generation and bill it; a second time changes nothing."""
        if generation.ended_s is not None:
            return
        generation.ended_s = time.time()
        generation.cancelled = cancelled
        generation.finish_reason = finish_reason
        generation.cost_nanousd = model.cost_nanousd(
            prompt=generation.prompt_tokens,
            cached=generation.cached_tokens,
            completion=generation.completion_tokens,
        )
        self.total_nanousd += generation.cost_nanousd
        if self._file is not None:
            self._file.write(json.dumps(generation.as_json()) + "\n")
            self._file.flush()

    def find_record(self, generation_id: str) -> Generation | None:
        """Return a generation as ``/generation`` shows it: ended, not hidden, and old enough."""
        found = self.generations.get(generation_id)
        if (
            found is None
            or found.ended_s is None
            or found.missing
            or time.time() < found.ended_s + found.delay_s
        ):
            return None
        return found

    @property
    def open_count(self) -> int:
        """How many generations are running."""
        return sum(generation.ended_s is None for generation in self.generations.values())

    async def wait_quiet(self, *, timeout_s: float = 10) -> None:
        """Wait until nothing is running.

        Raises:
            TimeoutError: something still is.
        """
        async with asyncio.timeout(timeout_s):
            while self.open_count:
                await asyncio.sleep(0.01)

    def activity(self) -> list[dict[str, Any]]:
        """Return what was billed per day and model, as ``/activity`` lists it; ``usage`` in nano-USD."""
        rows: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for generation in self.generations.values():
            if generation.ended_s is None:
                continue
            day = datetime.fromtimestamp(generation.started_s, tz=UTC).date().isoformat()
            row = rows[day, generation.model]
            row["requests"] += 1
            row["prompt_tokens"] += generation.prompt_tokens
            row["completion_tokens"] += generation.completion_tokens
            row["usage"] += generation.cost_nanousd
        return [{"date": day, "model": model, **row} for (day, model), row in sorted(rows.items())]
