"""Break each guard on purpose, in a copy, and show that the tests notice.

Run it with ``python -m tests.mutations [NAME …]`` from the checkout's environment. It exits 1 if a mutation survives.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_SKIPPED = (
    ".git",
    ".venv",
    ".tuma",
    "__pycache__",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
)
_TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class Mutation:
    """A guard's text, what replaces it, and the tests that must fail then."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = (
    Mutation(
        "a call is settled once",
        "billing/migrations/0005_verified_days.sql",
        "AND (c.state = 'open' OR (c.state = 'review' AND e.state <> 'review'))",
        "",
        "tests/billing/test_ledger.py",
    ),
    Mutation(
        "a call is settled once, by the state machine",
        "billing/migrations/0005_verified_days.sql",
        "AND (c.state = 'open' OR (c.state = 'review' AND e.state <> 'review'))",
        "",
        "tests/stateful/test_books.py",
    ),
    Mutation(
        "a call is settled once, whoever crashed",
        "billing/migrations/0005_verified_days.sql",
        "AND (c.state = 'open' OR (c.state = 'review' AND e.state <> 'review'))",
        "",
        "tests/stateful/test_crashes.py",
    ),
    Mutation(
        "a release is lost to a flush",
        "billing/lua/release.lua",
        "if not hold or ARGV[3] == '' then",
        "hold = hold or '0'\nif ARGV[3] == '' then",
        "tests/stateful/test_books.py",
    ),
    Mutation(
        "a stale snapshot fills nothing, by the state machine",
        "billing/lua/fill.lua",
        "if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end",
        "",
        "tests/stateful/test_books.py",
    ),
    Mutation(
        "a call is settled before its hold is released",
        "billing/calls.py",
        "            settlement = await self._settle(call, ending)\n        finally:",
        "            await self._release(call, charge_nano=ending.charge_nano)\n"
        "            settlement = await self._settle(call, ending)\n        finally:",
        "tests/stateful/test_crashes.py",
    ),
    Mutation(
        "a credit's key is used once, by the state machine",
        "billing/migrations/0002_posting.sql",
        "IF first.tx_id = p_tx THEN",
        "IF true THEN",
        "tests/stateful/test_books.py",
    ),
    Mutation(
        "a credit's key is used once, whoever crashed",
        "billing/migrations/0002_posting.sql",
        "IF first.tx_id = p_tx THEN",
        "IF true THEN",
        "tests/stateful/test_crashes.py",
    ),
    Mutation(
        "the sweeper leaves the living alone",
        "billing/sweeper.py",
        "AND (w.id IS NULL OR w.stopped_at IS NOT NULL OR w.lease_until < now())",
        "",
        "tests/billing/test_sweeper.py",
    ),
    Mutation(
        "the sweeper leaves the living alone, by the state machine",
        "billing/sweeper.py",
        "AND (w.id IS NULL OR w.stopped_at IS NOT NULL OR w.lease_until < now())",
        "",
        "tests/stateful/test_books.py",
    ),
    Mutation(
        "an answer's id is noted for the sweeper",
        "billing/calls.py",
        "                await self.holds.renew(call.hold, call.notes)",
        "                await self.holds.renew(call.hold)",
        "tests/stateful/test_crashes.py",
    ),
    Mutation(
        "a late exact figure is a correction",
        "billing/calls.py",
        "            await self._correct_late(ending, ending.provider_cost_nanousd)",
        "            pass",
        "tests/stateful/test_books.py",
    ),
    Mutation(
        "a charge is lowered though the house bears a part",
        "billing/corrections.py",
        "if lower or (higher and before.house_nanousd == 0):",
        "if (lower or higher) and before.house_nanousd == 0:",
        "tests/stateful/test_books.py",
    ),
    Mutation(
        "a bill that comes and goes is followed",
        "billing/corrections.py",
        "#{row['adjustments']}",
        "{before.cost_nanousd}",
        "tests/billing/test_corrections.py",
    ),
    Mutation(
        "a bill that comes and goes is followed, by the state machine",
        "billing/corrections.py",
        "#{row['adjustments']}",
        "{before.cost_nanousd}",
        "tests/stateful/test_books.py",
    ),
    Mutation(
        "wallets are locked in order when calls open",
        "billing/migrations/0002_posting.sql",
        "WHERE w.id = ANY (p_wallet) ORDER BY w.id FOR NO KEY UPDATE",
        "WHERE w.id = ANY (p_wallet) FOR NO KEY UPDATE",
        "tests/billing/test_locks.py",
    ),
    Mutation(
        "wallets are locked in order when holds are extended",
        "billing/migrations/0002_posting.sql",
        "ORDER BY w.id FOR NO KEY UPDATE;\n\n    RETURN QUERY\n    WITH ask AS (\n        SELECT a.id, a.hold,",
        "FOR NO KEY UPDATE;\n\n    RETURN QUERY\n    WITH ask AS (\n        SELECT a.id, a.hold,",
        "tests/billing/test_locks.py",
    ),
    Mutation(
        "wallets are locked in order when calls end",
        "billing/migrations/0002_posting.sql",
        "ORDER BY w.id FOR NO KEY UPDATE;\n\n    -- The guard",
        "FOR NO KEY UPDATE;\n\n    -- The guard",
        "tests/billing/test_locks.py",
    ),
    Mutation(
        "an exact charge is never raised",
        "billing/corrections.py",
        "charge.charge_nano > before.charge_nano and estimate and self._upward",
        "charge.charge_nano > before.charge_nano",
        "tests/billing/test_corrections.py",
    ),
    Mutation(
        "a correction knows from which figures it was computed",
        "billing/migrations/0005_verified_days.sql",
        "OR call.cost_nanousd <> p_seen_cost OR call.charge_nano <> p_seen_charge",
        "",
        "tests/billing/test_corrections.py",
    ),
    Mutation(
        "a transaction balances",
        "billing/migrations/0005_verified_days.sql",
        "GROUP BY e.tx, e.currency HAVING sum(e.amount) <> 0 LIMIT 1;",
        "GROUP BY e.tx, e.currency HAVING false LIMIT 1;",
        "tests/billing/test_ledger.py",
    ),
    Mutation(
        "Postgres admits last",
        "billing/migrations/0002_posting.sql",
        "WHERE j.decided = 'house' OR (j.decided IS NULL AND j.available_after >= 0)",
        "WHERE j.decided = 'house' OR j.decided IS NULL",
        "tests/billing/test_ledger.py",
    ),
    Mutation(
        "a credit's key is used once",
        "billing/migrations/0002_posting.sql",
        "IF first.tx_id = p_tx THEN",
        "IF true THEN",
        "tests/billing/test_ledger.py",
    ),
    Mutation(
        "the journal is append-only",
        "billing/migrations/0001_core.sql",
        "CREATE TRIGGER journal_entry_append_only BEFORE UPDATE OR DELETE",
        "CREATE TRIGGER journal_entry_append_only BEFORE UPDATE OF seq",
        "tests/billing/test_ledger.py",
    ),
    Mutation(
        "available is checked",
        "billing/lua/reserve.lua",
        "if redis.call('HINCRBY', KEYS[1], 'available', ARGV[4]) < 0 then",
        "if redis.call('HINCRBY', KEYS[1], 'available', ARGV[4]) < -1e18 then",
        "tests/billing/test_holds.py",
    ),
    Mutation(
        "a refusal gives back what it took",
        "billing/lua/reserve.lua",
        "    redis.call('HINCRBY', KEYS[1], 'available', ARGV[3])\n    return reply('insufficient_funds', 0)",
        "    return reply('insufficient_funds', 0)",
        "tests/billing/test_holds.py",
    ),
    Mutation(
        "a repeated reserve holds once",
        "billing/lua/reserve.lua",
        "if state[3] then return reply('granted', 0) end",
        "",
        "tests/billing/test_holds.py",
    ),
    Mutation(
        "a forgotten hold is not given back",
        "billing/lua/release.lua",
        "if not hold or ARGV[3] == '' then",
        "hold = hold or '0'\nif ARGV[3] == '' then",
        "tests/billing/test_holds.py",
    ),
    Mutation(
        "a stale snapshot fills nothing",
        "billing/lua/fill.lua",
        "if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end",
        "",
        "tests/billing/test_holds.py",
    ),
    Mutation(
        "a flush does not free a hold",
        "billing/lua/renew.lua",
        "redis.call('HINCRBY', KEYS[1], 'available', ARGV[4])",
        "redis.call('EXISTS', KEYS[1])",
        "tests/billing/test_holds.py",
    ),
    Mutation(
        "a batch waits for Postgres",
        "billing/batcher.py",
        "except (PostgresUnavailableError, *AWAY, *REPEATABLE) as error:",
        "except ZeroDivisionError as error:",
        "tests/billing/test_ledger.py",
    ),
    Mutation(
        "every way out settles",
        "proxy/chat.py",
        "        answer.conclude()",
        "        pass",
        "tests/proxy/test_relay.py tests/proxy/test_sdk.py",
    ),
    Mutation(
        "the answer's id is noted before its first byte",
        "proxy/answer.py",
        "        if generation_id is None or self.call.generation_id is not None:",
        "        if True:",
        "tests/faults/test_kill.py",
    ),
    Mutation(
        "hanging up stops a stalled stream",
        "proxy/relay.py",
        "            answer.response.close()  # type: ignore[union-attr]  # wakes the read under way",
        "            pass",
        "tests/proxy/test_relay.py",
    ),
    Mutation(
        "no byte before the call is open",
        "proxy/relay.py",
        "        await answer.services.calls.confirm_open(answer.call)",
        "        pass",
        "tests/proxy/test_relay.py tests/faults/test_flush.py",
    ),
    Mutation(
        "the provider is let go before its records are asked",
        "proxy/answer.py",
        "            self._release_connection()  # before its records are asked: it bills until it notices",
        "            pass",
        "tests/proxy/test_relay.py",
    ),
    Mutation(
        "usage is kept from who did not ask",
        "proxy/relay.py",
        "include_usage=answer.ask.include_usage",
        "include_usage=True",
        "tests/proxy/test_sdk.py",
    ),
    Mutation(
        "a model without a price is refused",
        "billing/quoting.py",
        "found = [prices.get_model(name) for name in models]",
        "found = [prices.models.get(name) or next(iter(prices.models.values())) for name in models]",
        "tests/proxy/test_bad_input.py",
    ),
    Mutation(
        "a revoked key is forgotten at once",
        "proxy/services.py",
        '"key": services.keys.forget,',
        '"key": services.fx.load,',
        "tests/proxy/test_bad_input.py",
    ),
    Mutation(
        "the sweeper asks the provider",
        "billing/sweeper.py",
        'generation_id = notes.get("generation_id") or row["generation_id"]',
        "generation_id = None",
        "tests/faults/test_kill.py",
    ),
    Mutation(
        "the quota is not exceeded",
        "billing/migrations/0004_quota.sql",
        "    IF given > free THEN\n        given := 0;\n        RETURN;\n    END IF;\n",
        "",
        "tests/billing/test_quota.py",
    ),
    Mutation(
        "one lease at a time",
        "billing/migrations/0004_quota.sql",
        "FROM provider_quota q FOR UPDATE; --",
        "FROM provider_quota q; --",
        "tests/billing/test_quota.py",
    ),
    Mutation(
        "a hold is taken from the slab",
        "billing/quota.py",
        "        self._free_nanousd -= nanousd\n        return nanousd",
        "        return nanousd",
        "tests/billing/test_quota.py tests/proxy/test_provider_quota.py",
    ),
    Mutation(
        "what a call cost is spent",
        "billing/migrations/0005_verified_days.sql",
        "ON CONFLICT (worker_id) DO UPDATE SET spent_nanousd = quota_slabs.spent_nanousd + excluded.spent_nanousd;",
        "ON CONFLICT (worker_id) DO NOTHING;",
        "tests/billing/test_quota.py tests/proxy/test_provider_quota.py",
    ),
    Mutation(
        "a dead worker's slab is returned when its calls have ended",
        "billing/migrations/0004_quota.sql",
        "          AND NOT EXISTS (SELECT 1 FROM calls c WHERE c.state IN ('open', 'review') AND c.worker_id = w.id)\n",
        "",
        "tests/billing/test_quota.py",
    ),
    Mutation(
        "a provider that refuses us is left alone",
        "proxy/answer.py",
        "            self.services.quota.refused(self.call.call_id, error.reason)",
        "            pass",
        "tests/proxy/test_provider_quota.py",
    ),
    Mutation(
        "an error inside a 200 is no sign of being served",
        "proxy/answer.py",
        "        await self.note_id(self.services.upstream.generation_id(self.response))\n\n    def accept",
        "        self.accept()\n"
        "        await self.note_id(self.services.upstream.generation_id(self.response))\n\n    def accept",
        "tests/proxy/test_provider_quota.py",
    ),
    Mutation(
        "one call at a time finds out",
        "billing/quota.py",
        "if left_s > 0 or self._trying is not None:",
        "if left_s > 0:",
        "tests/billing/test_quota.py",
    ),
    Mutation(
        "a posting into a proved day is listed",
        "billing/migrations/0005_verified_days.sql",
        "        INSERT INTO late_postings (tx_id) SELECT DISTINCT l.id FROM unnest(late) AS l (id);",
        "        NULL;",
        "tests/billing/test_daybook.py",
    ),
    Mutation(
        "a correction of a proved day is listed",
        "billing/migrations/0005_verified_days.sql",
        "        INSERT INTO late_postings (settled_nanousd) VALUES (p_cost - call.cost_nanousd);",
        "        NULL;",
        "tests/billing/test_daybook.py",
    ),
    Mutation(
        "a proof waits for postings under way",
        "billing/migrations/0005_verified_days.sql",
        '    PERFORM pg_advisory_xact_lock_shared(1684109683); -- "days"\n',
        "",
        "tests/billing/test_daybook.py",
    ),
    Mutation(
        "a day is proved only if it balances",
        "billing/daybook.py",
        "    if off is not None:",
        "    if off is not None and False:",
        "tests/billing/test_daybook.py",
    ),
    Mutation(
        "one reconciliation at a time",
        "billing/reconcile.py",
        'while not await lock.fetchval("SELECT pg_try_advisory_lock($1)", _LOCK):',
        'while not await lock.fetchval("SELECT $1 > 0", _LOCK):',
        "tests/billing/test_reconcile.py",
    ),
    Mutation(
        "a loss is booked when nothing is in flight",
        "billing/reconcile.py",
        "        if not totals.is_quiet:",
        "        if False:",
        "tests/billing/test_reconcile.py",
    ),
    Mutation(
        "a connection to what is no primary is dropped",
        "billing/redis_pipe.py",
        "if any(_is_of_another_time(reply) for reply in replies):",
        "if False:",
        "tests/billing/test_holds.py",
    ),
    Mutation(
        "a stop is heard while a worker is replaced",
        "scripts/serve.py",
        "        if self._stopping or (pid := os.fork()):\n            if not self._stopping:\n                self._workers.add(pid)",
        "        if pid := os.fork():\n            self._workers.add(pid)",
        "tests/faults/test_kill.py",
    ),
    Mutation(
        "a settlement that waits is noted",
        "billing/calls.py",
        "            await self.note(call, settlement=ending_as_note(ending))",
        "            pass",
        "tests/faults/test_kill.py",
    ),
    Mutation(
        "a fill never overwrites a mirror",
        "billing/lua/fill.lua",
        "if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end",
        "",
        "tests/billing/test_holds.py",
    ),
    Mutation(
        "one fills at a time",
        "billing/lua/reserve.lua",
        "local mine = redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', 5000)",
        "local mine = redis.call('SET', KEYS[2], ARGV[1], 'PX', 5000)",
        "tests/billing/test_holds.py",
    ),
    Mutation(
        "the wait for a settlement does not end it",
        "proxy/relay.py",
        "    await asyncio.wait((task,), timeout=answer.services.settings.batch.settle_wait_s)",
        "    await asyncio.wait_for(task, timeout=answer.services.settings.batch.settle_wait_s)",
        "tests/proxy/test_relay.py",
    ),
    Mutation(
        "a settlement is nobody's to cancel",
        "billing/calls.py",
        '            call.ended = self._endings.start(self._end(call, ending), name=f"end {call.call_id}")',
        '            call.ended = self._endings.start(self._end(call, ending), name=f"end {call.call_id}")\n'
        "            asyncio.get_running_loop().call_later(0.3, call.ended.cancel)",
        "tests/proxy/test_relay.py",
    ),
    Mutation(
        "a connection that was cut is not used",
        "billing/redis_pipe.py",
        "            if _is_alive(idle):",
        "            if True:",
        "tests/billing/test_holds.py",
    ),
    Mutation(
        "ids of answers that last are in Postgres, too",
        "billing/calls.py",
        "            await self._note_in_postgres(list(self._live.values()))",
        "            pass",
        "tests/faults/test_kill.py",
    ),
    Mutation(
        "what Redis cannot note is noted in Postgres",
        "billing/calls.py",
        "                await self._note_in_postgres([call])\n",
        "                pass\n",
        "tests/faults/test_kill.py",
    ),
    Mutation(
        "a loss is not counted twice",
        "billing/reconcile.py",
        "            if twice:",
        "            if False:",
        "tests/billing/test_sweeper.py",
    ),
    Mutation(
        "Postgres judges caps, too",
        "billing/migrations/0006_caps.sql",
        "        refused := coalesce(refused, '{}');\n    END IF;\n\n    RETURN QUERY\n    WITH judged",
        "        refused := '{}';\n    END IF;\n\n    RETURN QUERY\n    WITH judged",
        "tests/billing/test_caps.py",
    ),
    Mutation(
        "Redis judges caps",
        "billing/lua/reserve.lua",
        "if full then",
        "if false then",
        "tests/billing/test_caps.py",
    ),
    Mutation(
        "a refused cap takes nothing",
        "billing/lua/caps.lua",
        "                if caps[j].period ~= 'call' then",
        "                if false then",
        "tests/billing/test_caps.py",
    ),
    Mutation(
        "a cap per call is never used up",
        "billing/lua/caps.lua",
        "            redis.call('HINCRBY', mirror, cap.field, cap.usd and give_usd or give)\n        end\n        if left",
        "        end\n        if left",
        "tests/billing/test_caps.py",
    ),
    Mutation(
        "an extension is judged by caps in Redis",
        "billing/lua/extend.lua",
        "if state[4] then",
        "if false then",
        "tests/billing/test_caps.py",
    ),
    Mutation(
        "a release gives back to caps",
        "billing/lua/release.lua",
        "            redis.call('HINCRBY', KEYS[1], cap.field, cap.usd and state[2] or state[1])\n",
        "",
        "tests/billing/test_caps.py",
    ),
    Mutation(
        "a restored hold counts in caps",
        "billing/lua/renew.lua",
        "if cap.period ~= 'call' then redis",
        "if false then redis",
        "tests/billing/test_caps.py",
    ),
    Mutation(
        "a window that is over makes the mirror cold",
        "billing/lua/reserve.lua",
        "if not state[1] or over then",
        "if not state[1] then",
        "tests/billing/test_caps.py",
    ),
    Mutation(
        "an earlier window's call is not counted in this one",
        "billing/lua/caps.lua",
        "elseif arrived_ms >= tonumber(starts) then",
        "else",
        "tests/billing/test_caps.py",
    ),
    Mutation(
        "clocks that show midnight twice",
        "billing/migrations/0006_caps.sql",
        "CASE WHEN early.at AT TIME ZONE p_zone = p_local THEN least(early.at, late.at) ELSE late.at END",
        "late.at",
        "tests/billing/test_caps.py",
    ),
    Mutation(
        "a window is made before anything changes",
        "billing/migrations/0006_caps.sql",
        "    IF any_capped THEN -- before anything changes, so that a window that is made now is counted as things were",
        "    IF false THEN",
        "tests/billing/test_caps.py",
    ),
    Mutation(
        "caps are locked with all of the user's wallets",
        "billing/migrations/0006_caps.sql",
        "    PERFORM 1 FROM wallets w WHERE w.user_id = p_user ORDER BY w.id FOR NO KEY UPDATE;\n",
        "",
        "tests/billing/test_caps.py",
    ),
    Mutation(
        "a correction moves its window",
        "billing/migrations/0006_caps.sql",
        "    IF under THEN\n        PERFORM count_by_caps(",
        "    IF false THEN\n        PERFORM count_by_caps(",
        "tests/billing/test_caps.py",
    ),
    Mutation(
        "the house's part counts for no cap",
        "billing/migrations/0006_caps.sql",
        "array_agg(c.charge_nano), array_agg(c.cost_nanousd - c.house_nanousd))",
        "array_agg(c.charge_nano), array_agg(c.cost_nanousd))",
        "tests/billing/test_caps.py",
    ),
    Mutation(
        "the operator's ceiling counts",
        "billing/migrations/0006_caps.sql",
        "GENERATED ALWAYS AS (least(limit_nano, ceiling_nano))",
        "GENERATED ALWAYS AS (coalesce(limit_nano, ceiling_nano))",
        "tests/billing/test_caps.py",
    ),
    Mutation(
        "a threshold is told once",
        "billing/migrations/0006_caps.sql",
        "AND cap_percent(w.spent_nano, s.effective_nano) > w.warned\n",
        "AND cap_percent(w.spent_nano, s.effective_nano) > 0\n",
        "tests/billing/test_caps.py",
    ),
    Mutation(
        "a wallet made after the cap is capped",
        "billing/migrations/0006_caps.sql",
        "    NEW.capped := EXISTS (",
        "    NEW.capped := false AND EXISTS (",
        "tests/billing/test_caps.py",
    ),
    Mutation(
        "settlements count in caps, by the state machine",
        "billing/migrations/0006_caps.sql",
        "        IF any_capped THEN\n            PERFORM count_by_caps(",
        "        IF false THEN\n            PERFORM count_by_caps(",
        "tests/stateful/test_books.py",
    ),
    Mutation(
        "extensions are judged by caps in Postgres",
        "billing/migrations/0006_caps.sql",
        "                     AND NOT a.id = ANY (refused)\n",
        "",
        "tests/billing/test_caps.py",
    ),
    Mutation(
        "a user's limits count beside the key's",
        "billing/holds.py",
        "        return [(self.key_id, self.limits), (self.user_id, self.user_limits)]",
        "        return [(self.key_id, self.limits)]",
        "tests/billing/test_caps.py",
    ),
    Mutation(
        "a transfer coding other than chunked is refused",
        "proxy/framing.py",
        'if coding is not None and coding.lower() != "chunked":',
        "if False:",
        "tests/proxy/test_smuggling.py",
    ),
    Mutation(
        "HTTP/2 without HTTP/2 is refused",
        "proxy/connection.py",
        "            self._refuse_other_versions()\n",
        "",
        "tests/proxy/test_smuggling.py",
    ),
    Mutation(
        "nothing is read after chunks",
        "proxy/framing.py",
        "return hdrs.TRANSFER_ENCODING in headers or hdrs.UPGRADE in headers",
        "return hdrs.UPGRADE in headers",
        "tests/proxy/test_smuggling.py",
    ),
    Mutation(
        "nothing is read after the offer of another protocol",
        "proxy/framing.py",
        "return hdrs.TRANSFER_ENCODING in headers or hdrs.UPGRADE in headers",
        "return hdrs.TRANSFER_ENCODING in headers",
        "tests/proxy/test_smuggling.py",
    ),
    Mutation(
        "a request has one key",
        "proxy/framing.py",
        "            if lower in seen:",
        "            if False:",
        "tests/proxy/test_smuggling.py",
    ),
    Mutation(
        "whoever reads broken chunks is woken",
        "proxy/connection.py",
        "                self._fail_body()",
        "                pass",
        "tests/proxy/test_smuggling.py",
    ),
    Mutation(
        "a slow head is refused",
        "proxy/connection.py",
        "                protocol.refuse_head(408)",
        "                pass",
        "tests/proxy/test_connections.py",
    ),
    Mutation(
        "connections are bounded",
        "proxy/connection.py",
        "if self._count >= limits.connections or",
        "if",
        "tests/proxy/test_connections.py",
    ),
    Mutation(
        "a head is bounded while it comes",
        "proxy/connection.py",
        "                self.refuse_head(431)",
        "                pass",
        "tests/proxy/test_connections.py",
    ),
    Mutation(
        "the provider's errors are passed on without our key",
        "proxy/errors.py",
        "redact(json.dumps(json.loads(body), allow_nan=False))",
        "json.dumps(json.loads(body), allow_nan=False)",
        "tests/proxy/test_secrets.py",
    ),
    Mutation(
        "log lines are redacted",
        "config/logging.py",
        "        return redact(line)",
        "        return line",
        "tests/proxy/test_secrets.py",
    ),
    Mutation(
        "a DSN's password is not shown as a port",
        "billing/db.py",
        "    if not readable or",
        "    if",
        "tests/proxy/test_secrets.py",
    ),
    Mutation(
        "a redirect of a call is not followed",
        "proxy/upstream/adapter.py",
        "            ),\n            allow_redirects=False,",
        "            ),\n            allow_redirects=True,",
        "tests/proxy/test_upstream_isolation.py",
    ),
    Mutation(
        "a redirect of a record is not followed",
        "proxy/upstream/adapter.py",
        "else self._headers,\n                    allow_redirects=False,",
        "else self._headers,\n                    allow_redirects=True,",
        "tests/proxy/test_upstream_isolation.py",
    ),
    Mutation(
        "proxies of the environment are not used",
        "proxy/upstream/adapter.py",
        "trust_env=False",
        "trust_env=True",
        "tests/proxy/test_upstream_isolation.py",
    ),
    Mutation(
        "CORS is for configured origins",
        "proxy/cors.py",
        "return origin if origin in self._origins else None",
        "return origin",
        "tests/proxy/test_browsers.py",
    ),
    Mutation(
        "the name in Redis' certificate is checked",
        "billing/redis_pipe.py",
        '"ssl_check_hostname": True',
        '"ssl_check_hostname": False',
        "tests/billing/test_tls.py",
    ),
)


def survives(mutation: Mutation) -> bool:
    """Apply a mutation in a copy and run its tests; True if they all pass all the same.

    Raises:
        ValueError: the guard's text is not where it was: the mutation must follow the code.
    """
    with tempfile.TemporaryDirectory(prefix="tuma-mutation-") as name:
        copy = Path(name) / "tuma"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*_SKIPPED))
        path = copy / mutation.file
        text = path.read_text(encoding="utf-8")
        if text.count(mutation.old) != 1:
            raise ValueError(
                f"{mutation.name}: {mutation.file} has the guard {text.count(mutation.old)} times"
            )
        path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--timeout=60", "-p", "no:cacheprovider"]
        try:
            done = subprocess.run(
                [*command, *mutation.tests.split()],
                cwd=copy,
                capture_output=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0


def main() -> None:
    """Run the mutations named on the command line, or all."""
    wanted = sys.argv[1:]
    survivors = []
    for mutation in MUTATIONS:
        if wanted and not any(word in mutation.name for word in wanted):
            continue
        began = time.monotonic()
        alive = survives(mutation)
        print(
            f"{'SURVIVED' if alive else 'caught  '} {time.monotonic() - began:5.1f} s  {mutation.name}",
            flush=True,
        )
        if alive:
            survivors.append(mutation.name)
    print(f"{len(survivors)} survived")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
