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
    Mutation(
        "one caller is not different callers",
        "billing/provider/refusals.py",
        "return len(callers) >= CALLERS_MIN and len(models) >= MODELS_MIN",
        "return len(alike) >= CALLERS_MIN",
        "tests/billing/provider/test_refusals.py",
    ),
    Mutation(
        "one model is not different models",
        "billing/provider/refusals.py",
        "len(callers) >= CALLERS_MIN and len(models) >= MODELS_MIN",
        "len(callers) >= CALLERS_MIN",
        "tests/billing/provider/test_refusals.py",
    ),
    Mutation(
        "a record of an account in order stops nobody",
        "billing/provider/refusals.py",
        '        if standing != "unknown":\n            return standing == "refused"\n',
        '        if standing == "refused":\n            return True\n',
        "tests/billing/provider/test_refusals.py",
    ),
    Mutation(
        "a call that is served clears the account",
        "billing/provider/quota.py",
        "        if self._pause is None:\n            self._judge.served()\n",
        "        if self._pause is None:\n            pass\n",
        "tests/billing/provider/test_refusals.py",
    ),
    Mutation(
        "who tried last in vain leaves the next try to others",
        "billing/provider/quota.py",
        "        if user_id == self._tried_by and",
        "        if False and user_id == self._tried_by and",
        "tests/billing/provider/test_refusals.py",
    ),
    Mutation(
        "a record that is wrong about the key is believed once",
        "billing/provider/refusals.py",
        "            self._key_record_is_wrong = True",
        "            pass",
        "tests/billing/provider/test_refusals.py",
    ),
    Mutation(
        "calls that are refused in a row are told of",
        "billing/provider/quota.py",
        "                await self._tell_refusals(refusal.reason)",
        "                pass",
        "tests/billing/provider/test_refusals.py",
    ),
    Mutation(
        "one caller does not make us ask for every call",
        "billing/provider/refusals.py",
        "        if time.monotonic() - at_s >= _BELIEVED_S:",
        "        if True:",
        "tests/billing/provider/test_refusals.py",
    ),
)
