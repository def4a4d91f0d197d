"""Break each guard on purpose, in a copy, and show that the tests notice.

Run it with ``python -m tests.mutations [NAME …]`` from the checkout's environment. It exits 1 if a mutation survives.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_SKIPPED = (
    ".git",
    ".venv",
    ".tuma",
    "__pycache__",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
)
_TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class Mutation:
    """A guard's text, what replaces it, and the tests that must fail then."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = (
    Mutation(
        "a call is settled once",
        "billing/migrations/0002_posting.sql",
        "AND (c.state = 'open' OR (c.state = 'review' AND e.state <> 'review'))",
        "",
        "tests/billing/test_ledger.py",
    ),
    Mutation(
        "a call is settled once, by the state machine",
        "billing/migrations/0002_posting.sql",
        "AND (c.state = 'open' OR (c.state = 'review' AND e.state <> 'review'))",
        "",
        "tests/stateful",
    ),
    Mutation(
        "a release is lost to a flush",
        "billing/lua/release.lua",
        "if not hold or ARGV[3] == '' then",
        "hold = hold or '0'\nif ARGV[3] == '' then",
        "tests/stateful",
    ),
    Mutation(
        "an exact charge is never raised",
        "billing/corrections.py",
        "charge.charge_nano > before.charge_nano and estimate and self._upward",
        "charge.charge_nano > before.charge_nano",
        "tests/billing/test_corrections.py",
    ),
    Mutation(
        "a correction knows from which figures it was computed",
        "billing/migrations/0003_corrections.sql",
        "OR call.cost_nanousd <> p_seen_cost OR call.charge_nano <> p_seen_charge",
        "",
        "tests/billing/test_corrections.py",
    ),
    Mutation(
        "a transaction balances",
        "billing/migrations/0002_posting.sql",
        "GROUP BY e.tx, e.currency HAVING sum(e.amount) <> 0 LIMIT 1;",
        "GROUP BY e.tx, e.currency HAVING false LIMIT 1;",
        "tests/billing/test_ledger.py",
    ),
    Mutation(
        "Postgres admits last",
        "billing/migrations/0002_posting.sql",
        "WHERE j.decided = 'house' OR (j.decided IS NULL AND j.available_after >= 0)",
        "WHERE j.decided = 'house' OR j.decided IS NULL",
        "tests/billing/test_ledger.py",
    ),
    Mutation(
        "a credit's key is used once",
        "billing/migrations/0002_posting.sql",
        "IF first.tx_id = p_tx THEN",
        "IF true THEN",
        "tests/billing/test_ledger.py",
    ),
    Mutation(
        "the journal is append-only",
        "billing/migrations/0001_core.sql",
        "CREATE TRIGGER journal_entry_append_only BEFORE UPDATE OR DELETE",
        "CREATE TRIGGER journal_entry_append_only BEFORE UPDATE OF seq",
        "tests/billing/test_ledger.py",
    ),
    Mutation(
        "available is checked",
        "billing/lua/reserve.lua",
        "if redis.call('HINCRBY', KEYS[1], 'available', ARGV[4]) < 0 then",
        "if redis.call('HINCRBY', KEYS[1], 'available', ARGV[4]) < -1e18 then",
        "tests/billing/test_holds.py",
    ),
    Mutation(
        "a refusal gives back what it took",
        "billing/lua/reserve.lua",
        "    redis.call('HINCRBY', KEYS[1], 'available', ARGV[3])\n    return reply('insufficient_funds', 0)",
        "    return reply('insufficient_funds', 0)",
        "tests/billing/test_holds.py",
    ),
    Mutation(
        "a repeated reserve holds once",
        "billing/lua/reserve.lua",
        "if state[3] then return reply('granted', 0) end",
        "",
        "tests/billing/test_holds.py",
    ),
    Mutation(
        "a forgotten hold is not given back",
        "billing/lua/release.lua",
        "if not hold or ARGV[3] == '' then",
        "hold = hold or '0'\nif ARGV[3] == '' then",
        "tests/billing/test_holds.py",
    ),
    Mutation(
        "a stale snapshot fills nothing",
        "billing/lua/fill.lua",
        "if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end",
        "",
        "tests/billing/test_holds.py",
    ),
    Mutation(
        "a flush does not free a hold",
        "billing/lua/renew.lua",
        "redis.call('HINCRBY', KEYS[1], 'available', ARGV[4])",
        "redis.call('EXISTS', KEYS[1])",
        "tests/billing/test_holds.py",
    ),
    Mutation(
        "a batch waits for Postgres",
        "billing/batcher.py",
        "except (PostgresUnavailableError, *AWAY, *REPEATABLE) as error:",
        "except ZeroDivisionError as error:",
        "tests/billing/test_ledger.py",
    ),
    Mutation(
        "every way out settles",
        "proxy/chat.py",
        "        answer.conclude()",
        "        pass",
        "tests/proxy/test_relay.py tests/proxy/test_sdk.py",
    ),
    Mutation(
        "the answer's id is noted before its first byte",
        "proxy/answer.py",
        "        if generation_id is None or self.call.generation_id is not None:",
        "        if True:",
        "tests/faults/test_kill.py",
    ),
    Mutation(
        "hanging up stops a stalled stream",
        "proxy/relay.py",
        "            answer.response.close()  # type: ignore[union-attr]  # wakes the read under way",
        "            pass",
        "tests/proxy/test_relay.py",
    ),
    Mutation(
        "no byte before the call is open",
        "proxy/relay.py",
        "        await answer.services.calls.confirm_open(answer.call)",
        "        pass",
        "tests/proxy/test_relay.py tests/faults/test_flush.py",
    ),
    Mutation(
        "the provider is let go before its records are asked",
        "proxy/answer.py",
        "            self._release_connection()  # before its records are asked: it bills until it notices",
        "            pass",
        "tests/proxy/test_relay.py",
    ),
    Mutation(
        "usage is kept from who did not ask",
        "proxy/relay.py",
        "include_usage=answer.ask.include_usage",
        "include_usage=True",
        "tests/proxy/test_sdk.py",
    ),
    Mutation(
        "a model without a price is refused",
        "billing/quoting.py",
        "found = [prices.get_model(name) for name in models]",
        "found = [prices.models.get(name) or next(iter(prices.models.values())) for name in models]",
        "tests/proxy/test_bad_input.py",
    ),
    Mutation(
        "a revoked key is forgotten at once",
        "proxy/services.py",
        '"key": services.keys.forget,',
        '"key": services.fx.load,',
        "tests/proxy/test_bad_input.py",
    ),
    Mutation(
        "the sweeper asks the provider",
        "billing/sweeper.py",
        'generation_id = notes.get("generation_id") or row["generation_id"]',
        "generation_id = None",
        "tests/faults/test_kill.py",
    ),
)


def survives(mutation: Mutation) -> bool:
    """Apply a mutation in a copy and run its tests; True if they all pass all the same.

    Raises:
        ValueError: the guard's text is not where it was: the mutation must follow the code.
    """
    with tempfile.TemporaryDirectory(prefix="tuma-mutation-") as name:
        copy = Path(name) / "tuma"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*_SKIPPED))
        path = copy / mutation.file
        text = path.read_text(encoding="utf-8")
        if text.count(mutation.old) != 1:
            raise ValueError(
                f"{mutation.name}: {mutation.file} has the guard {text.count(mutation.old)} times"
            )
        path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--timeout=60", "-p", "no:cacheprovider"]
        try:
            done = subprocess.run(
                [*command, *mutation.tests.split()],
                cwd=copy,
                capture_output=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0


def main() -> None:
    """Run the mutations named on the command line, or all."""
    wanted = sys.argv[1:]
    survivors = []
    for mutation in MUTATIONS:
        if wanted and not any(word in mutation.name for word in wanted):
            continue
        began = time.monotonic()
        alive = survives(mutation)
        print(
            f"{'SURVIVED' if alive else 'caught  '} {time.monotonic() - began:5.1f} s  {mutation.name}",
            flush=True,
        )
        if alive:
            survivors.append(mutation.name)
    print(f"{len(survivors)} survived")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
