"""The books, asked on a quiet system."""

from billing.books.proof import Books, Check
from scripts.office import Office


async def check_books(office: Office) -> dict[str, Check]:
    """Assert I1 to I8 on a quiet system; return what the checks say."""
    checks = await Books(office.database, office.holds, office.upstream, sweep_grace_s=5).check()
    assert {name: check.detail for name, check in checks.items() if not check.ok} == {}
    async with office.database.connection() as connection:
        live = await connection.fetchval("SELECT count(*) FROM calls WHERE state = 'open'")
        held = await connection.fetchval("SELECT coalesce(sum(held_nano), 0) FROM wallets")
    assert live == 0
    assert held == 0
    assert await office.holds.find_leases(expired=False, limit=10) == []
    return checks
