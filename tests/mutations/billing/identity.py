"""Guards of ``billing/identity/``."""

from tests.mutations.mutation import Mutation

MUTATIONS = (
    Mutation(
        "a refresh of callers brings nobody back who was dropped meanwhile",
        "billing/identity/caller_cache.py",
        "        elif not any(meant is None or meant(found.caller) for meant in dropped):",
        "        else:",
        "tests/unit/identity/test_caller_cache.py",
    ),
    Mutation(
        "a bound key manages nothing",
        "billing/identity/keys.py",
        "not rules.bound if rules.manages is None else rules.manages,",
        "True,",
        "tests/proxy/account/test_keys.py",
    ),
    Mutation(
        "a key makes keys of its own wallet only",
        "billing/identity/keys.py",
        "if owner is not None and owner.wallet_id not in (None, wallet_id):",
        "if False:",
        "tests/proxy/account/test_keys.py",
    ),
    Mutation(
        "a key expires though it is cached",
        "billing/identity/caller_cache.py",
        "        return None if known.ends <= time.monotonic() else known.caller",
        "        return known.caller",
        "tests/proxy/account/test_keys.py",
    ),
    Mutation(
        "a lookup that a change overtook is not kept",
        "billing/identity/caller_cache.py",
        "            if changes == self._changes:\n",
        "            if True:\n",
        "tests/proxy/account/test_keys.py",
    ),
    Mutation(
        "the cache is the fallback of a revocation",
        "billing/identity/caller_cache.py",
        "        if known is None or known.until <= time.monotonic():",
        "        if known is None:",
        "tests/faults/test_revocation.py",
    ),
)
