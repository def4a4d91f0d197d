"""What the provider had billed before our first call: the zero from which I8 counts."""

from billing.db import Database
from billing.ids import new_id
from billing.money import attousd_from_decimal, nanousd_from_attousd
from billing.provider import Provider


async def record_opening(database: Database, provider: Provider) -> None:
    """Record the provider's total once, before anything was sent to it; later calls change nothing.

    Raises:
        ProviderUnavailableError: it cannot be asked; ask again before the first call.
        PostgresUnavailableError: Postgres is away.
    """
    async with database.connection() as connection:
        if await connection.fetchval("SELECT 1 FROM shadow_usd_ledger LIMIT 1"):
            return  # recorded, or too late to tell our own usage from what was before
        total_usd = await provider.find_total_usd()
        if total_usd is None:
            return
        await connection.execute(
            "INSERT INTO shadow_usd_ledger (id, kind, amount_nanousd, memo) VALUES ($1, 'opening', $2, $3)"
            " ON CONFLICT (kind) WHERE kind = 'opening' DO NOTHING",
            new_id(),
            nanousd_from_attousd(attousd_from_decimal(total_usd)),
            "what the provider had billed before our first call",
        )
