"""The proof that what ``usage_rollup`` sums is what the calls say: their rows are added up here by another query than settles them."""

import json
from typing import Any
from uuid import UUID

from billing.reports.usage import BIN_BOUNDS_MS

FIRST_ID = UUID(int=0)
LAST_ID = UUID(int=2**128 - 1)
_TIMEOUT_S = 3600.0
_MEMORY = "SELECT set_config('work_mem', '64MB', true)"  # a day is summed without the disk
_DIFFERENCES_MAX = 20
_NAMES = (
    *("calls", "voids", "exact", "prompt_tokens", "completion_tokens", "cached_read_tokens"),
    *("cached_write_tokens", "reasoning_tokens", "cost_nanousd", "charge_nano", "spread_nano"),
    *("house_nanousd", "first_byte_ms", "duration_ms", "first_byte_bins", "duration_bins"),
)
_ENDED = "c.state IN ('settled', 'void')"
_CALL = "c.wallet_id, c.model, c.key_id AS call_key, c.state, c.accuracy, c.cost_nanousd, c.charge_nano, c.spread_nano, c.house_nanousd"
_USAGE = (
    "u.prompt_tokens, u.completion_tokens, u.cached_read_tokens, u.cached_write_tokens, u.reasoning_tokens,"
    " u.first_byte_ms, u.duration_ms"
)


def _bins(column: str) -> str:
    floors = (-(2**31), *BIN_BOUNDS_MS)
    ceilings = (*BIN_BOUNDS_MS, 2**31)
    counts = (
        f"count(*) FILTER (WHERE e.{column} >= {floor} AND e.{column} < {ceiling})"
        for floor, ceiling in zip(floors, ceilings, strict=True)
    )
    return f"ARRAY[{', '.join(counts)}]::integer[]"


# The calls of a range of ids; and, of what lies before it, every wallet's quarter that something was posted into in the range.
_COMPARE = f"""
WITH touched AS (
    SELECT DISTINCT c.wallet_id, usage_quarter(c.id) AS quarter FROM calls c
    WHERE c.id < $1 AND c.id IN (
        SELECT t.call_id FROM journal_tx t
        WHERE t.id >= $1 AND t.id < $2 AND t.kind IN ('correction', 'refund') AND t.call_id < $1
        UNION ALL SELECT l.tx_id FROM late_postings l WHERE l.tx_id < $1 AND l.created_at >= uuid_moment($1))
), ended AS (
    SELECT c.id, {_CALL}, {_USAGE} FROM calls c
    LEFT JOIN (SELECT * FROM usage WHERE call_id >= $1 AND call_id < $2) u ON u.call_id = c.id
    WHERE c.id >= $1 AND c.id < $2 AND {_ENDED}
    UNION ALL
    SELECT c.id, {_CALL}, {_USAGE} FROM touched t JOIN calls c ON c.wallet_id = t.wallet_id AND c.id >= uuid_floor(t.quarter)
        AND c.id < uuid_floor(t.quarter + interval '15 minutes') AND {_ENDED}
    LEFT JOIN usage u ON u.call_id = c.id
), said AS (
    SELECT e.wallet_id, e.quarter, e.model, e.key_id, count(*) - count(*) FILTER (WHERE e.state = 'void') AS calls,
           count(*) FILTER (WHERE e.state = 'void') AS voids,
           count(*) FILTER (WHERE e.state = 'settled' AND e.accuracy = 'exact') AS exact,
           coalesce(sum(e.prompt_tokens), 0) AS prompt_tokens, coalesce(sum(e.completion_tokens), 0) AS completion_tokens,
           coalesce(sum(e.cached_read_tokens), 0) AS cached_read_tokens,
           coalesce(sum(e.cached_write_tokens), 0) AS cached_write_tokens,
           coalesce(sum(e.reasoning_tokens), 0) AS reasoning_tokens, sum(e.cost_nanousd) AS cost_nanousd,
           sum(e.charge_nano) AS charge_nano, coalesce(sum(e.spread_nano), 0) AS spread_nano,
           sum(e.house_nanousd) AS house_nanousd, coalesce(sum(e.first_byte_ms), 0) AS first_byte_ms,
           coalesce(sum(e.duration_ms), 0) AS duration_ms, {_bins("first_byte_ms")} AS first_byte_bins,
           {_bins("duration_ms")} AS duration_bins
    FROM (SELECT date_bin('15 minutes', uuid_moment(c.id), '2020-01-01T00:00Z') AS quarter,
                 coalesce(c.call_key, '00000000-0000-0000-0000-000000000000') AS key_id, c.* FROM ended c) e
    GROUP BY e.wallet_id, e.quarter, e.model, e.key_id
), kept AS (
    SELECT r.* FROM usage_rollup r WHERE r.quarter >= uuid_moment($1) AND r.quarter < uuid_moment($2)
    UNION ALL SELECT r.* FROM touched t JOIN usage_rollup r ON r.wallet_id = t.wallet_id AND r.quarter = t.quarter
)
SELECT wallet_id, quarter, model, key_id, to_jsonb(said)::text AS said, to_jsonb(kept)::text AS kept
FROM said FULL JOIN kept USING (wallet_id, quarter, model, key_id)
WHERE ({", ".join(f"said.{name}" for name in _NAMES)}) IS DISTINCT FROM ({", ".join(f"kept.{name}" for name in _NAMES)})
ORDER BY quarter, wallet_id, model, key_id LIMIT {_DIFFERENCES_MAX}
"""  # noqa: S608 - names and numbers of this module


async def compare_usage(connection: Any, first: UUID, end: UUID) -> list[str]:
    """Return in words where the sums differ from the calls of whole quarters of an hour, as the connection's snapshot shows them.

    What was corrected, refunded or settled late in this range of older calls is compared as well, so that days that follow each
    other leave nothing out but what was void in the end.

    Args:
        connection: inside a transaction; what it sees is compared.
        first: the smallest id, as ``id_floor`` makes it.
        end: the id after the last.
    """
    await connection.execute(_MEMORY)
    found = await connection.fetch(_COMPARE, first, end, timeout=_TIMEOUT_S)
    return [_describe(row) for row in found]


def _describe(row: Any) -> str:
    said = json.loads(row["said"] or "{}") or {}
    kept = json.loads(row["kept"] or "{}") or {}
    off = ", ".join(
        f"{name} {kept.get(name)} (calls say {said.get(name)})"
        for name in _NAMES
        if said.get(name) != kept.get(name)
    )
    return (
        f"wallet {row['wallet_id']}, {row['quarter'].isoformat()}, {row['model']}, key {row['key_id']}: {off}"
    )
