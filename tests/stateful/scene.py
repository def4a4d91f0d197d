"""What all examples of the state machine share: servers behind gates, emptied for each example."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any
from uuid import UUID

import asyncpg

from tests.stateful.world import (
    Connections,
)
from tests.support.settings import make_settings
from tests.support.tcp_proxy import TcpProxy

WORKERS = 2
WAIT_S = 30  # for what must happen; nobody waits so long unless it does not


class Scene:
    """What all examples share: a loop, a database and a Redis, each behind a gate, and connections through them.

    Args:
        dsn: of a migrated database, of which everything is deleted.
        redis_url: of a Redis, likewise.
    """

    def __init__(self, runner: asyncio.Runner, dsn: str, redis_url: str) -> None:
        self.runner = runner
        self.dsn = dsn
        self.postgres = TcpProxy(dsn)
        self.redis = TcpProxy(redis_url)
        self._redis_url = redis_url
        self._stack = AsyncExitStack()
        self._tables = ""
        self.connections: list[Connections] = []
        self.audit: Any = None

    async def open(self) -> None:
        self.audit = await asyncpg.connect(self.dsn)
        self._stack.push_async_callback(self.audit.close)
        self._tables = await self.audit.fetchval(
            "SELECT string_agg(relname, ', ') FROM pg_class WHERE relkind IN ('r', 'p') AND NOT relispartition"
            " AND relnamespace = 'public'::regnamespace AND relname NOT IN"
            " ('schema_functions', 'schema_migrations', 'audit_log', 'audit_blocks')"
        )
        for gate in (self.postgres, self.redis):
            await self._stack.enter_async_context(gate)
        configuration = make_settings(
            postgres_dsn=self.postgres.through(self.dsn),
            redis_url=self.redis.through(self._redis_url),
            holds={"lease_s": 600, "renew_s": 60},
            sweep={"worker_lease_s": 600, "review_after_s": 600},
            batch={"open_wait_s": WAIT_S, "settle_delay_ms": 0},
            reconcile={"sample": 10**6, "rows": 10**6},
            quota={"slab_usd": 10**5},
            redis={
                "timeout_s": WAIT_S
            },  # on a busy machine a command that timed out may run all the same, later
        )
        for _ in range(WORKERS):
            self.connections.append(Connections(configuration))
            self._stack.push_async_callback(self.connections[-1].close)

    async def clear(self) -> None:
        """Begin anew, so that an example depends on nothing but its steps."""
        # As nobody but a superuser can: the books refuse it.
        await self.audit.execute(
            f"SET session_replication_role = replica; TRUNCATE {self._tables}; RESET session_replication_role"
        )
        await self.audit.execute(
            "INSERT INTO fx_quotes (id, currency, rate, markup_bps) VALUES ($1, 'USD', 1, 0)", UUID(int=0)
        )
        await self.audit.execute("INSERT INTO provider_quota DEFAULT VALUES")
        await self.audit.execute("INSERT INTO quota_slabs (worker_id) VALUES ($1)", UUID(int=0))
        await self.connections[0].pipe.run("FLUSHALL")

    def open_gates(self) -> None:
        self.postgres.open()
        self.redis.open()

    async def close(self) -> None:
        await self._stack.aclose()
