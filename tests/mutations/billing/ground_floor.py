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
    Mutation(
        "threads take turns between owners",
        "billing/threads.py",
        "            if time.perf_counter() >= until:\n                return False, None\n",
        "",
        "tests/unit/test_threads.py",
    ),
    Mutation(
        "whose turn it was is last in the next round",
        "billing/threads.py",
        "owner, jobs = self._waiting.popitem(last=False)",
        "owner, jobs = self._waiting.popitem()",
        "tests/unit/test_threads.py",
    ),
    Mutation(
        "work that nobody wants is dropped",
        "billing/threads.py",
        "if job.wanted is not None and not job.wanted():",
        "if False:",
        "tests/unit/test_threads.py",
    ),
)
