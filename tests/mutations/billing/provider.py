"""Guards of ``billing/provider/``."""

from tests.mutations.mutation import Mutation

MUTATIONS = (
    Mutation(
        "a hold is taken from the slab",
        "billing/provider/quota.py",
        "        self._free_nanousd -= nanousd\n        self._held",
        "        self._held",
        "tests/billing/provider/test_quota.py tests/proxy/upstream/test_provider_quota.py",
    ),
    Mutation(
        "one call at a time finds out",
        "billing/provider/quota.py",
        "if left_s > 0 or self._trying is not None:",
        "if left_s > 0:",
        "tests/billing/provider/test_quota.py",
    ),
)
