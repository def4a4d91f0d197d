"""Fill an empty database with wallets, their keys, and millions of ended calls, as if a house had run for forty days.

Everything is there that the books keep of a call: its row, its usage, its transaction, the shadow ledger's batch, the sums
of usage; so I1 to I8 hold afterwards as they did before. Triggers are off meanwhile, and the big tables' indexes are made
at the end; that is what makes it quick. For a database of one's own that nobody else uses, as its superuser.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from uuid import UUID

import asyncpg

from billing.identity.key_secret import digest_secret, hint_of, make_secret, name_pepper
from billing.ids import id_floor
from billing.money import NANO

DAYS = 40
TABLES = ("calls", "usage", "journal_tx", "journal_entry")
_PER_STEP = 100_000
_SUMMED_TOGETHER = 1_000  # calls
_RUN = 10  # calls of a wallet in a row, as people make them
_BATCH = 100  # calls of one row of the shadow ledger
_STRIDE = 7919  # a prime: from one run to the next, so that neighbours in time are none in the indexes
_GRANT = 1_000_000  # of the wallet's currency
_COST = "(20000 + i % 9000)"
_STATEMENT_S = 3600.0
_MEMORY = "1GB"  # for making indexes
_CONNECTIONS = max(os.cpu_count() or 1, 2)
_NOBODY = "'00000000-0000-0000-0000-000000000000'::uuid"
_ID = """(lpad(to_hex(({first} + (i * {step})::bigint)), 12, '0') || '7' || substr(md5({salt} || i), 1, 3)
          || '8' || substr(md5({salt} || i), 4, 15))::uuid"""


@dataclass(frozen=True, slots=True)
class History:
    """What a database is filled with.

    Args:
        wallets: of as many users.
        calls: settled ones.
        currency: of all wallets.
        rate: units of it for a dollar, with the spread.
        spread: units of that which are spread.
    """

    wallets: int
    calls: int
    currency: str = "USD"
    rate: int = 1
    spread: int = 0
    model: str = "bench/fast"

    @property
    def cost_nanousd(self) -> int:
        """What the calls cost together."""
        whole, rest = divmod(self.calls, 9000)
        return 20_000 * self.calls + whole * (9000 * 8999 // 2) + rest * (rest + 1) // 2


def user_id(number: int) -> UUID:
    """Return the id of a filled-in user, counted from 1."""
    return UUID(f"00000000-0000-7000-8000-{number:012x}")


def wallet_id(number: int) -> UUID:
    """Return the id of a filled-in wallet, counted from 1; it is the user's of this number."""
    return UUID(f"00000000-0000-7000-9000-{number:012x}")


async def fill(dsn: str, history: History, say: Callable[[str], None]) -> None:
    """Write it all; the schema is there, and nothing else.

    Args:
        dsn: of the superuser.
        history: what.
        say: told what is being done, and how long the step before took.
    """
    now = datetime.now(UTC)
    first_ms = int((now - timedelta(days=DAYS)).timestamp() * 1000)
    step_ms = (DAYS * 24 * 3600 * 1000 - 3_600_000) / max(history.calls, 1)
    connections = [await _connect(dsn) for _ in range(_CONNECTIONS)]
    began = time.monotonic()

    def tell(what: str) -> None:
        say(f"filling: {what}, after {time.monotonic() - began:.0f} s")

    try:
        one = connections[0]
        await add_partitions(one, now)
        await _add_wallets(one, history, first_ms)
        async with _without_indexes(one, connections):
            steps = (
                (done + 1, min(done + _PER_STEP, history.calls))
                for done in range(0, history.calls, _PER_STEP)
            )
            await _share(connections, [_add_calls(history, first_ms, step_ms, *step) for step in steps])
            tell(f"{history.calls:,} calls written")
        tell("indexes made")
        await _share(connections, [_sum_slice(begin, end) for begin, end in _slices(now, history.calls)])
        tell("usage summed")
        await _post(one)
        await _share(connections, [_vacuum(table) for table in await _tables(one)])
        tell("done")
    finally:
        for connection in connections:
            await connection.close()


async def add_keys(dsn: str, history: History, pepper: str) -> list[str]:
    """Give every filled-in wallet the key that its calls were made with; return the secrets, by the wallets' numbers.

    Args:
        dsn: of the superuser.
        history: what was filled in.
        pepper: with which Tuma keeps secrets.
    """
    made = [make_secret() for _ in range(history.wallets)]
    digests = [digest_secret(pepper.encode(), secret) for secret in made]
    name = name_pepper(pepper.encode())
    connection = await _connect(dsn)
    try:
        await connection.copy_records_to_table(
            "api_keys",
            columns=("id", "wallet_id", "hint", "secret_hmac", "pepper"),
            records=[
                (user_id(number), wallet_id(number), hint_of(secret), digest, name)
                for number, (secret, digest) in enumerate(zip(made, digests, strict=True), start=1)
            ],
        )
        await connection.execute("ANALYZE api_keys")
    finally:
        await connection.close()
    return made


async def add_partitions(connection: Any, now: datetime) -> None:
    """Make the months of the last days."""
    month = (now - timedelta(days=DAYS)).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    while month < now:
        following = (month + timedelta(days=32)).replace(day=1)
        for table in (*TABLES, "usage_rollup"):
            bounds = [month.isoformat(), following.isoformat()]
            if table != "usage_rollup":
                bounds = [str(id_floor(month)), str(id_floor(following))]
            await connection.execute(
                f"CREATE TABLE IF NOT EXISTS {table}_{month:%Y_%m} PARTITION OF {table} FOR VALUES FROM"
                f" ('{bounds[0]}') TO ('{bounds[1]}')"
            )
        month = following


_Work = Callable[[Any], Awaitable[None]]


async def _share(connections: Sequence[Any], works: Iterable[_Work]) -> None:
    """Do all works, one after the other over each connection."""
    left = iter(list(works))

    async def work_on(connection: Any) -> None:
        for work in left:
            await work(connection)

    async with asyncio.TaskGroup() as group:
        for connection in connections:
            group.create_task(work_on(connection))


async def _connect(dsn: str) -> Any:
    connection = await asyncpg.connect(dsn, command_timeout=_STATEMENT_S)
    for name, value in (
        ("session_replication_role", "replica"),  # no triggers
        ("synchronous_commit", "off"),
        ("maintenance_work_mem", _MEMORY),
        ("work_mem", "64MB"),
    ):
        await connection.execute(f"SELECT set_config('{name}', '{value}', false)")
    return connection


async def _add_wallets(connection: Any, history: History, first_ms: int) -> None:
    """Write users with a wallet each, and the money in it."""
    tx = _ID.format(first=first_ms - 1000, step=0, salt="'grant'")
    user, wallet = _uuid("8000", "i"), _uuid("9000", "i")
    series = f"generate_series(1, {history.wallets}) i"
    grant = _GRANT * NANO
    for statement in (
        f"INSERT INTO users (id, email) SELECT {user}, 'user' || i || '@tuma.example' FROM {series}",
        f"INSERT INTO wallets (id, user_id, currency) SELECT {wallet}, {user}, '{history.currency}' FROM {series}",
        f"INSERT INTO journal_tx (id, kind, wallet_id) SELECT {tx}, 'grant', {wallet} FROM {series}",
        f"""
        INSERT INTO journal_entry (tx_id, seq, account, wallet_id, currency, amount_nano)
        SELECT {tx}, e.seq, e.account, e.wallet, '{history.currency}', e.amount
        FROM {series} CROSS JOIN LATERAL (VALUES (1, 'wallet', {wallet}, {grant}), (2, 'grant', NULL, {-grant}))
             AS e (seq, account, wallet, amount)
        """,
    ):
        await connection.execute(statement)


def _add_calls(history: History, first_ms: int, step_ms: float, first: int, last: int) -> _Work:
    identity = _ID.format(first=first_ms, step=step_ms, salt="'call'")
    number = f"1 + (i / {_RUN} * {_STRIDE}) % {history.wallets}"
    batch = (
        _ID.format(first=first_ms, step=step_ms, salt="'batch'")
        .replace("i *", "min(i) *")
        .replace("|| i)", "|| min(i))")
    )
    charge, spread = f"{history.rate} * cost", f"{history.spread} * cost"

    async def work(connection: Any) -> None:
        await connection.execute(
            f"""
            CREATE TEMP TABLE step AS
            SELECT i, {identity} AS id, {_uuid("9000", number)} AS wallet, {_uuid("8000", number)} AS person, {_COST}::bigint AS cost
            FROM generate_series({first}::bigint, {last}) i
            """
        )
        for statement in (
            f"""
            INSERT INTO calls (id, user_id, wallet_id, key_id, worker_id, model, stream, price_id, fx_quote_id, currency, hold_nano,
                               hold_nanousd, available_after_nano, state, opened_at, ended_at, outcome, generation_id, accuracy,
                               cost_nanousd, provider_cost_nanousd, charge_nano, spread_nano)
            SELECT id, person, wallet, person, {_NOBODY}, '{history.model}', true, {_NOBODY}, {_NOBODY}, '{history.currency}',
                   {90_000 * history.rate}, 90000, 1, 'settled', now(), now(), 'completed', 'gen-' || id, 'exact', cost, cost,
                   {charge}, {spread}
            FROM step
            """,
            """
            INSERT INTO usage (call_id, source, prompt_tokens, completion_tokens, first_byte_ms, duration_ms)
            SELECT id, 'provider_cost', 100, 200, 300, 4000 FROM step
            """,
            "INSERT INTO journal_tx (id, kind, call_id, wallet_id) SELECT id, 'settlement', id, wallet FROM step",
            f"""
            INSERT INTO journal_entry (tx_id, seq, account, wallet_id, currency, amount_nano)
            SELECT id, e.seq, e.account, e.wallet, e.currency, e.amount
            FROM step CROSS JOIN LATERAL (VALUES
                 (1, 'wallet', wallet, '{history.currency}', -{charge}), (2, 'fx_position', NULL, '{history.currency}', {charge} - {spread}),
                 (3, 'fx_spread', NULL, '{history.currency}', {spread}), (4, 'fx_position', NULL, 'USD', -cost),
                 (6, 'revenue', NULL, 'USD', cost), (7, 'provider_cost', NULL, 'USD', -cost), (8, 'provider_prepaid', NULL, 'USD', cost))
                 AS e (seq, account, wallet, currency, amount)
            WHERE e.amount <> 0
            """,
            f"""
            INSERT INTO shadow_usd_ledger (id, kind, amount_nanousd, calls)
            SELECT {batch}, 'settlement', sum(cost), count(*) FROM step GROUP BY i / {_BATCH}
            """,
            "DROP TABLE step",
        ):
            await connection.execute(statement)

    return work


def _uuid(kind: str, number: str) -> str:
    return f"('00000000-0000-7000-{kind}-' || lpad(to_hex({number}), 12, '0'))::uuid"


@asynccontextmanager
async def _without_indexes(connection: Any, connections: Sequence[Any]) -> AsyncIterator[None]:
    """Drop the big tables' indexes and primary keys, and make them again: sorting once is quicker than ten million look-ups."""
    rows = await connection.fetch(
        """
        SELECT x.indrelid::regclass::text AS parent, x.indexrelid::regclass::text AS name, k.conname,
               coalesce(pg_get_constraintdef(k.oid), pg_get_indexdef(x.indexrelid)) AS said
        FROM pg_index x LEFT JOIN pg_constraint k ON k.conindid = x.indexrelid AND k.contype = 'p'
        WHERE x.indrelid = ANY ($1::text[]::regclass[])
        """,
        list(TABLES),
    )
    for row in rows:
        await connection.execute(
            f"ALTER TABLE {row['parent']} DROP CONSTRAINT {row['conname']}"
            if row["conname"]
            else f"DROP INDEX {row['name']}"
        )
    yield

    def make(parent: str) -> _Work:
        async def work(connection: Any) -> None:
            for row in rows:
                if row["parent"] == parent:
                    await connection.execute(
                        f"ALTER TABLE {parent} ADD CONSTRAINT {row['conname']} {row['said']}"
                        if row["conname"]
                        else row["said"].replace(" ON ONLY ", " ON ")
                    )

        return work

    await _share(connections, [make(parent) for parent in reversed(TABLES)])  # the largest first


def _slices(now: datetime, calls: int) -> list[tuple[datetime, datetime]]:
    """Return times between which a batch's worth of calls began: ``add_usage`` is made for batches, and slow for more."""
    first = (now - timedelta(days=DAYS)).replace(minute=0, second=0, microsecond=0)
    per_hour = max(-(-calls // (DAYS * 24 * _SUMMED_TOGETHER)), 1)
    step = timedelta(hours=1) / per_hour
    begins = [first + step * number for number in range((DAYS * 24 + 2) * per_hour + 1)]
    return list(pairwise(begins))


def _sum_slice(begin: datetime, end: datetime) -> _Work:
    async def work(connection: Any) -> None:
        await connection.execute(
            "SELECT add_usage(array_agg(c.id), 1) FROM calls c WHERE c.id >= $1 AND c.id < $2",
            id_floor(begin),
            id_floor(end),
        )

    return work


async def _post(connection: Any) -> None:
    """Bring what is kept of wallets and of the provider's quota to what the rows say."""
    await connection.execute(
        "UPDATE wallets w SET posted_nano = e.total FROM (SELECT wallet_id, sum(amount_nano) AS total FROM journal_entry"
        " WHERE wallet_id IS NOT NULL GROUP BY wallet_id) e WHERE e.wallet_id = w.id"
    )
    await connection.execute(
        "UPDATE quota_slabs SET spent_nanousd = t.total, leased_nanousd = t.total"
        " FROM (SELECT coalesce(sum(amount_nanousd), 0) AS total FROM shadow_usd_ledger) t"
    )


async def _tables(connection: Any) -> list[str]:
    """Return every table that holds rows, the largest first."""
    rows = await connection.fetch(
        "SELECT oid::regclass::text AS name FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
        " ORDER BY relpages DESC, pg_relation_size(oid) DESC"
    )
    return [row["name"] for row in rows]


def _vacuum(table: str) -> _Work:
    async def work(connection: Any) -> None:
        await connection.execute(f"VACUUM (ANALYZE) {table}")

    return work
