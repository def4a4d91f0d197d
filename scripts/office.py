"""What a command needs of the house: opened for one command, closed after it."""

import contextlib
import os
import pwd
import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from billing.actor import acting
from billing.calls.ledger import Ledger
from billing.errors import PostgresUnavailableError, RedisUnavailableError
from billing.holds.holds import Holds
from billing.ids import new_id
from billing.monitoring.audit import Audit
from billing.postgres.database import Database
from billing.postgres.replica import Late, open_late
from billing.redis.client import RedisWay, make_redis
from billing.wallets.wallets import Wallets
from config.settings import Settings
from proxy.upstream.adapter import Upstream
from proxy.upstream.upstreams import make_upstream


@dataclass(frozen=True, slots=True)
class Office:
    """Connections for one command; each is made when first used."""

    settings: Settings
    database: Database
    late: Late
    pipe: RedisWay
    holds: Holds
    wallets: Wallets
    upstream: Upstream

    async def cool(self, wallet_id: UUID) -> None:
        """Let Redis rebuild a wallet's mirror; should Redis be away, the workers hear of the change from Postgres."""
        await self.cool_user((await self.wallets.get_wallet(wallet_id)).user_id)

    async def cool_user(self, user_id: UUID) -> None:
        """Let Redis rebuild a user's mirror; should Redis be away, the workers hear of the change from Postgres."""
        if not self.settings.redis.url.get_secret_value():
            return
        try:
            await self.holds.cool(user_id)
        except RedisUnavailableError as error:
            print(f"note: {error}; the mirror follows within minutes", file=sys.stderr)


def operator_name() -> str:
    """Return who types the command, for the audit log: the name of the process's user."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container's user may have none
        return str(os.getuid())


async def run_as_operator(office: Office, work: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """Do a command's work as the operator's doing, and seal at once what it left in the audit log."""
    with acting(f"operator:{operator_name()}"):
        result = await work
    if office.database.acted:
        with contextlib.suppress(
            PostgresUnavailableError
        ):  # the work is done; a server seals it, or the next command
            await Audit(office.database).seal()
    return result


@asynccontextmanager
async def open_office(settings: Settings) -> AsyncIterator[Office]:
    """Open the office."""
    database = Database(settings.postgres, name="tuma command")
    late, replica = open_late(database, name="tuma command")
    pipe = make_redis(settings.redis)
    holds = Holds(pipe, settings.holds, Ledger(database, worker_id=new_id()).read_mirror)
    upstream = make_upstream(settings)
    await upstream.start()
    try:
        yield Office(settings, database, late, pipe, holds, Wallets(database), upstream)
    finally:
        await upstream.close()
        await pipe.close()
        await database.close()
        if replica is not None:
            await replica.close()
