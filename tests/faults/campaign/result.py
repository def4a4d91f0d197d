"""What a campaign did and found."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Result:
    """What a campaign did and found; ``violations`` are broken promises, in words."""

    seed: int
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    differences: Counter[str] = field(default_factory=Counter)
    billed_usd: str = ""
    house_loss_usd: str = ""
    lost_with_both: int = 0  # answered calls that are void because Redis and their worker were lost together
    drift_usd: str = ""
    lowest_balance: str = ""
    violations: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return everything by name."""
        return {name: getattr(self, name) for name in self.__slots__}

    def __str__(self) -> str:
        kills = sum(self.faults[name] for name in ("kill_worker", "kill_master"))
        stops = sum(
            self.faults[name] for name in ("kill_redis", "restart_redis", "fail_over_redis", "kill_postgres")
        )
        rows = [
            ("seed", str(self.seed)),
            ("seconds", f"{self.seconds:.0f}"),
            (
                "faults",
                f"{sum(self.faults.values())}: {kills} kills, {self.faults['flush']} flushes, {stops} servers stopped",
            ),
            *((f"  {name}", str(count)) for name, count in sorted(self.faults.items())),
            ("calls made", str(sum(self.answers.values()))),
            *((f"  {name}", str(count)) for name, count in sorted(self.answers.items())),
            ("calls ended", str(sum(self.ended.values()))),
            *((f"  {name}", str(count)) for name, count in sorted(self.ended.items())),
            ("differences", str(sum(self.differences.values()))),
            *((f"  {name}", str(count)) for name, count in sorted(self.differences.items())),
            ("billed, USD", self.billed_usd),
            ("house loss, USD", self.house_loss_usd),
            ("void by double fault", str(self.lost_with_both)),
            ("lowest balance", self.lowest_balance),
            ("drift, USD", self.drift_usd),
            ("violations", str(len(self.violations))),
            *(("  !", text) for text in self.violations),
        ]
        return "\n".join(f"{name:<22} {value}" for name, value in rows)
