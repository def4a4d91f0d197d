"""Guards of ``billing/books/``."""

from tests.mutations.mutation import Mutation

MUTATIONS = (
    Mutation(
        "nothing is booked that a record which is away might explain",
        "billing/books/reconcile.py",
        ' or away.keys() - {"credits"}:',
        ":",
        "tests/billing/books/test_reconcile.py",
    ),
    Mutation(
        "the account's total does not stand in for the key's",
        "billing/books/totals.py",
        '    if "key" in away:\n        raise ProviderUnavailableError(away["key"])\n',
        "",
        "tests/billing/books/test_reconcile.py",
    ),
    Mutation(
        "a reconciliation says which record did not answer",
        "billing/books/reconcile.py",
        '            away["activity"] = str(error)\n',
        "",
        "tests/billing/books/test_reconcile.py",
    ),
    Mutation(
        "a day whose usage is wrong is not proved",
        "billing/books/proved_days.py",
        "    if differences:\n",
        "    if False:\n",
        "tests/billing/reports/test_usage_sums.py",
    ),
    Mutation(
        "old calls that were corrected are compared with the sums again",
        "billing/books/usage_proof.py",
        "t.kind IN ('correction', 'refund')",
        "t.kind IN ('correction')",
        "tests/billing/reports/test_usage_sums.py",
    ),
    Mutation(
        "old calls that were settled late are compared with the sums",
        "billing/books/usage_proof.py",
        "        UNION ALL SELECT l.tx_id FROM late_postings l WHERE l.tx_id < $1 AND l.created_at >= uuid_moment($1))",
        "        )",
        "tests/billing/reports/test_usage_sums.py",
    ),
    Mutation(
        "a day is proved only if it balances",
        "billing/books/proved_days.py",
        "    if off is not None:",
        "    if off is not None and False:",
        "tests/billing/books/test_proved_days.py",
    ),
    Mutation(
        "one reconciliation at a time",
        "billing/books/reconcile.py",
        'while not await lock.fetchval("SELECT pg_try_advisory_lock($1)", _LOCK):',
        'while not await lock.fetchval("SELECT $1 > 0", _LOCK):',
        "tests/billing/books/test_reconcile.py",
    ),
    Mutation(
        "a loss is booked when nothing is in flight",
        "billing/books/reconcile.py",
        "        if not totals.is_quiet:",
        "        if False:",
        "tests/billing/books/test_reconcile.py",
    ),
    Mutation(
        "a loss is not counted twice",
        "billing/books/reconcile.py",
        "        if twice:",
        "        if False:",
        "tests/billing/calls/test_sweeper.py",
    ),
    Mutation(
        "a proof waits for postings under way",
        "billing/books/proved_days.sql",
        '    PERFORM pg_advisory_xact_lock_shared(1684109683); -- "days"\n',
        "",
        "tests/billing/books/test_proved_days.py",
    ),
    Mutation(
        "one wallet that cannot be added up stops no proof",
        "billing/books/proof.py",
        '"SELECT id, user_id, posted_nano::numeric + overdraft_nano - held_nano AS available, held_nano FROM wallets"',
        '"SELECT id, user_id, posted_nano + overdraft_nano - held_nano AS available, held_nano FROM wallets"',
        "tests/proxy/call/odd/test_odd_figures.py::test_no_wallet_is_fuller_than_can_be_added_up",
    ),
)
