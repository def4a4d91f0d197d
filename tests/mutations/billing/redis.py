"""Guards of ``billing/redis/``."""

from tests.mutations.mutation import Mutation

MUTATIONS = (
    Mutation(
        "a command of unknown fate is not sent again",
        "billing/redis/cluster.py",
        "            self._suspect(pipe.node)\n            raise\n\n    async def _follow",
        "            self._suspect(pipe.node)\n            return await pipe.send(command, script)\n\n    async def _follow",
        "tests/unit/redis/test_cluster.py",
    ),
    Mutation(
        "a lost node's successor is looked for",
        "billing/redis/cluster.py",
        "            self._suspect(pipe.node)\n            raise\n\n    async def _follow",
        "            raise\n\n    async def _follow",
        "tests/unit/redis/test_cluster.py",
    ),
    Mutation(
        "redirects end",
        "billing/redis/cluster.py",
        "for _ in range(self._settings.redirects_max):",
        "for _ in range(10**3):",
        "tests/unit/redis/test_cluster.py",
    ),
    Mutation(
        "ASKING goes before what is asked",
        "billing/redis/cluster.py",
        "            return await self._submit(asking, Command(words))",
        "            asking.answer.set_result(None)\n            return await self._submit(Command(words))",
        "tests/unit/redis/test_cluster.py",
    ),
    Mutation(
        "a connection to what is no primary is dropped",
        "billing/redis/pipeline.py",
        "if self._link is not None and _is_of_another_time(reply):",
        "if False:",
        "tests/billing/holds/test_holds.py",
    ),
    Mutation(
        "a connection that was cut is not used",
        "billing/redis/connection.py",
        '        self._lose(exc or RedisConnectionError("the server closed the connection"))',
        "        pass",
        "tests/billing/holds/test_holds.py",
    ),
    Mutation(
        "a Redis that does not answer is given up",
        "billing/redis/connection.py",
        "        if left_s <= 0:",
        "        if False:",
        "tests/billing/holds/test_holds.py",
    ),
    Mutation(
        "the name in Redis' certificate is checked",
        "billing/redis/pipeline.py",
        '"ssl_check_hostname": True',
        '"ssl_check_hostname": False',
        "tests/billing/postgres/test_tls.py",
    ),
)
