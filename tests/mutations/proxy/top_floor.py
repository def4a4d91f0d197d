"""Guards of ``proxy/``."""

from tests.mutations.mutation import Mutation

MUTATIONS = (
    Mutation(
        "a revoked key ends its watchers",
        "proxy/cache_drops.py",
        "        self._watchers.doubt(None if key_id ==",
        "        (lambda _: None)(None if key_id ==",
        "tests/proxy/live/test_feed.py::test_who_may_no_longer_watch",
    ),
    Mutation(
        "a stopping worker sends its watchers away",
        "proxy/app.py",
        "    app[RUNTIME].watchers.close()\n",
        "    pass\n",
        "tests/proxy/live/test_feed.py::test_a_stopping_worker_sends_its_watchers_away",
    ),
    Mutation(
        "a revoked key is forgotten at once",
        "proxy/cache_drops.py",
        "        await self._keys.forget(key_id)\n",
        "",
        "tests/proxy/identity/test_key_changes.py",
    ),
    Mutation(
        "the proxy logs in as its role",
        "proxy/lifecycle.py",
        "name=_NAME, role=role, connections_max=most, meters=meters)",
        'name=_NAME, role=None if role == "proxy" else role, connections_max=most, meters=meters)',
        "tests/billing/postgres/test_roles.py",
    ),
)
