"""What the provider had billed before our first call: the zero from which I8 counts."""

from billing.errors import ProviderUnavailableError
from billing.money import attousd_from_decimal, nanousd_from_attousd
from billing.postgres.database import Database
from billing.provider.records import Provider


async def record_openings(database: Database, provider: Provider) -> None:
    """Record each of the provider's totals once, before anything was sent to it; later calls change nothing.

    A total that becomes known later (a management key given to a running house) begins where our own books stand.

    Raises:
        ProviderUnavailableError: it cannot be asked; ask again before the first call.
        PostgresUnavailableError: Postgres is away.
    """
    async with database.connection() as connection:
        known = {row["source"] for row in await connection.fetch("SELECT source FROM provider_openings")}
        consumed = int(await connection.fetchval("SELECT sum(spent_nanousd) FROM quota_slabs"))
        if consumed and not known:
            return  # too late to tell our own usage from what was before
        for source, total_usd in (await provider.find_totals_usd()).items():
            if isinstance(total_usd, ProviderUnavailableError):
                raise total_usd
            if source not in known:
                await connection.execute(
                    "INSERT INTO provider_openings (source, total_nanousd) VALUES ($1, $2) ON CONFLICT (source) DO NOTHING",
                    source,
                    nanousd_from_attousd(attousd_from_decimal(total_usd)) - consumed,
                )
