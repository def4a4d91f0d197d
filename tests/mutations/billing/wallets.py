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
)
