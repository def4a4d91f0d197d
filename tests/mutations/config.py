"""Guards of ``config/``."""

from tests.mutations.mutation import Mutation

MUTATIONS = (
    Mutation(
        "log lines are redacted",
        "config/logging.py",
        "        return redact(line)",
        "        return line",
        "tests/proxy/test_secrets.py",
    ),
    Mutation(
        "a pooler needs a way past it",
        "config/settings.py",
        '        if self.pooler != "none" and not self.direct_dsn',
        '        if self.pooler == "" and not self.direct_dsn',
        "tests/faults/test_pooler.py::test_a_pooler_needs_a_way_past_it",
    ),
    Mutation(
        "usual limits bound a user's calls in flight",
        "config/settings.py",
        "    user_calls_in_flight: Bound = 100\n",
        "    user_calls_in_flight: Bound = 0\n",
        "tests/proxy/account/test_rates.py",
    ),
)
