"""How a simulated provider can be told to fail, per provider and path, a number of times or from now on."""

from dataclasses import dataclass
from typing import Literal, get_args

from scripts.sim.payments.currencies import Provider

Kind = Literal["down", "error", "limited", "slow", "lost", "hang", "error_after"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# These let the work be done; only its answer suffers.
AFTER_THE_WORK: frozenset[Kind] = frozenset({"lost", "hang", "error_after"})


@dataclass(slots=True)
class Fault:
    """One fault.

    ``down``: 503; ``error``: 500; ``limited``: 429; ``slow``: the answer after ``delay_s``; and the worst, when the work is
    done: ``lost``: the connection ends without an answer; ``hang``: the same after ``delay_s`` of silence; ``error_after``:
    500. ``times`` counts down; ``None`` means always. ``path`` is a part of the path, ``method`` its verb.
    """

    provider: Provider | None
    kind: Kind
    times: int | None = None
    path: str = ""
    method: str | None = None
    delay_s: float = 0


class Faults:
    """What was told; the first that fits counts."""

    def __init__(self) -> None:
        self._told: list[Fault] = []

    def tell(self, fault: Fault) -> None:
        """Add a fault."""
        self._told.append(fault)

    def clear(self) -> None:
        """Forget all faults."""
        self._told.clear()

    def take(self, provider: Provider, method: str, path: str) -> Fault | None:
        """Return the fault of a request, and count it."""
        for fault in self._told:
            fits = (
                fault.provider in (None, provider) and fault.method in (None, method) and fault.path in path
            )
            if fits and fault.times != 0:
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return None
