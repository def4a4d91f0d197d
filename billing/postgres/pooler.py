"""Whether what needs a session has one: a pooler that lends connections for one transaction keeps none.

``LISTEN`` behind such a pooler is heard by nobody, and a lock is another's a moment later: neither says so. So a process asks
before it serves.
"""

import asyncio
from typing import Any

from billing.errors import InputError
from billing.ids import new_id
from billing.postgres.database import Database

_CLOSE_S = 5.0


async def require_sessions(database: Database, *, wait_s: float) -> str:
    """Refuse to run where a notice does not arrive, or arrives from another database than the one that is written to.

    Nothing is asked of a server that answers itself: the process that answers is then the one that let us in.

    Args:
        database: by any role.
        wait_s: for a notice to arrive.

    Returns:
        what was found, in words.

    Raises:
        InputError: a session is lost on the way; says which setting mends it.
        PostgresUnavailableError: Postgres is away.
    """
    settings = database.settings
    alone = await database.connect_alone()
    try:
        itself = await alone.fetchval("SELECT pg_backend_pid()") == alone.get_server_pid()
        if itself and not settings.direct_dsn.get_secret_value():
            return "no pooler"
        if not await _hears(database, alone, wait_s):
            raise InputError(_remedy(pooled=settings.pooler != "none"))
    finally:
        await alone.close(timeout=_CLOSE_S)
    if settings.pooler == "none":
        return "sessions of its own"
    return "connections for one transaction, and sessions past the pooler"


async def _hears(database: Database, alone: Any, wait_s: float) -> bool:
    """Whether a connection of one's own hears what another says while it waits."""
    heard = asyncio.Event()
    channel = f"tuma_{new_id().hex}"
    await alone.add_listener(channel, lambda *_: heard.set())
    async with database.connection() as connection:
        await connection.execute(f"NOTIFY {channel}")
    try:
        async with asyncio.timeout(wait_s):
            await heard.wait()
    except TimeoutError:
        return False
    return True


def _remedy(*, pooled: bool) -> str:
    if pooled:
        return (
            "TUMA_POSTGRES__DIRECT_DSN does not lead past the pooler to the database of TUMA_POSTGRES__DSN: what is said"
            " in one is not heard in the other"
        )
    return (
        "TUMA_POSTGRES__DSN leads to a pooler that lends connections for one transaction: set"
        " TUMA_POSTGRES__POOLER=transaction, and TUMA_POSTGRES__DIRECT_DSN to the server itself"
    )
