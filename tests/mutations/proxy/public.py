"""Guards of ``proxy/public/``."""

from tests.mutations.mutation import Mutation

MUTATIONS = (
    Mutation(
        "money is not shown through a proxy that nobody trusts",
        "proxy/public/metrics_page.py",
        "    if not told and any(name in request.headers for name in _PASSED_ON):\n        return False\n",
        "",
        "tests/proxy/telemetry/test_metrics.py",
    ),
)
