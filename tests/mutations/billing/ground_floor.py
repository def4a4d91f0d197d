"""Guards of ``billing/``."""

from tests.mutations.mutation import Mutation

MUTATIONS = (
    Mutation(
        "models beyond the bound share a label",
        "billing/meters.py",
        "        if len(self._models) >= self._models_max:\n            return OTHER\n",
        "",
        "tests/proxy/telemetry/test_metrics.py",
    ),
    Mutation(
        "a task of the house is not its starter's doing",
        "billing/tasks.py",
        "name=name, context=copy_context_of_house()",
        "name=name",
        "tests/billing/monitoring/test_audited_changes.py",
    ),
)
