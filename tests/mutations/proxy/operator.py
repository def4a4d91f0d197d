"""Guards of ``proxy/operator/``."""

from tests.mutations.mutation import Mutation

MUTATIONS = (
    Mutation(
        "no token is no token",
        "proxy/operator/guard.py",
        "    if not token:",
        "    if False:",
        "tests/proxy/operator/test_admin.py",
    ),
    Mutation(
        "the operator's changes are audited as theirs",
        "proxy/operator/guard.py",
        '    with acting("admin", str(call_id_of(request))):\n        return await handler(request)',
        "    return await handler(request)",
        "tests/proxy/operator/test_admin.py",
    ),
)
