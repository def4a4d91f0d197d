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
    Mutation(
        "webhooks that nobody signed have a rate",
        "proxy/public/webhooks.py",
        "        await services.unsigned.count(network)\n",
        "",
        "tests/proxy/account/test_rates.py::test_webhooks_that_nobody_signed",
    ),
    Mutation(
        "a burst of refused webhooks is one line",
        "proxy/public/webhooks.py",
        "        if now < told_s + self._pause_s:\n",
        "        if False:\n",
        "tests/proxy/account/test_rates.py::test_webhooks_that_nobody_signed",
    ),
)
