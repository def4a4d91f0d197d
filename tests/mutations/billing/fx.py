"""Guards of ``billing/fx/``."""

from tests.mutations.mutation import Mutation

MUTATIONS = (
    Mutation(
        "a stale rate prices no new call",
        "billing/fx/book.py",
        "if current.stale_at is not None and self._monotonic() >= current.stale_at:",
        "if current.stale_at is None and self._monotonic() < 0:",
        "tests/billing/fx/test_book.py",
    ),
    Mutation(
        "a stale rate prices no new call, over a socket",
        "billing/fx/book.py",
        "if current.stale_at is not None and self._monotonic() >= current.stale_at:",
        "if current.stale_at is None and self._monotonic() < 0:",
        "tests/proxy/outbound/test_fx.py",
    ),
    Mutation(
        "a rate that jumps is held",
        "billing/fx/rates.py",
        "if current is not None and not within(rate, current, bps=jump_bps):",
        "if current is None and not within(rate, rate, bps=jump_bps):",
        "tests/billing/fx/test_book.py",
    ),
    Mutation(
        "two rates must agree",
        "billing/fx/rates.py",
        "if witness is not None and not within(rate, witness, bps=band_bps):",
        "if witness is not None and not within(rate, rate, bps=band_bps):",
        "tests/billing/fx/test_book.py",
    ),
    Mutation(
        "one rate without its witness is not quoted",
        "billing/fx/rates.py",
        "if two_sources and witness is None:",
        "if two_sources and witness is None and current is None:",
        "tests/billing/fx/test_book.py",
    ),
    Mutation(
        "a held rate does not keep the old one fresh",
        "billing/fx/sync.py",
        "                report.held.append(currency)",
        '                report.held.append(currency)\n                await connection.execute("SELECT confirm_fx($1)", currency)',
        "tests/billing/fx/test_book.py",
    ),
    Mutation(
        "a pinned rate stays",
        "billing/fx/sync.py",
        'if current is not None and current["pinned"]:',
        'if current is not None and current["pinned"] is None:',
        "tests/billing/fx/test_book.py",
    ),
    Mutation(
        "the rate that is accepted is the one that was seen",
        "billing/fx/book.py",
        'if expected is not None and waiting["rate"] != expected:',
        'if expected is not None and waiting["rate"] is None:',
        "tests/billing/fx/test_book.py",
    ),
    Mutation(
        "a cross rate is rounded once",
        "billing/fx/rates.py",
        "return round_rate(Fraction(quote) / Fraction(base))",
        "return round_rate(Fraction(quote) * Fraction(round_rate(1 / Fraction(base))))",
        "tests/unit/fx/test_rates.py",
    ),
    Mutation(
        "who quotes rates does so alone",
        "billing/fx/book.sql",
        'SELECT pg_advisory_xact_lock(1719169396) -- "fxrt"',
        "SELECT",
        "tests/billing/fx/test_book.py",
    ),
)
