"""Guards of ``billing/wallets/``."""

from tests.mutations.mutation import Mutation

MUTATIONS = (
    Mutation(
        "another wallet's event is none to go on from",
        "billing/wallets/feed.py",
        " and match[1] == wallet_id.hex[-8:] else 0",
        " else 0",
        "tests/proxy/live/test_feed.py::test_a_gap_is_told",
    ),
    Mutation(
        "who comes waits for a transaction that found the wallet unwatched",
        "billing/wallets/feed.sql",
        "        ORDER BY w.id FOR NO KEY UPDATE OF w\n",
        "        ORDER BY w.id\n",
        "tests/proxy/live/test_feed.py::test_who_comes_while_a_transaction_is_under_way",
    ),
    Mutation(
        "after a time unwatched the numbers jump",
        "billing/wallets/feed.sql",
        "                       THEN f.seq ELSE greatest(f.seq + 1, excluded.seq) END,",
        "                       THEN f.seq ELSE f.seq END,",
        "tests/proxy/live/test_feed.py::test_a_gap_is_told",
    ),
    Mutation(
        "a wallet's alerts are its owner's to set",
        "billing/wallets/wallets.sql",
        "WHERE w.id = p_wallet AND w.user_id = require_person();",
        "WHERE w.id = p_wallet AND require_person() IS NOT NULL;",
        "tests/proxy/outbound/test_alerts.py",
    ),
    Mutation(
        "a credit's key is used once, by the state machine",
        "billing/wallets/wallets.sql",
        "IF first.tx_id = p_tx THEN",
        "IF true THEN",
        "tests/stateful/test_books.py",
    ),
    Mutation(
        "a credit's key is used once, whoever crashed",
        "billing/wallets/wallets.sql",
        "IF first.tx_id = p_tx THEN",
        "IF true THEN",
        "tests/stateful/test_crashes.py",
    ),
    Mutation(
        "a credit's key is used once",
        "billing/wallets/wallets.sql",
        "IF first.tx_id = p_tx THEN",
        "IF true THEN",
        "tests/billing/calls/test_ledger.py",
    ),
    Mutation(
        "clocks that show midnight twice",
        "billing/wallets/clock.sql",
        "CASE WHEN early.at AT TIME ZONE p_zone = p_local THEN least(early.at, late.at) ELSE late.at END",
        "late.at",
        "tests/billing/wallets/test_cap_windows.py",
    ),
    Mutation(
        "caps are locked with all of the user's wallets",
        "billing/wallets/caps.sql",
        "    PERFORM 1 FROM wallets w WHERE w.user_id = p_user ORDER BY w.id FOR NO KEY UPDATE;\n",
        "",
        "tests/billing/wallets/test_cap_changes.py",
    ),
    Mutation(
        "a threshold is told once",
        "billing/wallets/caps.sql",
        "AND cap_percent(w.spent_nano, s.effective_nano) > w.warned\n",
        "AND cap_percent(w.spent_nano, s.effective_nano) > 0\n",
        "tests/billing/wallets/test_cap_windows.py",
    ),
    Mutation(
        "a wallet made after the cap is capped",
        "billing/wallets/caps.sql",
        "    NEW.capped := EXISTS (",
        "    NEW.capped := false AND EXISTS (",
        "tests/billing/wallets/test_cap_refusals.py",
    ),
    Mutation(
        "own caps are of one's own wallet",
        "billing/wallets/caps.sql",
        "WHERE w.user_id = require_person() AND p_scope IN",
        "WHERE require_person() IS NOT NULL AND p_scope IN",
        "tests/billing/postgres/test_own_rows.py",
    ),
    Mutation(
        "no wallet is fuller than can be added up",
        "billing/wallets/wallets.py",
        "    if wallet.posted_nano + wallet.overdraft_nano > SUM_MAX_NANO:\n",
        "    if False:\n",
        "tests/proxy/call/odd/test_odd_figures.py::test_no_wallet_is_fuller_than_can_be_added_up",
    ),
)
