"""Guards of ``billing/reports/``."""

from tests.mutations.mutation import Mutation

MUTATIONS = (
    Mutation(
        "a charge is explained with its markup",
        "billing/reports/explain.py",
        "product = cost * rate * (_BPS + fx.markup_bps)",
        "product = cost * rate * _BPS",
        "tests/billing/reports/test_explain.py",
    ),
    Mutation(
        "a key sees the calls of its own wallet alone",
        "billing/reports/call_view.py",
        "WHERE c.id = $1 AND c.wallet_id = $2",
        "WHERE c.id = $1 AND $2::uuid IS NOT NULL",
        "tests/billing/reports/test_explain.py",
    ),
    Mutation(
        "a moment that cuts a quarter of an hour is refused",
        "billing/reports/usage.py",
        "    if bound.timestamp() % _QUARTER_S:\n",
        "    if False:\n",
        "tests/billing/reports/test_usage.py",
    ),
    Mutation(
        "a filtered page has the balance of all",
        "billing/reports/statement.py",
        "FROM journal_entry e WHERE e.wallet_id = $1 AND e.tx_id >= (SELECT",
        "FROM page e WHERE e.tx_id >= (SELECT",
        "tests/proxy/account/test_transactions.py",
    ),
    Mutation(
        "the pages of a file continue the balance",
        "billing/reports/statement.py",
        "page, balance_nano = [], last.balance_nano - last.amount_nano",
        "page, balance_nano = [], last.balance_nano",
        "tests/proxy/account/test_transactions.py",
    ),
    Mutation(
        "a month is of its owner's clock",
        "billing/reports/statement.py",
        'bounds_of(month, zone or "UTC")',
        'bounds_of(month, "Pacific/Midway")',
        "tests/proxy/account/test_transactions.py",
    ),
    Mutation(
        "nobody changes what a call cost without the sums",
        "billing/reports/usage.sql",
        "    IF current_setting('tuma.usage_kept', true) IS DISTINCT FROM 'yes' THEN",
        "    IF false THEN",
        "tests/billing/reports/test_usage_sums.py",
    ),
    Mutation(
        "usage is summed by quarters of an hour",
        "billing/reports/usage.sql",
        "::bigint / 900000 * 900)",
        "::bigint / 3600000 * 3600)",
        "tests/billing/reports/test_usage.py",
    ),
)
