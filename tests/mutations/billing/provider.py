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
    Mutation(
        "the quota is not exceeded",
        "billing/provider/quota.sql",
        "    IF given > free THEN\n        given := 0;\n        RETURN;\n    END IF;\n",
        "",
        "tests/billing/provider/test_quota.py",
    ),
    Mutation(
        "one lease at a time",
        "billing/provider/quota.sql",
        "FROM provider_quota q FOR UPDATE; --",
        "FROM provider_quota q; --",
        "tests/billing/provider/test_quota.py",
    ),
    Mutation(
        "a dead worker's slab is returned when its calls have ended",
        "billing/provider/quota.sql",
        "          AND NOT EXISTS (SELECT 1 FROM calls c WHERE c.state IN ('open', 'review') AND c.worker_id = w.id)\n",
        "",
        "tests/billing/provider/test_quota.py",
    ),
)
