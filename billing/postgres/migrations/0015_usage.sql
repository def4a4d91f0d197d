-- What was used, summed by wallet, quarter of an hour, model and key as calls end, so that nobody adds up millions of rows.
-- Whoever changes what a call cost holds its wallet's row locked and changes the sums in the same transaction: they equal
-- the rows at every moment (docs/decisions/0013-usage-rollups.md).

-- A quarter of an hour, since every zone's clocks differ from UTC by whole quarters: any day or hour of theirs is a sum of quarters.
CREATE TABLE usage_rollup (
    wallet_id           uuid NOT NULL,
    quarter             timestamptz NOT NULL, -- when it begins; a call lies where its id says that it arrived
    model               text NOT NULL,
    key_id              uuid NOT NULL,        -- all zeros: somebody who had signed in, without a key
    calls               integer NOT NULL,     -- settled
    voids               integer NOT NULL,     -- ended at zero; nothing else is counted of them
    exact               integer NOT NULL,     -- of those settled
    prompt_tokens       bigint NOT NULL,
    completion_tokens   bigint NOT NULL,
    cached_read_tokens  bigint NOT NULL,
    cached_write_tokens bigint NOT NULL,
    reasoning_tokens    bigint NOT NULL,
    cost_nanousd        bigint NOT NULL,
    charge_nano         bigint NOT NULL,
    spread_nano         bigint NOT NULL,
    house_nanousd       bigint NOT NULL,
    first_byte_ms       bigint NOT NULL, -- sums, of those calls that the bins count
    duration_ms         bigint NOT NULL,
    first_byte_bins     integer[] NOT NULL, -- how many were faster than 100, 200, 400, … 102400 ms, and than nothing
    duration_bins       integer[] NOT NULL,
    PRIMARY KEY (wallet_id, quarter, model, key_id)
) PARTITION BY RANGE (quarter);
CREATE TABLE usage_rollup_default PARTITION OF usage_rollup DEFAULT;
-- For everybody's day, as its proof reads it: rows are written in the order of time, more or less.
CREATE INDEX usage_rollup_quarter ON usage_rollup USING brin (quarter) WITH (pages_per_range = 32, autosummarize = on);

CREATE FUNCTION usage_quarter(id uuid) RETURNS timestamptz LANGUAGE sql IMMUTABLE AS $$
    SELECT to_timestamp(('x' || left(replace(id::text, '-', ''), 12))::bit(48)::bigint / 900000 * 900)
$$;
CREATE FUNCTION usage_bin(ms integer) RETURNS integer LANGUAGE sql IMMUTABLE AS $$
    SELECT width_bucket(ms, ARRAY[100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, 51200, 102400])
$$;
CREATE FUNCTION add_bins(a integer[], b integer[]) RETURNS integer[] LANGUAGE sql IMMUTABLE AS $$
    SELECT ARRAY[a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5], a[6] + b[6],
                 a[7] + b[7], a[8] + b[8], a[9] + b[9], a[10] + b[10], a[11] + b[11], a[12] + b[12]]
$$;

-- Add what these calls count as they stand now, or take it away (p_sign -1).
CREATE FUNCTION add_usage(p_ids uuid[], p_sign integer) RETURNS void LANGUAGE plpgsql AS $$
BEGIN -- plpgsql keeps the plan
    INSERT INTO usage_rollup AS r
    SELECT u.wallet_id, u.quarter, u.model, u.key_id,
           p_sign * count(*) FILTER (WHERE u.settled), p_sign * count(*) FILTER (WHERE NOT u.settled),
           p_sign * count(*) FILTER (WHERE u.settled AND u.accuracy = 'exact'),
           p_sign * coalesce(sum(u.prompt_tokens), 0), p_sign * coalesce(sum(u.completion_tokens), 0),
           p_sign * coalesce(sum(u.cached_read_tokens), 0), p_sign * coalesce(sum(u.cached_write_tokens), 0),
           p_sign * coalesce(sum(u.reasoning_tokens), 0), p_sign * sum(u.cost_nanousd), p_sign * sum(u.charge_nano),
           p_sign * coalesce(sum(u.spread_nano), 0), p_sign * sum(u.house_nanousd),
           p_sign * coalesce(sum(u.first_byte_ms), 0), p_sign * coalesce(sum(u.duration_ms), 0),
           ARRAY[p_sign * count(*) FILTER (WHERE u.first_bin = 0), p_sign * count(*) FILTER (WHERE u.first_bin = 1),
                 p_sign * count(*) FILTER (WHERE u.first_bin = 2), p_sign * count(*) FILTER (WHERE u.first_bin = 3),
                 p_sign * count(*) FILTER (WHERE u.first_bin = 4), p_sign * count(*) FILTER (WHERE u.first_bin = 5),
                 p_sign * count(*) FILTER (WHERE u.first_bin = 6), p_sign * count(*) FILTER (WHERE u.first_bin = 7),
                 p_sign * count(*) FILTER (WHERE u.first_bin = 8), p_sign * count(*) FILTER (WHERE u.first_bin = 9),
                 p_sign * count(*) FILTER (WHERE u.first_bin = 10), p_sign * count(*) FILTER (WHERE u.first_bin = 11)],
           ARRAY[p_sign * count(*) FILTER (WHERE u.last_bin = 0), p_sign * count(*) FILTER (WHERE u.last_bin = 1),
                 p_sign * count(*) FILTER (WHERE u.last_bin = 2), p_sign * count(*) FILTER (WHERE u.last_bin = 3),
                 p_sign * count(*) FILTER (WHERE u.last_bin = 4), p_sign * count(*) FILTER (WHERE u.last_bin = 5),
                 p_sign * count(*) FILTER (WHERE u.last_bin = 6), p_sign * count(*) FILTER (WHERE u.last_bin = 7),
                 p_sign * count(*) FILTER (WHERE u.last_bin = 8), p_sign * count(*) FILTER (WHERE u.last_bin = 9),
                 p_sign * count(*) FILTER (WHERE u.last_bin = 10), p_sign * count(*) FILTER (WHERE u.last_bin = 11)]
    FROM (SELECT c.wallet_id, usage_quarter(c.id) AS quarter, c.model,
                 coalesce(c.key_id, '00000000-0000-0000-0000-000000000000') AS key_id, c.state = 'settled' AS settled, c.accuracy,
                 c.cost_nanousd, c.charge_nano, c.spread_nano, c.house_nanousd, t.prompt_tokens, t.completion_tokens,
                 t.cached_read_tokens, t.cached_write_tokens, t.reasoning_tokens, t.first_byte_ms, t.duration_ms,
                 usage_bin(t.first_byte_ms) AS first_bin, usage_bin(t.duration_ms) AS last_bin
          FROM calls c LEFT JOIN usage t ON t.call_id = c.id
          WHERE c.id = ANY (p_ids) AND c.state IN ('settled', 'void')
          OFFSET 0) u -- so that each bin is found once
    GROUP BY u.wallet_id, u.quarter, u.model, u.key_id
    ON CONFLICT (wallet_id, quarter, model, key_id) DO UPDATE SET
        calls = r.calls + excluded.calls, voids = r.voids + excluded.voids, exact = r.exact + excluded.exact,
        prompt_tokens = r.prompt_tokens + excluded.prompt_tokens,
        completion_tokens = r.completion_tokens + excluded.completion_tokens,
        cached_read_tokens = r.cached_read_tokens + excluded.cached_read_tokens,
        cached_write_tokens = r.cached_write_tokens + excluded.cached_write_tokens,
        reasoning_tokens = r.reasoning_tokens + excluded.reasoning_tokens,
        cost_nanousd = r.cost_nanousd + excluded.cost_nanousd, charge_nano = r.charge_nano + excluded.charge_nano,
        spread_nano = r.spread_nano + excluded.spread_nano, house_nanousd = r.house_nanousd + excluded.house_nanousd,
        first_byte_ms = r.first_byte_ms + excluded.first_byte_ms, duration_ms = r.duration_ms + excluded.duration_ms,
        first_byte_bins = add_bins(r.first_byte_bins, excluded.first_byte_bins),
        duration_bins = add_bins(r.duration_bins, excluded.duration_bins);
END $$;

-- Sum the calls of whole quarters anew, from the first id to below the last; nothing is settled meanwhile.
CREATE FUNCTION rebuild_usage(p_first uuid, p_end uuid) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    hour timestamptz;
    at   uuid := p_first;
BEGIN
    LOCK TABLE calls, usage_rollup IN SHARE ROW EXCLUSIVE MODE;
    DELETE FROM usage_rollup WHERE quarter >= usage_quarter(p_first) AND quarter < usage_quarter(p_end);
    LOOP -- from one hour that has calls to the next
        SELECT c.id INTO at FROM calls c WHERE c.id >= at AND c.id < p_end ORDER BY c.id LIMIT 1;
        EXIT WHEN NOT FOUND;
        hour := date_trunc('hour', uuid_moment(at), 'UTC') + interval '1 hour';
        PERFORM add_usage(array_agg(c.id), 1) FROM calls c WHERE c.id >= at AND c.id < least(uuid_floor(hour), p_end);
        at := uuid_floor(hour);
    END LOOP;
END $$;

-- Who changes what a call cost without the sums is stopped; whoever began to settle before there were any settles again.
CREATE FUNCTION require_usage_kept() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('tuma.usage_kept', true) IS DISTINCT FROM 'yes' THEN
        RAISE EXCEPTION 'what calls cost is changed with the sums of their usage, or not at all'
            USING ERRCODE = 'serialization_failure';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER calls_usage_kept
    BEFORE UPDATE OF state, accuracy, cost_nanousd, charge_nano, spread_nano, house_nanousd ON calls
    FOR EACH STATEMENT EXECUTE FUNCTION require_usage_kept();

-- As in 0010, and the sums have months of their own.
CREATE OR REPLACE FUNCTION ensure_partitions(ahead integer) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    parent text;
    month  timestamptz;
    next   timestamptz;
    child  text;
    made   integer := 0;
BEGIN
    FOREACH parent IN ARRAY ARRAY['calls', 'usage', 'usage_rollup', 'journal_tx', 'journal_entry'] LOOP
        FOR step IN -1..ahead LOOP
            month := date_trunc('month', now() AT TIME ZONE 'UTC') AT TIME ZONE 'UTC' + make_interval(months => step);
            next := (month AT TIME ZONE 'UTC' + interval '1 month') AT TIME ZONE 'UTC';
            child := parent || to_char(month AT TIME ZONE 'UTC', '_YYYY_MM');
            IF to_regclass(child) IS NULL THEN
                EXECUTE format('CREATE TABLE %I PARTITION OF %I FOR VALUES FROM (%L) TO (%L)', child, parent,
                               CASE parent WHEN 'usage_rollup' THEN month::text ELSE uuid_floor(month)::text END,
                               CASE parent WHEN 'usage_rollup' THEN next::text ELSE uuid_floor(next)::text END);
                IF parent IN ('journal_tx', 'journal_entry') THEN
                    PERFORM refuse_truncate(child);
                END IF;
                made := made + 1;
            END IF;
        END LOOP;
    END LOOP;
    RETURN made;
END $$;
SELECT ensure_partitions(3);

-- What the other columns do not tell exactly: a cost that the provider names more finely than nano-dollars, and the parts of
-- a prompt that are priced apart. A charge is explained by them.
ALTER TABLE usage
    ADD COLUMN cost_attousd numeric(40, 0) CHECK (cost_attousd >= 0),
    ADD COLUMN images       bigint NOT NULL DEFAULT 0,
    ADD COLUMN audio_tokens bigint NOT NULL DEFAULT 0;

-- As in 0006, and what was used is summed. p_exact names the calls that have more to tell than every call, in the three after it.
CREATE FUNCTION settle_batch(
    p_batch uuid, p_id uuid[], p_state text[], p_outcome text[], p_accuracy text[], p_source text[], p_generation text[],
    p_cost bigint[], p_provider_cost bigint[], p_charge bigint[], p_spread bigint[], p_house bigint[],
    p_prompt bigint[], p_completion bigint[], p_cached_read bigint[], p_cached_write bigint[], p_reasoning bigint[],
    p_first_byte_ms integer[], p_duration_ms integer[],
    p_exact uuid[], p_exact_cost numeric[], p_images bigint[], p_audio bigint[]
) RETURNS TABLE (call_id uuid, won boolean, state text, charge_nano bigint, hold_nano bigint, posted_nano bigint, available_nano bigint)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    winners    uuid[];
    late       uuid[];
    any_capped boolean;
BEGIN
    PERFORM set_config('tuma.usage_kept', 'yes', true);
    SELECT bool_or(l.capped) INTO any_capped
    FROM (SELECT w.capped FROM wallets w
          WHERE w.id IN (SELECT c.wallet_id FROM calls c WHERE c.id = ANY (p_id)) ORDER BY w.id FOR NO KEY UPDATE) l;
    IF any_capped THEN -- before anything changes, so that a window that is made now is counted as things were
        PERFORM lock_cap_windows(array_agg(c.id), array_agg(c.user_id), array_agg(c.wallet_id), array_agg(c.key_id))
        FROM calls c JOIN wallets w ON w.id = c.wallet_id
        WHERE c.id = ANY (p_id) AND c.state IN ('open', 'review') AND w.capped
        HAVING count(*) > 0;
    END IF;

    -- The guard: only a live call can end, and the update decides who ended it.
    WITH ends AS (
        SELECT DISTINCT ON (e.id) e.*
        FROM unnest(p_id, p_state, p_outcome, p_accuracy, p_generation, p_cost, p_provider_cost, p_charge, p_spread,
                    p_house)
             AS e (id, state, outcome, accuracy, generation, cost, provider_cost, charge, spread, house)
    ), ended AS (
        UPDATE calls c SET state = e.state, outcome = e.outcome, ended_at = now(),
               generation_id = coalesce(e.generation, c.generation_id), accuracy = e.accuracy,
               cost_nanousd = e.cost, provider_cost_nanousd = e.provider_cost, charge_nano = e.charge, spread_nano = e.spread,
               house_nanousd = e.house
        FROM ends e
        WHERE c.id = e.id AND (c.state = 'open' OR (c.state = 'review' AND e.state <> 'review'))
        RETURNING c.id
    )
    SELECT coalesce(array_agg(ended.id), '{}') INTO winners FROM ended;

    IF cardinality(winners) > 0 THEN
        UPDATE wallets w SET held_nano = w.held_nano - s.amount
        FROM (SELECT c.wallet_id, sum(c.hold_nano)::bigint AS amount FROM calls c
              WHERE c.id = ANY (winners) AND c.state IN ('settled', 'void') GROUP BY c.wallet_id) s
        WHERE w.id = s.wallet_id;

        IF any_capped THEN
            PERFORM count_by_caps(
                array_agg(c.id), array_agg(c.user_id), array_agg(c.wallet_id), array_agg(c.key_id), array_agg(-c.hold_nano),
                array_agg(-c.hold_nanousd), array_agg(c.charge_nano), array_agg(c.cost_nanousd - c.house_nanousd))
            FROM calls c JOIN wallets w ON w.id = c.wallet_id
            WHERE c.id = ANY (winners) AND c.state IN ('settled', 'void') AND w.capped
            HAVING count(*) > 0;
        END IF;

        INSERT INTO usage (call_id, source, prompt_tokens, completion_tokens, cached_read_tokens, cached_write_tokens,
                           reasoning_tokens, first_byte_ms, duration_ms, cost_attousd, images, audio_tokens)
        SELECT DISTINCT ON (u.id) u.*, x.cost, coalesce(x.images, 0), coalesce(x.audio, 0)
        FROM unnest(p_id, p_source, p_prompt, p_completion, p_cached_read, p_cached_write, p_reasoning,
                    p_first_byte_ms, p_duration_ms)
             AS u (id, source, prompt, completion, cached_read, cached_write, reasoning, first_byte_ms, duration_ms)
        JOIN calls c ON c.id = u.id
        LEFT JOIN unnest(p_exact, p_exact_cost, p_images, p_audio) AS x (id, cost, images, audio) ON x.id = u.id
        WHERE u.id = ANY (winners) AND c.state = 'settled';

        PERFORM add_usage(winners, 1);

        INSERT INTO journal_tx (id, kind, call_id, wallet_id)
        SELECT c.id, 'settlement', c.id, c.wallet_id FROM calls c
        WHERE c.id = ANY (winners) AND c.state = 'settled' AND (c.cost_nanousd > 0 OR c.charge_nano > 0);

        -- The wallet pays the charge; what is not markup goes through the fx position and arrives as revenue in USD;
        -- what the provider bills is taken from the prepaid account as cost.
        PERFORM post_entries(array_agg(l.tx), array_agg(l.seq), array_agg(l.account), array_agg(l.wallet),
                             array_agg(l.currency), array_agg(l.amount))
        FROM (
            SELECT c.id AS tx, e.seq::smallint AS seq, e.account, e.wallet, e.currency, e.amount
            FROM calls c
            CROSS JOIN LATERAL (VALUES
                (1, 'wallet', c.wallet_id, c.currency, -c.charge_nano),
                (2, 'fx_position', NULL, c.currency, c.charge_nano - c.spread_nano),
                (3, 'fx_spread', NULL, c.currency, c.spread_nano),
                (4, 'fx_position', NULL, 'USD', -(c.cost_nanousd - c.house_nanousd)),
                (5, 'house_loss', NULL, 'USD', -c.house_nanousd),
                (6, 'revenue', NULL, 'USD', c.cost_nanousd),
                (7, 'provider_cost', NULL, 'USD', -c.cost_nanousd),
                (8, 'provider_prepaid', NULL, 'USD', c.cost_nanousd)
            ) AS e (seq, account, wallet, currency, amount)
            WHERE c.id = ANY (winners) AND c.state = 'settled' AND e.amount <> 0
        ) l
        HAVING count(*) > 0;

        INSERT INTO shadow_usd_ledger (id, kind, amount_nanousd, calls)
        SELECT p_batch, 'settlement', sum(c.cost_nanousd)::bigint, count(*)::integer FROM calls c
        WHERE c.id = ANY (winners) AND c.state = 'settled'
        HAVING count(*) > 0;

        INSERT INTO quota_slabs (worker_id, spent_nanousd)
        SELECT c.worker_id, sum(c.cost_nanousd)::bigint FROM calls c
        WHERE c.id = ANY (winners) AND c.state = 'settled' AND c.cost_nanousd > 0 GROUP BY c.worker_id
        ON CONFLICT (worker_id) DO UPDATE SET spent_nanousd = quota_slabs.spent_nanousd + excluded.spent_nanousd;

        late := find_verified(winners);
        IF late IS NOT NULL THEN
            INSERT INTO late_postings (settled_nanousd) SELECT c.cost_nanousd FROM calls c
            WHERE c.id = ANY (late) AND c.state = 'settled' AND c.cost_nanousd > 0;
        END IF;
    END IF;

    RETURN QUERY
    SELECT c.id, c.id = ANY (winners), c.state, coalesce(c.charge_nano, 0), c.hold_nano, w.posted_nano,
           w.posted_nano + w.overdraft_nano - w.held_nano
    FROM calls c JOIN wallets w ON w.id = c.wallet_id WHERE c.id = ANY (p_id);
END $$;

-- For whoever began to serve before this migration.
CREATE OR REPLACE FUNCTION settle_batch(
    p_batch uuid, p_id uuid[], p_state text[], p_outcome text[], p_accuracy text[], p_source text[], p_generation text[],
    p_cost bigint[], p_provider_cost bigint[], p_charge bigint[], p_spread bigint[], p_house bigint[],
    p_prompt bigint[], p_completion bigint[], p_cached_read bigint[], p_cached_write bigint[], p_reasoning bigint[],
    p_first_byte_ms integer[], p_duration_ms integer[]
) RETURNS TABLE (call_id uuid, won boolean, state text, charge_nano bigint, hold_nano bigint, posted_nano bigint, available_nano bigint)
LANGUAGE sql AS $$
    SELECT * FROM settle_batch(
        p_batch, p_id, p_state, p_outcome, p_accuracy, p_source, p_generation, p_cost, p_provider_cost, p_charge, p_spread,
        p_house, p_prompt, p_completion, p_cached_read, p_cached_write, p_reasoning, p_first_byte_ms, p_duration_ms,
        '{}', '{}', '{}', '{}')
$$;

CREATE OR REPLACE FUNCTION adjust_call(
    p_tx uuid, p_call uuid, p_kind text, p_memo text, p_key text, p_hash bytea,
    p_seen_cost bigint, p_seen_charge bigint,
    p_cost bigint, p_provider_cost bigint, p_charge bigint, p_spread bigint, p_house bigint, p_accuracy text,
    p_generation text
) RETURNS text LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    call  calls%ROWTYPE;
    first record;
    owner uuid;
    under boolean; -- caps
BEGIN
    PERFORM set_config('tuma.usage_kept', 'yes', true);
    SELECT c.wallet_id INTO owner FROM calls c WHERE c.id = p_call;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no call %', p_call USING ERRCODE = 'no_data_found';
    END IF;
    SELECT w.capped INTO under FROM wallets w WHERE w.id = owner FOR NO KEY UPDATE; -- the wallet first, as every posting does
    SELECT * INTO call FROM calls c WHERE c.id = p_call FOR UPDATE;

    SELECT k.input_hash INTO first FROM posting_keys k WHERE k.key = p_key;
    IF FOUND THEN
        IF first.input_hash <> p_hash THEN
            RAISE EXCEPTION 'idempotency key % was used with another input', p_key USING ERRCODE = 'unique_violation';
        END IF;
        RETURN 'repeated';
    END IF;
    IF call.state NOT IN ('settled', 'void') OR call.cost_nanousd <> p_seen_cost OR call.charge_nano <> p_seen_charge THEN
        RETURN 'stale';
    END IF;

    IF under THEN
        PERFORM lock_cap_windows(ARRAY[p_call], ARRAY[call.user_id], ARRAY[call.wallet_id], ARRAY[call.key_id]);
    END IF;
    INSERT INTO posting_keys (key, input_hash, tx_id) VALUES (p_key, p_hash, p_tx);
    INSERT INTO journal_tx (id, kind, call_id, wallet_id, memo) VALUES (p_tx, p_kind, p_call, call.wallet_id, p_memo);
    PERFORM post_entries(array_agg(p_tx), array_agg(e.seq::smallint), array_agg(e.account), array_agg(e.wallet),
                         array_agg(e.currency), array_agg(e.amount))
    FROM (VALUES
        (1, 'wallet', call.wallet_id, call.currency, -(p_charge - call.charge_nano)),
        (2, 'fx_position', NULL, call.currency, (p_charge - p_spread) - (call.charge_nano - call.spread_nano)),
        (3, 'fx_spread', NULL, call.currency, p_spread - call.spread_nano),
        (4, 'fx_position', NULL, 'USD', -((p_cost - p_house) - (call.cost_nanousd - call.house_nanousd))),
        (5, 'house_loss', NULL, 'USD', -(p_house - call.house_nanousd)),
        (6, 'revenue', NULL, 'USD', p_cost - call.cost_nanousd),
        (7, 'provider_cost', NULL, 'USD', -(p_cost - call.cost_nanousd)),
        (8, 'provider_prepaid', NULL, 'USD', p_cost - call.cost_nanousd)
    ) AS e (seq, account, wallet, currency, amount)
    WHERE e.amount <> 0
    HAVING count(*) > 0;
    IF p_cost <> call.cost_nanousd THEN
        INSERT INTO shadow_usd_ledger (id, kind, amount_nanousd, calls, memo)
        VALUES (p_tx, 'correction', p_cost - call.cost_nanousd, 1, p_memo);
    END IF;
    PERFORM add_usage(ARRAY[p_call], -1);
    UPDATE calls c SET state = CASE WHEN p_cost > 0 OR p_charge > 0 THEN 'settled' ELSE c.state END,
           cost_nanousd = p_cost, provider_cost_nanousd = p_provider_cost, charge_nano = p_charge, spread_nano = p_spread,
           house_nanousd = p_house, accuracy = p_accuracy, generation_id = coalesce(c.generation_id, p_generation)
    WHERE c.id = p_call;
    PERFORM add_usage(ARRAY[p_call], 1);
    IF p_cost <> call.cost_nanousd AND find_verified(ARRAY[p_call]) IS NOT NULL THEN
        INSERT INTO late_postings (settled_nanousd) VALUES (p_cost - call.cost_nanousd);
    END IF;
    IF under THEN
        PERFORM count_by_caps(
            ARRAY[p_call], ARRAY[call.user_id], ARRAY[call.wallet_id], ARRAY[call.key_id], ARRAY[0::bigint], ARRAY[0::bigint],
            ARRAY[p_charge - call.charge_nano],
            ARRAY[(p_cost - p_house) - (call.cost_nanousd - call.house_nanousd)]);
    END IF;
    IF p_charge <> call.charge_nano THEN
        PERFORM pg_notify('tuma', 'wallet:' || call.wallet_id);
    END IF;
    RETURN 'posted';
END $$;

SELECT rebuild_usage('00000000-0000-0000-0000-000000000000', 'ffffffff-ffff-ffff-ffff-ffffffffffff');
