"""What a command needs of the house: opened for one command, closed after it."""

import os
import pwd
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from uuid import UUID

from billing.db import Database
from billing.errors import RedisUnavailableError
from billing.holds import Holds
from billing.ids import new_id
from billing.ledger import Ledger
from billing.redis_pipe import RedisPipe
from billing.wallets import Wallets
from config.settings import Settings
from proxy.services import make_upstream
from proxy.upstream.adapter import Upstream


@dataclass(frozen=True, slots=True)
class Office:
    """Connections for one command; each is made when first used."""

    settings: Settings
    database: Database
    pipe: RedisPipe
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


@asynccontextmanager
async def open_office(settings: Settings) -> AsyncIterator[Office]:
    """Open the office."""
    database = Database(settings.postgres, name="tuma command")
    pipe = RedisPipe(settings.redis)
    holds = Holds(pipe, settings.holds, Ledger(database, worker_id=new_id()).read_mirror)
    upstream = make_upstream(settings)
    await upstream.start()
    try:
        yield Office(settings, database, pipe, holds, Wallets(database), upstream)
    finally:
        await upstream.close()
        await pipe.close()
        await database.close()
