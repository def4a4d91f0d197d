"""The chain of sealed blocks: no row of the audit log can be changed, removed or put in without its showing."""

import asyncio
import json
import time
import tracemalloc
from hashlib import sha256
from typing import Any

import asyncpg
import pytest

from billing.errors import InputError
from billing.monitoring.audit import Verdict
from scripts.office import Office
from tests.billing.monitoring.audit_log import Log
from tests.support.payers import make_payer


async def test_rows_are_never_rewritten(log: Log, office: Office) -> None:
    await make_payer(office)
    await log.audit.seal()
    async with office.database.connection() as connection:
        for mode in ("origin", "replica"):
            await connection.execute(f"SET session_replication_role = {mode}")
            for table in ("audit_log", "audit_blocks"):
                for statement in (
                    f"DELETE FROM {table}",
                    f"TRUNCATE {table}",
                    f"DELETE FROM {table} WHERE false",
                    f"UPDATE {table} SET {'actor' if table == 'audit_log' else 'digest'} = '' WHERE false",
                ):
                    with pytest.raises(asyncpg.RestrictViolationError):
                        await connection.execute(statement)
        await connection.execute("RESET session_replication_role")
        granted = await connection.fetch(
            "SELECT c.relname FROM pg_class c, LATERAL aclexplode(c.relacl) a"
            " WHERE c.relname IN ('audit_log', 'audit_blocks') AND a.grantee <> c.relowner"
        )
        assert granted == [], "nobody but the owner has any right"
        open_to_all = await connection.fetch(
            "SELECT proname FROM pg_proc WHERE proname IN"
            " ('write_audit', 'seal_audit', 'audit_change', 'audit_posting')"
            " AND (proacl IS NULL OR EXISTS (SELECT FROM aclexplode(proacl) a WHERE a.grantee = 0))"
        )
        assert open_to_all == []


@pytest.mark.calendar
async def test_the_books_are_not_truncated(office: Office) -> None:
    async with office.database.connection() as connection:
        await connection.execute("SELECT ensure_partitions(5)")
        tables = [
            row["relname"]
            for row in await connection.fetch(
                "SELECT relname FROM pg_class WHERE relkind IN ('r', 'p') AND relname ~ '^journal_(tx|entry)'"
            )
        ]
        assert len(tables) >= 2 * (1 + 1 + 7)
        for table in (*tables, "shadow_usd_ledger", "fx_rates, fx_quotes, calls"):
            with pytest.raises(asyncpg.RestrictViolationError, match="TRUNCATE refused"):
                await connection.execute(f"TRUNCATE {table}")
        # docs/archiving.md: what is detached can be dropped.
        for parent in ("journal_entry", "journal_tx"):
            month = max(name for name in tables if name.startswith(f"{parent}_2"))
            await connection.execute(f"ALTER TABLE {parent} DETACH PARTITION {month}")
            await connection.execute(f"DROP TABLE {month}")


def recompute(rows: list[Any], blocks: list[Any]) -> str:
    """What an outsider does with the stored bytes alone, as docs/security.md says."""
    digest = b""
    lines = {row["id"]: row["line"] for row in rows}
    for block in blocks:
        header = f"{block['number']} {round(block['sealed_at'].timestamp() * 1_000_000)} "
        leaves = b"".join(sha256(lines.pop(row_id).encode()).digest() for row_id in block["ids"])
        digest = sha256(digest + header.encode() + leaves).digest()
    assert not lines
    return f"{blocks[-1]['number']}:{digest.hex()}"


async def test_an_outsider_recomputes_the_chain(log: Log, office: Office) -> None:
    await make_payer(office)
    assert (await log.audit.verify()).blocks == 1
    await log.write(2500)
    assert await log.audit.seal() == 3
    assert await log.audit.seal() == 0
    verdict = await log.audit.verify()
    async with office.database.connection() as connection:
        rows = await connection.fetch("SELECT id, line FROM audit_log")
        blocks = await connection.fetch("SELECT * FROM audit_blocks ORDER BY number")
    assert verdict.as_json() == {
        "ok": True,
        "rows": len(rows),
        "blocks": 4,
        "unsealed": 0,
        "head": recompute(rows, blocks),
        "problems": [],
    }
    line = json.loads(rows[0]["line"])
    assert list(line)[:4] == ["id", "at", "actor", "db_role"]


async def sealed_twice(log: Log) -> None:
    """Rows 1 to 5 and 6 to 10, in two blocks; and 11 to 13, in none."""
    for count in (5, 5):
        await log.write(count)
        await log.audit.seal()
    await log.write(3)


CHANGES = {
    "id": "id + 1000",
    "at": "at + interval '1 microsecond'",
    "actor": "'operator:eve'",
    "db_role": "'eve'",
    "action": "'changed'",
    "subject": "'wallets'",
    "subject_id": "subject_id || '0'",
    "user_id": "'00000000-0000-0000-0000-000000000000'",
    "wallet_id": "'00000000-0000-0000-0000-000000000000'",
    "request_id": "'r'",
    "before": "'{}'",
    "after": "after || '{\"yes\": 1}'",
    "line": "line || ' '",
}


async def test_each_altered_column_is_found(log: Log, office: Office) -> None:
    await sealed_twice(log)
    async with office.database.connection() as connection:
        columns = await connection.fetch(
            "SELECT attname FROM pg_attribute WHERE attrelid = 'audit_log'::regclass AND attnum > 0"
        )
    assert {row["attname"] for row in columns} == CHANGES.keys()
    for column, value in CHANGES.items():
        problems = await log.tamper(f"UPDATE audit_log SET {column} = {value} WHERE id = 7")
        row = 1007 if column == "id" else 7
        assert row in {problem.get("row") for problem in problems}, column
        if column not in ("id", "line"):
            assert problems == [{"block": 2, "row": 7, "problem": f"it differs from its line in {column}"}]
            problems = await log.tamper(f"UPDATE audit_log SET {column} = {value} WHERE id = 12")
            assert problems == [{"row": 12, "problem": f"it differs from its line in {column}"}], (
                "sealed or not"
            )


async def test_what_is_altered_in_both_removed_inserted_or_swapped_is_found(log: Log) -> None:
    await sealed_twice(log)
    altered = [{"block": 2, "row": 7, "problem": "its line was altered"}]
    both = "UPDATE audit_log SET actor = 'admin', line = replace(line, 'system', 'admin') WHERE id = 7"
    assert await log.tamper(both) == altered
    for line in ("'[]'", "'{'", "'null'"):
        assert await log.tamper(f"UPDATE audit_log SET line = {line} WHERE id = 7") == altered
        assert len(await log.tamper(f"UPDATE audit_log SET line = {line} WHERE id = 12")) == 1
    for row, block in ((1, 1), (7, 2), (10, 2)):
        assert await log.tamper(f"DELETE FROM audit_log WHERE id = {row}") == [
            {"block": block, "row": row, "problem": "it was removed"}
        ]
    swap = """
    UPDATE audit_log SET id = -id WHERE id IN (7, 8);
    UPDATE audit_log SET id = 15 + id WHERE id IN (-7, -8);
    """
    assert await log.tamper(swap) == [
        {"block": 2, "row": 7, "problem": "it holds what was sealed as row 8"},
        {"block": 2, "row": 8, "problem": "it holds what was sealed as row 7"},
    ]
    for inserted in (0, -5):
        insert = f"""
        INSERT INTO audit_log SELECT {inserted}, at, actor, db_role, action, subject, subject_id, user_id, wallet_id, request_id,
               before, after, replace(line, '"id" : 7', '"id" : {inserted}') FROM audit_log WHERE id = 7
        """
        assert await log.tamper(insert) == [
            {"block": 1, "row": inserted, "problem": "it was not there when the block was sealed"}
        ]


async def test_an_altered_chain_is_found(log: Log) -> None:
    await sealed_twice(log)
    assert [
        problem["block"] for problem in await log.tamper("DELETE FROM audit_blocks WHERE number = 1")
    ] == [2]
    for change in (
        "previous = sha256('')",
        "previous = ''",
        "ids = ids[1:4]",
        "ids = ids || 99::bigint",
        "ids = ARRAY[7, 6, 8, 9, 10]::bigint[]",
        "ids = '{}'",
        "leaves = leaves || sha256('')",
        "leaves = ''",
        "sealed_at = sealed_at + interval '1 microsecond'",
        "digest = sha256('')",
        "number = 3",
    ):
        problems = await log.tamper(f"UPDATE audit_blocks SET {change} WHERE number = 2")
        assert problems, change
        assert problems[0]["block"] in (2, 3), change
    # One who recomputes a block cannot recompute what was noted of the next.
    forged = "UPDATE audit_blocks SET digest = sha256('forged') WHERE number = 1"
    assert {"block": 2, "problem": "it does not follow the block before it"} in await log.tamper(forged)


async def test_a_cut_tail_shows_against_a_noted_head(log: Log, office: Office) -> None:
    await sealed_twice(log)
    heads = [str((await log.audit.verify()).head)]
    await log.write(1)
    heads.append(str((await log.audit.verify()).head))
    assert [head.partition(":")[0] for head in heads] == ["3", "4"]
    for head in heads:
        assert (await log.audit.verify(expect=head)).ok
    async with log.tampering() as connection:
        await connection.execute(
            "DELETE FROM audit_blocks WHERE number = 4; DELETE FROM audit_log WHERE id = 14"
        )
    assert (await log.audit.verify()).ok, "the chain alone cannot show it"
    assert (await log.audit.verify(expect=heads[0])).ok
    assert (await log.audit.verify(expect=heads[1])).as_json()["problems"] == [
        {"problem": "the chain ends before block 4, which was noted elsewhere"}
    ]
    await log.write(1)
    assert (await log.audit.verify()).ok
    assert (await log.audit.verify(expect=heads[1])).as_json()["problems"] == [
        {"block": 4, "problem": "its digest is not the one that was noted elsewhere"}
    ]
    for wrong in ("", "4", "4:abc", f"0:{'0' * 64}", f"x:{'0' * 64}"):
        with pytest.raises(InputError):
            await log.audit.verify(expect=wrong)

    await log.write(1)
    async with log.tampering() as connection:
        await connection.execute("DELETE FROM audit_log WHERE id = 2")
    verdict = await log.audit.verify()
    assert (verdict.ok, verdict.unsealed, verdict.blocks) == (False, 1, 4), "what is wrong is not sealed over"


async def test_many_rows_are_verified_in_little_memory(log: Log) -> None:
    rows = 20_000  # five times as many take five times as long, and no more memory
    began = time.monotonic()
    await log.write(rows)
    written_s = time.monotonic() - began
    began = time.monotonic()
    assert await log.audit.seal() == rows // 1000
    sealed_s = time.monotonic() - began
    began = time.monotonic()
    verdict = await log.audit.verify()
    verified_s = time.monotonic() - began
    assert (verdict.ok, verdict.rows) == (True, rows)
    print(
        f"{rows} rows: written in {written_s:.1f} s, sealed in {sealed_s:.1f}, verified in {verified_s:.1f}"
    )
    tracemalloc.start()
    again = Verdict()
    async with asyncio.timeout(60):
        await log.audit._verify_on(again, None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"peak {peak / 2**20:.1f} MiB")
    assert peak < 8 * 2**20

    async with log.tampering() as connection:
        await connection.execute("UPDATE audit_log SET actor = 'admin'")
    problems = (await log.audit.verify()).as_json()["problems"]
    assert len(problems) == 101, "what is wrong is listed up to a bound"
    assert problems[-1] == {"problem": f"{rows - 100} more"}
